"""From clips on disk to a campaign: python -m feedback_app.campaigns --db URL --name NAME --source FILE_OR_FOLDER

A source is a manifest.jsonl that sampling wrote, or a folder of audio with a metadata.jsonl (Hugging Face audiofolder: `file_name`,
`prompt` or `caption`, `system`). Two sources are two systems, paired by prompt. Each clip is heard once, for its loudness, so that
every pair is played equally loud; a clip that is not what its row says ends the call, and nothing is stored.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from base_models.audio import AudioInfo, Wav, integrated_lufs, probe, read_audio, true_peak_dbfs, write_audio
from base_models.errors import UserError
from db import storage
from db.campaigns import MAX_CLIP_S, SPOILED, CampaignSummary, ClipKey, PairOf, Row, Rules, check_rows, check_text, create, pairs_of_systems
from db.errors import StoreError
from db.schema import ASPECTS, CHOOSERS
from db.store import Store, open_store
from feedback_app.owners import CHOOSES
from feedback_app.tags import check_untagged

Progress = Callable[[str, int, int], None]
"""Is told (stage, done, total)."""
Item = TypeVar("Item")
MAX_ROWS = 200_000
DURATION_SLACK_S = 0.1
"""How far a row may misstate a clip's length: headers of MP3 files are a frame or two off."""
CLIP_GAIN = 16.0
NOISE_RMS = 0.2


@dataclass(frozen=True)
class Source:
    """A manifest, or a folder with one. `system`: the name under which its clips are compared, over what its rows say."""

    address: str
    system: str | None = None


def measure(path: Path) -> tuple[float, float]:
    """(integrated loudness LUFS, true peak dBFS) of a file. Raises UserError for audio that cannot be read."""
    wav, sample_rate = read_audio(path)
    return float(integrated_lufs(wav, sample_rate)), float(true_peak_dbfs(wav, sample_rate))


def read_rows(manifest: str | Path) -> list[dict[str, Any]]:
    """The rows of a manifest.jsonl or metadata.jsonl. Raises UserError."""
    address = str(manifest)
    try:
        text = b"".join(storage.read_bytes(address)).decode("utf-8")
    except (StoreError, UnicodeDecodeError) as error:
        reason = error.got if isinstance(error, StoreError) else f"{address}: {error}"
        raise UserError(reason, "a manifest.jsonl", "pass the one that sampling wrote") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{address}:{number}: {error}", "one JSON object a line", "sample again") from error
        if row is not None and not isinstance(row, dict):
            raise UserError(f"{address}:{number}: a {type(row).__name__}", "one JSON object a line", "sample again")
        if row is not None:
            rows.append(row)
    if len(rows) > MAX_ROWS:
        raise UserError(f"{address} of {len(rows)} rows", f"at most {MAX_ROWS}", "split it over several campaigns")
    return rows


def untold(stage: str, done: int, total: int) -> None:
    """The progress that nobody follows."""


def told(progress: Progress, stage: str, items: Collection[Item]) -> Iterator[Item]:
    """The items, each told when its turn comes."""
    for number, item in enumerate(items):
        progress(stage, number, len(items))
        yield item


def gather(sources: Sequence[Source], progress: Progress = untold) -> dict[ClipKey, Row]:
    """The clips of one or two sources, each heard and found to be what its row says.

    Of two sources the prompts are matched by their text, so that clips of both answer one prompt.
    Raises: UserError or StoreError naming the first thing that is wrong.
    """
    if not 1 <= len(sources) <= 2:
        raise UserError(f"{len(sources)} sources", "one, or two systems to compare", "name one or two")
    found: dict[ClipKey, Row] = {}
    prompt_ids: dict[str, str] = {}
    systems = []
    for source in sources:
        base, name = _manifest_of(source.address)
        rows = read_rows(_join(base, name))
        if any("file_name" in row for row in rows):
            listed = told(progress, f"reading {name}", rows)
            rows = [_folder_row(base, row, number, name) for number, row in enumerate(listed, start=1)]
        if source.system is not None:
            check_text(source.system, "the system's name", 128)
            rows = [row | {"system": source.system} for row in rows]
        if len(sources) == 2:
            rows = [row | {"prompt_id": prompt_ids.setdefault(str(row.get("prompt")), str(row.get("prompt_id")))} for row in rows]
        checked = check_rows(told(progress, "checking files", rows), base, name)
        for row in told(progress, "checking audio", checked.values()):
            _as_stated(row)
        systems.append({str(row.fields["system"]) for row in checked.values()})
        found = checked | found
    if len(sources) == 2 and systems[0] & systems[1]:
        got = f"two sources of one system, {sorted(systems[0] & systems[1])[0]!r}"
        raise UserError(got, "two systems", "name the system of each source")
    return found


