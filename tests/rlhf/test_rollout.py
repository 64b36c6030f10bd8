"""Play and judgement on a tiny language model: what is sampled is what is scored, and the score arrives once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from adapters.lora import adapter_disabled, attach_lora
from base_models.conditions import Conditions
from base_models.lm import MusicLM, MusicLMConfig
from rlhf.controllers import RewardNormalizer
from rlhf.losses import entropy
from rlhf.rollout import Critic, Rollout, add_score_once, judge, play, prompt_of, sample_seed, score_steps

T = 7


def tiny_lm(n_q: int = 3, card: int = 8, init_b: bool = True) -> MusicLM:
    """A random model with decided heads; `init_b` gives its adapter something to say."""
    torch.manual_seed(0)
    shape = MusicLMConfig(n_q=n_q, card=card, d_model=32, n_layers=2, n_heads=2, d_ff=64, text_dim=8, dropout=0.1)
    lm = MusicLM(shape).eval()
    for head in lm.decoder.lm_heads:
        torch.nn.init.normal_(head.weight, std=0.3)
    attach_lora(lm, r=4, alpha=8.0, init_b=init_b)
    return lm


def conditions(B: int) -> Conditions:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(B, 5, 8, generator=generator)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (B, 1), generator=generator)
    return Conditions(text * mask[..., None], mask, torch.tensor([90.0, float("nan")]).repeat(B)[:B])


def played(lm: MusicLM, B: int = 6, **settings: float) -> tuple[Rollout, Critic, Conditions]:
    critic, cond = Critic(32), conditions(B)
    torch.nn.init.normal_(critic.head.weight)
    return play(lm, critic, cond, range(B), range(B), T, **settings), critic, cond


# -- what is sampled is what is scored


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"cfg_coef": 2.0}, {"temperature": 1.3, "cfg_coef": 1.5}])
def test_scoring_gives_the_sampler_its_own_log_probs_and_values(settings: dict[str, float]) -> None:
    lm = tiny_lm()
    rollout, critic, cond = played(lm, **settings)
    with torch.no_grad():
        scored = score_steps(lm, rollout.codes, cond, **settings)
    assert ((scored.logps - rollout.logps).exp() - 1).abs().max() < 1e-5
    torch.testing.assert_close(critic(scored.hidden), rollout.values, atol=1e-5, rtol=0)


def test_a_forgotten_temperature_would_be_seen_in_the_ratio() -> None:
    lm = tiny_lm()
    rollout, _, cond = played(lm, temperature=0.7)
    with torch.no_grad():
        wrong = score_steps(lm, rollout.codes, cond)
    assert ((wrong.logps - rollout.logps).exp() - 1).abs().mean() > 0.05


def test_a_fresh_adapter_is_bitwise_the_reference() -> None:
    lm = tiny_lm(init_b=False)
    rollout, _, cond = played(lm)
    with torch.no_grad():
        policy = score_steps(lm, rollout.codes, cond).logps
        with adapter_disabled(lm):
            reference = score_steps(lm, rollout.codes, cond).logps
    assert torch.equal(policy, reference)
    assert torch.equal(reference, rollout.ref_logps)
    assert (rollout.logps - rollout.ref_logps).abs().max() < 1e-5  # the sampler's cache only rounds differently


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


def test_step_log_probs_are_the_joint_distribution_of_the_codes() -> None:
    lm = tiny_lm(n_q=2, card=3)
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)  # all 81 clips of two frames
    cond = conditions(1).repeat(len(every))
    with torch.no_grad():
        scored = score_steps(lm, every, cond)
    torch.testing.assert_close(scored.logps.sum(1).exp().sum(), torch.tensor(1.0))


def test_forced_delay_tokens_add_nothing_to_log_probs_or_entropy() -> None:
    lm = tiny_lm()
    rollout, _, cond = played(lm)
    with torch.no_grad():
        scored = score_steps(lm, rollout.codes, cond, with_entropy=True)
        logits = lm.heads(lm.hidden(rollout.codes, cond))  # [B, K, S, V], fillers included
    log_p, spread = logits.log_softmax(-1), entropy(logits)
    want, want_spread = torch.zeros_like(scored.logps), torch.zeros_like(scored.logps)
    for s, k in itertools.product(range(T + 2), range(3)):
        if 0 <= s - k < T:
            code = rollout.codes[:, k, s - k]
            want[:, s] += log_p[:, k, s].gather(-1, code[:, None])[:, 0]
            want_spread[:, s] += spread[:, k, s]
    torch.testing.assert_close(scored.logps, want)
    torch.testing.assert_close(scored.entropy, want_spread)


# -- invariance


def test_padding_the_text_permuting_the_batch_and_splitting_it_change_nothing() -> None:
    lm = tiny_lm()
    rollout, _, cond = played(lm)
    with torch.no_grad():
        want = score_steps(lm, rollout.codes, cond).logps
        wider = Conditions.cat([cond, Conditions(torch.ones(1, 9, 8), torch.ones(1, 9, dtype=torch.bool), torch.ones(1))])
        padded = score_steps(lm, rollout.codes, Conditions(wider.text[:6], wider.mask[:6], wider.tempo_bpm[:6])).logps
        order = torch.tensor([3, 1, 5, 0, 4, 2])
        permuted = score_steps(lm, rollout.codes[order], cond.index(order)).logps
        alone = torch.cat([score_steps(lm, rollout.codes[i : i + 1], cond.index([i])).logps for i in range(6)])
    for got in (padded, permuted[order.argsort()], alone):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


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


def rollout_of(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Rollout:
    B = len(logps)
    nothing = torch.zeros_like(logps)
    codes = torch.zeros(B, 1, logps.shape[1], dtype=torch.int64)
    return Rollout(codes, torch.arange(B), mask, logps, ref_logps, nothing, torch.full((B,), float("nan")), nothing)


def test_score_is_added_once_on_the_last_valid_step_whatever_token_stands_there() -> None:
    mask = torch.tensor([[True, True, True, True], [True, True, False, False], [False] * 4])
    got = add_score_once(torch.full((3, 4), 0.5), torch.tensor([2.0, 3.0, 4.0]), mask)
    want = [[0.5, 0.5, 0.5, 2.5], [0.5, 3.5, 0.5, 0.5], [0.5] * 4]
    torch.testing.assert_close(got, torch.tensor(want))


def test_score_lands_on_the_last_step_of_clips_that_end_in_code_zero() -> None:
    lm = tiny_lm()
    rollout, _, _ = played(lm)
    rollout.codes[:, :, -3:] = 0  # code 0 is an ordinary code
    score = torch.tensor([1.0, 2, 3, 4, 5, 6])
    judged = judge(rollout, score, RewardNormalizer(), kl_coef=0.0)
    assert (judged.rewards[:, :-1] == 0).all()
    torch.testing.assert_close(judged.rewards[:, -1], (score - 3.5) / score.std(correction=0))


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
