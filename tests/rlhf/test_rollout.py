"""Play and judgement on a tiny language model: what is sampled is what is scored, and the score arrives once."""

from __future__ import annotations

import torch

from rlhf.controllers import RewardNormalizer
from rlhf.rollout import judge, play, prompt_of, sample_seed, score_steps
from tests.rlhf.ppo_toys import T, played, rollout_of, tiny_lm

# -- what is sampled is what is scored


def test_the_reference_is_the_model_before_it_had_an_adapter() -> None:
    lm = tiny_lm()
    rollout, _, cond = played(lm)
    torch.manual_seed(0)
    bare = tiny_lm(init_b=False)
    with torch.no_grad():
        torch.testing.assert_close(score_steps(bare, rollout.codes, cond).logps, rollout.ref_logps)
    assert (rollout.logps - rollout.ref_logps).abs().max() > 1e-3


def test_bf16_scores_differ_from_the_samplers_by_far_less_than_the_clip_range() -> None:
    lm = tiny_lm()
    rollout, _, cond = played(lm)
    with torch.no_grad():
        scored = score_steps(lm, rollout.codes, cond, bf16=True)
    assert scored.logps.dtype == torch.float32
    deviation = ((scored.logps - rollout.logps).exp() - 1).abs()
    assert 0 < deviation.max() < 0.1
    assert deviation.mean() < 0.02


# -- codebooks


def test_the_codebooks_shares_of_the_kl_add_up_to_the_clips() -> None:
    lm = tiny_lm()
    rollout, _, _ = played(lm)
    assert rollout.book_kl.shape == (6, 3)
    torch.testing.assert_close(rollout.book_kl.sum(1), (rollout.logps - rollout.ref_logps).sum(1), atol=1e-5, rtol=0)
    assert (rollout.book_kl.abs() > 1e-4).all()


# -- invariance


def test_a_clip_depends_on_its_seed_and_not_on_its_batch_mates() -> None:
    lm = tiny_lm()
    rollout, critic, cond = played(lm)
    half = play(lm, critic, cond.index([4, 2]), [4, 2], [4, 2], T)
    assert torch.equal(half.codes, rollout.codes[[4, 2]])


def test_sampling_leaves_every_weight_as_it_was() -> None:
    lm = tiny_lm()
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    played(lm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())


def test_the_value_loss_never_reaches_the_policy() -> None:
    lm = tiny_lm()
    rollout, critic, cond = played(lm)
    critic(score_steps(lm, rollout.codes, cond).hidden).sum().backward()
    assert all(parameter.grad is None for parameter in lm.parameters())
    assert all(parameter.grad is not None for parameter in critic.parameters())


# -- seeds and prompts


def test_seeds_differ_for_all_clips_and_runs() -> None:
    seeds = {sample_seed(run, index) for run in range(5) for index in range(20_000)}
    assert len(seeds) == 100_000
    assert all(0 <= seed < 2**63 for seed in list(seeds)[:1000])


def test_every_prompt_is_played_once_a_round_in_a_new_order_wherever_the_batch_is_cut() -> None:
    whole = prompt_of(range(60), n_prompts=10, samples_per_prompt=2, seed=0)
    assert whole == [p for i in range(0, 60, 7) for p in prompt_of(range(i, min(i + 7, 60)), 10, 2, 0)]
    rounds = [whole[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(part) == sorted(list(range(10)) * 2) for part in rounds)
    assert all(part[0::2] == part[1::2] for part in rounds)
    assert rounds[0] != rounds[1]
    assert whole != prompt_of(range(60), 10, 2, seed=1)


# -- rewards


def test_rewards_are_the_price_of_each_steps_log_ratio() -> None:
    logps, ref = torch.tensor([[-1.0, -2.0, -3.0]] * 2), torch.tensor([[-1.5, -1.0, -3.0]] * 2)
    rollout = rollout_of(logps, ref, torch.ones(2, 3, dtype=torch.bool))
    judged = judge(rollout, torch.tensor([1.0, 3.0]), RewardNormalizer(), kl_coef=0.1)
    torch.testing.assert_close(judged.rewards, torch.tensor([[-0.05, 0.1, -1.0], [-0.05, 0.1, 1.0]]))


def test_a_clip_with_a_nan_score_is_left_out_and_the_others_are_not_touched() -> None:
    logps = torch.full((3, 2), -1.0)
    rollout = rollout_of(logps, logps.clone(), torch.ones(3, 2, dtype=torch.bool))
    normalizer = RewardNormalizer()
    judged = judge(rollout, torch.tensor([1.0, float("nan"), 3.0]), normalizer, kl_coef=0.1)
    assert judged.mask.tolist() == [[True, True], [False, False], [True, True]]
    torch.testing.assert_close(judged.rewards, torch.tensor([[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]]))
    assert (normalizer.count, normalizer.mean) == (2.0, 2.0)