def spoiled(rows: Mapping[ClipKey, Row], n: int, folder: Path) -> tuple[dict[ClipKey, Row], list[PairOf]]:
    """`n` clips clipped at 24 dB and under noise, as files in `folder`, and the gold pairs (clip, its spoiled self).

    Whoever listens prefers the clip that was left alone. A file that is there already is used again, so a second call adds
    nothing. Raises: UserError when a file cannot be written or fewer than `n` prompts have a clip that sounds.
    """
    made: dict[ClipKey, Row] = {}
    pairs: list[PairOf] = []
    prompts = set()
    for key, row in rows.items():
        if len(pairs) == n:
            break
        if (key.prompt_id, key.text_sha256) in prompts or row.fields["system"] == SPOILED:
            continue
        file = folder / f"{row.sha256}{storage.suffix(row.uri)}"
        if not file.exists():
            with storage.local_copy(row.uri) as path:
                wav, sample_rate = read_audio(path)
            if not np.abs(wav).max() > 0:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            write_audio(file, spoil(wav, seed=int(row.sha256[:8], 16)), sample_rate)
        prompts.add((key.prompt_id, key.text_sha256))
        uri = str(file.resolve())
        digest = storage.sha256(uri)
        left_out = {"lufs", "true_peak_dbfs", "codes_file"}
        fields = {name: value for name, value in row.fields.items() if name not in left_out}
        fields |= {"system": SPOILED, "sha256": digest}
        bad = replace(row, sha256=digest, uri=uri, codes_uri=None, size_bytes=storage.size_bytes(uri), fields=fields)
        made[bad.key] = bad
        pairs.append((key, bad.key))
    if len(pairs) < n:
        raise UserError(f"{n} gold pairs of {len(pairs)} prompts", "at most one for each prompt", "ask for fewer")
    return made, pairs


def spoil(wav: Wav, seed: int) -> Wav:
    """wav [C, L] -> the same, driven 24 dB into hard clipping and mixed with white noise; the same seed gives the same."""
    clipped = np.clip(wav / np.abs(wav).max() * CLIP_GAIN, -1.0, 1.0) * 0.4
    noise = np.random.default_rng(seed).normal(0.0, NOISE_RMS, wav.shape)
    return np.asarray(np.clip(clipped + noise, -1.0, 1.0), dtype=np.float32)


def fill_campaign(
    store: Store,
    name: str,
    sources: Sequence[Source],
    rules: Rules,
    *,
    every: bool = False,
    n_gold: int = 0,
    gold_dir: Path | None = None,
    pairs_file: Path | None = None,
    owner_id: int | None = None,
    keep_rules: bool = False,
    progress: Progress = untold,
) -> CampaignSummary:
    """Registers one or two sources under `name`; the same call again adds nothing. All of it or nothing.

    Args:
        every: whether every two clips of a prompt meet; else two systems meet clip by clip, and one's clips two by two.
        n_gold: how many gold pairs to make by spoiling clips; their files go into `gold_dir`.
        pairs_file: JSON lines {"a", "b", "gold"}: files or sha256 of clips that meet; `gold`, "a" or "b", is the known answer.
        progress: is told (stage, done, total) as the work goes on.

    Raises: UserError or StoreError; see `gather` and `db.campaigns.create`.
    """
    rows = gather(sources, progress)
    pairs: list[PairOf] | None = None
    gold: list[PairOf] = []
    if pairs_file is not None:
        pairs, gold = read_pairs(pairs_file, rows)
    elif every:
        by_prompt: dict[tuple[str, str], list[ClipKey]] = {}
        for key in rows:
            by_prompt.setdefault(key[:2], []).append(key)
        pairs = [pair for keys in by_prompt.values() for pair in combinations(keys, 2)]
    elif len({row.fields["system"] for row in rows.values()}) > 1 and (
        len(sources) == 2 or "file_name" in next(iter(rows.values())).fields
    ):
        pairs = list(pairs_of_systems(rows))
    if n_gold:
        if gold_dir is None:
            raise UserError("gold pairs with no place for their clips", "a folder", "pass --gold-dir DIR")
        made, known = spoiled(rows, n_gold, gold_dir)
        rows, gold = rows | made, gold + known
    heard = itertools.count()

    def hear(path: Path) -> tuple[float, float]:
        progress("measuring loudness", next(heard), len(rows))
        return measure(path)

    return create(store, name, rows, rules, pairs=pairs, gold=gold, measure=hear, owner_id=owner_id, keep_rules=keep_rules)


