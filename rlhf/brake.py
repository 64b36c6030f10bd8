"""The brake on over-optimisation: a reward can be raised without the music getting better, and this is where it shows.

Every few rounds the policy plays the same held-out prompts with the same seeds as the base did. Three signs are looked for:
the members of the reward disagree far more than they did about the base (the policy went where no vote has been: Coste et al. 2024,
arXiv:2310.02743); clips of one prompt have become alike; the held-out score, pessimistic as it is, falls below the best look
(Gao et al. 2023, arXiv:2210.10760, show the gold score falling while the proxy still rises). A sign that stays for `patience` looks
in a row stops the run, or takes it back to the best look that showed none. The fourth, a budget of KL, is watched in every round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import t as student_t
from torch import Tensor

CHANCE = 0.0228
"""A fall is believed when noise alone would show it this seldom: two standard errors, and more where prompts are few (Student's t)."""


@dataclass(frozen=True)
class Look:
    """What the held-out clips came to: scores [N], non-finite where there is none; prompt_ids, one a clip; spread, the reward's members'
    mean disagreement, and diversity, the mean distance of clips of one prompt, each NaN where it cannot be told; kl, nats a clip."""

    scores: Tensor
    prompt_ids: Sequence[int]
    kl: float = math.nan
    spread: float = math.nan
    diversity: float = math.nan

    @property
    def mean(self) -> float:
        """Mean of the finite scores; NaN where there is none."""
        finite = self.scores[torch.isfinite(self.scores)]
        return float(finite.double().mean()) if len(finite) else math.nan


@dataclass(frozen=True)
class Gain:
    """Mean and standard error, over n prompts, of the scores' differences clip by clip; NaN where fewer than two prompts have any."""

    mean: float
    error: float
    n: int

    @property
    def is_a_fall(self) -> bool:
        """Whether it is below 0 by more than noise explains."""
        return self.mean < 0 and self.mean <= float(student_t.ppf(CHANCE, self.n - 1)) * self.error


def paired_gain(now: Look, then: Look) -> Gain:
    """What the clips gained. Same prompts and same seeds: what prompts and seeds do to a score cancels."""
    difference = (now.scores - then.scores).double()
    groups: dict[int, list[float]] = {}
    for prompt_id, value in zip(now.prompt_ids, difference.tolist()):
        if math.isfinite(value):
            groups.setdefault(prompt_id, []).append(value)
    if len(groups) < 2:
        return Gain(math.nan, math.nan, len(groups))
    means = torch.tensor([sum(group) / len(group) for group in groups.values()], dtype=torch.float64)
    return Gain(float(means.mean()), float(means.std()) / math.sqrt(len(means)), len(groups))


class Brake:
    """Remembers the base's look and the best one, and says why a run should end.

    Args: max_disagreement: spread of the reward's members, as a multiple of the base's. min_diversity: as a share of the base's.
    patience: looks in a row.
    """

    def __init__(self, max_disagreement: float, min_diversity: float, patience: int) -> None:
        self.max_disagreement, self.min_diversity, self.patience = max_disagreement, min_diversity, patience
        self.base: Look | None = None
        self.best: Look | None = None
        self.best_step = -1
        self.bad = 0
        """Looks in a row with a sign."""

    @property
    def unseen(self) -> list[str]:
        """The signs that cannot show: all of them before the first look, then those that it could not tell."""
        nothing = Look(torch.empty(0), [])
        base = self.base or nothing
        known = {"the held-out score": base.mean, "diversity": base.diversity, "disagreement": base.spread}
        return [name for name, value in known.items() if math.isnan(value)]

    def signs(self, look: Look) -> list[str]:
        """What speaks against going on; nothing does in the first look, the base's."""
        if self.base is None or self.best is None:
            return []
        found = []
        if look.spread > self.max_disagreement * self.base.spread:
            times = look.spread / self.base.spread
            found.append(f"the reward's members disagree {times:.2f} times as much as on the base (limit {self.max_disagreement:g})")
        if look.diversity < self.min_diversity * self.base.diversity:
            share = look.diversity / self.base.diversity
            found.append(f"clips of one prompt have {share:.2f} of the base's diversity (limit {self.min_diversity:g})")
        if math.isnan(look.mean):
            found.append("no held-out clip has a finite score")
        gain = paired_gain(look, self.best)
        if gain.is_a_fall:
            found.append(f"the held-out score is {-gain.mean:.3g} +- {gain.error:.2g} below that of step {self.best_step}")
        return found

    def __call__(self, step: int, look: Look) -> str | None:
        """Take in the look of a step; the reason to end the run, or None."""
        found = self.signs(look)
        self.bad = self.bad + 1 if found else 0
        if self.base is None:
            self.base = look
        if not found and (self.best is None or not look.mean <= self.best.mean):
            self.best, self.best_step = look, step
        if self.bad < self.patience:
            return None
        return "; ".join(found) + (f", in {self.patience} looks in a row" if self.patience > 1 else "")

    def figures(self, look: Look) -> dict[str, float]:
        """For plots: the look's figures, and against the base's where there are any."""
        told = {"heldout_score": look.mean, "heldout_kl": look.kl, "heldout_spread": look.spread, "heldout_diversity": look.diversity}
        if self.base is not None:
            gain = paired_gain(look, self.base)
            told["heldout_gain"], told["heldout_gain_error"] = gain.mean, gain.error
            told["heldout_spread_of_base"] = look.spread / self.base.spread if self.base.spread else math.nan
            told["heldout_diversity_of_base"] = look.diversity / self.base.diversity if self.base.diversity else math.nan
        return {name: value for name, value in told.items() if not math.isnan(value)}

    def state_dict(self) -> dict[str, Any]:
        def plain(look: Look | None) -> dict[str, Any] | None:
            if look is None:
                return None
            figures = [None if math.isnan(value) else value for value in (look.kl, look.spread, look.diversity)]
            return {"scores": look.scores, "prompt_ids": list(look.prompt_ids), "figures": figures}

        return {"base": plain(self.base), "best": plain(self.best), "best_step": self.best_step, "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        def whole(kept: Mapping[str, Any] | None) -> Look | None:
            if kept is None:
                return None
            figures = [math.nan if value is None else float(value) for value in kept["figures"]]
            return Look(kept["scores"], list(kept["prompt_ids"]), *figures)

        self.base, self.best = whole(state["base"]), whole(state["best"])
        self.best_step, self.bad = int(state["best_step"]), int(state["bad"])
