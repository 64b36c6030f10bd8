"""One clip edited twice, for the better and for the worse: a pair for DPO whose sides differ in nothing but what the reward hears.

    codes [B, K, T] -> slope of the score -> gains [B, K, T, V] -> redrawn towards +gain: chosen; towards -gain: rejected

Two clips of a prompt differ in four hundred codes, of which most have nothing to do with why one is liked better; a policy with some
hundred thousand adaptable numbers learns those. Here some codes of one clip are redrawn from pi * exp(gain / price), and, apart from
that, from pi * exp(-gain / price) (rlhf.dense.redraw). Both sides stem from the same clip and both are as much of an edit: were one
side the clip as it was played, DPO would learn to tell edits from clips, which drives the policy away from music (measured: 330 nats a
clip). The reward may be asked about both sides; a pair that it does not order as it was meant is not used.

The log-ratios of a pair that was drawn are summed over the codes that differ (rlhf.round_rows.edited_codes): the rest is the same on
both sides and only said in another context, which is noise. What the draw itself adds of noise, `expected_difference` is without: it is
the mean of those log-ratios over all edits of the clip, which the policy's own distributions give in closed form. (docs/experiments.md has
figures.)

The idea of learning from a clip and its counterfactual: Kaushik et al. 2020, arXiv:1909.12434 (counterfactually augmented data);
mirrored noise against variance: antithetic variates, Hammersley and Morton 1956.
"""

from __future__ import annotations

import math
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
    """better, worse: codes [B, K, T]; gap [B]: the reward's score of better minus worse, NaN where it was not asked, -inf where it has
    none or nothing was edited."""

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
    asked: Tensor | None = None,
) -> Edits:
    """Edit each of B clips both ways.

    Args: codes [B, K, T], drawn by `lm` as it stands; slope [B, D, T] of the reward at them, limited (rlhf.dense); cond, prompts: B of
        each; seeds: one a clip, so that batch mates change nothing. unit: the standard deviation of the score. price: a nat of
        departure from the policy is worth so many units of gain; the smaller, the more codes change. asked [B] bool: of whose edits the
        reward is asked (its slope made them, and to judge both sides costs as much again); default: of all.
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
    gap = torch.full((len(better),), math.nan, device=codes.device)
    judged = torch.arange(len(better)) if asked is None else asked.nonzero()[:, 0]
    if len(judged):
        names = [prompts[row] for row in judged.tolist()]
        found = reward(better[judged], names) - reward(worse[judged], names)
        gap[judged] = torch.nan_to_num(found, nan=-math.inf, neginf=-math.inf).to(gap)
    gap[(better == worse).flatten(1).all(1)] = -math.inf
    return Edits(better, worse, gap)


def expected_difference(logits: Tensor, ref_logits: Tensor, gain: Tensor, price: float) -> Tensor:
    """What the log-ratio log pi / ref of a better edit is expected to have over that of a worse one, code by code, nats.

    sum_v (better(v) - worse(v)) * (log pi(v) - log ref(v)), better and worse = pi * exp(+-gain / price), normalised: what edits of a clip
    differ by on the average, without drawing them, given the clip as it was played. The two edits' probabilities sum to the same, so that
    logits serve as well as log-probs. The distributions of the edits are those of the policy as it stands, and carry no gradient.

    Args: logits, ref_logits, gain [..., V]. price: as in `antithetic_edits`. Returns: [...].
    """
    with torch.no_grad():
        tilt = gain / price
        apart = (logits + tilt).softmax(-1) - (logits - tilt).softmax(-1)
    return (apart * (logits - ref_logits)).sum(-1)
