"""Votes in SQL -> a frozen, hashed folder. Training reads only such a folder, never the live database.

    export_snapshot       snapshot.json   name, sha256, campaign, rules, counts, excluded votes by reason
                          votes.jsonl     one vote a line, sides turned back to x and y, raters under pseudonyms
                          clips.jsonl     the clips those votes speak of, with their provenance and the hash of their codes
    export_preferences    snapshot.json and one <split>.jsonl of (prompt, chosen, rejected, chosen_probability, margin) for TRL

`sha256` is over the bytes of the files' lines, in the order above, one canonical JSON object a line. Votes stream from the
database into the file, so that memory does not grow with them. Whose votes went out stands in `snapshot_rater`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from db import quality, storage
from db.bulk import add_missing
from db.errors import ConflictError, NoVotesError, StoreError
from db.quality import Rules, clip_x, clip_y
from db.schema import Assignment, Campaign, Clip, Pair, Prompt, Rater, Snapshot, SnapshotRater, SpanMark, Vote, VoteAspect, utc_now
from db.store import Store

SCHEMA_VERSION = 5
"""1 had no aspects, marks, coverage, kind, propensity, policy, side shown first, comment, source and page version; 2 no events, rep
and time of issue; 3 no hashes of codes; 4 no systems with the votes, only those under which the clips were first registered. Readers
take all. The client's clock, idempotency keys and ends of leases stay in the database."""
CHUNK = 2000
"""Votes held in memory at a time."""


@dataclass
class _Told:
    """What a stream of lines tells once it has run."""

    n_votes: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    by_rater: Counter[int] = field(default_factory=Counter)
    clip_ids: set[int] = field(default_factory=set)


def export_snapshot(store: Store, campaign: str, out_dir: str | Path, name: str, rules: Rules = quality.DEFAULT) -> dict[str, Any]:
    """Writes `<out_dir>/<name>/` and returns its snapshot.json. The same votes under the same name: nothing changes.

    Args: rules: which votes count; the others are in the file as well, with the reason.
    Raises: StoreError for an unknown campaign, no usable vote, a bad name, or a folder of that name that holds
        anything else; what was there stays as it was.
    """
    _check_name(name)
    salt = store.pseudonym_salt()
    told = _Told()
    with store.read() as session:
        found, out = _open(session, campaign, rules)

        def files() -> Iterator[tuple[str, Iterable[dict[str, Any]]]]:
            yield "votes.jsonl", _votes(session, found, rules, out, salt, told)
            yield "clips.jsonl", _clips(session, told.clip_ids)

        def about(sha256: str) -> dict[str, Any]:
            return {
                "name": name,
                "sha256": sha256,
                "created_at": utc_now().isoformat(timespec="seconds"),
                "campaign": campaign,
                "rules": asdict(rules),
                "n_votes": told.n_votes,
                "n_excluded": dict(sorted(told.excluded.items())),
                "n_raters": sum(n > 0 for n in told.by_rater.values()),
                "schema": SCHEMA_VERSION,
            }

        snapshot = _write_folder(Path(out_dir) / name, files(), about)
    _record(store, found, snapshot, told.by_rater)
    return snapshot


def export_preferences(store: Store, campaign: str, out_dir: str | Path, name: str, rules: Rules = quality.DEFAULT) -> dict[str, Any]:
    """Writes `<out_dir>/<name>/<split>.jsonl`, a TRL preference dataset of one row a pair, and returns its snapshot.json.

    `chosen` and `rejected` are the clips' URIs, beside their hashes. `chosen_probability` = (votes for it + ties / 2) / votes for a
    side or tie, so that a pair that is a tie is a soft label of .5; `margin` = 2 chosen_probability - 1, in [0, 1]. First answers of
    those who count are joined; pairs that are both bad alone have no row and are counted in snapshot.json.

    Raises: as `export_snapshot`.
    """
    _check_name(name)
    with store.read() as session:
        found, out = _open(session, campaign, rules)
        answers = quality.answers_by_pair(session, found, rules, out)
        ordered = {pair: said for pair, said in answers.items() if sum(said[:3])}
        if not ordered:
            raise StoreError(f"campaign {campaign!r} without a pair that votes order", "votes for a side, or ties", "collect votes first")
        by_rater = Counter[int]()
        for cell in quality.tally(session, found, rules):
            if cell.reason is None and cell.rater_id not in out and cell.kind == "normal":
                by_rater[cell.rater_id] += cell.n
        of_campaign = select(Prompt.split).join(Pair, Pair.prompt_id == Prompt.id).where(Pair.campaign_id == found.id)
        splits = sorted(session.scalars(of_campaign.distinct()))
        if odd := [split for split in splits if not split or not split.replace("-", "").replace("_", "").isalnum()]:
            raise StoreError(f"split {odd[0]!r}", "letters, digits, '-' and '_', as it names a file", "mend the manifest")

        def about(sha256: str) -> dict[str, Any]:
            return {
                "name": name,
                "sha256": sha256,
                "created_at": utc_now().isoformat(timespec="seconds"),
                "campaign": campaign,
                "format": "trl",
                "rules": asdict(rules),
                "n_pairs": len(ordered),
                "n_pairs_both_bad": len(answers) - len(ordered),
                "n_votes": sum(by_rater.values()),
                "n_raters": len(by_rater),
                "schema": SCHEMA_VERSION,
            }

        lines = ((f"{split}.jsonl", _preferences(session, found, split, ordered)) for split in splits)
        snapshot = _write_folder(Path(out_dir) / name, lines, about)
    _record(store, found, snapshot, by_rater)
    return snapshot


