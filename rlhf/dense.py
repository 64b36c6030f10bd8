"""Credit code by code: what another choice at each place would have changed in the score, to first order.

    codes [B, K, T] -> latents [B, D, T] -> score [B] -> slope d score / d latents [B, D, T]
                    -> gains [B, K, T, V] = slope . codebook vectors -> advantages -> the clipped surrogate, summed over all actions

One score for a hundred steps of four codes is a poor teacher: a policy gradient has to average hundreds of clips until the noise of
all other choices is gone, and a policy with 700,000 adaptable numbers drifts on that noise (measured on the demo base: 47 nats of
KL for .3 standard deviations of score). But this reward was made of smooth statistics of what the codec plays, so it can say more
than whether it liked a clip: its slope names the direction in which each frame should have moved, and a code's vector how far each
choice would have moved it. That is a local, linear critic that costs one backward pass through the codec's decoder.

Two uses, both exact about the actions and linear about the reward:
- PPO: the expectation of the clipped surrogate over all V actions of a code, under the policy that played, instead of one sample of
  it (all-action gradients: Asadi et al. 2017, arXiv:1709.00503; Ciosek and Whiteson 2018, arXiv:1706.05374). A linear critic taken
  from a derivative as in Gu et al. 2017, "Q-Prop", arXiv:1611.02247; here without its Monte Carlo residual, which brings back
  the noise: it is biased where the score is far from linear, and the KL price keeps it near.
- DPO: a minimal pair, the clip as it was played against the same clip with the few codes redrawn that the gains speak against.

What it neglects: that a code also changes what is played after it. Each round plays anew, so such errors are met by the next slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.losses import masked_mean


class Sloped(Protocol):
    """A reward that knows its slope (rlhf.reward_model.RewardModel)."""

    base: Any

    def slope(self, codes: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


def limited(slope: Tensor, times: float = 2.0, typical: float | None = None) -> Tensor:
    """slope [B, D, T], none longer than `times` the typical one: one clip at a cliff of the score must not lead a round.

    Slopes that are not finite become 0: such a clip teaches nothing. typical: by default `typical_length` of the batch.
    """
    slope = torch.where(torch.isfinite(slope).flatten(1).all(1)[:, None, None], slope, torch.zeros_like(slope))
    length = slope.flatten(1).norm(dim=1)
    bound = times * (typical_length(length) if typical is None else typical)
    return slope * (bound / length.clamp_min(1e-12)).clamp(max=1.0)[:, None, None]


def typical_length(length: Tensor) -> float:
    """The median of the lengths [B] that are finite and above 0; 0 where none is. A clip whose prompt asks nothing has no slope, and were
    it counted, half a batch of such clips would take all others' away."""
    there = length[torch.isfinite(length) & (length > 0)]
    return float(there.median()) if len(there) else 0.0


def gains(slope: Tensor, codebooks: Tensor) -> Tensor:
    """slope [B, D, T], codebook vectors [K, V, D] -> first-order part of the score that each choice would bring [B, K, T, V]."""
    return torch.einsum("bdt,kvd->bktv", slope, codebooks)


def dense_advantages(gain: Tensor, old_log_probs: Tensor, ref_log_probs: Tensor, kl_coef: float) -> Tensor:
    """A(v) = r(v) - E_old[r], r(v) = gain(v) - kl_coef * (log pi_old(v) - log ref(v)).

    Its gradient under pi_old is exactly that of E[gain] - kl_coef * KL(pi || ref), place by place.

    Args: gain [B, K, T, V] in the unit that kl_coef prices a nat in; log-probs [B, K, T, V], nats.
    Returns: [B, K, T, V], of mean 0 under pi_old at every place; without gradient.
    """
    reward = gain - kl_coef * (old_log_probs - ref_log_probs)
    return (reward - (old_log_probs.exp() * reward).sum(-1, keepdim=True)).detach()


