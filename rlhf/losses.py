"""Losses and estimators of preference learning: pure functions over `[B, S]`, each with its equation and its paper.

`mask` is True where a step counts; whatever stands at a False place, NaN included, changes no result.
A whole round is to be handed in, all ranks' clips together; a loss over a part of it takes the global count: divided by that it adds
up over microbatches and ranks, so 1 x 8 equals 8 x 1 and two processes equal one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _check(mask: Tensor, *tensors: Tensor) -> None:
    """All of one shape [B, S], the mask boolean: anything else is a bug of the caller."""
    assert mask.dtype == torch.bool, f"mask must be bool, not {mask.dtype}"
    assert mask.ndim == 2, f"expected [B, S], got {tuple(mask.shape)}"
    for tensor in tensors:
        assert tensor.shape == mask.shape, f"expected {tuple(mask.shape)}, got {tuple(tensor.shape)}"


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x [B, S] over the places where mask [B, S] is True. Returns a scalar; masked NaNs are not seen."""
    _check(mask, x)
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def from_group_means(rows: Tensor, group: Tensor) -> Tensor:
    """rows [N, F], each less the mean of its group; group [N] long, from 0: [N, F]."""
    count = torch.bincount(group).clamp_min(1).to(rows)
    mean = rows.new_zeros((len(count), rows.shape[1])).index_add_(0, group, rows) / count[:, None]
    return rows - mean[group]


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """sum(mask * x) / count, a scalar; 0 where nothing is valid.

    Args: x [B, S]. mask [B, S] bool. count: the divisor, for losses that are summed later over microbatches and ranks;
        by default the number of valid places.
    """
    total = masked_sum(x, mask)
    return total / (mask.sum().clamp(min=1) if count is None else count)


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, S] in float64 with 0 at masked places; mean and variance over the valid ones (0 where there is none), scalars."""
    wide = torch.where(mask, x, torch.zeros_like(x)).double()
    count = mask.sum().double().clamp(min=1)
    mean = wide.sum() / count
    return wide, mean, torch.where(mask, (wide - mean) ** 2, torch.zeros_like(wide)).sum() / count


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps), moments over the valid places, in float64.

    To be called with *all* ranks' steps: rank-local moments shift every rank by its own mean, and the gradient is then no longer the
    one of the global batch. Two passes, so that a large mean costs no digits. Huang et al. 2024, arXiv:2403.17031, detail
    "advantage whitening".

    Args: x, mask [B, S]. shift_mean: False keeps the mean (for rewards).
    Returns: [B, S]; 0 at masked places.
    """
    _check(mask, x)
    wide, mean, variance = _moments(x, mask)
    white = (wide - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, torch.zeros_like(white)).to(x.dtype)


