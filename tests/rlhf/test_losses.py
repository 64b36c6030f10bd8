"""The losses against hand-made numbers, enumeration and independent implementations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.controllers import AdaptiveKLController, PromptBaseline, RewardNormalizer
from rlhf.losses import (
    bradley_terry_loss,
    dpo_loss,
    entropy,
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    masked_mean,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
)


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def ragged(B: int = 8, S: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """Random x [B, S] with a right-padded mask of ragged lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, S + 1, (B, 1), generator=generator)
    return torch.randn(B, S, generator=generator), torch.arange(S)[None] < lengths, generator


# -- generalised advantage estimation


def test_gae_equals_the_hand_computed_three_steps() -> None:
    # delta = [1 + .9*2 - 1, 0 + .9*3 - 2, 4 - 3] = [1.8, .7, 1.0]; A_2 = 1; A_1 = .7 + .45*1; A_0 = 1.8 + .45*1.15
    advantages, returns = gae(row(1, 0, 4), row(1, 2, 3), torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, row(2.3175, 1.15, 1.0))
    torch.testing.assert_close(returns, row(3.3175, 3.15, 4.0))


def test_gae_with_lam_one_is_the_sum_of_rewards_minus_the_value() -> None:
    rewards, values = row(1, -2, 3, 5), row(0.5, 1, -1, 2)
    advantages, returns = gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, row(7, 6, 8, 5))
    torch.testing.assert_close(advantages, row(7, 6, 8, 5) - values)


def test_gae_with_lam_zero_is_the_temporal_difference() -> None:
    advantages, _ = gae(row(1, 2, 3), row(4, 5, 6), torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.0)
    torch.testing.assert_close(advantages, row(1 + 2.5 - 4, 2 + 3 - 5, 3 - 6))


def test_gae_does_not_see_padding_wherever_it_stands() -> None:
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    want, want_returns = gae(rewards, values, torch.ones(3, 5, dtype=torch.bool), 0.9, 0.8)
    mask = torch.tensor([False, True, True, False, True, True, True, False]).expand(3, -1)
    padded_rewards, padded_values = torch.full((3, 8), float("nan")), torch.full((3, 8), float("nan"))
    padded_rewards[:, mask[0]], padded_values[:, mask[0]] = rewards, values
    advantages, returns = gae(padded_rewards, padded_values, mask, 0.9, 0.8)
    torch.testing.assert_close(advantages[:, mask[0]], want)
    torch.testing.assert_close(returns[:, mask[0]], want_returns)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


# -- whitening and means


def test_whitened_advantages_have_zero_mean_and_unit_variance_over_the_valid_places() -> None:
    x, mask, _ = ragged()
    white = masked_whiten(x * 7 + 3, mask)[mask]
    assert abs(float(white.mean())) < 1e-6
    assert abs(float(white.var(unbiased=False)) - 1) < 1e-5


def test_whitening_keeps_the_mean_when_asked() -> None:
    x, mask, _ = ragged()
    white = masked_whiten(x * 7 + 3, mask, shift_mean=False)[mask]
    torch.testing.assert_close(white.mean(), (x * 7 + 3)[mask].mean())


class TwoRanks:
    """A `reduce` for one of two ranks run one after the other: replays the other's contributions, in order."""

    def __init__(self, other: list[Tensor]) -> None:
        self.other, self.mine = other, []

    def __call__(self, x: Tensor) -> Tensor:
        self.mine.append(x.clone())
        call = len(self.mine) - 1
        return x + self.other[call] if call < len(self.other) else x


def test_whitening_uses_the_moments_of_all_ranks() -> None:
    x, mask, _ = ragged(B=8)
    x[4:] += 3.0  # the ranks differ in their mean, which rank-local moments would hide
    want = masked_whiten(x, mask)
    halves = [(x[:4], mask[:4]), (x[4:], mask[4:])]
    # Three rounds of exchange (count, sum, squares): iterate until both ranks have seen the other's true share.
    shares: list[list[Tensor]] = [[], []]
    for _ in range(4):
        reducers = [TwoRanks(shares[1]), TwoRanks(shares[0])]
        got = [masked_whiten(part, m, reducer) for (part, m), reducer in zip(halves, reducers)]
        shares = [reducer.mine for reducer in reducers]
    torch.testing.assert_close(torch.cat(got), want)
    local = torch.cat([masked_whiten(part, m) for part, m in halves])
    assert (local - want)[mask].abs().max() > 0.5


def test_masked_mean_ignores_nan_and_takes_a_foreign_count() -> None:
    x = row(1, 3, float("nan"))
    mask = torch.tensor([[True, True, False]])
    assert float(masked_mean(x, mask)) == 2.0
    assert float(masked_mean(x, mask, count=8)) == 0.5
    assert float(masked_mean(x, torch.zeros_like(mask))) == 0.0


