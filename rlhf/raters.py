"""Who among the raters can be relied on, how far they agree, and how right a model can be at all.

    votes -> agreement -> ceiling          votes -> EM -> accuracy a_r per rater -> weight log(a_r / (1 - a_r))

Nothing here asks what was played: it uses only who said what about which pair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from db import quality
from db.quality import Agreement, ceiling
from rlhf.preferences import Vote, X, Y

__all__ = ["Agreement", "RaterQuality", "agreement", "ceiling", "reliability", "weights"]

Array = NDArray[np.float64]


# ---- agreement -------------------------------------------------------------------------------------------------------


def agreement(votes: Sequence[Vote], n_boot: int = 1000, seed: int = 0) -> Agreement | None:
    """Agreement over all pairs with two decided votes or more of different raters; None when there is no such pair."""
    by_pair: dict[str, dict[str, str]] = defaultdict(dict)
    for vote in votes:
        if vote.choice in (X, Y) and not vote.gold and not vote.repeat:
            by_pair[vote.pair_id][vote.rater] = vote.clip_x if vote.choice == X else vote.clip_y
    firsts = ((sum(clip == min(said.values()) for clip in said.values()), len(said)) for said in by_pair.values())
    return quality.agreement(((n, of - n) for n, of in firsts), n_boot, seed)


# ---- reliability -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RaterQuality:
    """What the votes say about one rater."""

    accuracy: float
    """Probability of naming the side that the others' votes make the better one, drawn towards `prior` when votes are
    few."""
    weight: float
    """log(accuracy / (1 - accuracy)), never below 0, scaled to a mean of 1 over the raters."""
    n: int
    """Decided votes on pairs that somebody else judged too."""


def reliability(votes: Sequence[Vote], prior: float = 0.7, prior_votes: float = 8.0, iterations: int = 50) -> dict[str, RaterQuality]:
    """One-coin Dawid and Skene (1979) by EM: which side is better is hidden, each rater names it with accuracy a_r.

    E: posterior of the better side of every pair from its votes. M: a_r = (expected right votes + prior * prior_votes)
    / (n_r + prior_votes), the mean of a Beta posterior, so that a rater with few votes is neither trusted nor damned.
    Ties and both-bad say nothing here. Gold questions enter as pairs whose better side is known.

    Returns: rater -> quality, for everybody who voted. A rater whose accuracy is 1/2 or less weighs 0.
    """
    raters = sorted({vote.rater for vote in votes})
    number = {rater: index for index, rater in enumerate(raters)}
    by_pair: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote.choice in (X, Y):
            by_pair[vote.pair_id].append(vote)
    pair_of, rater_of, for_first, known = [], [], [], {}
    for index, (_, said) in enumerate(sorted(by_pair.items())):
        if len({vote.rater for vote in said}) < 2 and not said[0].gold:
            continue
        first = min(said[0].clip_x, said[0].clip_y)
        for vote in said:
            pair_of.append(index)
            rater_of.append(number[vote.rater])
            for_first.append((vote.clip_x if vote.choice == X else vote.clip_y) == first)
            if vote.gold in (X, Y):
                known[index] = (vote.clip_x if vote.gold == X else vote.clip_y) == first
    accuracy = np.full(len(raters), prior)
    n = np.bincount(np.array(rater_of, dtype=int), minlength=len(raters)).astype(float)
    if pair_of:
        pairs, who = np.array(pair_of), np.array(rater_of)
        sign = np.where(for_first, 1.0, -1.0)
        for _ in range(iterations):
            log_odds = np.log(accuracy / (1 - accuracy))
            evidence = np.bincount(pairs, weights=sign * log_odds[who], minlength=pairs.max() + 1)
            first_better = 1 / (1 + np.exp(-np.clip(evidence, -30, 30)))
            for index, truth in known.items():
                first_better[index] = float(truth)
            right = np.where(sign > 0, first_better[pairs], 1 - first_better[pairs])
            hits = np.bincount(who, weights=right, minlength=len(raters))
            accuracy = np.clip((hits + prior * prior_votes) / (n + prior_votes), 0.02, 0.98)
    weight = np.maximum(0.0, np.log(accuracy / (1 - accuracy)))
    weight = weight / weight.mean() if weight.sum() > 0 else np.ones_like(weight)
    return {rater: RaterQuality(float(accuracy[i]), float(weight[i]), int(n[i])) for rater, i in number.items()}


def weights(qualities: Mapping[str, RaterQuality]) -> dict[str, float]:
    """rater -> weight, as rlhf.preferences.training_pairs takes it."""
    return {rater: quality.weight for rater, quality in qualities.items()}
