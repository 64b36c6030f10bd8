"""One clip edited twice, for the better and for the worse: a pair for DPO whose sides differ in nothing but what the reward hears.

    codes [B, K, T] -> slope of the score -> gains [B, K, T, V] -> redrawn towards +gain: chosen; towards -gain: rejected

Two clips of a prompt differ in four hundred codes, of which most have nothing to do with why one is liked better; a policy with some
hundred thousand adaptable numbers learns those. Here some codes of one clip are redrawn from pi * exp(gain / price), and, apart from
that, from pi * exp(-gain / price) (rlhf.dense.redraw). Both sides stem from the same clip and both are as much of an edit: were one
side the clip as it was played, DPO would learn to tell edits from clips, which drives the policy away from music (measured: 330 nats a
clip). The reward judges both; a pair that it does not order as it was meant is not used.

The log-ratios of such a pair are summed over the codes that differ (rlhf.own_pairs.edited_codes): the rest is the same on both sides and
only said in another context, which is noise. (docs/training.md has what single runs gave; they differ in more than this.)

The idea of learning from a clip and its counterfactual: Kaushik et al. 2020, arXiv:1909.12434 (counterfactually augmented data);
mirrored noise against variance: antithetic variates, Hammersley and Morton 1956.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base_models.conditions import Conditions
from base_models.lm import MusicLM
from rlhf.dense import gains, redraw
from rlhf.rewards import Mixed
from rlhf.rollout import code_logits


@dataclass(frozen=True)
class Edits:
    """better, worse: codes [B, K, T]; gap [B]: the reward's score of better minus worse, not finite where it has none."""

    better: Tensor
    worse: Tensor
    gap: Tensor


@torch.no_grad()
def antithetic_edits(
    lm: MusicLM,
    reward: Mixed,
    codes: Tensor,
    slope: Tensor,
    cond: Conditions,
    prompts: Sequence[str],
    seeds: Sequence[int],
    unit: float,
    price: float,
    temperature: float = 1.0,
) -> Edits:
    """Edit each of B clips both ways.

    Args: codes [B, K, T], drawn by `lm` as it stands; slope [B, D, T] of the reward at them, limited (rlhf.dense); cond, prompts: B of
        each; seeds: one a clip, so that batch mates change nothing. unit: the standard deviation of the score. price: a nat of
        departure from the policy is worth so many units of gain; the smaller, the more codes change.
    """
    gain = gains(slope.to(codes.device) / unit, reward.codebooks.to(slope))
    logits, _ = code_logits(lm, codes, cond, temperature=temperature)
    log_probs = logits.log_softmax(-1)
    sides = []
    for sign in (1.0, -1.0):
        rows = [
            redraw(codes[i : i + 1], log_probs[i : i + 1], sign * gain[i : i + 1], price, torch.Generator().manual_seed(seed))
            for i, seed in enumerate(seeds)
        ]
        sides.append(torch.cat(rows))
    better, worse = sides
    return Edits(better, worse, reward(better, list(prompts)) - reward(worse, list(prompts)))
