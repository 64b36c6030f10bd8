"""Votes in SQL -> a frozen, hashed folder. Training reads only such a snapshot, never the live database.

    snapshot.json   name, sha256, campaign, counts, excluded votes by reason
    votes.jsonl     one vote a line, sides turned back to x and y, raters under pseudonyms
    clips.jsonl     the clips those votes speak of, with their provenance

`sha256` is over the bytes of votes.jsonl followed by clips.jsonl, one canonical JSON object a line.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from db.errors import ConflictError, NotFoundError, StoreError
from db.schema import Assignment, Campaign, Clip, Pair, Prompt, Rater, Vote, utc_now
from db.store import Store

SCHEMA_VERSION = 1


def export_snapshot(store: Store, campaign: str, out_dir: str | Path, name: str) -> dict[str, Any]:
    """Writes `<out_dir>/<name>/` and returns its snapshot.json. The same votes under the same name: nothing changes.

    Raises: StoreError for an unknown campaign, no usable vote, a bad name, or a folder of that name that holds
        anything else; what was there stays as it was.
    """
    if not name or name.startswith(".") or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise StoreError(f"snapshot name {name!r}", "letters, digits, '.', '-' and '_'", "choose another name")
    salt = store.pseudonym_salt()
    with store.read() as session:
        found = session.scalar(select(Campaign).where(Campaign.name == campaign))
        if found is None:
            raise NotFoundError(f"campaign {campaign!r}", "a registered campaign", "check its name")
        votes, clip_ids = _votes(session, found, salt)
        clips = _clips(session, clip_ids)
    excluded = Counter(vote["excluded_reason"] for vote in votes if vote["excluded_reason"])
    n_votes = len(votes) - excluded.total()
    if n_votes == 0:
        got = f"campaign {campaign!r} with {len(votes)} votes, {excluded.total()} of them excluded"
        raise StoreError(got, "at least one vote that counts", "collect votes in the rating app, then export")
    votes_bytes, clips_bytes = _json_lines(votes), _json_lines(clips)
    snapshot = {
        "name": name,
        "sha256": hashlib.sha256(votes_bytes + clips_bytes).hexdigest(),
        "created_at": utc_now().isoformat(timespec="seconds"),
        "campaign": campaign,
        "n_votes": n_votes,
        "n_excluded": dict(sorted(excluded.items())),
        "n_raters": len({vote["rater"] for vote in votes if not vote["excluded_reason"]}),
        "schema": SCHEMA_VERSION,
    }
    folder = Path(out_dir) / name
    if folder.exists():
        return _same_or_refuse(folder, snapshot)
    files = {
        "votes.jsonl": votes_bytes,
        "clips.jsonl": clips_bytes,
        "snapshot.json": (json.dumps(snapshot, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(),
    }
    try:
        _write_folder(folder, files)
    except OSError as error:
        if folder.exists():  # somebody else finished the same name first
            return _same_or_refuse(folder, snapshot)
        raise StoreError(f"{folder}: {error.strerror}", "a writable folder with room", "choose another") from error
    return snapshot


def snapshot_sha256(folder: str | Path) -> str:
    """The hash of a snapshot folder's votes and clips as they lie there now."""
    return hashlib.sha256((Path(folder) / "votes.jsonl").read_bytes() + (Path(folder) / "clips.jsonl").read_bytes()).hexdigest()


def _votes(session: Session, campaign: Campaign, salt: str) -> tuple[list[dict[str, Any]], set[int]]:
    x, y = aliased(Clip), aliased(Clip)
    rows = session.execute(
        select(Vote, Assignment, Pair, Prompt, Rater.id, Rater.status, x, y)
        .join(Assignment, Assignment.id == Vote.assignment_id)
        .join(Pair, Pair.id == Assignment.pair_id)
        .join(Prompt, Prompt.id == Pair.prompt_id)
        .join(Rater, Rater.id == Vote.rater_id)
        .join(x, x.id == Pair.clip_x_id)
        .join(y, y.id == Pair.clip_y_id)
        .where(Pair.campaign_id == campaign.id)
        .order_by(Vote.id)
    )
    votes, clip_ids = [], set[int]()
    for vote, assignment, pair, prompt, rater_id, rater_status, clip_x, clip_y in rows:
        clip_ids |= {clip_x.id, clip_y.id}
        as_shown = (vote.listen_a_ms, vote.listen_b_ms)
        listen_x_ms, listen_y_ms = as_shown[::-1] if assignment.swapped else as_shown
        needed_ms = min(campaign.min_listen_ms, clip_x.duration_ms, clip_y.duration_ms)
        reason = vote.excluded_reason
        if reason is None and rater_status != "active":
            reason = "rater_blocked"
        if reason is None and min(as_shown) < needed_ms:
            reason = "listened_too_little"
        votes.append(
            {
                "vote_id": vote.id,
                "pair_id": pair.id,
                "prompt_id": prompt.key,
                "prompt": prompt.text,
                "split": prompt.split,
                "rater": _pseudonym(salt, rater_id),
                "choice": _as_stored(vote.choice, assignment.swapped),
                "clip_x": clip_x.sha256,
                "clip_y": clip_y.sha256,
                "listen_x_ms": listen_x_ms,
                "listen_y_ms": listen_y_ms,
                "confidence": vote.confidence,
                "created_at": vote.created_at.isoformat(timespec="milliseconds"),
                "excluded_reason": reason,
                "gold": pair.gold,
                "repeat": assignment.rep > 0,
            }
        )
    return votes, clip_ids


def _clips(session: Session, clip_ids: set[int]) -> list[dict[str, Any]]:
    rows = session.execute(select(Clip, Prompt).join(Prompt, Prompt.id == Clip.prompt_id).order_by(Clip.id))
    return [
        {
            "sha256": clip.sha256,
            "uri": clip.uri,
            "codes_uri": clip.codes_uri,
            "prompt_id": prompt.key,
            "prompt": prompt.text,
            "tempo_bpm": clip.tempo_bpm,
            "genre": clip.genre,
            "system": clip.system,
            "policy_sha256": clip.policy_sha256,
            "adapters": clip.adapters,
            "seed": clip.seed,
            "duration_s": clip.duration_ms / 1000,
            "sample_rate": clip.sample_rate,
            "licence": clip.licence,
            "consent": clip.consent,
        }
        for clip, prompt in rows
        if clip.id in clip_ids
    ]


def _as_stored(choice: str, swapped: bool) -> str:
    """a, b as shown -> x, y as stored; tie and both_bad have no side."""
    if choice not in ("a", "b"):
        return choice
    return "x" if (choice == "a") != swapped else "y"


def _pseudonym(salt: str, rater_id: int) -> str:
    return "r_" + hmac.new(salt.encode(), str(rater_id).encode(), "sha256").hexdigest()[:16]


def _json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    lines = (json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows)
    return "".join(lines).encode()


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


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """All of it or nothing: written and synced beside its place, then renamed into it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for file_name, content in files.items():
            with (temporary / file_name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        _sync(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
