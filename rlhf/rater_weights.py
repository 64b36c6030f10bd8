"""By what raters weigh when a reward model is fitted: their agreement on common pairs, or how their votes follow what it hears.

margins by heads that have met neither prompt nor fold -> each rater's slope -> weights -> fitted again
held-out loss of single votes with either kind of weights -> the better one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlhf import raters
from rlhf.preferences import Preference, Snapshot, Vote, Y
from rlhf.reward_folds import Choice, Clips, Folds, cross_calibrated, loss_by_fold, ordering, unseen_scores
from rlhf.reward_heads import Pairs

if TYPE_CHECKING:
    from rlhf.train_reward import Config


@dataclass(frozen=True)
class Weighing:
    """By what raters weigh, and what came of it."""

    name: str
    weights: Mapping[str, float] | None
    scores: Tensor
    """[n_folds, N]: row f by heads that have not seen fold f; in each fold with the weights that are better on the others."""
    losses: dict[str, float]
    """Held-out loss of single votes, nats, by what raters weigh."""
    habits: raters.Habits | None
    training: tuple[Pairs, ...] = ()
    """For each fold, the pairs with the weights that its row of `scores` was fitted with."""

    @property
    def lean(self) -> float | None:
        """The mean rater's lean to the left side, nats."""
        return None if self.habits is None else self.habits.lean

    def told(self, rater: str) -> dict[str, Any]:
        """What else is known of a rater: the weight that was used (1 where all count alike, below 0 of one who is turned round), and the
        habits. A slope that is surely negative makes an adversary, too, whom only slopes silence."""
        weight = 1.0 if self.weights is None else self.weights.get(rater)
        told = {} if weight is None else {"weight": float(weight)}
        habit = None if self.habits is None else self.habits.raters.get(rater)
        if habit is None:
            return told
        return told | {"slope": habit.slope, "slope_se": habit.slope_se, "lean": habit.lean, "against_the_music": habit.adversary}


def weigh(
    cfg: Config,
    folds: Folds,
    clips: Clips,
    snapshot: Snapshot,
    agreed: Mapping[str, float] | None,
    pairs: Pairs,
    choice: Choice,
    preferences: Callable[[Mapping[str, float] | None], list[Preference]],
) -> Weighing:
    """Fit with the weights of agreement and with the raters' slopes, and see which foretells held-out votes better.

    Slopes come from margins of heads that have met neither the vote's prompt nor the fold that is judged; the heads are then fitted
    again with them: one turn of expectation and maximisation. Both are judged by every rater's votes at this rater's slope, from
    the other folds: what foretells an adversary's votes the wrong way round is right. The control of turned labels is not weighed anew.
    """
    votes = ordering(snapshot.votes)
    single = clips.single(votes)
    fold = folds.of(single)

    def habits(scores: Tensor, seen: Tensor) -> raters.Habits | None:
        margin = folds.margins(scores, single) * torch.tensor([-1.0 if vote.choice == Y else 1.0 for vote in votes])
        rows = seen.nonzero()[:, 0].tolist()
        return raters.habits([votes[row] for row in rows], margin.double().numpy()[rows])

    def loss(scores: Tensor) -> np.ndarray:
        margin = cross_calibrated(folds.margins(scores, single), single, folds)
        for f in range(folds.n):
            if (found := habits(scores, fold != f)) is not None:
                slope = [found.scale * (found.raters[vote.rater].slope if vote.rater in found.raters else 1.0) for vote in votes]
                margin = torch.where(fold == f, folds.margins(scores, single) * torch.tensor(slope), margin)
        return loss_by_fold(margin, single, folds)

    def slopes(found: raters.Habits | None) -> Mapping[str, float] | None:
        return agreed if found is None else {rater: habit.used(cfg.adversaries) for rater, habit in found.raters.items()}

    plain = "nothing" if cfg.weights_by == "nothing" else "agreement"
    scores = {plain: unseen_scores(folds, pairs, choice.chosen, cfg.members, cfg.seed, cfg.lam)}
    overall = habits(scores[plain], torch.ones(len(votes), dtype=torch.bool))
    weights = {plain: agreed, "slopes": slopes(overall)}
    turned: list[Pairs] = []
    if cfg.weights_by in ("auto", "slopes") and overall is not None and not cfg.shuffle_labels:
        turned = [clips.pairs(preferences(slopes(habits(choice.inner[f], fold != f)))) for f in range(folds.n)]
        scores["slopes"] = unseen_scores(folds, turned, choice.chosen, cfg.members, cfg.seed, cfg.lam)
    losses = {option: loss(rows) for option, rows in scores.items()}
    allowed = ["slopes"] if cfg.weights_by == "slopes" and "slopes" in scores else list(scores)
    kept = [min(allowed, key=lambda option: losses[option].sum() - losses[option][f]) for f in range(folds.n)]
    best = min(allowed, key=lambda option: losses[option].sum())
    return Weighing(
        best,
        weights[best],
        torch.stack([scores[option][f] for f, option in enumerate(kept)]),
        {option: round(float(loss.sum()) / len(votes), 4) for option, loss in losses.items()},
        overall,
        tuple(turned[f] if option == "slopes" else pairs for f, option in enumerate(kept)),
    )


def reliable(
    preferences: Callable[[Mapping[str, float] | None, Sequence[Vote]], list[Preference]], cfg: Config
) -> Callable[[Sequence[Vote]], list[Preference]]:
    """Votes -> preferences, with weights from these votes alone."""

    def made(votes: Sequence[Vote]) -> list[Preference]:
        return preferences(None if cfg.weights_by == "nothing" else raters.weights(raters.reliability(votes), cfg.adversaries), votes)

    return made