def masked_spread(x: Tensor, mask: Tensor) -> float:
    """Standard deviation of x [B, S] over the valid places, in float64; 0 where there is none. NaNs at other places are not seen."""
    _check(mask, x)
    return _moments(x, mask)[2].sqrt().item()


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: A_s = sum_i (gamma lam)^i delta_{s+i}, delta_s = r_s + gamma V_{s+1} - V_s.

    The value after the last valid step is 0 (a clip ends there). Masked steps are skipped over, wherever they stand.
    lam = 1, gamma = 1: A_s = sum of the rewards to come - V_s. lam = 0: the TD error.
    Schulman et al. 2016, arXiv:1506.02438.

    Args: rewards, values, mask [B, S].
    Returns: advantages [B, S], returns = advantages + values [B, S]; both 0 at masked places, without gradient.
    """
    _check(mask, rewards, values)
    rewards, values = rewards.detach(), values.detach()
    zero = torch.zeros_like(values[:, 0])
    next_value, carried = zero, zero
    columns: list[Tensor] = []
    for s in reversed(range(rewards.shape[1])):
        valid = mask[:, s]
        delta = rewards[:, s] + gamma * next_value - values[:, s]
        advantage = delta + gamma * lam * carried
        carried = torch.where(valid, advantage, carried)
        next_value = torch.where(valid, values[:, s], next_value)
        columns.append(torch.where(valid, advantage, zero))
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))


def ppo_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(logps - old_logps).

    Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    Args: logps, old_logps, advantages, mask [B, S], nats per step. count: divisor (see `masked_mean`).
    Returns: a scalar loss; figures `approx_kl` (k3 of old against new), `clipfrac`, `ratio`, divided by the same count.
    """
    _check(mask, logps, old_logps, advantages)
    log_ratio = torch.where(mask, logps - old_logps.detach(), torch.zeros_like(logps))
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    advantages = advantages.detach()
    loss = masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask, count)
    with torch.no_grad():
        stats = {
            "approx_kl": masked_mean(ratio - 1.0 - log_ratio, mask, count),
            "clipfrac": masked_mean(((ratio - 1.0).abs() > cliprange).float(), mask, count),
            "ratio": masked_mean(ratio, mask, count),
        }
    return loss, stats


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float,
    count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean of 1/2 max((V - R)^2, (V_clip - R)^2), V_clip = V_old + clip(V - V_old, -eps, eps).

    The larger of the two: a value may be drawn back into the range, never be rewarded for having left it.
    arXiv:2403.17031 (value clipping, as in OpenAI's baselines).

    Args: values, old_values, returns, mask [B, S]. count: divisor (see `masked_mean`).
    Returns: a scalar loss; the figure `value_clipfrac`.
    """
    _check(mask, values, old_values, returns)
    values, old_values, returns = (torch.where(mask, x, torch.zeros_like(x)) for x in (values, old_values.detach(), returns.detach()))
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    free, bound = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(free, bound), mask, count)
    with torch.no_grad():
        stats = {"value_clipfrac": masked_mean((bound > free).float(), mask, count)}
    return loss, stats


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """k1 = log pi(a) - log ref(a): the unbiased single-sample estimate of KL(pi || ref); may be negative.

    Schulman 2020, "Approximating KL Divergence". Args: [B, S] nats, actions drawn from pi. Returns: [B, S].
    """
    assert logps.shape == ref_logps.shape, f"{tuple(logps.shape)} against {tuple(ref_logps.shape)}"
    return logps - ref_logps


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """k3 = r - 1 - log r, r = ref(a) / pi(a): unbiased as k1, never negative, of less variance near zero.

    Schulman 2020, "Approximating KL Divergence". Args: [B, S] nats, actions drawn from pi. Returns: [B, S] >= 0.
    """
    assert logps.shape == ref_logps.shape, f"{tuple(logps.shape)} against {tuple(ref_logps.shape)}"
    log_r = ref_logps - logps
    return torch.expm1(log_r) - log_r


def kl_full(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) of whole distributions, not of a draw from them: logits [..., V] twice -> nats [...]."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """H = -sum_v p_v log p_v of softmax(logits), in nats and in float32. Args: logits [..., V]. Returns: [...]."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def dpo_loss(
    logps_chosen: Tensor,
    logps_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    p_chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta * ((log pi/ref)(chosen) - (log pi/ref)(rejected))).

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    With `p_chosen` the label is soft: -p log sigmoid(h) - (1 - p) log sigmoid(-h) (cDPO); p = 1/2 is a tie.

    Args: each log-prob [B], nats, summed over the answer's steps. beta: price of drift, dimensionless.
        p_chosen [B] in [0, 1].
    Returns: loss [B]; implicit rewards of chosen and rejected [B], without gradient.
    """
    assert logps_chosen.ndim == 1, f"expected [B], got {tuple(logps_chosen.shape)}"
    assert logps_chosen.shape == logps_rejected.shape == ref_chosen.shape == ref_rejected.shape
    reward_chosen = beta * (logps_chosen - ref_chosen)
    reward_rejected = beta * (logps_rejected - ref_rejected)
    loss = bradley_terry_loss(reward_chosen, reward_rejected, p_chosen)
    return loss, reward_chosen.detach(), reward_rejected.detach()


def ipo_loss(
    logps_chosen: Tensor,
    logps_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    codes_chosen: Tensor,
    codes_rejected: Tensor,
    beta: float,
    p_chosen: Tensor | None = None,
) -> Tensor:
    """p (h - m)^2 + (1 - p) (h + m)^2, h = (log pi/ref)(chosen) per code - the same of rejected, m = 1 / (2 beta).

    Azar et al. 2023, arXiv:2310.12036, eq. 17; averaged over the codes, as its authors told TRL that they did: so m is nats a *code*
    (a step holds K of them), and a clip of N codes is asked for a margin of N / (2 beta) nats.

    Args: each log-prob [B], nats, summed over the answer's codes; codes_* [B]: how many they are. p_chosen [B] in [0, 1].
    Returns: loss [B]; at h = 0 it is m^2, whatever p.
    """
    assert logps_chosen.shape == logps_rejected.shape == ref_chosen.shape == ref_rejected.shape == codes_chosen.shape
    h = (logps_chosen - ref_chosen) / codes_chosen - (logps_rejected - ref_rejected) / codes_rejected
    margin = 1.0 / (2.0 * beta)
    if p_chosen is None:
        return (h - margin) ** 2
    return p_chosen * (h - margin) ** 2 + (1.0 - p_chosen) * (h + margin) ** 2


def simpo_loss(
    logps_chosen: Tensor,
    logps_rejected: Tensor,
    codes_chosen: Tensor,
    codes_rejected: Tensor,
    beta: float,
    gamma: float,
    p_chosen: Tensor | None = None,
) -> Tensor:
    """-p log sigmoid(d - gamma) - (1 - p) log sigmoid(-d - gamma), d = beta * (log pi(chosen) per code - log pi(rejected) per code).

    Meng et al. 2024, arXiv:2405.14734, eq. 6: no reference. Per *code*, the unit of TRL's SimPO over the flat view. With p < 1 the
    other way round has the same margin gamma, so that a tie (p = 1/2) leans to neither side.

    Args: each log-prob [B], nats, summed over the answer's codes; codes_* [B]: how many they are. gamma: target margin, nats.
    Returns: loss [B].
    """
    assert logps_chosen.shape == logps_rejected.shape == codes_chosen.shape == codes_rejected.shape
    d = beta * (logps_chosen / codes_chosen - logps_rejected / codes_rejected)
    if p_chosen is None:
        return -F.logsigmoid(d - gamma)
    return -p_chosen * F.logsigmoid(d - gamma) - (1.0 - p_chosen) * F.logsigmoid(-d - gamma)


def kto_loss(logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor | float, beta: float) -> Tensor:
    """1 - sigmoid(beta (r - kl)) for a desirable clip, 1 - sigmoid(beta (kl - r)) for another; r = log pi/ref of the clip.

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7. Clips are judged one by one: no pairs are needed.

    Args: logps, ref_logps [B], nats a clip. desirable [B] bool. kl: the point of reference, nats a clip, >= 0, without gradient.
    Returns: loss [B] in (0, 1); 1/2 at r = kl.
    """
    assert logps.shape == ref_logps.shape == desirable.shape, f"{tuple(logps.shape)} against {tuple(desirable.shape)}"
    gain = beta * (logps - ref_logps - kl)
    return 1.0 - torch.sigmoid(torch.where(desirable, gain, -gain))


def bradley_terry_loss(score_chosen: Tensor, score_rejected: Tensor, p_chosen: Tensor | None = None) -> Tensor:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d), d = score(chosen) - score(rejected). Bradley & Terry 1952.

    Args: scores [B], logits. p_chosen [B] in [0, 1]: share of the raters for `chosen` (a tie is 1/2); 1 by default.
    Returns: loss [B], nats. At d = 0 it is log 2.
    """
    assert score_chosen.ndim == 1, f"expected [B], got {tuple(score_chosen.shape)}"
    assert score_chosen.shape == score_rejected.shape
    difference = score_chosen - score_rejected
    if p_chosen is None:
        return -F.logsigmoid(difference)
    assert p_chosen.shape == difference.shape
    return -p_chosen * F.logsigmoid(difference) - (1.0 - p_chosen) * F.logsigmoid(-difference)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the valid places: 1 is a perfect critic, 0 a constant, below 0 worse than that.

    Args: values, returns, mask [B, S]. Returns: a scalar; 0 where the returns do not vary.
    """
    _check(mask, values, returns)

    of_returns, left = (_moments(x.detach(), mask)[2] for x in (returns, returns - values))
    share = 1.0 - left / of_returns.clamp(min=1e-12)
    return torch.where(of_returns > 1e-12, share, torch.zeros_like(share)).float()
