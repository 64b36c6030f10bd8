"""The losses against hand-made numbers, enumeration and independent implementations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.controllers import PromptBaseline, RewardNormalizer
from rlhf.losses import (
    bradley_terry_loss,
    dpo_loss,
    entropy,
    explained_variance,
    gae,
    masked_mean,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
)
from tests.rlhf.ppo_toys import ragged, row

# -- generalised advantage estimation


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


def test_explained_variance_is_one_for_truth_zero_for_a_constant_and_negative_for_the_opposite() -> None:
    returns, mask, _ = ragged()
    noisy = torch.where(mask, returns, torch.full_like(returns, float("nan")))
    assert float(explained_variance(returns, noisy, mask)) == pytest.approx(1.0)
    assert float(explained_variance(torch.full_like(returns, 4.0), returns, mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3.0, abs=1e-5)
    assert float(explained_variance(returns, torch.ones_like(returns), mask)) == 0.0


# -- KL and entropy


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


def test_reward_normalizer_leaves_nan_out_and_survives_a_constant() -> None:
    normalizer = RewardNormalizer()
    normalizer.update(torch.tensor([float("nan"), float("inf")]))
    assert normalizer.count == 0
    normalizer.update(torch.tensor([2.0, float("nan"), 2.0]))
    assert (normalizer.mean, normalizer.std) == (2.0, 1.0)
    got = normalizer(torch.tensor([2.0, float("nan")]))
    assert float(got[0]) == 0.0
    assert torch.isnan(got[1])


def test_reward_normalizer_does_not_blow_small_differences_up() -> None:
    scores = torch.tensor([0.01, -0.01, 0.01, -0.01])
    plain, careful = RewardNormalizer(), RewardNormalizer(least=0.25)
    for normalizer in (plain, careful):
        normalizer.update(scores)
    assert float(plain(scores).abs().max()) == pytest.approx(1)
    assert float(careful(scores).abs().max()) == pytest.approx(0.04)


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
