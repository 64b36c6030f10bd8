"""Heads on frozen features: what votes teach, and how sure they make us.

    blocks [N, F] -> standardised within prompts (Lens) -> what the head is linear in [N, P] -> weights [P] by Bradley-Terry
    bootstraps of the prompts -> members [E, P] -> mean - lam * spread

A head is linear; a Gaussian process over the features, whose score returns to the mean where no clip has been heard (Chu and
Ghahramani 2005, "Preference learning with Gaussian processes", ICML; its posterior mode); or a relevance head, which thinks that
a taste is a sum of bumps in a few of the features and finds out which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlhf.losses import bradley_terry_loss, from_group_means
from rlhf.reward_features import DESCRIPTORS, DETAILS, FIT, LATENTS, MAGNITUDES, SHARED, Table

REACH = 4.0
"""Features are cut off at so many spreads within a prompt: no score runs away where no clip has been heard."""
LANDMARKS = 1024
"""A Gaussian process is spanned by at most so many clips (Williams and Seeger 2001, "Using the Nystroem method"); fewer are exact."""
PARTS = 256
"""Columns of a relevance head's kernel part; the strongest directions of the process, the rest is not missed."""
ROUNDS, FLOOR = 5, 0.04
"""Rounds of reweighting by relevance, and what the least relevant feature keeps of the most relevant one's prior."""

EARNED = 2.0
"""The t^2 by which a slope pays for itself (Akaike 1974)."""
MOST_TEMPERATURE = math.exp(4.0)
"""That of a reward that knows nothing: its scores differ by next to nothing."""


# ---- pairs, and kinds of heads ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Comparisons between rows of a feature table: chosen, rejected [N] long; p, weight [N]; prompt [N] long."""

    chosen: Tensor
    rejected: Tensor
    p: Tensor
    weight: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.p)

    def index(self, rows: Tensor) -> Pairs:
        return Pairs(self.chosen[rows], self.rejected[rows], self.p[rows], self.weight[rows], self.prompt[rows])

    def reweighted(self, weight: Tensor) -> Pairs:
        return Pairs(self.chosen, self.rejected, self.p, weight, self.prompt)


@dataclass(frozen=True)
class Head:
    """One way from features to a score, with how far scores are expected to range before any vote was heard."""

    kind: Literal["linear", "kernel", "relevance"]
    """relevance: bumps in every feature by itself, plus a process over all of them, whose priors follow what proves relevant."""
    blocks: tuple[str, ...]
    """The blocks of features it reads; each weighs alike, however many features it has (relevance: each feature by itself)."""
    prior: float
    """Standard deviation of a score (kernel, relevance) or of a weight (linear) before any vote, in nats."""
    length: float = 2.0
    """kernel: the distance over which scores stay alike; 1 is one spread within a prompt in every feature. relevance: width of a bump."""


def candidates(blocks: Sequence[str]) -> tuple[Head, ...]:
    """The heads that committees are made of (rlhf.reward_committee), for a base that gives these blocks."""
    plain = tuple(block for block in blocks if block in (LATENTS, MAGNITUDES, SHARED))
    groups = [plain] + [(MAGNITUDES,)] * (MAGNITUDES in blocks and len(plain) > 1)
    few = tuple(block for block in blocks if block in (DESCRIPTORS, FIT))
    many = tuple(block for block in blocks if block in (DESCRIPTORS, DETAILS, FIT))
    relevant = tuple(
        head
        for named in ((few, many) if DETAILS in blocks else (few,))
        for head in (
            Head("relevance", named, 2.0, 2.0),
            Head("relevance", named, 1.5, 2.0),
            Head("relevance", named, 2.0, 3.0),
            Head("kernel", tuple(block for block in named if block != FIT), 2.0, 1.5),
            Head("linear", named, 0.6),
        )
    )
    return (relevant if DESCRIPTORS in blocks else ()) + tuple(
        head
        for group in groups
        for head in (
            Head("linear", group, 0.6),
            Head("kernel", group, 1.0, 2.0),
            Head("kernel", group, 2.0, 1.5),
            Head("kernel", group, 4.0, 2.0),
        )
    )


@dataclass(frozen=True)
class Lens:
    """What turns a head's features into what it is linear in. mean, spread, share [F]; landmarks [M, F]; whiten [M, P]."""

    mean: Tensor
    spread: Tensor
    """How far clips of one prompt lie apart."""
    share: Tensor
    """What a feature weighs; the squares sum to 1, alike for every block."""
    landmarks: Tensor
    """Standardised clips that span a kernel head; none for a linear one."""
    whiten: Tensor
    """K(landmarks, landmarks) to the power -1/2."""

    def standard(self, rows: Tensor) -> Tensor:
        """[B, F] -> [B, F], all features together about 1 wide within a prompt."""
        return ((rows - self.mean) / self.spread).clamp(-REACH, REACH) * self.share


# ---- from features to what a head is linear in -----------------------------------------------------------------------