def expected_ppo_loss(
    logits: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    count: Tensor | float | None = None,
    at: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """mean over codes of -sum_v pi_old(v) min(rho_v A_v, clip(rho_v, 1 - eps, 1 + eps) A_v): PPO's surrogate without its sampling noise.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7, with the expectation over actions taken exactly.

    Args: logits [B, K, T, V] of the policy as it stands. old_log_probs, advantages [N, K, T, V]. mask [B, K, T] bool. count: divisor (see
        `losses.masked_mean`). at: which of the N clips the B are, where they are not all of them in order.
    Returns: a scalar loss, to be differentiated once; figures `dense_kl` (KL of old to new), `dense_clipfrac` (probability mass that was
        clipped), by the same count; the policy's normaliser log sum exp logits [B, K, T], without gradient.
    """
    rows = range(len(logits)) if at is None else at
    *sums, normaliser = _ExpectedSurrogate.apply(logits, old_log_probs, advantages, rows, cliprange)  # type: ignore[no-untyped-call]
    surrogate, kl, clipped = (masked_mean(x.flatten(1), mask.flatten(1), count) for x in sums)
    return -surrogate, {"dense_kl": kl, "dense_clipfrac": clipped}, normaliser


class _ExpectedSurrogate(torch.autograd.Function):
    """Sums over V, [B, K, T] each: sum pi_old min(rho A, clip(rho) A); KL of old to new; the probability that is clipped; log sum exp.

    The derivative of the first by log pi is g = pi A where nothing is clipped and 0 elsewhere, by the logits g - pi sum g. It is written
    down on the way, clip by clip, so that what is needed in between stays in the cache, and is all that is kept, where autograd would
    keep seven tensors as large.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, old_log_probs: Tensor, advantages: Tensor, rows: Sequence[int], cliprange: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slope, sums = torch.empty_like(logits), logits.new_empty((4, *logits.shape[:-1]))
        for here, row in enumerate(rows):
            before, advantage = old_log_probs[row], advantages[row]
            new = logits[here].log_softmax(-1)
            sums[3, here] = logits[here, ..., 0] - new[..., 0]
            old = before.exp()
            change = new.sub_(before)
            sums[1, here] = -(old * change).sum(-1)
            ratio = change.exp_()
            bounded = ratio.clamp(1 - cliprange, 1 + cliprange)
            sums[2, here] = (old * (ratio != bounded)).sum(-1)
            now, plain = old * ratio, ratio.mul_(advantage)
            bounded.mul_(advantage)
            free = plain <= bounded
            sums[0, here] = torch.minimum(plain, bounded).mul_(old).sum(-1)
            by_log_prob = plain.mul_(old).mul_(free)
            torch.sub(by_log_prob, now.mul_(by_log_prob.sum(-1, keepdim=True)), out=slope[here])
        ctx.slope = slope
        outputs = tuple(x.clone() for x in sums)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        slope, ctx.slope = ctx.slope, None  # it is as large as the logits: given away, not copied
        assert slope is not None, "the surrogate can be differentiated once"
        return slope.mul_(upstream[..., None]), None, None, None, None


def redraw(codes: Tensor, log_probs: Tensor, gain: Tensor, price: float, generator: torch.Generator) -> Tensor:
    """Codes [B, K, T] moved from pi to pi * exp(gain / price), changing as few as can be (a maximal coupling).

    A code is kept with probability min(1, new(v) / old(v)), else drawn from what the new distribution has more of.

    Args: log_probs [B, K, T, V] of the policy that drew the codes. gain [B, K, T, V]. price: nats are worth so much gain each; the
        smaller, the more codes change.
    """
    tilted = (log_probs + gain / price).log_softmax(-1)
    picked = codes[..., None]
    keep = (tilted.gather(-1, picked) - log_probs.gather(-1, picked))[..., 0].exp()
    left = torch.rand(codes.shape, generator=generator).to(keep) >= keep
    old, new = log_probs[left].exp(), tilted[left].exp()  # [n, V]: few, and only they are drawn
    more = (new - old).clamp_min(0)
    nothing = more.sum(-1, keepdim=True) <= 1e-9  # the two are equal there but for rounding
    made = codes.clone()
    if len(more):
        made[left] = torch.multinomial((more + nothing * old).cpu(), 1, generator=generator)[:, 0].to(codes)
    return made
