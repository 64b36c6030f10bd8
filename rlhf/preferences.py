"""A frozen snapshot of votes -> preferences that a trainer can use.

    rlhf.snapshot -> votes of one pair joined -> chosen / rejected codes [K, T]

Three kinds of answer stay three kinds: a preference is an order, a tie is half of each (a soft label), and "both bad"
says nothing about the order, so it never becomes a pair but an absolute judgement of its own (`both_bad`). Splits go by
prompt and artist, never by pair: two pairs of one prompt share clips and would leak.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlhf.snapshot import (
    BOTH_BAD,
    TIE,
    Codes,
    NothingToLearnError,
    Snapshot,
    Spans,
    Vote,
    X,
    Y,
    checked_codes,
    content_sha256,
    load_snapshot,
    read_codes,
)

__all__ = [
    "BOTH_BAD", "TIE", "BothBad", "Codes", "Preference", "Snapshot", "Spans", "Vote", "X", "Y", "both_bad", "checked_codes", "clip_marks",
    "codes_sha256", "content_sha256", "decided", "demand_decided", "load_snapshot", "pairs_sha256", "prompt_folds", "prompt_groups",
    "read_codes", "shuffled", "split_by_prompt", "training_pairs",
]  # fmt: skip


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
    n_votes: int = 1
    """The votes that weigh anything."""


@dataclass(frozen=True)
class BothBad:
    """An absolute judgement: neither clip is any good."""

    prompt_id: str
    pair_id: str
    rater: str
    clip_x: str
    clip_y: str


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
    Raises: NothingToLearnError when no ordered pair is left; UserError for codes that are not of this codec.
    """
    groups: dict[tuple[str, str, str], list[Vote]] = defaultdict(list)
    for vote in snapshot.judged:
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
                n_votes=sum(weight != 0 for weight in weights),
            )
        )
    if not pairs:
        raise NothingToLearnError(
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


def both_bad(snapshot: Snapshot) -> list[BothBad]:
    """The absolute judgements, kept apart from the preferences. Gold questions are left out: one of their clips is bad on purpose."""
    said = [vote for vote in snapshot.judged if vote.choice == BOTH_BAD]
    return [BothBad(vote.prompt_id, vote.pair_id, vote.rater, vote.clip_x, vote.clip_y) for vote in said]


def decided(pairs: Iterable[Preference]) -> list[Preference]:
    """Without the pairs whose votes balance out."""
    return [pair for pair in pairs if pair.p > 0.5]


def demand_decided(pairs: list[Preference]) -> list[Preference]:
    """The pairs as they are. Raises: NothingToLearnError when each of them is a tie, from which an order cannot be learnt."""
    if not decided(pairs):
        raise NothingToLearnError(f"{len(pairs)} pairs, all of them ties", "votes for a side", "collect votes on pairs that differ more")
    return pairs


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


# ---- splits ----------------------------------------------------------------------------------------------------------


def prompt_folds(prompt_ids: Iterable[str], n_folds: int, seed: int = 0) -> dict[str, int]:
    """prompt_id -> fold, as even as can be, a function of the ids and the seed only (not of their order).

    Raises: NothingToLearnError with fewer prompts than folds.
    """
    ids = sorted(set(prompt_ids), key=lambda name: hashlib.sha256(f"{seed}|{name}".encode()).hexdigest())
    if len(ids) < n_folds:
        got = f"votes on {len(ids)} prompts, those that share an artist or a clip taken as one"
        raise NothingToLearnError(got, f"at least {n_folds}, one a fold", "collect votes on more prompts, or ask for fewer folds")
    return {name: index % n_folds for index, name in enumerate(ids)}


def prompt_groups(snapshot: Snapshot) -> dict[str, str]:
    """prompt_id -> the group it is held out with: prompts whose clips share an artist, or are the same clip, stand together. Else each
    alone. What gold questions share links nothing, as nothing is learnt from them."""
    parent = {vote.prompt_id: vote.prompt_id for vote in snapshot.votes} | {
        clip.prompt_id: clip.prompt_id for clip in snapshot.clips.values()
    }

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    heard = [(sha256, vote.prompt_id) for vote in snapshot.judged for sha256 in (vote.clip_x, vote.clip_y)]
    by_artist = [(f"artist {clip.artist}", clip.prompt_id) for clip in (snapshot.clips[sha256] for sha256, _ in heard) if clip.artist]
    by_clip = [(f"clip {sha256}", prompt_id) for sha256, prompt_id in heard]
    first: dict[str, str] = {}
    for shared, prompt_id in sorted({*by_artist, *by_clip}):
        one, other = root(first.setdefault(shared, prompt_id)), root(prompt_id)
        parent[max(one, other)] = min(one, other)
    return {name: root(name) for name in sorted(parent)}


def split_by_prompt(
    pairs: Sequence[Preference], held_out: float = 0.2, seed: int = 0, groups: Mapping[str, str] | None = None
) -> tuple[list[Preference], list[Preference]]:
    """(training, held-out) pairs without a common prompt; about `held_out` of the prompts, at least one, are held out.

    Args: groups: prompt_id -> group (`prompt_groups`); prompts of one group stand on one side, so that no artist stands on both.
    Raises: NothingToLearnError when there is but one prompt, or one group.
    """
    group = {pair.prompt_id: (groups or {}).get(pair.prompt_id, pair.prompt_id) for pair in pairs}
    names = set(group.values())
    if len(names) < 2:
        raise NothingToLearnError(
            f"votes on {len(group)} prompt(s), all linked by an artist or a clip, or one",
            "two or more that can stand apart",
            "collect more, or pass --held-out 0",
        )
    folds = prompt_folds(names, max(2, min(round(1 / held_out), len(names))), seed)
    return (
        [pair for pair in pairs if folds[group[pair.prompt_id]] != 0],
        [pair for pair in pairs if folds[group[pair.prompt_id]] == 0],
    )


# ---- what a training set is known by ---------------------------------------------------------------------------------


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


def codes_sha256(clips: Iterable[tuple[str, Codes]]) -> str:
    """What the codes [K, T] that a run learns are known by: in their order, each with what is said of it. A resumed run asks for them."""
    digest = hashlib.sha256()
    for said, codes in clips:
        digest.update(f"{said}{codes.shape}|".encode() + codes.tobytes())
    return digest.hexdigest()
