"""A frozen snapshot of votes -> preferences that a trainer can use.

    snapshot.json + votes.jsonl + clips.jsonl -> hash checked -> pairs, votes of one pair joined -> chosen / rejected
    codes [K, T]

Three kinds of answer stay three kinds: a preference is an order, a tie is half of each (a soft label), and "both bad"
says nothing about the order, so it never becomes a pair but an absolute judgement of its own (`both_bad`). Beside the
order a vote may judge aspects apart and mark stretches of a clip as bad; both are kept. Excluded votes are counted, not
used. Splits go by prompt and artist, never by pair: two pairs of one prompt share clips and would leak."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from numpy.typing import NDArray

from base_models.errors import UserError

Codes = NDArray[np.int64]
"""[K, T]"""

X, Y, TIE, BOTH_BAD = "x", "y", "tie", "both_bad"
CHOICES = (X, Y, TIE, BOTH_BAD)
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
    codes_uri: str
    prompt_id: str
    prompt: str
    policy_sha256: str
    tempo_bpm: float | None = None
    system: str = ""
    adapters: tuple[str, ...] = ()
    seed: int | None = None
    artist: str = ""
    """Whose clip it is, where its metadata tells."""


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot. `votes` are the usable ones (gold questions and repeats included); `n_excluded` counts the
    rest by reason."""

    folder: Path
    name: str
    sha256: str
    votes: tuple[Vote, ...]
    clips: Mapping[str, Clip]
    n_excluded: Mapping[str, int]

    @property
    def policy_sha256(self) -> str:
        """The base that all clips were made with."""
        return next(iter(self.clips.values())).policy_sha256

    @property
    def raters(self) -> list[str]:
        return sorted({vote.rater for vote in self.votes})


@dataclass(frozen=True)
class Preference:
    """A pair with everything that its raters said: `p` is the probability that chosen beats rejected (1/2 to 1)."""

    prompt: str
    tempo_bpm: float | None
    chosen_codes: Codes
    rejected_codes: Codes
    p: float
    weight: float
    """How much its votes weigh together; the mean over a training set is about 1."""
    pair_id: str
    rater: str
    """The raters, joined by commas."""
    prompt_id: str
    chosen_sha256: str
    rejected_sha256: str
    aspects: Mapping[str, float] = field(default_factory=dict)
    """Aspect -> how much better chosen is than rejected, -2 to 2: the mean over its raters, weighted as their votes are."""
    chosen_marks: Spans = ()
    """Where raters marked the chosen clip as bad, in whichever pair they met it."""
    rejected_marks: Spans = ()


@dataclass(frozen=True)
class BothBad:
    """An absolute judgement: neither clip is any good."""

    prompt_id: str
    pair_id: str
    rater: str
    clip_x: str
    clip_y: str


# ---- a snapshot's folder ---------------------------------------------------------------------------------------------


