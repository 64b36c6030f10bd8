"""A samples manifest, checked: rows that can be believed, files that are what they say, pairs worth hearing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.errors import ConflictError, StoreError
from db.gains import pair_gains_db
from db.schema import Campaign, Clip, Pair, Prompt

Measure = Callable[[Path], tuple[float, float]]
"""path -> (integrated loudness LUFS, true peak dBFS)."""


@dataclass(frozen=True)
class CampaignSummary:
    """What `create_campaign` found or made."""

    name: str
    n_clips: int
    n_pairs: int
    n_new_pairs: int


class ClipKey(NamedTuple):
    """What makes a clip one clip: the same bytes may answer two prompts, and are two clips then."""

    prompt_id: str
    text_sha256: str
    sha256: str


@dataclass(frozen=True)
class Row:
    """One manifest row whose file was found and whose bytes have the stated hash."""

    sha256: str
    path: Path
    codes_path: Path | None
    prompt: str
    prompt_id: str
    split: str
    fields: Mapping[str, Any]

    @property
    def key(self) -> ClipKey:
        return ClipKey(self.prompt_id, hashlib.sha256(self.prompt.encode()).hexdigest(), self.sha256)


def check_rows(rows: Iterable[Mapping[str, Any]], base_dir: Path) -> dict[ClipKey, Row]:
    """Rows by key, in order; a clip listed twice is one. Raises StoreError naming the first row that is wrong."""
    checked: dict[ClipKey, Row] = {}
    for number, fields in enumerate(rows, start=1):
        where = f"manifest row {number}"
        for key in ("file", "sha256", "prompt", "prompt_id", "system", "duration_s", "sample_rate"):
            if fields.get(key) in (None, ""):
                raise StoreError(f"{where} without {key!r}", "a row as `encore sample` writes it", "write the manifest anew")
        path = _inside(base_dir, str(fields["file"]), where)
        codes = fields.get("codes_file")
        row = Row(
            sha256=str(fields["sha256"]),
            path=path,
            codes_path=_inside(base_dir, str(codes), where) if codes else None,
            prompt=str(fields["prompt"]),
            prompt_id=str(fields["prompt_id"]),
            split=str(fields.get("split") or "train"),
            fields=fields,
        )
        found = _file_sha256(path)
        if found != row.sha256:
            got = f"{where}: {path} with sha256 {found[:12]}"
            raise StoreError(got, f"sha256 {row.sha256[:12]}", "sample again; the file was changed after it was listed")
        if not 0 < float(fields["duration_s"]) < 3600:
            raise StoreError(f"{where}: duration_s {fields['duration_s']}", "a length in (0, 3600) s", "drop the row")
        checked.setdefault(row.key, row)
    if not checked:
        raise StoreError("an empty manifest", "one row a clip", "sample some clips first")
    return checked


def clip_columns(row: Row, measure: Measure | None) -> dict[str, Any]:
    """The columns of `Clip` for a row, loudness included. Raises StoreError when it cannot be known."""
    fields = row.fields
    if fields.get("lufs") is not None and fields.get("true_peak_dbfs") is not None:
        lufs, true_peak_dbfs = float(fields["lufs"]), float(fields["true_peak_dbfs"])
    elif measure is not None:
        lufs, true_peak_dbfs = measure(row.path)
    else:
        remedy = "pass measure=, or add lufs and true_peak_dbfs to the rows"
        raise StoreError(f"{row.path.name} with no loudness", "a measured loudness", remedy)
    audible = math.isfinite(lufs) and math.isfinite(true_peak_dbfs) and lufs > -70.0
    return {
        "sha256": row.sha256,
        "uri": str(row.path),
        "codes_uri": str(row.codes_path) if row.codes_path else None,
        "size_bytes": row.path.stat().st_size,
        "duration_ms": max(1, round(float(fields["duration_s"]) * 1000)),
        "sample_rate": int(fields["sample_rate"]),
        "lufs": lufs if audible else None,
        "true_peak_dbfs": true_peak_dbfs if audible else None,
        "system": str(fields["system"]),
        "policy_sha256": fields.get("policy_sha256"),
        "adapters": [str(adapter) for adapter in fields.get("adapters") or []],
        "seed": fields.get("seed"),
        "tempo_bpm": fields.get("tempo_bpm"),
        "genre": fields.get("genre"),
        "gen": dict(fields.get("gen") or {}),
        "licence": fields.get("licence"),
        "consent": None if fields.get("consent") is None else str(fields["consent"]),
    }


def choose_pairs(keys: Iterable[ClipKey]) -> list[tuple[ClipKey, ClipKey]]:
    """Clips of one prompt meet two by two, in order, each once; an odd one out waits for more samples."""
    by_prompt: dict[tuple[str, str], list[ClipKey]] = {}
    for key in keys:
        by_prompt.setdefault((key.prompt_id, key.text_sha256), []).append(key)
    return [(clips[i], clips[i + 1]) for clips in by_prompt.values() for i in range(0, len(clips) - 1, 2)]


def named_pairs(keys: Iterable[ClipKey], pairs: Iterable[tuple[str, str]]) -> list[tuple[ClipKey, ClipKey]]:
    """Pairs given by sha256, found among the clips. Raises StoreError where they are not two clips of one prompt."""
    by_sha: dict[str, list[ClipKey]] = {}
    for key in keys:
        by_sha.setdefault(key.sha256, []).append(key)
    found = []
    for sha_x, sha_y in pairs:
        for sha in (sha_x, sha_y):
            if sha not in by_sha:
                raise StoreError(f"a pair with clip {sha[:12]}", "a clip of the manifest", "add its row or drop the pair")
        both = [(x, y) for x in by_sha[sha_x] for y in by_sha[sha_y] if x[:2] == y[:2] and x != y]
        if not both:
            got = f"the pair {sha_x[:12]}, {sha_y[:12]}"
            raise StoreError(got, "two different clips of one prompt", "drop or mend the pair")
        found.append(both[0])
    return found


def register(
    session: Session,
    name: str,
    rows: Mapping[ClipKey, Row],
    columns: Mapping[ClipKey, dict[str, Any]],
    pairs: Sequence[tuple[str, str]] | None,
    target_votes: int,
    min_listen_ms: int,
) -> CampaignSummary:
    """Stores what is new of a campaign. Runs inside a write transaction; raises StoreError, and nothing is stored."""
    campaign = session.scalar(select(Campaign).where(Campaign.name == name))
    if campaign is None:
        campaign = Campaign(name=name, target_votes=target_votes, min_listen_ms=min_listen_ms)
        session.add(campaign)
        session.flush()
    elif (campaign.target_votes, campaign.min_listen_ms) != (target_votes, min_listen_ms):
        rules = f"target_votes={campaign.target_votes}, min_listen_ms={campaign.min_listen_ms}"
        raise ConflictError(f"other rules for campaign {name!r}", rules, "repeat them, or choose another name")
    clips = {key: _add_clip(session, row, columns.get(key)) for key, row in rows.items()}
    session.flush()
    here = select(Pair.clip_x_id, Pair.clip_y_id).where(Pair.campaign_id == campaign.id)
    have = {(clip_x_id, clip_y_id) for clip_x_id, clip_y_id in session.execute(here)}
    paired = {clip_id for pair in have for clip_id in pair}
    unpaired = [key for key, clip in clips.items() if clip.id not in paired]
    wanted = choose_pairs(unpaired) if pairs is None else named_pairs(clips, pairs)
    n_new = sum(_add_pair(session, campaign, clips[x], clips[y], have) for x, y in wanted)
    if not have:
        expected = "at least one prompt with two different clips"
        raise StoreError(f"no pair among {len(rows)} clips", expected, "sample with -n 2 or more")
    return CampaignSummary(name, len(clips), len(have), n_new)


def _add_clip(session: Session, row: Row, columns: dict[str, Any] | None) -> Clip:
    key = row.key
    prompt = session.scalar(select(Prompt).where(Prompt.key == key.prompt_id, Prompt.text_sha256 == key.text_sha256))
    if prompt is None:
        prompt = Prompt(key=key.prompt_id, text=row.prompt, text_sha256=key.text_sha256, split=row.split)
        session.add(prompt)
        session.flush()
    clip = session.scalar(select(Clip).where(Clip.prompt_id == prompt.id, Clip.sha256 == key.sha256))
    if clip is None:
        assert columns is not None
        clip = Clip(prompt_id=prompt.id, **columns)
        session.add(clip)
    else:
        clip.uri = str(row.path)  # the newest place at which these very bytes were seen
        clip.codes_uri = str(row.codes_path) if row.codes_path else clip.codes_uri
    return clip


def _add_pair(session: Session, campaign: Campaign, one: Clip, two: Clip, have: set[tuple[int, int]]) -> bool:
    x, y = sorted((one, two), key=lambda clip: clip.id)
    if (x.id, y.id) in have:
        return False
    gain_x_db, gain_y_db = pair_gains_db(x.lufs, x.true_peak_dbfs, y.lufs, y.true_peak_dbfs)
    session.add(
        Pair(
            campaign_id=campaign.id,
            prompt_id=x.prompt_id,
            clip_x_id=x.id,
            clip_y_id=y.id,
            gain_x_db=gain_x_db,
            gain_y_db=gain_y_db,
            target_votes=campaign.target_votes,
        )
    )
    have.add((x.id, y.id))
    return True


def _inside(base_dir: Path, name: str, where: str) -> Path:
    base = base_dir.resolve()
    path = (base / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(base):
        raise StoreError(f"{where}: path {name!r}", f"a path inside {base_dir}", "list files relative to the manifest")
    if not path.is_file():
        raise StoreError(f"{where}: no file {path}", "a file that exists", "sample again, or drop the row")
    return path


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", "a readable file", "check its permissions") from error
