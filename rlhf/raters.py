"""Who among the raters can be relied on, how far they agree, and how right a model can be at all.

    votes -> agreement -> ceiling
    votes -> EM over pairs -> accuracy per rater -> weight log(a / (1 - a))                    (needs two raters on a pair)
    votes + margins of a model that has not seen them -> slope a_r and lean b_r per rater      (needs none)

The first asks only who said what about which pair. The second also uses what the reward makes of the clips, and so learns about
a rater who shares no pair with anybody. Whoever answers against the music beyond chance is an adversary: silenced, or turned round.
How much each system is liked, with ties and the side's gain, is `db.davidson`'s to say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from db import quality
from db.quality import Agreement, ceiling
from rlhf.preferences import BOTH_BAD, TIE, Vote, X, Y

__all__ = ["Agreement", "Habit", "Habits", "RaterQuality", "agreement", "ceiling", "habits", "reliability", "weights"]

Array = NDArray[np.float64]
Adversaries = Literal["silence", "invert"]
SURE = 2.0
"""A rater is an adversary when so many standard errors above the estimate still lie on the wrong side."""


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
    adversary: bool = False
    """Whether the votes go against the others' beyond chance: the accuracy and two standard errors are still below 1/2."""


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
    against = accuracy + SURE * np.sqrt(accuracy * (1 - accuracy) / (n + prior_votes + 1)) < 0.5
    return {rater: RaterQuality(float(accuracy[i]), float(weight[i]), int(n[i]), bool(against[i])) for rater, i in number.items()}


def weights(qualities: Mapping[str, RaterQuality], adversaries: Adversaries = "silence") -> dict[str, float]:
    """rater -> weight, as rlhf.preferences.training_pairs takes it.

    Args: adversaries: "silence" gives them 0; "invert" a negative weight, by which their votes count the other way round.
    """
    found = {rater: quality.weight for rater, quality in qualities.items()}
    if adversaries == "invert":
        unit = np.mean([max(0.0, _log_odds(quality.accuracy)) for quality in qualities.values()]) or 1.0
        found |= {rater: _log_odds(quality.accuracy) / float(unit) for rater, quality in qualities.items() if quality.adversary}
    return found


def _log_odds(accuracy: float) -> float:
    return float(np.log(accuracy / (1 - accuracy)))


# ---- habits: how raters answer to what a model hears -----------------------------------------------------------------

SLOPE_SD, LEAN_SD = 0.5, 0.3
"""What the spreads of slopes (over their mean) and of leans (nats) are taken for before anybody voted; it counts as two raters."""


@dataclass(frozen=True)
class Habit:
    """How one rater answers."""

    slope: float
    """By how much the rater's answers follow the margins; 1 is all raters taken as one, 0 does not listen, below 0 answers against."""
    slope_se: float
    lean: float
    """Towards the side on the left, nats."""
    n: int
    """Votes for a side, and ties."""

    @property
    def adversary(self) -> bool:
        return self.slope + SURE * self.slope_se < 0

    def used(self, adversaries: Adversaries = "silence") -> float:
        """The slope that training takes: never below 0, unless adversaries are turned round."""
        return self.slope if self.adversary and adversaries == "invert" else max(0.0, self.slope)


@dataclass(frozen=True)
class Habits:
    """The habits of all raters, and what they share."""

    raters: dict[str, Habit]
    scale: float
    """Nats for a margin of 1 at slope 1."""
    tie: float
    """nu in Davidson's model."""
    lean: float
    """The mean rater's, nats."""
    spread: float
    """Between raters, of the slope."""