def joined(table: Table, blocks: Sequence[str]) -> Tensor:
    """Blocks side by side: [N, F]."""
    return torch.cat([table[block] for block in blocks], dim=1)


def make_lens(head: Head, table: Table, prompt: Tensor) -> Lens:
    """Standardise by what clips differ by *within* prompts, since only these are ever compared. No vote is used.

    Args: table: blocks [N, F]. prompt [N] long: which prompt a clip answers.
    """
    rows = joined(table, head.blocks)
    spread = from_group_means(rows, prompt).square().mean(0).sqrt()
    floor = 1e-3 * rows.std(0, correction=0) + 1e-6  # a feature that is constant within prompts tells nothing
    share = torch.cat([torch.full((table[block].shape[1],), (table[block].shape[1] * len(head.blocks)) ** -0.5) for block in head.blocks])
    nothing = rows.new_zeros((0, 0))
    lens = Lens(rows.mean(0), torch.maximum(spread, floor), share, nothing, nothing)
    if head.kind == "linear":
        return lens
    if head.kind == "relevance":
        lens = replace(lens, share=torch.full_like(lens.share, len(lens.share) ** -0.5))
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:LANDMARKS].sort().values
    landmarks = lens.standard(rows[chosen])
    values, vectors = torch.linalg.eigh(_kernel(landmarks, landmarks, _reach(head)).double())
    kept = values > 1e-6 * values[-1]
    if head.kind == "relevance":
        kept[:-PARTS] = False
    return replace(lens, landmarks=landmarks, whiten=(vectors[:, kept] / values[kept].sqrt()).float().contiguous())


def _kernel(one: Tensor, other: Tensor, length: float) -> Tensor:
    """exp(-|a - b|^2 / (2 length^2)): [B, F], [M, F] -> [B, M]."""
    return torch.exp(-torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * length**2))


def expand(lens: Lens, head: Head, table: Table) -> Tensor:
    """Blocks [B, F] -> what the head is linear in [B, P]."""
    standard = lens.standard(joined(table, head.blocks))
    if head.kind == "linear":
        return standard
    together = _kernel(standard, lens.landmarks, _reach(head)) @ lens.whiten
    if head.kind == "kernel":
        return together
    padded = torch.nn.functional.pad(together, (0, PARTS - together.shape[1]))
    return torch.cat([padded, bumps(standard / lens.share, head.length).flatten(1)], dim=1)


def _reach(head: Head) -> float:
    """The length of the process over all features together."""
    return 1.5 if head.kind == "relevance" else head.length


def bumps(standard: Tensor, width: float) -> Tensor:
    """Features [B, F] -> [B, F, G]: a smooth function of one feature is linear in its G numbers, and a priori about 1 wide.

    The Gaussian process of one variable with length `width`, spanned by a grid over the range that is not cut off.
    """
    grid = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.exp(-(grid[:, None] - grid[None]).square() / (2 * width**2)))
    kept = values > 1e-3 * values[-1]
    onto = (vectors[:, kept] / values[kept].sqrt()).to(standard)
    return torch.exp(-(standard[..., None] - grid.to(standard)).square() / (2 * width**2)) @ onto


# ---- fitting ---------------------------------------------------------------------------------------------------------


