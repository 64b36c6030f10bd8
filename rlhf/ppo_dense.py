"""Credit code by code in a PPO round: what every clip's slope says of every choice, held while the round is learnt.

rlhf/dense.py has the equations; this is their bookkeeping. Old and reference log-probs of all V choices are those of the round's play, so
that no pass through the model is needed; they stay with the process that played a clip, which alone learns from it; and advantages are
scaled by one number over all processes. Memory, from play until the round is learnt: 8 bytes x K x T x V a clip of this process (105 MB for
32 clips of 4 x 100 codes of 1,024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from base_models.lm import codes_of_steps, sum_by_step
from rlhf.dense import dense_advantages, expected_ppo_loss, gains
from rlhf.rollout import Rollout

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


@dataclass(frozen=True)
class DenseTable:
    """first: which row of the rollout is row 0 here; old_log_probs, advantages [N, K, T, V], the latter over scale; mask [N, K, T]."""

    first: int
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    scale: float

    def loss(
        self, logits: Tensor, codes: Tensor, rows: Tensor, cliprange: float, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """`expected_ppo_loss` of logits [B, K, T, V] for these rows of the rollout, its figures, and the log-probs [B, S] that the policy
        has now for what was played there, codes [B, K, T]."""
        here = rows - self.first
        loss, stats, normaliser = expected_ppo_loss(
            logits, self.old_log_probs, self.advantages, self.mask[here], cliprange, count, here.tolist()
        )
        with torch.no_grad():
            return loss, stats, step_log_probs(logits, codes, normaliser)


@torch.no_grad()
def dense_table(rollout: Rollout, first: int, codebooks: Tensor, unit: float, price: float, reduce: Reduce) -> DenseTable:
    """Advantages of all choices in the clips that this process played.

    Their memory is that of `rollout.choice_ref_logps`, which is written over: a round is learnt from once.

    Args: rollout: the whole round, with slopes; its rows from `first` on are those that this process played. unit: the score's standard
        deviation. price: of a nat, in units. reduce: sums over ranks.
    """
    old, made = rollout.choice_logps, rollout.choice_ref_logps
    mask = codes_of_steps(rollout.mask, old.shape[1])[first : first + len(old)]
    assert abs(float(made[0, 0, 0].logsumexp(0))) < 1e-3, "no log-probs of the reference: a round can be learnt from once"
    sums = torch.zeros(2, dtype=torch.float64, device=old.device)
    for row, (before, reference) in enumerate(zip(old, made)):  # clip by clip, so that what is needed in between stays in the cache
        gain = gains(rollout.slope[first + row][None] / unit, codebooks)[0]
        made[row] = advantages = dense_advantages(gain, before, reference, price)
        square = (before.exp() * advantages.square()).sum(-1).double()
        sums += torch.stack([(square * mask[row]).sum(), mask[row].sum()])
    sums = reduce(sums)
    scale = float((sums[0] / sums[1].clamp(min=1)).sqrt().clamp_min(1e-12))
    return DenseTable(first, old, made.div_(scale), mask, scale)


def step_log_probs(logits: Tensor, codes: Tensor, normaliser: Tensor) -> Tensor:
    """log pi [B, S] of the steps that were played: codes [B, K, T], of logits [B, K, T, V] with log sum exp [B, K, T]."""
    return sum_by_step(logits.gather(-1, codes[..., None])[..., 0] - normaliser)
