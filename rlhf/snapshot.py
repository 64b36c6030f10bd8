"""A frozen snapshot of votes, as `encore ratings export` writes it: read, and verified.

    snapshot.json + votes.jsonl + clips.jsonl -> hash checked -> votes, clips; the codes [K, T] of a clip, hash checked

Beside the order a vote may judge aspects apart and mark stretches of a clip as bad; both are kept. Excluded votes are counted,
not used.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from numpy.typing import NDArray

from base_models.errors import UserError

Codes = NDArray[np.int64]
"""[K, T]"""


class NothingToLearnError(UserError):
    """Votes that are sound, and teach nothing: none is for a side, all are one rater's, or on too few prompts. More of them may serve."""


X, Y, TIE, BOTH_BAD = "x", "y", "tie", "both_bad"
CHOICES = (X, Y, TIE, BOTH_BAD)
TRAIN = "train"
"""The split whose votes may be learnt from."""
FILES = ("votes.jsonl", "clips.jsonl")
DEMAND = {
    "votes.jsonl": ("vote_id", "pair_id", "prompt_id", "prompt", "rater", "choice", "clip_x", "clip_y"),
    "clips.jsonl": ("sha256", "codes_uri", "prompt_id", "prompt", "policy_sha256"),
}


Spans = tuple[tuple[int, int], ...]
"""Stretches of a clip, (from, to) in ms, in order."""


class Mark(NamedTuple):
    """A stretch of a clip that a rater marked as bad."""

    clip: str
    """Its hash."""
    t0_ms: int
    t1_ms: int
    tag: str = "bad"


@dataclass(frozen=True)
class Vote:
    """One rater's answer to one pair, as exported: sides undone, x and y are clips by hash."""

    vote_id: str
    pair_id: str
    prompt_id: str
    prompt: str
    split: str
    rater: str
    choice: str
    clip_x: str
    clip_y: str
    excluded_reason: str | None = None
    gold: str | None = None
    repeat: bool = False
    confidence: float | None = None
    shown_first: str | None = None
    """The side that stood on the left, x or y; None where an old snapshot does not tell."""
    aspects: Mapping[str, int] = field(default_factory=dict)
    """Aspect -> how much better x is than y, -2 to 2. (The file counts the other way round.)"""
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Clip:
    """A rated clip: where its codes lie, and who made it."""

    sha256: str
    codes_uri: str | None
    """None where it was heard only: a recording, or a clip that was spoiled for a gold question."""
    prompt_id: str
    prompt: str
    policy_sha256: str
    tempo_bpm: float | None = None
    system: str = ""
    adapters: tuple[str, ...] = ()
    seed: int | None = None
    artist: str = ""
    """Whose clip it is, where its metadata tells."""
    codes_sha256: str | None = None
    """The hash of its codes' file as votes were exported; None in old snapshots, or where the exporter could not read the file."""


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot. `votes` are the usable ones (gold questions and repeats included); `n_excluded` counts the
    rest by reason. The clips of gold questions may be anything that can be heard: they tell who listens, and teach nothing."""

    folder: Path
    name: str
    sha256: str
    votes: tuple[Vote, ...]
    clips: Mapping[str, Clip]
    n_excluded: Mapping[str, int]

    @property
    def judged(self) -> tuple[Vote, ...]:
        """The votes that are learnt from: those on no gold question."""
        return tuple(vote for vote in self.votes if not vote.gold)

    @property
    def policy_sha256(self) -> str:
        """The base that all clips were made with from which is learnt."""
        return self.clips[self.judged[0].clip_x].policy_sha256

    @property
    def raters(self) -> list[str]:
        return sorted({vote.rater for vote in self.votes})


# ---- reading ---------------------------------------------------------------------------------------------------------


def content_sha256(folder: str | Path) -> str:
    """The hash a snapshot is known by: over the bytes of votes.jsonl, then of clips.jsonl."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()


