import math

import pytest
import torch

from rlhf.dense import dense_advantages, expected_ppo_loss, gains, limited, redraw
from rlhf.losses import ppo_policy_loss

B, K, T, V = 2, 2, 3, 5


def distributions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, T, V, generator=generator, dtype=torch.float64).log_softmax(-1)


EVERYWHERE = torch.ones(B, K, T, dtype=torch.bool)


def test_advantages_have_mean_zero_under_the_policy_that_played():
    old, ref, gain = distributions(0), distributions(1), torch.randn(B, K, T, V, dtype=torch.float64)
    made = dense_advantages(gain, old, ref, 0.3)
    assert (old.exp() * made).sum(-1).abs().max() < 1e-12


def test_the_first_step_follows_exactly_the_gradient_of_gain_minus_price_times_kl():
    logits = torch.randn(B, K, T, V, dtype=torch.float64).requires_grad_(True)
    ref, gain, price = distributions(1), torch.randn(B, K, T, V, dtype=torch.float64), 0.3
    log_probs = logits.log_softmax(-1)
    objective = (log_probs.exp() * (gain - price * (log_probs - ref))).sum(-1).mean()
    (wanted,) = torch.autograd.grad(objective, logits)
    old = logits.detach().log_softmax(-1)
    loss, stats, _ = expected_ppo_loss(logits, old, dense_advantages(gain, old, ref, price), EVERYWHERE, 0.2)
    (found,) = torch.autograd.grad(-loss, logits)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9)
    assert stats["dense_kl"] == pytest.approx(0, abs=1e-12)
    assert stats["dense_clipfrac"] == 0


def test_it_is_what_sampled_ppo_gives_on_the_average():
    """One codebook, so that a code is a step: the mean over many sampled actions of PPO's own loss."""
    old, new = distributions(0)[:1, :1, :1], distributions(3)[:1, :1, :1]
    advantages = dense_advantages(torch.randn(1, 1, 1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), old, old, 0.0)
    exact, *_ = expected_ppo_loss(new, old, advantages, torch.ones(1, 1, 1, dtype=torch.bool), 0.2)
    n = 200_000
    action = torch.multinomial(old.exp().flatten(), n, replacement=True, generator=torch.Generator().manual_seed(1))
    picked = [x.flatten()[action][:, None] for x in (new, old, advantages)]
    sampled, _ = ppo_policy_loss(*picked, torch.ones(n, 1, dtype=torch.bool), 0.2)
    assert float(sampled) == pytest.approx(float(exact), abs=4 * float(picked[2].std()) * 3 / math.sqrt(n))


def test_a_clipped_action_has_no_gradient_and_a_masked_place_none_either():
    old = distributions(0)
    logits = (old + 1.5 * torch.eye(V, dtype=torch.float64)[0]).requires_grad_(True)  # action 0 has become far more likely
    advantages = torch.zeros(B, K, T, V, dtype=torch.float64)
    advantages[..., 0] = 1.0
    loss, stats, _ = expected_ppo_loss(logits, old, advantages, EVERYWHERE, 0.2)
    loss.backward()
    assert logits.grad.abs().max() == 0
    assert stats["dense_clipfrac"] > 0.1
    logits = old.clone().requires_grad_(True)
    mask = EVERYWHERE.clone()
    mask[1] = False
    expected_ppo_loss(logits, old, advantages, mask, 0.2)[0].backward()
    assert logits.grad[1].abs().max() == 0
    assert logits.grad[0].abs().max() > 0


def test_microbatches_add_up_with_the_global_count():
    old, new, advantages = distributions(0), distributions(1), torch.randn(B, K, T, V, dtype=torch.float64)
    whole, *_ = expected_ppo_loss(new, old, advantages, EVERYWHERE, 0.2)
    count = float(EVERYWHERE.sum())
    parts = [expected_ppo_loss(new[i : i + 1], old[i : i + 1], advantages[i : i + 1], EVERYWHERE[i : i + 1], 0.2, count)[0] for i in (0, 1)]
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-12)