def _check_name(name: str) -> None:
    if not name or name.startswith(".") or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise StoreError(f"snapshot name {name!r}", "letters, digits, '.', '-' and '_'", "choose another name")


def _open(session: Session, name: str, rules: Rules) -> tuple[Campaign, dict[int, str]]:
    """The campaign, and the raters whose votes do not count, as one consistent state."""
    if session.get_bind().dialect.name == "postgresql":
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    campaign = quality.find_campaign(session, name)
    cells = quality.tally(session, campaign, rules)
    out = quality.doubted(quality.measure(session, campaign, cells), rules)
    total = sum(cell.n for cell in cells)
    usable = sum(cell.n for cell in cells if cell.reason is None and cell.rater_id not in out)
    if usable == 0:
        reasons = Counter[str]()
        for cell in cells:
            reasons[cell.reason or out[cell.rater_id]] += cell.n
        told = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        got = f"campaign {name!r} with {total} votes, {total} of them excluded" + (f" ({told})" if told else "")
        remedy = "collect votes in the rating app, then export"
        if reasons[quality.ONE_SIDED]:
            remedy += "; where an imported file has the winner always on one side, draw the sides anew"
        raise NoVotesError(got, "at least one vote that counts", remedy)
    return campaign, out


def snapshot_sha256(folder: str | Path) -> str:
    """The hash of a snapshot folder's lines as they lie there now: votes then clips, or the splits in order."""
    folder = Path(folder)
    names = ["votes.jsonl", "clips.jsonl"] if (folder / "votes.jsonl").exists() else sorted(path.name for path in folder.glob("*.jsonl"))
    digest = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _votes(session: Session, campaign: Campaign, rules: Rules, out: Mapping[int, str], salt: str, told: _Told) -> Iterator[dict[str, Any]]:
    wanted: Any = select(
        Vote.id,
        Vote.rater_id,
        Vote.choice,
        Vote.listen_a_ms,
        Vote.listen_b_ms,
        Vote.coverage_a,
        Vote.coverage_b,
        Vote.confidence,
        Vote.comment,
        Vote.created_at,
        Vote.source,
        Vote.ui_version,
        Vote.events,
        Assignment.issued_at,
        Assignment.swapped,
        Assignment.rep,
        Assignment.kind,
        Assignment.policy,
        Assignment.propensity,
        Pair.id.label("pair_id"),
        Pair.gold,
        Pair.clip_x_id,
        Pair.clip_y_id,
        Pair.system_x,
        Pair.system_y,
        Prompt.key,
        Prompt.text,
        Prompt.split,
        Rater.handle,
        Rater.status,
        clip_x.sha256.label("x"),
        clip_y.sha256.label("y"),
        quality.vote_reason(rules).label("reason"),
    )
    statement = quality.of_campaign(wanted, campaign).join(Prompt, Prompt.id == Pair.prompt_id).order_by(Vote.id)
    for rows in session.execute(statement.execution_options(yield_per=CHUNK)).partitions():
        aspects, marks = _beside(session, rows[0].id, rows[-1].id)
        for row in rows:
            reason = row.reason or out.get(row.rater_id)
            told.clip_ids |= {row.clip_x_id, row.clip_y_id}
            if reason:
                told.excluded[reason] += 1
                told.by_rater[row.rater_id] += 0  # the row is in the file all the same, with what its rater wrote
            else:
                told.n_votes += 1
                told.by_rater[row.rater_id] += 1
            yield _vote(row, reason, salt, aspects.get(row.id, []), marks.get(row.id, []))


