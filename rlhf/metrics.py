"""Figures with their uncertainty: win rates, accuracy, calibration, diversity, distance from the base.

Every interval resamples *prompts*, not pairs: pairs of one prompt share clips and conditions, and pretending that they
are independent makes intervals too narrow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval, and how many observations in how many clusters it rests on."""

    value: float
    ci: tuple[float, float]
    n: int
    n_clusters: int

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "ci": list(self.ci)}


def cluster_bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    clusters: Sequence[object],
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `statistic(indices)` under resampling of whole clusters with replacement.

    Args: statistic: row indices -> figure (NaN for a draw that defines none; such draws are left out). clusters: one
        label a row."""
    labels = np.unique(np.asarray([str(cluster) for cluster in clusters]), return_inverse=True)[1]
    members = [np.flatnonzero(labels == index) for index in range(labels.max() + 1)]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_boot):
        chosen = rng.integers(0, len(members), len(members))
        draws.append(statistic(np.concatenate([members[index] for index in chosen])))
    values = np.asarray(draws, dtype=float)
    tail = (1 - level) / 2 * 100
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def mean_ci(values: ArrayLike, clusters: Sequence[object], n_boot: int = 2000, seed: int = 0) -> Estimate:
    """A mean over observations with its interval by cluster.

    The interval is of the ratio sum/count over resampled clusters: the general `cluster_bootstrap`, in closed form for
    a mean."""
    observed = np.asarray(values, dtype=float)
    if observed.ndim != 1 or len(observed) != len(clusters) or not len(observed):
        raise ValueError(f"{observed.shape} values for {len(clusters)} cluster labels")
    labels = np.unique(np.asarray([str(cluster) for cluster in clusters]), return_inverse=True)[1]
    sums, counts = np.bincount(labels, weights=observed), np.bincount(labels).astype(float)
    draws = np.random.default_rng(seed).integers(0, len(sums), (n_boot, len(sums)))
    low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
    return Estimate(float(observed.mean()), (float(low), float(high)), len(observed), len(sums))


def crossed_bootstrap(values: ArrayLike, first: Sequence[object], second: Sequence[object], n_boot: int = 2000, seed: int = 0) -> Estimate:
    """A mean with its interval under two crossed kinds of cluster, prompts and raters: both are resampled, a value's weight is the product.

    Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2): a little too wide rather than too narrow. With a single
    cluster of a kind (one rater) the interval speaks of that one alone."""
    observed = np.asarray(values, dtype=float)
    if observed.ndim != 1 or not len(observed) == len(first) == len(second) or not len(observed):
        raise ValueError(f"{observed.shape} values for {len(first)} and {len(second)} cluster labels")
    rng = np.random.default_rng(seed)
    weight = np.ones((n_boot, len(observed)))
    sizes = []
    for clusters in (first, second):
        labels = np.unique(np.asarray([str(cluster) for cluster in clusters]), return_inverse=True)[1]
        n = int(labels.max()) + 1
        weight *= rng.multinomial(n, np.full(n, 1 / n), n_boot)[:, labels]
        sizes.append(n)
    total = weight.sum(1)
    means = (weight @ observed)[total > 0] / total[total > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(observed.mean()), (float(low), float(high)), len(observed), sizes[0])


@dataclass(frozen=True)
class WinRate:
    """Wins of a system over another in paired comparisons."""

    decided: Estimate
    """Wins / (wins + losses): ties are out."""
    with_ties: Estimate
    """(wins + ties / 2) / all."""
    n_ties: int


def win_rate(outcomes: ArrayLike, prompts: Sequence[object], n_boot: int = 2000, seed: int = 0) -> WinRate:
    """Paired win rate, both ways of counting ties.

    Args: outcomes: per pair 1 (won), 0 (lost) or 0.5 (tie). prompts: per pair.
    Raises: ValueError when no pair is decided.
    """
    result = np.asarray(outcomes, dtype=float)
    if not np.isin(result, (0.0, 0.5, 1.0)).all():
        raise ValueError("outcomes must be 1, 0 or 0.5")
    is_decided = result != 0.5
    if not is_decided.any():
        raise ValueError("no pair is decided")
    kept = [prompt for prompt, use in zip(prompts, is_decided) if use]
    return WinRate(mean_ci(result[is_decided], kept, n_boot, seed), mean_ci(result, prompts, n_boot, seed), int((~is_decided).sum()))


def paired_outcomes(scores: ArrayLike, base_scores: ArrayLike, tie_width: float = 0.0) -> Array:
    """Scores of two systems on the same prompts and seeds -> 1, 0 or 0.5 (closer than or at `tie_width`)."""
    difference = np.asarray(scores, dtype=float) - np.asarray(base_scores, dtype=float)
    return np.where(np.abs(difference) <= tie_width, 0.5, (difference > 0).astype(float))


def accuracy(margins: ArrayLike, clusters: Sequence[object], p: ArrayLike | None = None, seed: int = 0) -> Estimate:
    """Share of decided pairs that are ordered as the raters did. A margin of exactly 0 counts half.

    Args: margins: score(chosen) - score(rejected). p: the soft labels; pairs with p = 1/2 are left out.
    """
    margin = np.asarray(margins, dtype=float)
    use = np.ones(len(margin), bool) if p is None else np.asarray(p, dtype=float) != 0.5
    right = np.where(margin == 0, 0.5, (margin > 0).astype(float))
    return mean_ci(right[use], [cluster for cluster, keep in zip(clusters, use) if keep], seed=seed)


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, n_bins: int = 10, weights: ArrayLike | None = None) -> float:
    """Mean over equally filled bins of |mean probability - mean label|. Naeini et al. 2015; labels may be soft.

    For pairs give each in both orders, or the chosen side alone says nothing below one half.
    """
    predicted, observed = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=float)
    weight = np.ones_like(predicted) if weights is None else np.asarray(weights, dtype=float)
    order = np.argsort(predicted, kind="stable")
    error = 0.0
    for part in np.array_split(order, min(n_bins, len(order))):
        share = weight[part].sum()
        if share > 0:
            error += abs(float(weight[part] @ (predicted[part] - observed[part])))
    return error / float(weight.sum())


def pair_calibration_error(margins: ArrayLike, p: ArrayLike, weights: ArrayLike | None = None, n_bins: int = 10) -> float:
    """Calibration of sigmoid(margin) against the soft label p, each pair in both orders."""
    margin, label = np.asarray(margins, dtype=float), np.asarray(p, dtype=float)
    forward = 1 / (1 + np.exp(-margin))
    weight = np.ones_like(margin) if weights is None else np.asarray(weights, dtype=float)
    return expected_calibration_error(
        np.concatenate([forward, 1 - forward]), np.concatenate([label, 1 - label]), n_bins, np.concatenate([weight, weight])
    )


def calibration_error_by_chance(
    margins: ArrayLike, n_votes: Sequence[int], weights: ArrayLike | None = None, n_draws: int = 200, seed: int = 0
) -> float:
    """What pair_calibration_error exceeds in 5 % of draws of a model without error: each pair's votes (`n_votes`) are drawn by its margin.

    A binned error is never negative, so chance alone makes one, the larger the fewer votes there are (Broecker 2012, "Estimating
    reliability and resolution of probability forecasts through decomposition of the empirical score").
    """
    margin, votes = np.asarray(margins, dtype=float), np.asarray(n_votes)
    rng = np.random.default_rng(seed)
    shares = rng.binomial(votes, 1 / (1 + np.exp(-margin)), (n_draws, len(margin))) / votes
    return float(np.quantile([pair_calibration_error(margin, share, weights) for share in shares], 0.95))


def diversity(features: ArrayLike, prompts: Sequence[object]) -> float:
    """Mean Euclidean distance between clips of one prompt, over prompts with two clips or more: 0 when all sound alike.

    Args: features [N, F], standardised by the caller. Compare with the base's figure by ratio: a policy that plays one
        song is at 0."""
    points = np.asarray(features, dtype=float)
    labels = np.asarray([str(prompt) for prompt in prompts])
    means = []
    for label in np.unique(labels):
        group = points[labels == label]
        if len(group) > 1:
            upper = np.triu_indices(len(group), 1)
            means.append(np.linalg.norm(group[:, None] - group[None], axis=-1)[upper].mean())
    if not means:
        raise ValueError("diversity needs a prompt with two clips")
    return float(np.mean(means))


def sequence_kl(logps: ArrayLike, ref_logps: ArrayLike, mask: ArrayLike, prompts: Sequence[object], seed: int = 0) -> Estimate:
    """KL(policy || reference) in nats a clip, by samples of the policy: the mean of sum_s logp - ref_logp (k1,
    unbiased).

    Args: logps, ref_logps, mask [B, S]: both scored at the distribution the clips were sampled from.
    """
    valid = np.asarray(mask, dtype=bool)
    difference = np.where(valid, np.asarray(logps, dtype=float) - np.asarray(ref_logps, dtype=float), 0.0)
    return mean_ci(difference.sum(axis=1), prompts, seed=seed)


def decimals(value: float | None, limit: float) -> int:
    """How many places a number is told to: three, and as many more as it takes to read otherwise than a limit that it is not."""
    places = 3
    while value is not None and value != limit and float(f"{value:.{places}f}") == float(f"{limit:.{places}f}"):
        places += 1
    return places