# -- the clipped policy loss


def test_policy_loss_at_ratio_one_is_minus_the_mean_advantage_with_nothing_clipped() -> None:
    logps, mask, generator = ragged()
    advantages = torch.randn(logps.shape, generator=generator)
    loss, stats = ppo_policy_loss(logps, logps.clone(), advantages, mask, 0.2)
    torch.testing.assert_close(loss, -advantages[mask].mean())
    assert float(stats["ratio"]) == 1.0
    assert float(stats["clipfrac"]) == 0.0
    assert float(stats["approx_kl"]) == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.5, 1.0, False), (0.5, -1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_policy_gradient_is_zero_exactly_where_the_clip_matches_the_advantage(ratio: float, advantage: float, moves: bool) -> None:
    logps = row(math.log(ratio)).requires_grad_()
    loss, _ = ppo_policy_loss(logps, row(0.0), row(advantage), torch.ones(1, 1, dtype=torch.bool), 0.2)
    loss.backward()
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, row(-advantage * ratio if moves else 0.0))


def test_ragged_minibatch_in_eight_microbatches_has_the_gradient_of_one() -> None:
    old, mask, generator = ragged(B=8)
    advantages = torch.randn(old.shape, generator=generator)
    new = (old + 0.3 * torch.randn(old.shape, generator=generator)).requires_grad_()
    whole, whole_stats = ppo_policy_loss(new, old, advantages, mask, 0.2)
    (want,) = torch.autograd.grad(whole, new)
    count, total, clipfrac = mask.sum(), torch.zeros(()), torch.zeros(())
    for i in range(8):
        part = slice(i, i + 1)
        loss, stats = ppo_policy_loss(new[part], old[part], advantages[part], mask[part], 0.2, count)
        total, clipfrac = total + loss, clipfrac + stats["clipfrac"]
    (got,) = torch.autograd.grad(total, new)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(clipfrac, whole_stats["clipfrac"])


def test_padding_with_nan_changes_no_loss_and_no_gradient() -> None:
    x, _, generator = ragged(B=4, S=6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    y, z = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    wide_mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)

    def pad(t: Tensor) -> Tensor:
        return torch.cat([t, torch.full((4, 3), float("nan"))], 1)

    for loss_of in (ppo_policy_loss, ppo_value_loss):
        narrow, wide = x.clone().requires_grad_(), pad(x).requires_grad_()
        loss, _ = loss_of(narrow, y, z, mask, 0.2)
        padded, _ = loss_of(wide, pad(y), pad(z), wide_mask, 0.2)
        torch.testing.assert_close(padded, loss)
        (want,), (got,) = torch.autograd.grad(loss, narrow), torch.autograd.grad(padded, wide)
        torch.testing.assert_close(got[:, :6], want)
        assert (got[:, 6:] == 0).all()


# -- the clipped value loss


@pytest.mark.parametrize(
    ("value", "want", "gradient"),
    [
        (0.1, 0.5 * 0.9**2, -0.9),  # inside the range: the plain squared error
        (0.5, 0.5 * 0.8**2, 0.0),  # beyond it towards the return: the clipped one is larger and has no gradient
        (-0.5, 0.5 * 1.5**2, -1.5),  # beyond it away from the return: the free one is larger and pulls back
    ],
)
def test_value_loss_in_its_three_analytic_cases(value: float, want: float, gradient: float) -> None:
    values = row(value).requires_grad_()
    loss, _ = ppo_value_loss(values, row(0.0), row(1.0), torch.ones(1, 1, dtype=torch.bool), 0.2)
    loss.backward()
    assert values.grad is not None
    assert float(loss.detach()) == pytest.approx(want)
    assert float(values.grad) == pytest.approx(gradient)


def test_explained_variance_is_one_for_truth_zero_for_a_constant_and_negative_for_the_opposite() -> None:
    returns, mask, _ = ragged()
    noisy = torch.where(mask, returns, torch.full_like(returns, float("nan")))
    assert float(explained_variance(returns, noisy, mask)) == pytest.approx(1.0)
    assert float(explained_variance(torch.full_like(returns, 4.0), returns, mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3.0, abs=1e-5)
    assert float(explained_variance(returns, torch.ones_like(returns), mask)) == 0.0


# -- KL and entropy


def test_k1_and_k3_average_to_the_enumerated_categorical_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    log_p = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), -1)
    log_q = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), -1)
    want = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=log_p), torch.distributions.Categorical(logits=log_q))
    torch.testing.assert_close((log_p.exp() * kl_k1(log_p, log_q)).sum(), want)
    torch.testing.assert_close((log_p.exp() * kl_k3(log_p, log_q)).sum(), want)
    assert (kl_k3(log_p, log_q) >= 0).all()
    assert (kl_k1(log_p, log_q) < 0).any()