def fit(head: Head, inputs: Tensor, pairs: Pairs) -> Tensor:
    """The most probable weights [P] of a head. A relevance head is fitted several times: what has moved scores gets more of the
    prior, what has not gets less, down to FLOOR (as in automatic relevance determination: MacKay 1994; here by the spread of
    each feature's part of the score, which needs no inverse of [P, P])."""
    if head.kind != "relevance":
        return _most_probable(inputs, pairs, head.prior)
    width = bumps(torch.zeros(1, 1), head.length).shape[-1]
    group = torch.cat([torch.zeros(PARTS, dtype=torch.long), 1 + torch.arange((inputs.shape[1] - PARTS) // width).repeat_interleave(width)])
    n_groups = int(group.max()) + 1
    scale = torch.full((n_groups,), (2 * (n_groups - 1)) ** -0.5)
    scale[0] = 0.5**0.5
    used = torch.unique(torch.cat([pairs.chosen, pairs.rejected]))
    for turn in range(ROUNDS + 1):
        weights = scale[group] * _most_probable(inputs * scale[group], pairs, head.prior)
        if turn < ROUNDS:
            parts = inputs.new_zeros((len(used), n_groups)).index_add_(1, group, inputs[used] * weights)
            moved = parts.std(0, correction=0)
            scale = moved / moved.max().clamp_min(1e-12) + FLOOR
            scale = scale / scale.norm()
    return weights


def _most_probable(inputs: Tensor, pairs: Pairs, prior: float) -> Tensor:
    """The most probable weights [P]: Bradley-Terry likelihood, soft labels p, a normal prior; convex, by L-BFGS to the end.

    Weights are scaled to a mean of 1 over the pairs that have any, so that they say whom to believe more and not how many
    votes there are. Bradley and Terry 1952.
    """
    there = pairs.weight > 0
    loudness = pairs.weight / pairs.weight[there].mean().clamp_min(1e-12)
    difference = inputs[pairs.chosen] - inputs[pairs.rejected]
    weights = torch.zeros(inputs.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        margin = difference @ weights
        loss = (loudness * bradley_terry_loss(margin, torch.zeros_like(margin), pairs.p)).sum()
        value = (loss + weights.square().sum() / (2 * prior**2)) / len(pairs)
        value.backward()
        return value

    solver.step(closure)
    return weights.detach()


def bootstrap(pairs: Pairs, seed: int) -> Pairs:
    """The pairs with the weights of one draw of whole prompts with replacement."""
    labels, index = torch.unique(pairs.prompt, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    times = torch.bincount(torch.randint(len(labels), (len(labels),), generator=generator), minlength=len(labels))
    return pairs.reweighted(pairs.weight * times[index])


def log_loss(margin: Tensor, pairs: Pairs) -> float:
    """Weighted mean Bradley-Terry loss of margins score(chosen) - score(rejected) [N]; nats, log 2 for ignorance."""
    loss = bradley_terry_loss(margin, torch.zeros_like(margin), pairs.p)
    return float((pairs.weight * loss).sum() / pairs.weight.sum())


def best_temperature(margin: Tensor, pairs: Pairs) -> float:
    """The divisor that makes sigmoid(margin / temperature) most probable: by golden section on its logarithm.

    Guo et al. 2017, arXiv:1706.04599. Margins must come from pairs that the heads have not seen.
    """
    low, high, ratio = -3.0, math.log(MOST_TEMPERATURE), 0.6180339887
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if log_loss(margin / math.exp(a), pairs) < log_loss(margin / math.exp(b), pairs):
            high = b
        else:
            low = a
    return math.exp((low + high) / 2)


def evidence(margin: Tensor, pairs: Pairs) -> float:
    """How many standard errors away from 0 the mean over prompts is of what votes say for margins: sum of w * (p - 1/2) * margin.

    That sum is the slope of their likelihood along the margins where nothing is believed yet (a score test: Rao 1948), which is told as
    well where votes follow margins without a fault and no best slope exists. Votes of a prompt share clips, and are one observation
    (Liang and Zeger 1986). Negative where votes go against margins; 0 where fewer than two prompts have votes.
    """
    gain = pairs.weight.double() * (pairs.p.double() - 0.5) * margin.double()
    prompts, place = torch.unique(pairs.prompt, return_inverse=True)
    by_prompt = torch.zeros(len(prompts), dtype=torch.float64).index_add_(0, place, gain)
    if len(prompts) < 2 or not bool(by_prompt.any()):
        return 0.0
    error = float(by_prompt.std(correction=1)) / len(prompts) ** 0.5
    return float(by_prompt.mean()) / error if error else math.copysign(math.inf, float(by_prompt[0]))


def sure_temperature(margin: Tensor, pairs: Pairs) -> tuple[float, float]:
    """The temperature that margins earn, and the evidence t for it: the best one, divided by max(0, 1 - 2 / t^2), t above 0.

    A reward that learnt from noise has a slope too, by chance, and whoever trains on it follows one random direction. So the slope is
    shrunk by the non-negative garrote (Breiman 1995, Technometrics 37), and by as much as a parameter has to earn (Akaike 1974: a gain
    in likelihood of t^2 < 2 counts for nothing). Three standard errors keep .78 of the slope, eight .97.
    """
    t = evidence(margin, pairs)
    kept = 1 - EARNED / t**2 if t > EARNED**0.5 else 0.0
    return (min(best_temperature(margin, pairs) / kept, MOST_TEMPERATURE) if kept else MOST_TEMPERATURE), t


def pessimistic(member_scores: Tensor, lam: float) -> Tensor:
    """[E, B] -> mean - lam * spread [B]; a single head has no spread."""
    spread = member_scores.std(0, correction=1) if len(member_scores) > 1 else torch.zeros_like(member_scores[0])
    return member_scores.mean(0) - lam * spread


Share = Callable[[int, Callable[[int], Tensor]], Tensor]
"""(number of jobs, job -> tensor of one shape) -> [jobs, ...]: does the jobs, possibly spread over processes."""


def alone(n: int, job: Callable[[int], Tensor]) -> Tensor:
    """All jobs in this process."""
    return torch.stack([job(index) for index in range(n)])


def fit_ensemble(head: Head, inputs: Tensor, pairs: Pairs, n_members: int, seed: int, share: Share = alone) -> tuple[Tensor, Tensor]:
    """inputs [N, P] -> members [E, P] fitted on bootstraps of the prompts, and their offsets [E]. Whatever `share` is."""
    members = share(n_members, lambda index: fit(head, inputs, bootstrap(pairs, seed * 1000 + index) if n_members > 1 else pairs))
    used = torch.unique(torch.cat([pairs.chosen, pairs.rejected]))
    return members, (members @ inputs[used].T).mean(1)