def load_snapshot(folder: str | Path, policy_sha256: str | None = None) -> Snapshot:
    """Read and verify a snapshot that `encore ratings export` wrote.

    Votes on prompts of another split than "train" are left out, and counted as `split_<name>`: what is held out is never learnt from.
    Args: policy_sha256: the base that is to be trained; its codes are the only ones that mean anything to it.
    Raises: NothingToLearnError when no usable vote is left beside gold questions; UserError when files are missing, cut or changed after
        the export, when votes name unknown clips, or when clips that are learnt from come from another base, or from none."""
    folder = Path(folder)
    for name in ("snapshot.json", *FILES):
        if not (folder / name).is_file():
            raise UserError(f"{folder} without {name}", "a snapshot's folder", "export one with `encore ratings export` and give its path")
    try:
        meta = json.loads((folder / "snapshot.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'snapshot.json'}: {error}", "valid JSON", "export the snapshot again") from error
    found = content_sha256(folder)
    if found != meta.get("sha256"):
        raise UserError(
            f"a snapshot whose content hashes to {found[:12]}",
            f"{str(meta.get('sha256'))[:12]}, as written at export",
            "do not edit snapshots: export the votes again under a new name",
        )
    vote_rows, clip_rows = (_rows(folder / name) for name in FILES)
    clips = {row["sha256"]: _clip(row) for row in clip_rows}
    why = [row.get("excluded_reason") or _of_other_split(row) for row in vote_rows]
    excluded: Counter[str] = Counter(reason for reason in why if reason)
    votes = tuple(_vote(row) for row, reason in zip(vote_rows, why) if not reason)
    snapshot = Snapshot(folder, str(meta.get("name", folder.name)), found, votes, clips, dict(excluded))
    if not snapshot.judged:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(excluded.items())) or "none was given"
        gold = f"{len(votes)} on gold questions; " if votes else ""
        raise NothingToLearnError(
            f"snapshot {snapshot.name!r} without a usable vote ({gold}excluded: {reasons})",
            "at least one vote",
            "collect votes in the app, or look at why they were excluded",
        )
    for vote in votes:
        if vote.choice not in CHOICES:
            raise UserError(f"choice {vote.choice!r} in vote {vote.vote_id}", f"one of {CHOICES}", "export the snapshot again")
        for side in (vote.clip_x, vote.clip_y):
            if side not in clips:
                raise UserError(f"vote {vote.vote_id} on clip {side[:12]}, which is not in clips.jsonl", "every clip", "export again")
    made_by = {vote.pair_id: {clips[side].policy_sha256 for side in (vote.clip_x, vote.clip_y)} for vote in snapshot.judged}
    bases = set[str]().union(*made_by.values())
    if None in bases:
        n = sum(None in of_pair for of_pair in made_by.values())
        raise UserError(
            f"snapshot {snapshot.name!r} with {n} of {len(made_by)} pairs on clips that no base has made",
            "clips that `encore sample` made, with their codes; recordings in gold questions alone",
            "recordings can be rated, but a policy learns from what it can play: sample its clips and rate them in a campaign of their own",
        )
    wanted = policy_sha256 or min(bases)
    if bases != {wanted}:
        raise UserError(
            f"clips of base {', '.join(sorted(base[:12] for base in bases - {wanted}))}",
            f"clips of base {wanted[:12]} only",
            "train the base that the clips were sampled from, or sample and rate clips of this one",
        )
    return snapshot


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(io.StringIO(path.read_text(encoding="utf-8")), start=1):
        try:
            row = json.loads(line)
            missing = [key for key in DEMAND[path.name] if key not in row]
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error}", "one JSON object a line", "export the snapshot again") from error
        if missing:
            raise UserError(f"{path}, line {number} without {', '.join(missing)}", "all of a row's fields", "export again")
        rows.append(row)
    return rows


def _of_other_split(row: Mapping[str, Any]) -> str | None:
    """Why a vote on a held-out prompt is left out of training; None for one on a prompt that is trained on."""
    split = row.get("split") or TRAIN
    return None if split == TRAIN else f"split_{split}"


def _vote(row: dict[str, Any]) -> Vote:
    return Vote(
        vote_id=str(row["vote_id"]),
        pair_id=str(row["pair_id"]),
        prompt_id=str(row["prompt_id"]),
        prompt=row["prompt"],
        split=row.get("split") or TRAIN,
        rater=str(row["rater"]),
        choice=row["choice"],
        clip_x=row["clip_x"],
        clip_y=row["clip_y"],
        gold=row.get("gold"),
        repeat=bool(row.get("repeat", False)),
        confidence=row.get("confidence"),
        shown_first=row.get("shown_first"),
        aspects=_aspects(row),
        marks=_marks(row),
    )


