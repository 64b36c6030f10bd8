"""Which system is better, by how much, and how sure we are: Davidson's model of votes on pairs.

    votes alike, counted -> fit: strengths, ties, side, a scale for each rater -> covariance clustered by rater

With d = s_r (theta_a - theta_b) the weights of "a", "b" and "tie" are e^((d + beta)/2) : e^(-(d + beta)/2) : nu. That is Davidson
(1970) with an order effect (Davidson and Beaver, 1977) and a reliability s_r that stretches a rater's differences: 1 is the
mean rater, 0 hears nothing. log s_r has a normal prior of mean 0, so that a rater with few votes stays near 1.

Votes of one rater are alike for reasons the model does not know (taste, fatigue, the room). Their scores are therefore summed
by rater before they become a variance: the jackknife that leaves out one rater at a time, in one Newton step (CR3 of Bell and
McCaffrey, 2002), which stays honest with few and uneven raters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import t as student

from db.errors import StoreError

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

OUTCOMES = ("a", "b", "tie")
SCALE_SD = 0.7
"""Prior spread of log s_r: two raters in three lie between half and twice the mean rater."""
SHRINKAGE = 0.01
"""Weight of sum(strengths^2) / 2, which keeps the estimate finite for a system that always wins."""
MAX_ITERATIONS = 1000
FLAT = 1e-5


@dataclass(frozen=True)
class Counts:
    """Votes that are alike, counted: row i holds `n[i]` votes for OUTCOMES by `rater[i]` on systems `a[i]` and `b[i]`, as shown."""

    systems: tuple[str, ...]
    raters: tuple[Hashable, ...]
    a: Indices
    b: Indices
    rater: Indices
    n: Array
    """[N, 3]"""

    @classmethod
    def of(cls, votes: Iterable[tuple[Hashable, str, str, str, float]]) -> Counts:
        """Counts (rater, system a, system b, choice, how often); both bad and pairs within a system order nothing."""
        cells: dict[tuple[Hashable, str, str], list[float]] = {}
        for rater, a, b, choice, n in votes:
            if choice in OUTCOMES and a != b:
                cells.setdefault((rater, a, b), [0.0, 0.0, 0.0])[OUTCOMES.index(choice)] += n
        systems = tuple(sorted({system for _, a, b in cells for system in (a, b)}))
        raters = tuple(dict.fromkeys(rater for rater, _, _ in cells))
        number, seat = ({name: i for i, name in enumerate(names)} for names in (systems, raters))
        return cls(
            systems,
            raters,
            np.array([number[a] for _, a, _ in cells], dtype=np.int64),
            np.array([number[b] for _, _, b in cells], dtype=np.int64),
            np.array([seat[rater] for rater, _, _ in cells], dtype=np.int64),
            np.array(list(cells.values()), dtype=np.float64).reshape(-1, 3),
        )

    def groups(self) -> NDArray[np.int32]:
        """[S] the group of each system: those of one group can be compared, if only by way of third ones."""
        size = len(self.systems)
        met = coo_array((np.ones(len(self.a)), (self.a, self.b)), shape=(size, size))
        return connected_components(met, directed=False)[1] if size else np.zeros(0, dtype=np.int32)

    def connected(self) -> bool:
        """Whether all systems are of one group."""
        return len(set(self.groups().tolist())) < 2


@dataclass(frozen=True)
class Davidson:
    """Strengths of systems in nats (mean 0), the propensity to tie, the advantage of side a, and the raters' scales."""

    strengths: dict[str, float]
    tie: float
    side_bias: float
    scales: dict[Hashable, float]


@dataclass(frozen=True)
class _Model:
    """Derivatives of the log-likelihood by cell at one point. `d` [N] is the stretched difference."""

    value: float
    gap: Array
    """[N] theta_a - theta_b"""
    scale: Array
    """[N] s_r"""
    total: Array
    """[N] votes"""
    p: Array
    """[N, 3]"""
    by_d: Array
    """[N] slope of the log-likelihood in d (and in beta)"""
    by_tie: Array
    """[N] slope in log nu"""