def _vote(row: Row[Any], reason: str | None, salt: str, aspects: Sequence[Any], marks: Sequence[Any]) -> dict[str, Any]:
    turn = -1 if row.swapped else 1
    side = {"a": "y", "b": "x"} if row.swapped else {"a": "x", "b": "y"}
    listen_x_ms, listen_y_ms = (row.listen_a_ms, row.listen_b_ms)[::turn]
    coverage_x, coverage_y = (row.coverage_a, row.coverage_b)[::turn]
    return {
        "vote_id": row.id,
        "pair_id": row.pair_id,
        "prompt_id": row.key,
        "prompt": row.text,
        "split": row.split,
        "rater": pseudonym(salt, row.rater_id, row.handle, row.status),
        "choice": side.get(row.choice, row.choice),
        "clip_x": row.x,
        "clip_y": row.y,
        "system_x": row.system_x,
        "system_y": row.system_y,
        "listen_x_ms": listen_x_ms,
        "listen_y_ms": listen_y_ms,
        "coverage_x": coverage_x,
        "coverage_y": coverage_y,
        "aspects": {aspect.aspect: turn * aspect.score for aspect in aspects},
        "marks": [{"side": side[mark.side], "t0_ms": mark.t0_ms, "t1_ms": mark.t1_ms, "tag": mark.tag} for mark in marks],
        "confidence": row.confidence,
        "comment": row.comment,
        "created_at": row.created_at.isoformat(timespec="milliseconds"),
        "excluded_reason": reason,
        "gold": row.gold,
        "repeat": row.rep > 0,
        "kind": row.kind,
        "rep": row.rep,
        "shown_first": side["a"],
        "issued_at": row.issued_at.isoformat(timespec="milliseconds"),
        "events": [[since, what, side.get(shown, shown), at] for since, what, shown, at in row.events],
        "policy": row.policy,
        "propensity": row.propensity,
        "source": row.source,
        "ui_version": row.ui_version,
    }


def _beside(session: Session, first: int, last: int) -> tuple[dict[int, list[Any]], dict[int, list[Any]]]:
    """Aspects and marks of the votes from `first` to `last`, by vote."""
    aspects: dict[int, list[Any]] = {}
    marks: dict[int, list[Any]] = {}
    scored = select(VoteAspect.vote_id, VoteAspect.aspect, VoteAspect.score).where(VoteAspect.vote_id.between(first, last))
    for aspect in session.execute(scored.order_by(VoteAspect.vote_id, VoteAspect.aspect)):
        aspects.setdefault(aspect.vote_id, []).append(aspect)
    marked = select(SpanMark.vote_id, SpanMark.side, SpanMark.t0_ms, SpanMark.t1_ms, SpanMark.tag).where(
        SpanMark.vote_id.between(first, last)
    )
    for mark in session.execute(marked.order_by(SpanMark.id)):
        marks.setdefault(mark.vote_id, []).append(mark)
    return aspects, marks


def _clips(session: Session, clip_ids: set[int]) -> Iterator[dict[str, Any]]:
    statement = select(Clip, Prompt).join(Prompt, Prompt.id == Clip.prompt_id).order_by(Clip.id).execution_options(yield_per=CHUNK)
    for clip, prompt in session.execute(statement):
        if clip.id not in clip_ids:
            continue
        yield {
            "sha256": clip.sha256,
            "uri": clip.uri,
            "codes_uri": clip.codes_uri,
            "codes_sha256": _codes_sha256(clip.codes_uri),
            "prompt_id": prompt.key,
            "prompt": prompt.text,
            "tempo_bpm": clip.tempo_bpm,
            "genre": clip.genre,
            "system": clip.system,
            "policy_sha256": clip.policy_sha256,
            "adapters": clip.adapters,
            "seed": clip.seed,
            "gen": clip.gen,
            "duration_s": clip.duration_ms / 1000,
            "sample_rate": clip.sample_rate,
            "size_bytes": clip.size_bytes,
            "lufs": clip.lufs,
            "true_peak_dbfs": clip.true_peak_dbfs,
            "licence": clip.licence,
            "consent": clip.consent,
        }


def _codes_sha256(uri: str | None) -> str | None:
    """The hash of a clip's codes as they lie there now; None where there are none, or none that this machine can read."""
    if uri is None or not ("://" in uri or Path(uri).is_absolute()):
        return None
    try:
        return storage.sha256(uri)
    except StoreError:
        return None