def content_sha256(folder: str | Path) -> str:
    """The hash a snapshot is known by: over the bytes of votes.jsonl, then of clips.jsonl."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()


def load_snapshot(folder: str | Path, policy_sha256: str | None = None) -> Snapshot:
    """Read and verify a snapshot that `encore ratings export` wrote.

    Args: policy_sha256: the base that is to be trained; its codes are the only ones that mean anything to it.
    Raises: UserError when files are missing, cut or changed after the export, when no usable vote is left, when votes
        name unknown clips, or when clips come from another base."""
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
    excluded: Counter[str] = Counter(row["excluded_reason"] for row in vote_rows if row.get("excluded_reason"))
    votes = tuple(_vote(row) for row in vote_rows if not row.get("excluded_reason"))
    if not votes:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(excluded.items())) or "none was given"
        raise UserError(
            f"snapshot {meta.get('name', folder.name)!r} without a usable vote (excluded: {reasons})",
            "at least one vote",
            "collect votes in the app, or look at why they were excluded",
        )
    for vote in votes:
        if vote.choice not in CHOICES:
            raise UserError(f"choice {vote.choice!r} in vote {vote.vote_id}", f"one of {CHOICES}", "export the snapshot again")
        for side in (vote.clip_x, vote.clip_y):
            if side not in clips:
                raise UserError(f"vote {vote.vote_id} on clip {side[:12]}, which is not in clips.jsonl", "every clip", "export again")
    bases = {clips[side].policy_sha256 for vote in votes for side in (vote.clip_x, vote.clip_y)}
    wanted = policy_sha256 or min(bases)
    if bases != {wanted}:
        raise UserError(
            f"clips of base {', '.join(sorted(base[:12] for base in bases - {wanted}))}",
            f"clips of base {wanted[:12]} only",
            "train the base that the clips were sampled from, or sample and rate clips of this one",
        )
    return Snapshot(folder, str(meta.get("name", folder.name)), found, votes, clips, dict(excluded))


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


def _vote(row: dict[str, Any]) -> Vote:
    return Vote(
        vote_id=str(row["vote_id"]),
        pair_id=str(row["pair_id"]),
        prompt_id=str(row["prompt_id"]),
        prompt=row["prompt"],
        split=row.get("split") or "train",
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
    )


def read_codes(snapshot: Snapshot, clip_sha256: str) -> Codes:
    """The codes [K, T] of a clip, from a local path, one relative to the snapshot, or any fsspec URI. Never a
    pickle."""
    uri = snapshot.clips[clip_sha256].codes_uri
    place = uri if "://" in uri else str(snapshot.folder / uri)
    try:
        with fsspec.open(place, "rb") as handle:
            codes = np.load(handle, allow_pickle=False)
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


# ---- preferences -----------------------------------------------------------------------------------------------------


def training_pairs(
    snapshot: Snapshot,
    reliability: Mapping[str, float] | None = None,
    *,
    n_q: int | None = None,
    card: int | None = None,
    min_weight: float = 0.0,
    known: Mapping[str, Codes] | None = None,
) -> list[Preference]:
    """Join the votes of each pair into one preference; the order of the result depends on the content only.

    With the raters' weights w (1 each without `reliability`): p(x beats y) = sum w [x wins] + w/2 [tie] over sum w,
    over the votes that order. Gold questions and "both bad" are left out; a repeat counts like any vote. A weight of 0
    silences a rater; below 0, the rater's answers count the other way round, |w| each. Aspects are joined over all votes
    on the pair that tell them, marks over all votes on the clip, both-bad ones included.

    Args: reliability: rater -> weight (rlhf.raters.reliability). n_q, card: what the codec speaks, to refuse foreign
        codes. min_weight: leave out pairs whose votes weigh this or less. known: codes of clips that were read already.
    Raises: UserError when no ordered pair is left, or for codes that are not of this codec.
    """
    groups: dict[tuple[str, str, str], list[Vote]] = defaultdict(list)
    for vote in snapshot.votes:
        if not vote.gold:
            groups[(vote.pair_id, min(vote.clip_x, vote.clip_y), max(vote.clip_x, vote.clip_y))].append(vote)
    marks = clip_marks(snapshot, reliability)

    codes = dict(known or {})

    def codes_of(clip: str) -> Codes:
        if clip not in codes:
            codes[clip] = checked_codes(snapshot, clip, n_q, card)
        return codes[clip]

    pairs = []
    for (pair_id, first, second), told in sorted(groups.items()):
        votes = [vote for vote in told if vote.choice != BOTH_BAD]
        weights = [_weight(vote, reliability) for vote in votes]
        total = sum(abs(weight) for weight in weights)
        if not votes or total <= min_weight:
            continue
        wins = [0.5 if vote.choice == TIE else float((_winner(vote) == first) == (weight > 0)) for vote, weight in zip(votes, weights)]
        p = sum(abs(weight) * win for weight, win in zip(weights, wins)) / total
        chosen, rejected = (first, second) if p >= 0.5 else (second, first)
        clip = snapshot.clips[chosen]
        pairs.append(
            Preference(
                prompt=votes[0].prompt,
                tempo_bpm=clip.tempo_bpm,
                chosen_codes=codes_of(chosen),
                rejected_codes=codes_of(rejected),
                p=max(p, 1 - p),
                weight=total,
                pair_id=pair_id,
                rater=",".join(sorted({vote.rater for vote in votes})),
                prompt_id=votes[0].prompt_id,
                chosen_sha256=chosen,
                rejected_sha256=rejected,
                aspects=_joined_aspects(told, chosen, reliability),
                chosen_marks=marks.get(chosen, ()),
                rejected_marks=marks.get(rejected, ()),
            )
        )
    if not pairs:
        raise UserError(
            f"snapshot {snapshot.name!r} with {len(snapshot.votes)} votes but no pair that is ordered by them",
            "votes for a side or ties from raters who are trusted",
            "collect more votes; both-bad answers and gold questions order nothing",
        )
    scale = len(pairs) / sum(pair.weight for pair in pairs)
    return [replace(pair, weight=pair.weight * scale) for pair in pairs]


def _weight(vote: Vote, reliability: Mapping[str, float] | None) -> float:
    return 1.0 if reliability is None else reliability.get(vote.rater, 0.0)


def _joined_aspects(votes: Sequence[Vote], chosen: str, reliability: Mapping[str, float] | None) -> dict[str, float]:
    """Aspect -> weighted mean score of chosen over the other clip, over the votes that judge it; raters of weight 0 or less say nothing."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for vote in votes:
        weight = max(0.0, _weight(vote, reliability))
        for name, score in vote.aspects.items():
            sums[name][0] += weight * (score if vote.clip_x == chosen else -score)
            sums[name][1] += weight
    return {name: total / weight for name, (total, weight) in sorted(sums.items()) if weight > 0}


def clip_marks(snapshot: Snapshot, reliability: Mapping[str, float] | None = None) -> dict[str, Spans]:
    """Clip -> the stretches that raters marked as bad, in whichever pair; gold questions and raters of weight 0 or less are left out."""
    found: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for vote in snapshot.votes:
        if vote.marks and not vote.gold and _weight(vote, reliability) > 0:
            for mark in vote.marks:
                found[mark.clip].add((mark.t0_ms, mark.t1_ms))
    return {clip: tuple(sorted(spans)) for clip, spans in sorted(found.items())}