def fit(counts: Counts, *, scales: bool = True, shrinkage: float = SHRINKAGE, scale_sd: float = SCALE_SD) -> Davidson:
    """The posterior mode, by L-BFGS. Without `scales` every rater weighs alike.

    Raises: StoreError when there is no vote that orders two systems, or no optimum was reached.
    """
    return _named(counts, *_mode(counts, scales, shrinkage, scale_sd))


def _named(counts: Counts, theta: Array, log_nu: float, beta: float, log_scale: Array) -> Davidson:
    return Davidson(
        {name: float(value) for name, value in zip(counts.systems, theta - theta.mean())},
        float(np.exp(log_nu)),
        float(beta),
        {rater: float(value) for rater, value in zip(counts.raters, np.exp(log_scale))},
    )


def fit_davidson(games: Sequence[tuple[str, str, str]], shrinkage: float = SHRINKAGE) -> Davidson:
    """Strengths from games (system a, system b, choice "a" | "b" | "tie") of raters who weigh alike; other choices are skipped."""
    alike = Counter(games)
    return fit(Counts.of(("", a, b, choice, n) for (a, b, choice), n in alike.items()), scales=False, shrinkage=shrinkage)


def fit_with_covariance(
    counts: Counts, *, scales: bool = True, shrinkage: float = SHRINKAGE, scale_sd: float = SCALE_SD
) -> tuple[Davidson, Array | None]:
    """The fit, and the covariance [P, P] of its centred strengths, clustered by rater; None with a single rater.

    Scales are profiled out: H = sum_r (H_tt - H_tu H_ut / H_uu), and rater r, left out, moves the estimate by
    (H - H_r)^-1 g_r. The covariance is (R - 1) / R times the sum of those moves' outer products.
    """
    theta, log_nu, beta, log_scale = _mode(counts, scales, shrinkage, scale_sd)
    found = _named(counts, theta, log_nu, beta, log_scale)
    n_raters, size = len(counts.raters), len(counts.systems)
    if n_raters < 2:
        return found, None
    at = _model(counts, theta, log_nu, beta, log_scale)
    order = np.argsort(counts.rater, kind="stable")
    bounds = np.searchsorted(counts.rater[order], np.arange(n_raters + 1))
    informations = np.zeros((n_raters, size + 2, size + 2))
    scores = np.zeros((n_raters, size + 2))
    for rater in range(n_raters):
        rows = order[bounds[rater] : bounds[rater + 1]]
        informations[rater], scores[rater] = _of_rater(counts, at, rows, size, scale_sd if scales else None)
    total = informations.sum(0) + shrinkage * np.eye(size + 2)
    # A rater who alone connects systems leaves nothing to go by: the prior's weight keeps the step finite, and wide.
    steps = np.linalg.solve(total[None] - informations, scores[..., None])[..., 0]
    moves = steps[:, :size] - steps[:, :size].mean(1, keepdims=True)
    return found, (n_raters - 1) / n_raters * (moves.T @ moves)


def half_widths(covariance: Array, n_raters: int, level: float = 0.95) -> Array:
    """Half-widths [P] of intervals for the strengths; Student's t with one degree less than there are raters."""
    quantile = float(student.ppf(0.5 + level / 2, n_raters - 1))
    return np.asarray(quantile * np.sqrt(np.diag(covariance)))


def votes_needed(difference: float, covariance: Array, i: int, j: int, n_votes: int, n_raters: int) -> int | None:
    """How many more votes, spread as those so far, until the 95 % interval of a difference of strengths leaves out 0.

    The standard error falls with the root of the votes, so n* = n (t se / difference)^2, less the n there are; 0 when they are
    separate already, None when the estimates are equal and no number would do. The estimate is taken at its word: a plan, no promise.
    """
    if difference == 0:
        return None
    variance = float(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j])
    quantile = float(student.ppf(0.975, n_raters - 1))
    return max(0, int(np.ceil(n_votes * (quantile**2 * variance / difference**2 - 1))))