def read_pairs(path: Path, rows: Mapping[ClipKey, Row]) -> tuple[list[PairOf], list[PairOf]]:
    """(pairs to be rated, gold pairs with the better clip first) of a pairs file. Raises UserError."""
    sha_of = {str(row.fields["file"]): row.sha256 for row in rows.values()} | {row.sha256: row.sha256 for row in rows.values()}
    pairs: list[PairOf] = []
    gold: list[PairOf] = []
    for number, line in enumerate(read_rows(path), start=1):
        ends = [sha_of.get(str(line.get(side))) for side in ("a", "b")]
        if ends[0] is None or ends[1] is None:
            got = f"{path} row {number}: {line.get('a')!r} against {line.get('b')!r}"
            raise UserError(got, "two clips of the source, by file or sha256", "correct the row")
        if line.get("gold") not in (None, "a", "b"):
            raise UserError(f"{path} row {number}: gold {line['gold']!r}", "a, b or nothing", "correct the row")
        one, other = ends[0], ends[1]
        if line.get("gold") is None:
            pairs.append((one, other))
        else:
            gold.append((one, other) if line["gold"] == "a" else (other, one))
    return pairs, gold


def register_campaign(
    store: Store,
    name: str,
    manifest_path: str | Path,
    *,
    target_votes: int = 3,
    min_listen_ms: int = 3000,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> CampaignSummary:
    """Registers a manifest's clips and pairs under `name`; again with the same rows adds nothing. See `create_campaign`."""
    rows = gather([Source(str(manifest_path))])
    return create(store, name, rows, Rules(target_votes, min_listen_ms), pairs=pairs, measure=measure, keep_rules=True)


def every_pair(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """All pairs of clips that answer the same prompt, as hashes: n (n - 1) / 2 pairs of n clips, each clip in n - 1 of them."""
    of_prompt: dict[str, list[str]] = {}
    for row in rows:
        of_prompt.setdefault(str(row.get("prompt_id")), []).append(str(row.get("sha256")))
    return [pair for clips in of_prompt.values() for pair in combinations(clips, 2)]


def _manifest_of(address: str) -> tuple[str, str]:
    """(folder, name of the JSON lines file in it). Raises UserError where there is none."""
    if storage.is_folder(address):
        for name in ("manifest.jsonl", "metadata.jsonl"):
            if storage.is_file(_join(address, name)):
                return address, name
        raise UserError(f"{address} without a list of clips", "a manifest.jsonl or metadata.jsonl in it", "add one")
    head, chain, rest = address.partition("::")
    folder, slash, name = head.rpartition("/")
    if folder.endswith(":/"):  # zip://manifest.jsonl::clips.zip
        folder += "/"
    return (folder or ("/" if slash else ".")) + chain + rest, name


def _join(base: str, name: str) -> str:
    address = storage.inside(base, name)
    if address is None:
        raise UserError(f"the name {name!r}", f"a file inside {base}", "choose another name")
    return address


def _folder_row(base: str, row: Mapping[str, Any], number: int, name: str) -> dict[str, Any]:
    """A row of an audiofolder as a manifest has it: with the hash, length and rate of what lies there."""
    where = f"{name} row {number}"
    uri = storage.inside(base, str(row.get("file_name") or ""))
    if uri is None or not storage.is_file(uri):
        raise UserError(f"{where}: file_name {row.get('file_name')!r}", f"a file inside {base}", "correct the row or add the file")
    prompt = next((row[key] for key in ("prompt", "caption", "text") if row.get(key)), None)
    check_text(prompt, f"{where}: prompt", 20_000)
    if prompt is None:
        raise UserError(f"{where} without a prompt", "a column prompt, caption or text", "add what the clip was made for")
    info = _heard(uri)
    stated = {
        "file": str(row["file_name"]),
        "sha256": storage.sha256(uri),
        "prompt": prompt,
        "prompt_id": row.get("prompt_id") or hashlib.sha256(str(prompt).encode()).hexdigest()[:16],
        "duration_s": info.duration_s,
        "sample_rate": info.sample_rate,
    }
    return {**row, **stated}


def _heard(uri: str) -> AudioInfo:
    """What a clip's header says. Raises UserError for a clip that cannot be played, that nobody hears to its end, or with tags in it."""
    with storage.local_copy(uri) as path:
        try:
            info = probe(path)
            check_untagged(path)
        except UserError as error:
            raise UserError(error.got.replace(str(path), uri), error.expected, error.remedy) from error
    if info.duration_s >= MAX_CLIP_S:
        raise UserError(f"{uri} of {info.duration_s:.0f} s", f"less than {MAX_CLIP_S:.0f} s", "cut it")
    return info


def _as_stated(row: Row) -> None:
    info = _heard(row.uri)
    stated = (float(row.fields["duration_s"]), int(row.fields["sample_rate"]))
    if info.sample_rate != stated[1] or abs(info.duration_s - stated[0]) > DURATION_SLACK_S:
        got = f"{row.uri} of {info.duration_s:.2f} s at {info.sample_rate} Hz"
        raise UserError(got, f"{stated[0]:.2f} s at {stated[1]} Hz, as its row says", "correct the row, or sample again")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m feedback_app.campaigns", description=__doc__.splitlines()[0])
    parser.add_argument("--db", default="sqlite:///runs/demo/encore.db", metavar="URL", help="database URL; default %(default)s")
    parser.add_argument("--name", required=True, help="the campaign's name; made if need be, else it is filled further")
    sources = "a manifest.jsonl, or a folder of audio with a metadata.jsonl; given twice, two systems that meet prompt by prompt"
    parser.add_argument("--source", "--manifest", action="append", required=True, help=sources)
    parser.add_argument(
        "--system", action="append", metavar="NAME", help="name of each source's system, in order; default: what the rows say"
    )
    votes = "votes wanted for each pair, each by another person; default %(default)s"
    parser.add_argument("--target-votes", type=int, default=3, metavar="N", help=votes)
    listening = "listening asked for on each side, milliseconds; default %(default)s"
    parser.add_argument("--min-listen-ms", type=int, default=3000, metavar="MS", help=listening)
    meet = "all n(n-1)/2 pairs of a prompt's clips; default: floor(n/2) disjoint pairs, or clip k of one system with clip k of the other"
    parser.add_argument("--all-pairs", action="store_true", help=meet)
    named = 'JSON lines {"a", "b", "gold"}: which clips meet, by file or SHA-256; "gold", a or b, is the better one of a known answer'
    parser.add_argument("--pairs", type=Path, metavar="FILE", help=named)
    gold = "make N pairs with a known answer by spoiling clips, at most one a prompt; default %(default)s"
    parser.add_argument("--gold", type=int, default=0, metavar="N", help=gold)
    parser.add_argument("--gold-dir", type=Path, metavar="DIR", help="where the spoiled clips go; needed with --gold")
    shares = "share of assignments, 0 to .5 together with {}, {}; default %(default)s"
    parser.add_argument("--gold-rate", type=float, default=0.0, help=shares.format("--repeat-rate", "that have a known answer"))
    parser.add_argument("--repeat-rate", type=float, default=0.0, help=shares.format("--gold-rate", "that were heard before, sides turned"))
    parser.add_argument("--chooser", choices=CHOOSERS, default="least_voted", help=f"{CHOOSES}; default %(default)s")
    parser.add_argument("--aspect", action="append", choices=ASPECTS, default=[], help="ask for this beside the vote; repeatable")
    parser.add_argument("--invited-only", action="store_true", help="only for raters who were invited to it")
    parser.add_argument("--practice", action="store_true", help="new raters rehearse first")
    parser.add_argument("--require-screen", action="store_true", help="only for raters who passed the headphone check")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.system and len(args.system) != len(args.source):
            raise UserError(f"{len(args.system)} systems for {len(args.source)} sources", "one each", "name each or none")
        rules = Rules(
            args.target_votes,
            args.min_listen_ms,
            args.chooser,
            gold_rate=args.gold_rate,
            repeat_rate=args.repeat_rate,
            aspects=tuple(args.aspect),
            invited_only=args.invited_only,
            practice=args.practice,
            require_screen=args.require_screen,
        )
        sources = [Source(address, system) for address, system in zip(args.source, args.system or [None, None], strict=False)]
        with open_store(args.db) as store:
            found = fill_campaign(
                store,
                args.name,
                sources,
                rules,
                every=args.all_pairs,
                n_gold=args.gold,
                gold_dir=args.gold_dir,
                pairs_file=args.pairs,
                keep_rules=rules == Rules(args.target_votes, args.min_listen_ms),
            )
    except (UserError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    gold = f", {found.n_gold} gold pairs" if found.n_gold else ""
    named = f", {found.n_named} named anew" if found.n_named else ""
    print(f"campaign {found.name}: {found.n_clips} clips, {found.n_pairs} pairs ({found.n_new_pairs} new){gold}{named}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
