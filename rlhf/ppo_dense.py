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
from base_models.lm import MusicLM, codes_of_steps, sum_by_step
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

    def loss(
        self, logits: Tensor, codes: Tensor, rows: Tensor, cliprange: float, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """`expected_ppo_loss` of logits [B, K, T, V] for these rows of the rollout, its figures, and the log-probs [B, S] that the policy
        has now for what was played there, codes [B, K, T]."""
        here = [self.place[row] for row in rows.tolist()]
        mask = self.mask[torch.tensor(here, device=self.mask.device)]
        loss, stats, normaliser = expected_ppo_loss(logits, self.old_log_probs, self.advantages, mask, cliprange, count, here)
        with torch.no_grad():
            return loss, stats, step_log_probs(logits, codes, normaliser)


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
    passes: int,
    reduce: Reduce,
) -> DenseTable:
    """Advantages of all choices at the rows that this process will learn from.

    Args: rollout: the whole round, with slopes. conditions: rows -> their conditions. rows: which are needed here. own: rows that
        no other process counts in the scale. unit: the score's standard deviation. price: of a nat, in units. passes: through the model, on
        every process alike, since where weights are sharded each is a collective; those that find no rows left repeat some. reduce: sums
        over ranks.
    """
    needed = torch.unique(torch.cat([rows, own]))
    shape = (len(needed), *rollout.codes.shape[1:])
    old, made = (rollout.slope.new_empty((*shape, codebooks.shape[1])) for _ in range(2))
    parts = needed.split(microbatch)
    for number in range(max(passes, len(parts))):
        start, part = number * microbatch, parts[number % len(parts)]
        codes, cond = rollout.codes[part], conditions(part)
        now = logits(codes, cond)
        with adapter_disabled(lm):
            reference = logits(codes, cond)
        if number >= len(parts):
            continue
        for i, row in enumerate(part.tolist()):  # clip by clip, so that what is needed in between stays in the cache
            gain = gains(rollout.slope[row : row + 1] / unit, codebooks)[0]
            old[start + i] = now[i].log_softmax(-1)
            made[start + i] = dense_advantages(gain, old[start + i], reference[i].log_softmax(-1), price)
    place = {row: index for index, row in enumerate(needed.tolist())}
    mask = codes_of_steps(rollout.mask[needed], shape[1])
    mine = torch.tensor([place[row] for row in own.tolist()], dtype=torch.long, device=needed.device)
    square = torch.cat([(old[row].exp() * made[row].square()).sum(-1)[None] for row in mine]).double()
    counted = mask[mine].double()
    sums = reduce(torch.stack([(square * counted).sum(), counted.sum()]))
    scale = float((sums[0] / sums[1].clamp(min=1)).sqrt().clamp_min(1e-12))
    return DenseTable(place, old, made.div_(scale), mask, scale)


def step_log_probs(logits: Tensor, codes: Tensor, normaliser: Tensor) -> Tensor:
    """log pi [B, S] of the steps that were played: codes [B, K, T], of logits [B, K, T, V] with log sum exp [B, K, T]."""
    return sum_by_step(logits.gather(-1, codes[..., None])[..., 0] - normaliser)