def _mode(counts: Counts, scales: bool, shrinkage: float, scale_sd: float) -> tuple[Array, float, float, Array]:
    size, n_raters = len(counts.systems), len(counts.raters)
    if not counts.n.sum():
        raise StoreError("no vote that orders two systems", "votes for a side or ties, on different systems", "collect votes first")
    n_total = float(counts.n.sum())

    def loss(parameters: Array) -> tuple[float, Array]:
        theta, log_nu, beta = parameters[:size], parameters[size], parameters[size + 1]
        log_scale = parameters[size + 2 :] if scales else np.zeros(n_raters)
        at = _model(counts, theta, log_nu, beta, log_scale)
        gradient = shrinkage * parameters
        by_gap = at.by_d * at.scale
        gradient[:size] -= np.bincount(counts.a, by_gap, size) - np.bincount(counts.b, by_gap, size)
        gradient[size] -= at.by_tie.sum()
        gradient[size + 1] -= at.by_d.sum()
        value = shrinkage * float(parameters[: size + 2] @ parameters[: size + 2]) / 2 - at.value
        if scales:
            gradient[size + 2 :] = log_scale / scale_sd**2 - np.bincount(counts.rater, by_gap * at.gap, n_raters)
            value += float(log_scale @ log_scale) / (2 * scale_sd**2)
        return value / n_total, gradient / n_total

    start = np.zeros(size + 2 + n_raters * scales)
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MAX_ITERATIONS, "ftol": 1e-11, "gtol": 1e-7, "maxcor": 30}
    )
    # The line search may give up for rounding when it stands on the optimum already; the slope, nats a vote, tells.
    if not found.success and np.abs(found.jac).max() > FLAT:
        raise StoreError(f"a fit that did not settle ({found.message})", "votes that can be ordered", "report the votes that led here")
    best = found.x
    return best[:size], float(best[size]), float(best[size + 1]), best[size + 2 :] if scales else np.zeros(n_raters)


def _model(counts: Counts, theta: Array, log_nu: float, beta: float, log_scale: Array) -> _Model:
    gap = theta[counts.a] - theta[counts.b]
    scale = np.exp(np.clip(log_scale, -20, 20))[counts.rater]
    half = (scale * gap + beta) / 2
    top = np.maximum(np.abs(half), log_nu)
    weights = np.exp(np.stack([half - top, -half - top, log_nu - top], axis=1))
    normaliser = weights.sum(1)
    p = weights / normaliser[:, None]
    total = counts.n.sum(1)
    value = float((counts.n[:, 0] - counts.n[:, 1]) @ half + log_nu * counts.n[:, 2].sum() - total @ (np.log(normaliser) + top))
    by_d = ((counts.n[:, 0] - counts.n[:, 1]) - total * (p[:, 0] - p[:, 1])) / 2
    return _Model(value, gap, scale, total, p, by_d, counts.n[:, 2] - total * p[:, 2])


def _of_rater(counts: Counts, at: _Model, rows: Indices, size: int, scale_sd: float | None) -> tuple[Array, Array]:
    """One rater's information [P + 2, P + 2] on (strengths, log nu, beta), the scale profiled out, and score [P + 2]."""
    p, total, scale, gap = at.p[rows], at.total[rows], at.scale[rows], at.gap[rows]
    lean = p[:, 0] - p[:, 1]
    # Minus the second derivatives of the log-likelihood in d and log nu.
    dd = total * (p[:, 0] + p[:, 1] - lean**2) / 4
    dn = -total * lean * p[:, 2] / 2
    nn = total * p[:, 2] * (1 - p[:, 2])
    design = np.zeros((len(rows), size + 2))
    each = np.arange(len(rows))
    design[each, counts.a[rows]] = scale
    design[each, counts.b[rows]] = -scale
    design[:, -1] = 1.0  # beta adds to d
    information = design.T @ (dd[:, None] * design)
    crossed = design.T @ dn
    information[:, -2] += crossed
    information[-2, :] += crossed
    information[-2, -2] += nn.sum()
    score = design.T @ at.by_d[rows]
    score[-2] += at.by_tie[rows].sum()
    if scale_sd is not None:
        stretch = scale * gap  # d's slope in log s_r, and its curvature there
        own = float(dd @ stretch**2 - at.by_d[rows] @ stretch) + scale_sd**-2
        mixed = design.T @ (dd * stretch)
        mixed[-2] += dn @ stretch
        by_gap = at.by_d[rows] * scale
        mixed[:size] -= np.bincount(counts.a[rows], by_gap, size) - np.bincount(counts.b[rows], by_gap, size)
        information -= np.outer(mixed, mixed) / max(own, 1e-9)
    return information, score