def _aspects(row: Mapping[str, Any]) -> dict[str, int]:
    """Turned round: the app counts from -2 (the first side is much better) to 2, we by how much x is better than y."""
    scores = row.get("aspects") or {}
    if not isinstance(scores, dict) or not all(type(score) is int and -2 <= score <= 2 for score in scores.values()):
        raise UserError(f"aspects {scores!r} in vote {row['vote_id']}", "whole numbers from -2 to 2 by name", "export the snapshot again")
    return {name: -score for name, score in sorted(scores.items())}


def _marks(row: Mapping[str, Any]) -> tuple[Mark, ...]:
    marks = row.get("marks") or []
    clips = {X: row["clip_x"], Y: row["clip_y"]}
    try:
        found = tuple(Mark(clips[mark["side"]], int(mark["t0_ms"]), int(mark["t1_ms"]), str(mark.get("tag", "bad"))) for mark in marks)
        whole = all(0 <= mark.t0_ms < mark.t1_ms for mark in found)
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"marks {marks!r} in vote {row['vote_id']}", "side x or y and 0 <= t0_ms < t1_ms", "export the snapshot again")
    return found


def _clip(row: dict[str, Any]) -> Clip:
    tempo = row.get("tempo_bpm")
    made = row.get("gen") or {}
    return Clip(
        sha256=row["sha256"],
        codes_uri=row["codes_uri"],
        prompt_id=str(row["prompt_id"]),
        prompt=row["prompt"],
        policy_sha256=row["policy_sha256"],
        tempo_bpm=None if tempo is None else float(tempo),
        system=row.get("system") or "",
        adapters=tuple(row.get("adapters") or ()),
        seed=row.get("seed"),
        artist=str(row.get("artist") or made.get("artist") or ""),
        codes_sha256=row.get("codes_sha256"),
    )


def read_codes(snapshot: Snapshot, clip_sha256: str) -> Codes:
    """The codes [K, T] of a clip, from a local path, one relative to the snapshot, or any fsspec URI. Never a
    pickle, and never others than were rated, where the snapshot knows their hash."""
    clip = snapshot.clips[clip_sha256]
    if clip.codes_uri is None:
        raise UserError(f"clip {clip_sha256[:12]} without codes", "clips that `encore sample` made", "sample and rate clips of a base")
    place = clip.codes_uri if "://" in clip.codes_uri else str(snapshot.folder / clip.codes_uri)
    try:
        with fsspec.open(place, "rb") as handle:
            content: bytes = handle.read()
        found = hashlib.sha256(content).hexdigest()
        if clip.codes_sha256 not in (None, found):
            raise UserError(
                f"{place} of sha256 {found[:12]}",
                f"{str(clip.codes_sha256)[:12]}, as of clip {clip_sha256[:12]} when its votes were exported",
                "restore the codes that were rated, or sample and rate again",
            )
        codes = np.load(io.BytesIO(content), allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(
            f"no codes at {place}",
            f"the codes of clip {clip_sha256[:12]}",
            "restore the samples' folder, or sample and rate again",
        ) from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{place}: {error}", "a whole .npy of integers", "restore the file; pickled arrays are refused") from error
    if codes.ndim != 2 or codes.dtype.kind not in "iu":
        raise UserError(f"{place} of shape {codes.shape}, {codes.dtype}", "codes [K, T] of integers", "restore the file")
    return np.asarray(codes, dtype=np.int64)


def checked_codes(snapshot: Snapshot, clip_sha256: str, n_q: int | None = None, card: int | None = None) -> Codes:
    """The codes [K, T] of a clip. Raises: UserError when they are not there, or not of a codec of n_q books of `card` entries."""
    codes, clip = read_codes(snapshot, clip_sha256), snapshot.clips[clip_sha256]
    bad_books = n_q is not None and codes.shape[0] != n_q
    bad_values = codes.size == 0 or codes.min() < 0 or (card is not None and codes.max() >= card)
    if bad_books or bad_values:
        values = f"values {codes.min()} to {codes.max()}" if codes.size else "no value"
        raise UserError(
            f"clip {clip.sha256[:12]} with {codes.shape[0]} codebooks, {values}",
            f"codes of this codec: {n_q or codes.shape[0]} codebooks, 0 to {(card or 1) - 1}",
            "train with the codec that the clips were sampled with",
        )
    return codes