def habits(votes: Sequence[Vote], margins: Array, iterations: int = 30) -> Habits | None:
    """Slope a_r and lean b_r of every rater, given margins from elsewhere: x : y : tie = e^(h/2) : e^(-h/2) : nu, h = a_r d + b_r o.

    d [N]: margins score(x) - score(y) of a model that has *not* seen these votes, else raters are judged by their own echo.
    o = 1 where x stood on the left, -1 where y did, 0 where that is not known. a_r and b_r are normal around means of their own;
    how far they spread is learnt from the raters (EM, with Laplace's approximation), so that a rater with few votes is drawn
    towards the mean rater. Davidson and Beaver 1977 (ties, order); slopes may be negative, which tells an adversary.

    Returns: None when the margins tell nothing about the votes: all raters taken as one have no slope above 0 by two standard errors.
    """
    told = [(vote, d) for vote, d in zip(votes, margins, strict=True) if vote.choice != BOTH_BAD]
    unit = float(np.sqrt(np.mean(np.square([d for _, d in told])))) if told else 0.0
    if unit == 0:
        return None
    names = sorted({vote.rater for vote, _ in told})
    seat = {name: index for index, name in enumerate(names)}
    who = np.array([seat[vote.rater] for vote, _ in told])
    d = np.array([margin for _, margin in told]) / unit
    o = np.array([{X: 1.0, Y: -1.0}.get(vote.shown_first or "", 0.0) for vote, _ in told])
    said = np.array([[vote.choice == X, vote.choice == Y, vote.choice == TIE] for vote, _ in told], dtype=float)
    R, n = len(names), np.bincount(who, minlength=len(names))
    nobody = np.zeros_like(who)
    one = _habits_mode(np.array([1.0, 1.0, 0.0, 0.0, -1.0]), said, d, o, nobody, 1.0, LEAN_SD)
    listening = float(one[0])
    if listening <= SURE * float(_habits_information(one, d, o, nobody, 1.0, LEAN_SD)[0, 0]) ** -0.5:
        return None

    slope_sd, lean_sd = SLOPE_SD * listening, LEAN_SD
    at = np.concatenate([np.full(R + 1, 1.0), np.zeros(R + 1), [-1.0]])  # a_r, their mean, b_r, their mean, log nu
    information = np.eye(len(at))
    for _ in range(iterations):
        at = _habits_mode(at, said, d, o, who, slope_sd, lean_sd)
        information = _habits_information(at, d, o, who, slope_sd, lean_sd)
        variance = np.diag(np.linalg.inv(information))
        a, m, b, mean = at[:R], at[R], at[R + 1 : 2 * R + 1], at[2 * R + 1]
        before = slope_sd, lean_sd
        # Two raters' worth of the spreads that were expected keep a crew of equals from falling to none, where EM would stay.
        slope_sd = float(np.sqrt((np.sum((a - m) ** 2 + variance[:R]) + 2 * (SLOPE_SD * listening) ** 2) / (R + 2)))
        lean_sd = float(np.sqrt((np.sum((b - mean) ** 2 + variance[R + 1 : 2 * R + 1]) + 2 * LEAN_SD**2) / (R + 2)))
        if abs(slope_sd - before[0]) + abs(lean_sd - before[1]) < 1e-3:
            break
    return Habits(
        {name: Habit(float(a[i] / listening), float(np.sqrt(variance[i]) / listening), float(b[i]), int(n[i])) for name, i in seat.items()},
        scale=listening / unit,
        tie=float(np.exp(at[-1])),
        lean=float(mean),
        spread=slope_sd / listening,
    )


def _habits_mode(at: Array, said: Array, d: Array, o: Array, who: NDArray[np.int64], slope_sd: float, lean_sd: float) -> Array:
    """The posterior mode, from `at` on."""
    found = minimize(_habits_loss, at, args=(said, d, o, who, slope_sd, lean_sd), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return np.asarray(found.x)


def _habits_point(at: Array, d: Array, o: Array, who: NDArray[np.int64]) -> Array:
    """Probabilities [N, 3] of x, y and tie."""
    R = (len(at) - 3) // 2
    half = (at[:R][who] * d + at[R + 1 : 2 * R + 1][who] * o) / 2
    weights = np.stack([half, -half, np.full_like(half, at[-1])], axis=1)
    weights = np.exp(weights - weights.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _habits_loss(
    at: Array, said: Array, d: Array, o: Array, who: NDArray[np.int64], slope_sd: float, lean_sd: float
) -> tuple[float, Array]:
    """Minus the log posterior, and its slope."""
    R = (len(at) - 3) // 2
    p = _habits_point(at, d, o, who)
    value = -float(np.log(np.maximum((p * said).sum(1), 1e-300)).sum())
    by_h = -((said[:, 0] - said[:, 1]) - (p[:, 0] - p[:, 1])) / 2
    gradient = np.zeros_like(at)
    gradient[:R] = np.bincount(who, by_h * d, R)
    gradient[R + 1 : 2 * R + 1] = np.bincount(who, by_h * o, R)
    gradient[-1] = -float((said[:, 2] - p[:, 2]).sum()) + 0.01 * at[-1]
    value += 0.005 * float(at[-1]) ** 2
    for first, sd in ((0, slope_sd), (R + 1, lean_sd)):
        off = at[first : first + R] - at[first + R]
        value += float(off @ off) / (2 * sd**2)
        gradient[first : first + R] += off / sd**2
        gradient[first + R] -= float(off.sum()) / sd**2
    return value, gradient


def _habits_information(at: Array, d: Array, o: Array, who: NDArray[np.int64], slope_sd: float, lean_sd: float) -> Array:
    """Minus the second derivatives of the log posterior [P, P]."""
    R = (len(at) - 3) // 2
    p = _habits_point(at, d, o, who)
    lean = p[:, 0] - p[:, 1]
    hh = (p[:, 0] + p[:, 1] - lean**2) / 4
    hn = -lean * p[:, 2] / 2
    each, slopes, leans = np.arange(R), np.arange(R), np.arange(R) + R + 1
    result = np.zeros((len(at), len(at)))
    result[each, each] = np.bincount(who, hh * d * d, R)
    result[leans, leans] = np.bincount(who, hh * o * o, R)
    result[slopes, leans] = result[leans, slopes] = np.bincount(who, hh * d * o, R)
    for places, along in ((slopes, d), (leans, o)):
        result[places, -1] = result[-1, places] = np.bincount(who, hn * along, R)
    result[-1, -1] = float((p[:, 2] * (1 - p[:, 2])).sum()) + 0.01
    for first, sd in ((0, slope_sd), (R + 1, lean_sd)):
        rows = np.arange(first, first + R)
        result[rows, rows] += sd**-2
        result[rows, first + R] -= sd**-2
        result[first + R, rows] -= sd**-2
        result[first + R, first + R] += R * sd**-2
    result[2 * R + 1, 2 * R + 1] += 1e-6  # a snapshot that tells no sides leaves the mean lean open
    return result
