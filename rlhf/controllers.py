"""What PPO remembers from step to step beside its weights: the price of drift, each prompt's ease, the scale of the reward.

All are plain numbers with `state_dict` / `load_state_dict`, so that a resumed run goes on exactly where it stood. (`leave_one_out`
stands beside the baseline that it may replace, and remembers nothing.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from base_models.errors import UserError

MOST_STEP = 0.2
"""An error beyond this share of the target counts as no more (the clip of Ziegler et al.)."""
MOST_ANSWER = 4.0
"""A KL of so many times its target is answered like one beyond; the budget ends such a run."""


def check_power(power: float, target_kl: float | None) -> None:
    """Refuse a --kl-power that answers nothing."""
    if power < 0 or (power and target_kl is None):
        raise UserError(
            f"--kl-power {power:g} with --target-kl {target_kl}", "0 or more, and a target", "give --target-kl and take 1, or leave it out"
        )


class AdaptiveKLController:
    """Moves the KL price so that the policy's KL per sequence stays near a target.

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2:
    beta <- beta * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon).

    Args: kl_coef: the first price. target_kl: nats per sequence; None keeps the price fixed. horizon: sequences.
    least: what the price never falls below; without it a reward that says little is followed as far as any.
    power: how the price of a round answers its own KL, beside beta, which answers all KL so far: beta * (kl / target) ** power. Beta alone
        (0) comes late and goes on rising until the policy is back, and so swings about the target (docs/experiments.md).
    """

    def __init__(
        self, kl_coef: float, target_kl: float | None = None, horizon: int = 10_000, least: float = 0.0, power: float = 0.0
    ) -> None:
        self.kl_coef, self.target_kl, self.horizon, self.least, self.power = kl_coef, target_kl, horizon, least, power

    def price(self, kl: float) -> float:
        """Of a nat in a round of this mean KL (nats per sequence; an estimate, which may fall below 0)."""
        if self.target_kl is None or not self.power or not math.isfinite(kl):
            return self.kl_coef
        return max(self.least, self.kl_coef * min(max(kl / self.target_kl, 0.0), MOST_ANSWER) ** self.power)

    def update(self, kl: float, n: int) -> float:
        """Takes the mean KL (nats per sequence) of n sequences, returns the new price. A non-finite KL: no change."""
        if self.target_kl is not None and math.isfinite(kl):
            error = min(max(kl / self.target_kl - 1.0, -MOST_STEP), MOST_STEP)
            self.kl_coef = max(self.least, self.kl_coef * (1.0 + error * n / self.horizon))
        return self.kl_coef

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coef = float(state["kl_coef"])


class RewardNormalizer:
    """Running mean and variance of the scores over all steps and ranks: (score - mean) / max(std, least), clipped to +-clip.

    The mean is shared by every sequence: taking it away changes no preference; it only spares the critic a bias.
    Moments are merged exactly (Chan, Golub and LeVeque 1983), so that one batch of 2n equals two of n.
    """

    def __init__(self, clip: float = 5.0, eps: float = 1e-4, least: float = 0.0) -> None:
        self.clip, self.eps, self.least = clip, eps, least
        self.count, self.mean, self.m2 = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Not less than `least`. 1 until two scores were seen, and where all scores are equal (they differ from the mean by 0 then)."""
        variance = self.m2 / self.count if self.count > 1 else 0.0
        return max(math.sqrt(variance) if variance > self.eps**2 else 1.0, self.least)

    def update(self, scores: Tensor) -> None:
        """Takes the finite scores of [B], a whole round over all ranks."""
        assert scores.ndim == 1, f"expected [B], got {tuple(scores.shape)}"
        finite = scores[torch.isfinite(scores)].double()
        count = float(finite.numel())
        if count == 0:
            return
        mean = float(finite.sum()) / count
        m2 = float(((finite - mean) ** 2).sum())
        total, delta = self.count + count, mean - self.mean
        self.m2 += m2 + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def __call__(self, scores: Tensor) -> Tensor:
        """[B] -> [B]; non-finite scores stay non-finite, for the caller to leave out."""
        return ((scores - self.mean) / self.std).clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.m2 = float(state["count"]), float(state["mean"]), float(state["m2"])


def leave_one_out(prompt_ids: Tensor, scores: Tensor) -> Tensor:
    """score_i - mean of the other clips of its prompt in this round: how much better than its siblings a clip is.

    Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"; RLOO, Ahmadian et al. 2024, arXiv:2402.14740, sec. 3.3.
    Needs no memory and is right from the first round, but spends the batch on fewer prompts.

    Args: a whole round, over all ranks: prompt_ids, scores [B]. Returns: [B], NaN where a score is not finite or has no sibling.
    """
    assert prompt_ids.shape == scores.shape, f"{tuple(prompt_ids.shape)} against {tuple(scores.shape)}"
    finite = torch.isfinite(scores)
    sibling = (prompt_ids[:, None] == prompt_ids[None]) & finite[None]
    sibling.fill_diagonal_(False)
    known = torch.where(finite, scores, torch.zeros_like(scores))
    return torch.where(finite, scores, torch.full_like(scores, float("nan"))) - sibling.to(scores) @ known / sibling.sum(1)


class PromptBaseline:
    """Takes away what a prompt's clips score above or below the others whatever is played: score - offset(prompt).

    A prompt that is always judged well tells nothing about the clip, yet dwarfs what does until the critic has learnt it, which
    takes longer than a short run lasts. Only earlier rounds enter an offset, so the expected gradient is unchanged (any function of
    the prompt may be a baseline: Ahmadian et al. 2024, arXiv:2402.14740; running statistics by prompt: Black et al. 2023,
    arXiv:2305.13301). Offsets are taken from the mean of the clip's own round, so that a policy that improves does not shift
    them, and shrunk to 0 by one imagined clip.
    """

    def __init__(self, n_prompts: int) -> None:
        self.sums, self.counts = [0.0] * n_prompts, [0] * n_prompts

    def offset(self, prompt_id: int) -> float:
        return self.sums[prompt_id] / (self.counts[prompt_id] + 1)

    def __call__(self, prompt_ids: Tensor, scores: Tensor) -> Tensor:
        """A whole round, over all ranks: scores [B] -> centred scores [B]; then the round is remembered. NaN stays NaN."""
        assert prompt_ids.shape == scores.shape, f"{tuple(prompt_ids.shape)} against {tuple(scores.shape)}"
        ids = prompt_ids.tolist()
        centred = scores - torch.tensor([self.offset(i) for i in ids], dtype=scores.dtype, device=scores.device)
        finite = torch.isfinite(scores)
        if finite.any():
            deviations = (scores - scores[finite].mean()).tolist()
            for prompt_id, deviation, known in zip(ids, deviations, finite.tolist()):
                if known:
                    self.sums[prompt_id] += deviation
                    self.counts[prompt_id] += 1
        return centred

    def state_dict(self) -> dict[str, list[float] | list[int]]:
        return {"sums": list(self.sums), "counts": list(self.counts)}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        self.sums, self.counts = [float(x) for x in state["sums"]], [int(x) for x in state["counts"]]