def test_entropy_of_the_uniform_is_log_v_and_of_a_certainty_zero() -> None:
    certain = torch.tensor([0.0, -1e4, -1e4, -1e4])
    got = entropy(torch.stack([torch.zeros(4), certain]))
    torch.testing.assert_close(got, torch.tensor([math.log(4), 0.0]))


# -- preferences


def test_dpo_loss_of_an_unmoved_policy_is_log_two() -> None:
    a, b = torch.randn(5), torch.randn(5)
    loss, chosen, rejected = dpo_loss(a, b, a.clone(), b.clone(), beta=0.1)
    torch.testing.assert_close(loss, torch.full((5,), math.log(2)))
    assert (chosen == 0).all()
    assert (rejected == 0).all()


def test_dpo_gradient_raises_the_chosen_and_lowers_the_rejected_by_the_same() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    loss, _, _ = dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=0.4)
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert float(chosen.grad) == pytest.approx(-0.2)
    assert float(rejected.grad) == pytest.approx(0.2)


def test_soft_labels_put_the_minimum_where_the_win_probability_equals_the_label() -> None:
    difference = torch.tensor([math.log(0.8 / 0.2)], requires_grad=True)
    loss = bradley_terry_loss(difference, torch.zeros(1), torch.tensor([0.8]))
    (gradient,) = torch.autograd.grad(loss.sum(), difference)
    assert abs(float(gradient)) < 1e-6
    hard = bradley_terry_loss(difference, torch.zeros(1))
    torch.testing.assert_close(hard, bradley_terry_loss(difference, torch.zeros(1), torch.ones(1)))
    torch.testing.assert_close(hard, -torch.tensor([0.8]).log())


# -- controllers


def test_kl_controller_moves_both_ways_and_not_when_fixed() -> None:
    controller = AdaptiveKLController(0.1, target_kl=6.0, horizon=100)
    assert controller.update(60.0, n=10) == pytest.approx(0.1 * 1.02)
    assert controller.update(0.0, n=10) == pytest.approx(0.1 * 1.02 * 0.98)
    before = controller.kl_coef
    assert controller.update(6.0, n=10) == before
    assert controller.update(float("nan"), n=10) == before
    assert AdaptiveKLController(0.1).update(1e9, n=10) == 0.1


def test_reward_normalizer_has_the_moments_of_all_scores_it_has_seen() -> None:
    scores = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 4 + 10
    normalizer = RewardNormalizer()
    for part in scores.split([5, 1, 30, 28]):
        normalizer.update(part)
    assert normalizer.mean == pytest.approx(float(scores.mean()), rel=1e-5)
    assert normalizer.std == pytest.approx(float(scores.std(unbiased=False)), rel=1e-5)
    again = RewardNormalizer()
    again.load_state_dict(normalizer.state_dict())
    assert torch.equal(again(scores), normalizer(scores))


def test_reward_normalizer_leaves_nan_out_and_survives_a_constant() -> None:
    normalizer = RewardNormalizer()
    normalizer.update(torch.tensor([float("nan"), float("inf")]))
    assert normalizer.count == 0
    normalizer.update(torch.tensor([2.0, float("nan"), 2.0]))
    assert (normalizer.mean, normalizer.std) == (2.0, 1.0)
    got = normalizer(torch.tensor([2.0, float("nan")]))
    assert float(got[0]) == 0.0
    assert torch.isnan(got[1])


def test_prompt_baseline_learns_each_prompts_ease_and_not_the_policys_progress() -> None:
    generator = torch.Generator().manual_seed(0)
    baseline, ease = PromptBaseline(4), torch.tensor([2.0, -1.0, 0.0, -1.0])
    prompts = torch.arange(4).repeat(4)
    for progress in range(30):
        noise = 0.1 * torch.randn(16, generator=generator)
        centred = baseline(prompts, ease[prompts] + progress + noise)
    assert (centred - centred.mean()).abs().max() < 0.5
    assert abs(float(centred.mean()) - 29) < 0.2
    again = PromptBaseline(4)
    again.load_state_dict(baseline.state_dict())
    assert torch.equal(again(prompts, noise), baseline(prompts, noise))


def test_prompt_baseline_never_sees_the_clip_it_centres_and_leaves_nan_alone() -> None:
    baseline = PromptBaseline(3)
    scores = torch.tensor([5.0, 1.0, float("nan")])
    centred = baseline(torch.tensor([0, 1, 2]), scores)
    torch.testing.assert_close(centred, scores, equal_nan=True)
    assert baseline.counts == [1, 1, 0]
    assert [baseline.offset(i) for i in range(3)] == [1.0, -1.0, 0.0]  # +-2 from the mean of 3, halved by the imagined clip