def test_gains_are_the_slope_along_each_codes_vector():
    slope, books = torch.randn(B, 4, T), torch.randn(K, V, 4)
    made = gains(slope, books)
    assert made.shape == (B, K, T, V)
    assert made[1, 0, 2, 3] == pytest.approx(float(slope[1, :, 2] @ books[0, 3]), abs=1e-5)


def test_one_clip_at_a_cliff_does_not_lead_and_one_without_a_slope_is_left_out():
    slope = torch.ones(5, 3, 4)
    slope[1] *= 100
    slope[2, 0, 0] = float("nan")
    made = limited(slope)
    length = made.flatten(1).norm(dim=1)
    assert length[1] == pytest.approx(2 * float(length[0]), rel=1e-5)
    assert length[2] == 0
    torch.testing.assert_close(made[0], slope[0])


def test_redrawn_codes_follow_the_tilted_policy_and_change_as_few_as_can_be():
    old = distributions(5)[:1, :1, :1]
    gain, price, n = torch.randn(1, 1, 1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), 0.7, 100_000
    generator = torch.Generator().manual_seed(4)
    codes = torch.multinomial(old.exp().flatten(), n, replacement=True, generator=generator)[:, None, None]
    wide = old.expand(n, 1, 1, V)
    made = redraw(codes, wide, gain.expand(n, 1, 1, V), price, generator)
    tilted = (old + gain / price).log_softmax(-1).exp().flatten()
    torch.testing.assert_close(torch.bincount(made.flatten(), minlength=V) / n, tilted, atol=8e-3, rtol=0, check_dtype=False)
    total_variation = 0.5 * (tilted - old.exp().flatten()).abs().sum()
    assert float((made != codes).double().mean()) == pytest.approx(float(total_variation), abs=8e-3)


def test_without_a_gain_nothing_is_redrawn():
    codes = torch.randint(0, V, (B, K, T), generator=torch.Generator().manual_seed(0))
    same = redraw(codes, distributions(0), torch.zeros(B, K, T, V, dtype=torch.float64), 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(codes, same)


def test_the_surrogates_derivative_is_that_of_its_definition_clipped_or_not():
    old, advantages = distributions(1), torch.randn(B, K, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits = (old + torch.randn(B, K, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).requires_grad_(True)
    ratio = (logits.log_softmax(-1) - old).exp()
    assert 0.2 < float(((ratio - 1).abs() > 0.2).double().mean()) < 0.95  # both kinds are there
    plain = -(old.exp() * torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).sum(-1).mean()
    (expected,) = torch.autograd.grad(plain, logits)
    loss, stats, normaliser = expected_ppo_loss(logits, old, advantages, EVERYWHERE, 0.2)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, expected)
    assert not stats["dense_kl"].requires_grad
    torch.testing.assert_close(normaliser, logits.detach().logsumexp(-1))
    torch.testing.assert_close(stats["dense_kl"], (old.exp() * (old - logits.detach().log_softmax(-1))).sum(-1).mean())


def test_clips_may_be_chosen_from_a_table_in_any_order():
    old, advantages, logits = distributions(0), distributions(2), distributions(1).requires_grad_(True)
    turned = [1, 0]
    loss, stats, normaliser = expected_ppo_loss(logits, old, advantages, EVERYWHERE, 0.2, at=turned)
    (found,) = torch.autograd.grad(loss, logits)
    again, more, same = expected_ppo_loss(logits, old[turned], advantages[turned], EVERYWHERE, 0.2)
    (wanted,) = torch.autograd.grad(again, logits)
    assert (loss, stats) == (again, more)
    assert torch.equal(found, wanted)
    assert torch.equal(normaliser, same)


def test_clips_whose_prompt_asks_nothing_do_not_take_the_others_slope_away():
    """Half a batch and more has no slope where parts are asked for by few prompts."""
    slope = torch.zeros(5, 3, 4)
    slope[1], slope[3] = 1.0, 100.0
    made = limited(slope)
    torch.testing.assert_close(made[1], slope[1])
    assert made[3].norm() == pytest.approx(2 * float(slope[1].norm()), rel=1e-5)
    assert made[[0, 2, 4]].abs().max() == 0
    assert limited(torch.zeros(2, 3, 4)).abs().max() == 0
