"""Credit code by code in a PPO round: what every clip's slope says of every choice, held while the round is learnt.

rlhf/dense.py has the equations; this is their bookkeeping: old and reference log-probs of all V choices are computed once a round,
before the first update, for the rows that this process will meet, and advantages are scaled by one number over all processes.
Memory: 8 bytes x K x T x V a row (105 MB for 32 clips of 4 x 100 codes of 1,024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.lora import adapter_disabled
from base_models.conditions import Conditions
from base_models.lm import MusicLM, sum_by_step
from rlhf.dense import dense_advantages, expected_ppo_loss, gains
from rlhf.rollout import Rollout

Logits = Callable[[Tensor, Conditions], Tensor]
"""codes [B, K, T] and their conditions -> logits [B, K, T, V] of the policy as it stands."""
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


@dataclass(frozen=True)
class DenseTable:
    """place: row of the rollout -> row here; old_log_probs, advantages [N, K, T, V]; mask [N, K, T]; scale: divisor of the advantages."""

    place: dict[int, int]
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    scale: float

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the rollout [B] -> old log-probs, advantages [B, K, T, V], mask [B, K, T]."""
        here = torch.tensor([self.place[row] for row in rows.tolist()], device=self.mask.device)
        return self.old_log_probs[here], self.advantages[here], self.mask[here]

    def loss(self, log_probs: Tensor, rows: Tensor, cliprange: float, count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`expected_ppo_loss` of log_probs [B, K, T, V] for these rows of the rollout."""
        return expected_ppo_loss(log_probs, *self.at(rows), cliprange, count)


@torch.no_grad()
def dense_table(
    lm: MusicLM,
    logits: Logits,
    rollout: Rollout,
    conditions: Callable[[Tensor], Conditions],
    rows: Tensor,
    own: Tensor,
    codebooks: Tensor,
    unit: float,
    price: float,
    microbatch: int,
    reduce: Reduce,
) -> DenseTable:
    """Advantages of all choices at the rows that this process will learn from.

    Args: rollout: the whole round, with slopes. conditions: rows -> their conditions. rows: which are needed here. own: rows that
        no other process counts in the scale. unit: the score's standard deviation. price: of a nat, in units. reduce: sums over ranks.
    """
    needed = torch.unique(torch.cat([rows, own]))
    shape = (len(needed), *rollout.codes.shape[1:])
    old, made = (rollout.slope.new_empty((*shape, codebooks.shape[1])) for _ in range(2))
    for start, part in zip(range(0, len(needed), microbatch), needed.split(microbatch)):
        here = slice(start, start + len(part))
        codes, cond = rollout.codes[part], conditions(part)
        now = old[here] = logits(codes, cond).log_softmax(-1)
        with adapter_disabled(lm):
            reference = logits(codes, cond).log_softmax(-1)
        made[here] = dense_advantages(gains(rollout.slope[part] / unit, codebooks), now, reference, price)
    place = {row: index for index, row in enumerate(needed.tolist())}
    mask = rollout.mask[needed].any(1)[:, None, None].expand(shape)
    mine = torch.tensor([place[row] for row in own.tolist()], dtype=torch.long, device=needed.device)
    square = torch.cat([(old[row].exp() * made[row].square()).sum(-1)[None] for row in mine]).double()
    counted = mask[mine].double()
    sums = reduce(torch.stack([(square * counted).sum(), counted.sum()]))
    scale = float((sums[0] / sums[1].clamp(min=1)).sqrt().clamp_min(1e-12))
    return DenseTable(place, old, made.div_(scale), mask, scale)


def sampled_log_ratio(log_probs: Tensor, codes: Tensor, old_logps: Tensor) -> Tensor:
    """How far the steps that were played have become likelier: log pi - log pi_old [B, S], for the figures."""
    return sum_by_step(log_probs.gather(-1, codes[..., None])[..., 0]) - old_logps