def _preferences(session: Session, campaign: Campaign, split: str, ordered: Mapping[int, Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Rows of one split; `ordered`: pair -> votes for x, for y, ties, both bad."""
    statement = (
        select(
            Pair.id,
            Prompt.key,
            Prompt.text,
            clip_x.sha256.label("x"),
            clip_x.uri.label("x_uri"),
            clip_y.sha256.label("y"),
            clip_y.uri.label("y_uri"),
        )
        .join(Prompt, Prompt.id == Pair.prompt_id)
        .join(clip_x, clip_x.id == Pair.clip_x_id)
        .join(clip_y, clip_y.id == Pair.clip_y_id)
        .where(Pair.campaign_id == campaign.id, Prompt.split == split)
        .order_by(Pair.id)
        .execution_options(yield_per=CHUNK)
    )
    for row in session.execute(statement):
        if row.id not in ordered:
            continue
        x, y, ties, both_bad = ordered[row.id]
        p = (x + ties / 2) / (x + y + ties)
        chosen, rejected = ((row.x_uri, row.x), (row.y_uri, row.y))[:: 1 if p >= 0.5 else -1]
        p = max(p, 1 - p)
        yield {
            "prompt": row.text,
            "chosen": chosen[0],
            "rejected": rejected[0],
            "chosen_probability": p,
            "margin": 2 * p - 1,
            "chosen_sha256": chosen[1],
            "rejected_sha256": rejected[1],
            "prompt_id": row.key,
            "pair_id": row.id,
            "n_votes": x + y + ties,
            "n_both_bad": both_bad,
        }


def pseudonym(salt: str, rater_id: int, handle: str = "", status: str = "") -> str:
    """A name that tells votes of one rater together and not who it is. A rater who was imported under one keeps it; whoever was
    forgotten gets another, from the random handle that erasure gave, so that no list of old pseudonyms leads to later exports."""
    if status == "external" and handle.startswith("r_") and len(handle) == 18:
        return handle
    known_by = handle if status == "erased" else str(rater_id)
    return "r_" + hmac.new(salt.encode(), known_by.encode(), "sha256").hexdigest()[:16]


def is_recorded(store: Store, sha256: str) -> bool:
    """Whether the database knows whose votes are in this snapshot. One that was cut off right after its folder is not known."""
    with store.read() as session:
        return session.scalar(select(Snapshot.id).where(Snapshot.sha256 == sha256)) is not None


def _record(store: Store, campaign: Campaign, snapshot: Mapping[str, Any], by_rater: Mapping[int, int]) -> None:
    """Whose votes are in the snapshot, once: the same content under a second name is the same snapshot."""
    row = {"campaign_id": campaign.id} | {key: snapshot[key] for key in ("name", "sha256", "n_votes")}
    with store.write() as session:
        if add_missing(session, Snapshot, row):
            made = session.scalars(select(Snapshot.id).where(Snapshot.sha256 == snapshot["sha256"])).one()
            session.add_all(SnapshotRater(snapshot_id=made, rater_id=rater, n_votes=n) for rater, n in sorted(by_rater.items()))


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def _same_or_refuse(folder: Path, snapshot: dict[str, Any]) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads((folder / "snapshot.json").read_text())
        same = stored["sha256"] == snapshot["sha256"] == snapshot_sha256(folder)
    except (OSError, ValueError, KeyError):
        same = False
    if not same:
        remedy = "export under a new name; a snapshot is frozen"
        raise ConflictError(f"{folder}, which holds something else", "a free name, or the very same votes", remedy)
    return stored


def _write_folder(
    folder: Path, files: Iterable[tuple[str, Iterable[dict[str, Any]]]], about: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """All of it or nothing: written and synced beside its place, then renamed into it. Returns the snapshot.json that stands."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror}", "a writable folder with room", "choose another") from error
    try:
        digest = hashlib.sha256()
        for file_name, rows in files:
            with (temporary / file_name).open("wb") as file:
                for row in rows:
                    line = _line(row)
                    digest.update(line)
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
        snapshot = about(digest.hexdigest())
        if folder.exists():
            return _same_or_refuse(folder, snapshot)
        with (temporary / "snapshot.json").open("w", encoding="utf-8") as text:
            text.write(json.dumps(snapshot, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
            text.flush()
            os.fsync(text.fileno())
        temporary.chmod(0o755)
        _sync(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if folder.exists():  # somebody else finished the same name first
                return _same_or_refuse(folder, snapshot)
            raise
        _sync(folder.parent)
        return snapshot
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror}", "a writable folder with room", "choose another") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is left there after the rename


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
