"""More heads on the same features: one for each aspect that raters judge apart, and one for "both bad".

    aspects of preferences -> soft labels -> a head an aspect, judged on prompts it has not met
    both-bad votes -> their clips lose against clips that won elsewhere -> a head; a level on its scale from the votes -> log-odds

"Both bad" orders nothing, but it is the only absolute thing a rater says. Its clips are compared with winners of other pairs,
beside the ordinary comparisons; the level below which the better of two clips is called bad is then fitted to all votes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from rlhf import metrics
from rlhf.preferences import BOTH_BAD, Preference, Vote
from rlhf.reward_folds import Clips, Folds, ordering, unseen_scores
from rlhf.reward_model import ACCEPTABLE, Extra, Head, Pairs, best_temperature, fit_ensemble

MIN_PAIRS = 30
"""An aspect has a head from so many pairs on that it decides, and "both bad" from so many votes on."""
ABSOLUTE = 0.3
"""What a comparison between a clip called bad and a winner elsewhere weighs beside an ordinary one."""


@dataclass(frozen=True)
class Fitted:
    """A head, and what was measured of it. No head where votes are too few."""

    extra: Extra | None
    figures: dict[str, Any]


def fit_extras(
    folds: Folds,
    clips: Clips,
    preferences: Sequence[Preference],
    votes: Sequence[Vote],
    weights: Mapping[str, float] | None,
    chosen: Sequence[Head],
    head: Head,
    n_members: int,
    seed: int,
) -> dict[str, Fitted]:
    """Every aspect that a preference tells, and ACCEPTABLE where anybody said "both bad".

    Args: chosen: the heads by fold that judge. head: the kind that is kept. weights: rater -> weight.
    """
    names = sorted({name for pair in preferences for name in pair.aspects})
    found = {name: fit_aspect(folds, clips, preferences, name, chosen, head, n_members, seed) for name in names}
    if any(vote.choice == BOTH_BAD and not vote.gold for vote in votes):
        found[ACCEPTABLE] = fit_acceptable(folds, clips, preferences, votes, weights, chosen, head, n_members, seed)
    return found


def aspect_pairs(clips: Clips, preferences: Sequence[Preference], name: str) -> Pairs:
    """Comparisons by one aspect: chosen is better at it, p = 1/2 + |score| / 4, so that "much better" is certain."""
    told = [pair for pair in preferences if name in pair.aspects]
    pairs, score = clips.pairs(told), torch.tensor([pair.aspects[name] for pair in told])
    turned = score < 0
    return Pairs(
        torch.where(turned, pairs.rejected, pairs.chosen),
        torch.where(turned, pairs.chosen, pairs.rejected),
        0.5 + score.abs() / 4,
        pairs.weight,
        pairs.prompt,
    )


def fit_aspect(
    folds: Folds, clips: Clips, preferences: Sequence[Preference], name: str, chosen: Sequence[Head], head: Head, n_members: int, seed: int
) -> Fitted:
    """A head for one aspect, and its accuracy on decided pairs of unseen prompts."""
    pairs = aspect_pairs(clips, preferences, name)
    n = int((pairs.p != 0.5).sum())
    if n < MIN_PAIRS or len(torch.unique(folds.of(pairs))) < folds.n:
        return Fitted(None, {"n": n, "accuracy": None, "ci": None, "asked": MIN_PAIRS})
    margin = folds.margins(unseen_scores(folds, pairs, chosen, 1, seed), pairs)
    told = metrics.accuracy(margin.numpy(), pairs.prompt.tolist(), pairs.p.numpy(), seed)
    members, offsets = fit_ensemble(head, folds.inputs[head], pairs, n_members, seed, folds.share)
    extra = Extra(members, offsets, best_temperature(margin, pairs))
    return Fitted(extra, {"n": n, "accuracy": told.value, "ci": list(told.ci), "asked": MIN_PAIRS})


def acceptable_pairs(clips: Clips, folds: Folds, pairs: Pairs, bad: Sequence[Vote], decided: Pairs, seed: int) -> Pairs:
    """`pairs`, and each clip of a both-bad vote against a winner drawn from `decided` votes on prompts of the same fold."""
    winners = {f: decided.chosen[folds.of(decided) == f] for f in range(folds.n)}
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, prompt = [], [], []
    for vote in bad:
        number = clips.prompt_number[vote.prompt_id]
        there = winners[int(folds.fold[number])]
        for clip in (vote.clip_x, vote.clip_y):
            if len(there):
                chosen.append(int(there[torch.randint(len(there), (1,), generator=generator)]))
                rejected.append(clips.row[clip])
                prompt.append(number)
    more = len(chosen)
    return Pairs(
        torch.cat([pairs.chosen, torch.tensor(chosen, dtype=torch.long)]),
        torch.cat([pairs.rejected, torch.tensor(rejected, dtype=torch.long)]),
        torch.cat([pairs.p, torch.ones(more)]),
        torch.cat([pairs.weight, torch.full((more,), ABSOLUTE)]),
        torch.cat([pairs.prompt, torch.tensor(prompt, dtype=torch.long)]),
    )


def fit_acceptable(
    folds: Folds,
    clips: Clips,
    preferences: Sequence[Preference],
    votes: Sequence[Vote],
    weights: Mapping[str, float] | None,
    chosen: Sequence[Head],
    head: Head,
    n_members: int,
    seed: int,
) -> Fitted:
    """A head whose score is the log-odds that the better of two such clips is not called bad, and how it ranks unseen votes."""
    trusted = [vote for vote in votes if not vote.gold and (weights is None or weights.get(vote.rater, 0.0) > 0)]
    bad = [vote for vote in trusted if vote.choice == BOTH_BAD]
    if len(bad) < MIN_PAIRS:
        return Fitted(None, {"n": len(bad), "auc": None, "asked": MIN_PAIRS})
    fine = clips.single(ordering(trusted))
    pairs = acceptable_pairs(clips, folds, clips.pairs(preferences), bad, fine.index(fine.p != 0.5), seed)
    scores = unseen_scores(folds, pairs, chosen, 1, seed)
    better = _better(scores, clips.single(bad), folds), _better(scores, fine, folds)
    level, slope = level_of(*better)
    members, offsets = fit_ensemble(head, folds.inputs[head], pairs, n_members, seed, folds.share)
    figures = {"n": len(bad), "auc": auc(*better), "level": level, "asked": MIN_PAIRS}
    return Fitted(Extra(members, offsets + level, 1 / slope), figures)


def _better(scores: Tensor, pairs: Pairs, folds: Folds) -> np.ndarray:
    """[pairs]: the score of the better clip, by heads that have not met the prompt."""
    rows = scores[folds.of(pairs)]
    return torch.stack([rows.gather(1, side[:, None])[:, 0] for side in (pairs.chosen, pairs.rejected)]).amax(0).double().numpy()


def auc(low: np.ndarray, high: np.ndarray) -> float:
    """How often a value of `high` is above one of `low`; ties count half."""
    gap = high[:, None] - low[None]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def level_of(bad: np.ndarray, fine: np.ndarray) -> tuple[float, float]:
    """Scores of the better clip of both-bad votes, and of others -> level c, slope k > 0 of P(both bad) = sigmoid(k (c - s))."""
    s, y = np.concatenate([bad, fine]), np.concatenate([np.ones(len(bad)), np.zeros(len(fine))])

    def loss(at: np.ndarray) -> float:
        z = np.exp(at[1]) * (at[0] - s)
        return float(np.mean(np.logaddexp(0, -z) * y + np.logaddexp(0, z) * (1 - y)) + 1e-3 * at[1] ** 2)

    found = minimize(loss, np.array([float(np.median(bad)), 0.0]), method="Nelder-Mead", options={"maxiter": 2000})
    return float(found.x[0]), float(np.exp(found.x[1]))