def _winner(vote: Vote) -> str:
    return vote.clip_x if vote.choice == X else vote.clip_y


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


def both_bad(snapshot: Snapshot) -> list[BothBad]:
    """The absolute judgements, kept apart from the preferences."""
    return [
        BothBad(vote.prompt_id, vote.pair_id, vote.rater, vote.clip_x, vote.clip_y) for vote in snapshot.votes if vote.choice == BOTH_BAD
    ]


def decided(pairs: Iterable[Preference]) -> list[Preference]:
    """Without the pairs whose votes balance out."""
    return [pair for pair in pairs if pair.p > 0.5]


def shuffled(pairs: Sequence[Preference], seed: int) -> list[Preference]:
    """The control: in half of the pairs chosen and rejected change places. Whatever is learnt from these is no taste.

    Exactly half, and of each prompt's pairs half (give or take one), drawn at random: independent coins would by luck leave more
    true labels than false ones. One shuffle still is one draw: what it teaches points somewhere, so judge the control over several.
    """
    rng = np.random.default_rng(seed)
    rank = rng.permutation(len(pairs))
    prompts = sorted({pair.prompt_id for pair in pairs})
    place = dict(zip(prompts, rng.permutation(len(prompts))))
    order = sorted(range(len(pairs)), key=lambda row: (place[pairs[row].prompt_id], rank[row]))
    turned = set(order[int(rng.integers(2)) :: 2])
    return [
        replace(
            pair,
            chosen_codes=pair.rejected_codes,
            rejected_codes=pair.chosen_codes,
            chosen_sha256=pair.rejected_sha256,
            rejected_sha256=pair.chosen_sha256,
            aspects={name: -score for name, score in pair.aspects.items()},
            chosen_marks=pair.rejected_marks,
            rejected_marks=pair.chosen_marks,
        )
        if row in turned
        else pair
        for row, pair in enumerate(pairs)
    ]


def prompt_folds(prompt_ids: Iterable[str], n_folds: int, seed: int = 0) -> dict[str, int]:
    """prompt_id -> fold, as even as can be, a function of the ids and the seed only (not of their order).

    Raises: UserError with fewer prompts than folds.
    """
    ids = sorted(set(prompt_ids), key=lambda name: hashlib.sha256(f"{seed}|{name}".encode()).hexdigest())
    if len(ids) < n_folds:
        raise UserError(f"votes on {len(ids)} prompts", f"at least {n_folds}, one a fold", "collect votes on more prompts")
    return {name: index % n_folds for index, name in enumerate(ids)}


def prompt_groups(snapshot: Snapshot) -> dict[str, str]:
    """prompt_id -> the group it is held out with: prompts whose clips share an artist stand together. Without artists, each alone."""
    parent = {vote.prompt_id: vote.prompt_id for vote in snapshot.votes} | {
        clip.prompt_id: clip.prompt_id for clip in snapshot.clips.values()
    }

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    first: dict[str, str] = {}
    for clip in sorted(snapshot.clips.values(), key=lambda clip: clip.sha256):
        if clip.artist:
            one, other = root(first.setdefault(clip.artist, clip.prompt_id)), root(clip.prompt_id)
            parent[max(one, other)] = min(one, other)
    return {name: root(name) for name in sorted(parent)}


def pairs_sha256(pairs: Sequence[Preference]) -> str:
    """What a training set is known by: clips, codes, labels, weights, aspects and marks; not the order of the pairs, nor who voted."""
    digest = hashlib.sha256()
    for line in sorted(json.dumps(_content(pair), sort_keys=True) for pair in pairs):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _content(pair: Preference) -> dict[str, Any]:
    codes = hashlib.sha256(pair.chosen_codes.tobytes() + b"|" + pair.rejected_codes.tobytes()).hexdigest()
    clips = [pair.chosen_sha256, pair.rejected_sha256, pair.chosen_codes.shape, pair.rejected_codes.shape, codes]
    said = [round(pair.p, 9), round(pair.weight, 9), dict(pair.aspects), pair.chosen_marks, pair.rejected_marks]
    return {"prompt": [pair.prompt_id, pair.prompt, pair.tempo_bpm], "clips": clips, "said": said}


def split_by_prompt(pairs: Sequence[Preference], held_out: float = 0.2, seed: int = 0) -> tuple[list[Preference], list[Preference]]:
    """(training, held-out) pairs without a common prompt; about `held_out` of the prompts, at least one, are held
    out."""
    ids = {pair.prompt_id for pair in pairs}
    folds = prompt_folds(ids, max(2, min(round(1 / held_out), len(ids))), seed)
    return (
        [pair for pair in pairs if folds[pair.prompt_id] != 0],
        [pair for pair in pairs if folds[pair.prompt_id] == 0],
    )
