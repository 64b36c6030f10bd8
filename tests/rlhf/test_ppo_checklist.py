"""The checklist of PPO implementations, line by line: twenty ways in which others went wrong, each a claim about ours.

What goes beyond them stands in test_losses, test_rollout, test_train_ppo and test_kill.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from adapters.lora import adapter_disabled
from base_models.checkpoint import read_json, tensors_sha256
from base_models.conditions import Conditions
from rlhf.controllers import AdaptiveKLController, RewardNormalizer
from rlhf.losses import entropy, gae, kl_k1, kl_k3, masked_whiten, ppo_policy_loss, ppo_value_loss
from rlhf.ppo_run import Run
from rlhf.ppo_task import Task, share_of_code_3, toy_task
from rlhf.rewards import Score
from rlhf.rollout import Rollout, add_score_once, judge, score_steps
from rlhf.train_ppo import TOY, main
from tests.rlhf.ppo_toys import (
    SCRIPT,
    T,
    alone,
    conditions,
    config,
    judged_by,
    largest_difference,
    metrics,
    played,
    ragged,
    row,
    tiny_lm,
    untimed,
    weights,
)

ALL = torch.ones(1, 3, dtype=torch.bool)


# ---- what is sampled is what is scored -------------------------------------------------------------------------------


@pytest.mark.parametrize("arrives", ["eval", "train"])
def test_01_first_minibatch_has_ratio_one_no_clipping_no_kl_and_dropout_off(arrives: str, tmp_path: Path) -> None:
    task = toy_task(0)
    task.lm.train(arrives == "train")
    main(config(tmp_path, steps=1, epochs=1, minibatches=1), task)
    (told,) = metrics(tmp_path)
    assert abs(told["ratio_first"] - 1) < 1e-5
    assert told["clipfrac"] == 0
    assert abs(told["approx_kl"]) < 1e-6


def test_02_kl_to_the_reference_is_exactly_zero_before_the_first_step() -> None:
    lm = tiny_lm(init_b=False)
    rollout, _, cond = played(lm)
    with torch.no_grad():
        policy = score_steps(lm, rollout.codes, cond).logps
        with adapter_disabled(lm):
            reference = score_steps(lm, rollout.codes, cond).logps
    assert torch.equal(policy, reference)
    assert torch.equal(reference, rollout.ref_logps)
    assert (rollout.logps - rollout.ref_logps).abs().max() < 1e-5  # the sampler's cache only rounds differently


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"cfg_coef": 2.0}, {"temperature": 1.3, "cfg_coef": 1.5}])
def test_03_temperature_and_guidance_are_the_same_in_rollout_policy_and_reference(settings: dict[str, float]) -> None:
    lm = tiny_lm()
    rollout, critic, cond = played(lm, **settings)
    with torch.no_grad():
        scored = score_steps(lm, rollout.codes, cond, **settings)
        with adapter_disabled(lm):
            reference = score_steps(lm, rollout.codes, cond, **settings)
        forgotten = score_steps(lm, rollout.codes, cond)
    assert ((scored.logps - rollout.logps).exp() - 1).abs().max() < 1e-5
    assert torch.equal(reference.logps, rollout.ref_logps)
    torch.testing.assert_close(critic(scored.hidden), rollout.values, atol=1e-5, rtol=0)
    if settings:
        assert ((forgotten.logps - rollout.logps).exp() - 1).abs().mean() > 1e-3  # a hundred times what rounding does


# ---- advantages, score, codebooks, KL --------------------------------------------------------------------------------


def test_04_gae_is_the_hand_computed_one_the_return_at_lam_one_and_the_td_error_at_lam_zero() -> None:
    # delta = [1 + .9*2 - 1, 0 + .9*3 - 2, 4 - 3] = [1.8, .7, 1.0]; A_2 = 1; A_1 = .7 + .45*1; A_0 = 1.8 + .45*1.15
    advantages, returns = gae(row(1, 0, 4), row(1, 2, 3), ALL, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, row(2.3175, 1.15, 1.0))
    torch.testing.assert_close(returns, row(3.3175, 3.15, 4.0))
    monte_carlo, returns = gae(row(1, -2, 3), row(0.5, 1, -1), ALL, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, row(2, 1, 3))
    torch.testing.assert_close(monte_carlo, row(1.5, 0, 4))
    temporal_difference, _ = gae(row(1, 2, 3), row(4, 5, 6), ALL, gamma=0.5, lam=0.0)
    torch.testing.assert_close(temporal_difference, row(1 + 2.5 - 4, 2 + 3 - 5, 3 - 6))


def test_05_score_is_added_once_on_the_last_valid_step_also_where_code_zero_stands_there() -> None:
    mask = torch.tensor([[True, True, True, True], [True, True, False, False], [False] * 4])
    got = add_score_once(torch.full((3, 4), 0.5), torch.tensor([2.0, 3.0, 4.0]), mask)
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.5, 0.5, 2.5], [0.5, 3.5, 0.5, 0.5], [0.5] * 4]))
    lm = tiny_lm()
    assert lm.special == lm.card  # padding lies outside of the codec's vocabulary
    rollout, _, _ = played(lm)
    rollout.codes[:, :, -3:] = 0
    score = torch.tensor([1.0, 2, 3, 4, 5, 6])
    judged = judge(rollout, score, RewardNormalizer(), kl_coef=0.0)
    assert (judged.rewards[:, :-1] == 0).all()
    torch.testing.assert_close(judged.rewards[:, -1], (score - 3.5) / score.std(correction=0))


def test_06_step_log_probs_are_the_joint_of_the_codebooks_and_forced_delay_tokens_add_nothing() -> None:
    small = tiny_lm(n_q=2, card=3)
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)  # all 81 clips of two frames
    with torch.no_grad():
        joint = score_steps(small, every, conditions(1).repeat(len(every))).logps.sum(1).exp()
    torch.testing.assert_close(joint.sum(), torch.tensor(1.0))

    lm = tiny_lm()
    rollout, _, cond = played(lm)
    with torch.no_grad():
        scored = score_steps(lm, rollout.codes, cond, with_entropy=True)
        logits = lm.heads(lm.hidden(rollout.codes, cond))  # [B, K, S, V], fillers included
    log_p, spread = logits.log_softmax(-1), entropy(logits)
    want, want_spread = torch.zeros_like(scored.logps), torch.zeros_like(scored.logps)
    for s, k in itertools.product(range(T + 2), range(3)):
        if 0 <= s - k < T:
            want[:, s] += log_p[:, k, s].gather(-1, rollout.codes[:, k, s - k, None])[:, 0]
            want_spread[:, s] += spread[:, k, s]
    torch.testing.assert_close(scored.logps, want)
    torch.testing.assert_close(scored.entropy, want_spread)


def test_07_k1_and_k3_average_to_the_enumerated_categorical_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    log_p = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), -1)
    log_q = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), -1)
    want = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=log_p), torch.distributions.Categorical(logits=log_q))
    torch.testing.assert_close((log_p.exp() * kl_k1(log_p, log_q)).sum(), want)
    torch.testing.assert_close((log_p.exp() * kl_k3(log_p, log_q)).sum(), want)
    assert (kl_k3(log_p, log_q) >= 0).all()
    assert (kl_k1(log_p, log_q) < 0).any()


def test_08_adaptive_kl_controller_moves_both_ways_and_not_when_fixed() -> None:
    controller = AdaptiveKLController(0.1, target_kl=6.0, horizon=100)
    assert controller.update(60.0, n=10) == pytest.approx(0.1 * 1.02)
    assert controller.update(0.0, n=10) == pytest.approx(0.1 * 1.02 * 0.98)
    before = controller.kl_coef
    assert controller.update(6.0, n=10) == before
    assert controller.update(float("nan"), n=10) == before
    assert AdaptiveKLController(0.1).update(1e9, n=10) == 0.1


# ---- moments over all ranks ------------------------------------------------------------------------------------------


class TwoRanks:
    """A `reduce` for one of two ranks run one after the other: replays the other's contributions, in order."""

    def __init__(self, other: list[Tensor]) -> None:
        self.other, self.mine = other, []

    def __call__(self, x: Tensor) -> Tensor:
        self.mine.append(x.clone())
        call = len(self.mine) - 1
        return x + self.other[call] if call < len(self.other) else x


def on_two_ranks(work: Callable[[int, TwoRanks], Any], exchanges: int = 4) -> list[Any]:
    """What each of two ranks gets from `work(rank, reduce)`; repeated until both have seen the other's true share."""
    shares: list[list[Tensor]] = [[], []]
    for _ in range(exchanges):
        reducers = [TwoRanks(shares[1]), TwoRanks(shares[0])]
        got = [work(rank, reducer) for rank, reducer in enumerate(reducers)]
        shares = [reducer.mine for reducer in reducers]
    return got


def test_09_whitening_uses_the_mean_and_variance_of_all_ranks() -> None:
    x, mask, _ = ragged(B=8)
    x[4:] += 3.0  # the ranks differ in their mean, which rank-local moments would hide
    want = masked_whiten(x, mask)
    halves = [(x[:4], mask[:4]), (x[4:], mask[4:])]
    got = on_two_ranks(lambda rank, reduce: masked_whiten(*halves[rank], reduce))
    torch.testing.assert_close(torch.cat(got), want)
    local = torch.cat([masked_whiten(part, m) for part, m in halves])
    assert (local - want)[mask].abs().max() > 0.5


def test_10_reward_normaliser_has_the_moments_of_all_scores_on_all_ranks_and_in_a_checkpoint() -> None:
    scores = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 4 + 10
    normalizer = RewardNormalizer()
    for part in scores.split([5, 1, 30, 28]):
        normalizer.update(part)
    assert normalizer.mean == pytest.approx(float(scores.mean()), rel=1e-5)
    assert normalizer.std == pytest.approx(float(scores.std(unbiased=False)), rel=1e-5)

    def half(rank: int, reduce: TwoRanks) -> RewardNormalizer:
        mine = RewardNormalizer()
        mine.update(scores[rank::2], reduce)
        return mine

    for ranked in on_two_ranks(half):
        assert (ranked.count, ranked.mean, ranked.std) == pytest.approx((64, normalizer.mean, normalizer.std), rel=1e-6)
    again = RewardNormalizer()
    again.load_state_dict(normalizer.state_dict())
    assert torch.equal(again(scores), normalizer(scores))


# ---- the clipped losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "want", "gradient"),
    [
        (0.1, 0.5 * 0.9**2, -0.9),  # inside the range: the plain squared error
        (0.5, 0.5 * 0.8**2, 0.0),  # beyond it towards the return: the clipped one is larger and has no gradient
        (-0.5, 0.5 * 1.5**2, -1.5),  # beyond it away from the return: the free one is larger and pulls back
    ],
)
def test_11_value_loss_in_its_three_analytic_cases(value: float, want: float, gradient: float) -> None:
    values = row(value).requires_grad_()
    loss, _ = ppo_value_loss(values, row(0.0), row(1.0), ALL[:, :1], 0.2)
    loss.backward()
    assert values.grad is not None
    assert float(loss.detach()) == pytest.approx(want)
    assert float(values.grad) == pytest.approx(gradient)


def test_11_explained_variance_is_told_and_the_critic_earns_it(learned_toy: tuple[Path, dict[str, Any]]) -> None:
    explained = [told["explained_variance"] for told in metrics(learned_toy[0])]
    assert abs(explained[0]) < 0.05
    assert max(explained[-5:]) > 0.3


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.5, 1.0, False), (0.5, -1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_12_policy_gradient_is_zero_exactly_where_the_clip_matches_the_advantage(ratio: float, advantage: float, moves: bool) -> None:
    logps = row(math.log(ratio)).requires_grad_()
    loss, _ = ppo_policy_loss(logps, row(0.0), row(advantage), ALL[:, :1], 0.2)
    loss.backward()
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, row(-advantage * ratio if moves else 0.0))


# ---- the same result however it is cut -------------------------------------------------------------------------------


class Uncut(Conditions):
    """Conditions whose `index` leaves padding where it is."""

    def index(self, rows: Tensor | Sequence[int] | slice) -> Conditions:
        rows = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        return Conditions(self.text[rows], self.mask[rows], self.tempo_bpm[rows])


def ragged_text() -> Task:
    """The toy with prompts of one to four tokens, so that batch mates decide how much padding a prompt gets."""
    task = toy_task(0)
    mask = torch.arange(4)[None] < (torch.arange(8) % 4 + 1)[:, None]
    return dataclasses.replace(task, table=Conditions(task.table.text * mask[..., None], mask, task.table.tempo_bpm))


def ragged_rollout(run: Run) -> Rollout:
    """A judged round in which every clip counts for a length of its own."""
    mine = run.play()
    B, S = mine.mask.shape
    lengths = torch.randint(1, S + 1, (B, 1), generator=torch.Generator().manual_seed(0))
    return run.judge(dataclasses.replace(mine, mask=mine.mask & (torch.arange(S)[None] < lengths)))[0]


def one_update(tmp_path: Path, change: Callable[[Run, Rollout], Rollout] = lambda run, rollout: rollout, **settings: Any) -> list[Tensor]:
    """Weights of adapter and critic after two passes over one round as one minibatch, of a run in which something was changed."""
    run = Run(config(tmp_path, batch_size=8, minibatches=1, **settings), ragged_text(), Accelerator(cpu=True))
    before = [parameter.detach().clone() for parameter in run.parameters()]
    figures = run.learn(change(run, ragged_rollout(run)))
    assert figures["updates_skipped"] == 0
    after = [parameter.detach().clone() for parameter in run.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    return after


def pad_text(run: Run, rollout: Rollout) -> Rollout:
    table = run.table
    text, mask = torch.cat([table.text, torch.ones(8, 7, 16)], 1), torch.cat([table.mask, torch.zeros(8, 7, dtype=torch.bool)], 1)
    run.table = Uncut(text, mask, table.tempo_bpm)
    return rollout


def pad_steps_with_garbage(run: Run, rollout: Rollout) -> Rollout:
    """Whatever stands at places that do not count, NaN included."""
    spoilt = {name: torch.where(rollout.mask, getattr(rollout, name), math.nan) for name in ("logps", "ref_logps", "values", "rewards")}
    return dataclasses.replace(rollout, **spoilt)


def pad_batch(run: Run, rollout: Rollout) -> Rollout:
    """Four more clips that do not count."""
    wider = rollout.map(lambda x: torch.cat([x, x[:4]]))
    counts = torch.arange(12)[:, None] < 8
    return dataclasses.replace(wider, mask=wider.mask & counts)


def permute(run: Run, rollout: Rollout) -> Rollout:
    return rollout.map(lambda x: x[torch.tensor([3, 1, 7, 5, 0, 4, 2, 6])])


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (pad_text, {}),
        (pad_steps_with_garbage, {}),
        (pad_batch, {}),
        (permute, {}),
        (permute, {"microbatch": 3}),
    ],
    ids=["padded-text", "padded-steps", "padded-batch", "permuted", "permuted-in-microbatches"],
)
def test_13_padding_batch_order_and_microbatch_size_change_no_weight(
    change: Callable[[Run, Rollout], Rollout], settings: dict[str, Any], tmp_path: Path
) -> None:
    want, got = one_update(tmp_path), one_update(tmp_path, change, **settings)
    assert max(float((a - b).abs().max()) for a, b in zip(want, got)) < 1e-6


def test_14_eight_microbatches_of_one_are_one_of_eight_on_ragged_lengths(tmp_path: Path) -> None:
    whole, split = one_update(tmp_path, microbatch=8), one_update(tmp_path, microbatch=1)
    assert max(float((a - b).abs().max()) for a, b in zip(whole, split)) < 1e-6

    old, mask, generator = ragged(B=8)  # and the gradient of the loss itself
    advantages = torch.randn(old.shape, generator=generator)
    new = (old + 0.3 * torch.randn(old.shape, generator=generator)).requires_grad_()
    loss, stats = ppo_policy_loss(new, old, advantages, mask, 0.2)
    (want,) = torch.autograd.grad(loss, new)
    parts = [ppo_policy_loss(new[i : i + 1], old[i : i + 1], advantages[i : i + 1], mask[i : i + 1], 0.2, mask.sum()) for i in range(8)]
    (got,) = torch.autograd.grad(torch.stack([part for part, _ in parts]).sum(), new)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.stack([part["clipfrac"] for _, part in parts]).sum(), stats["clipfrac"])


def test_15_two_gloo_processes_equal_one_on_the_same_global_batch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    settings = {"steps": 3, "batch_size": 32, "look_every": 2, "heldout_clips": 3, "weights": "human=1,code_5=0.5,movement=0"}
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    everything = [*command, "--preset", "smoke", "--processes", "2", "--out", "two", *flags]
    done = subprocess.run(everything, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=alone(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    main(config(tmp_path / "one", **settings))
    assert largest_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-6
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for name in untimed(one):
            # A share of clipped steps is a count: one step on the border of the range may fall to either side.
            assert two[name] == pytest.approx(one[name], abs=0.01 if name.endswith("clipfrac") else 1e-5), name


# ---- again and again -------------------------------------------------------------------------------------------------


class CrashError(Exception):
    pass


def crash_in_call(number: int) -> Score:
    calls = iter(range(1, 1000))

    def score(codes: Tensor, prompts: list[str]) -> Tensor:
        if next(calls) == number:
            raise CrashError
        return share_of_code_3(codes, prompts)

    return score


def test_16_resume_is_bitwise_in_weights_adam_scheduler_rng_price_normaliser_and_brake(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 5, "save_every": 2, "look_every": 1, "target_kl": 0.1, "kl_horizon": 50}
    changes["weights"] = "human=1,movement=0.3"
    main(config(tmp_path / "whole", **changes))
    with pytest.raises(CrashError):
        main(config(tmp_path / "cut", **changes), judged_by(crash_in_call(7), toy_task(0).heldout))  # a look and a round each step
    for junk in (".step_00000004.half", "step_00000004"):  # what a kill in the middle of a save may leave; test_kill really kills
        (tmp_path / "cut" / "checkpoints" / junk).mkdir()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as half_written:
        half_written.write('{"step": 4, "sco')
    main(config(tmp_path / "cut", **changes, resume=True))
    folders = [tmp_path / name / "checkpoints" / "step_00000005" for name in ("whole", "cut")]
    files = sorted(path.name for path in folders[0].iterdir())
    tensors = {f"{name}.safetensors" for name in ("adapter", "best", "critic", "states", "rng")}
    assert tensors | {"state.json"} == set(files)
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    states = read_json(folders[0] / "state.json")["states"]
    assert {"optimizer", "scheduler", "controller", "baseline", "normalizer", "reward", "brake"} == set(states)
    assert states["controller"] != {"__dict__": [["kl_coef", TOY["kl_coef"]]]}
    assert [untimed(told) for told in metrics(tmp_path / "whole")] == [untimed(told) for told in metrics(tmp_path / "cut")]


def test_17_same_seed_same_run_and_ranks_play_different_seeds(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(config(tmp_path / name, seed=seed, steps=2), toy_task(0))
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "b")) == 0
    assert metrics(tmp_path / "a")[0]["entropy"] != metrics(tmp_path / "c")[0]["entropy"]

    run = Run(config(tmp_path), toy_task(0), Accelerator(cpu=True))
    whole = run.play().codes
    shares = []
    for rank in range(2):
        run.clips = 0
        run.accelerator = SimpleNamespace(process_index=rank, num_processes=2)  # type: ignore[assignment]
        shares.append(run.play().codes)
    assert torch.equal(torch.cat(shares), whole)
    assert len({tuple(codes.flatten().tolist()) for codes in whole}) == len(whole)


class Taste(nn.Module):
    """A reward with weights, which autograd could reach."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 1)

    def forward(self, codes: Tensor, prompts: list[str]) -> Tensor:
        return self.table(codes)[..., 0].mean((1, 2))


def test_18_base_reference_and_reward_are_untouched_and_only_adapter_and_critic_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    taste = Taste()
    task = judged_by(taste)
    codes = torch.randint(0, 16, (8, 2, 12))
    with torch.no_grad():
        reference = score_steps(task.lm, codes, task.table).logps
    base, reward = task.lm.sha256(), tensors_sha256(taste.state_dict())
    main(config(tmp_path), task)
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in task.lm.state_dict().items() if ".lora_" not in name}
    assert tensors_sha256({**kept, "layout.delay": torch.tensor([2, 16])}) == base == task.base_sha256
    assert tensors_sha256(taste.state_dict()) == reward
    assert taste.table.weight.grad is None
    with torch.no_grad(), adapter_disabled(task.lm):
        assert (score_steps(task.lm, codes, task.table).logps - reference).abs().max() < 1e-5  # eager attention rounds differently
    learning = [name for name, parameter in task.lm.named_parameters() if parameter.requires_grad]
    assert learning
    assert all(".lora_" in name and ".default." in name for name in learning)
    assert all(parameter.grad is None for name, parameter in task.lm.named_parameters() if name not in learning)
    assert any(float(tensor.abs().max()) > 0 for name, tensor in weights(tmp_path).items() if "lora_B" in name)


# ---- it learns, only where it should, and says what it leaves out ----------------------------------------------------


def test_19_a_token_count_reward_is_solved_within_a_minute(learned_toy: tuple[Path, dict[str, Any]]) -> None:
    _, figures = learned_toy
    assert figures["score_first"] < 0.15
    assert figures["score_last"] > 0.8
    assert figures["cpu_seconds"] < 60


def test_19_a_constant_reward_drifts_no_more_than_noise(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=12), judged_by(lambda codes, _: torch.ones(len(codes))))
    assert abs(figures["kl"]) < 0.5  # the reward that can be learnt goes beyond 10 in as many rounds


def test_19_a_large_price_of_drift_keeps_the_policy_where_it_is(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=12, kl_coef=100.0))
    assert abs(figures["kl"]) < 0.5
    assert figures["score_last"] < 0.15


def test_20_nan_scores_are_skipped_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rounds = iter(range(1000))

    def sometimes(codes: Tensor, prompts: list[str]) -> Tensor:
        score, number = share_of_code_3(codes, prompts), next(rounds)
        score[0] = float("inf")
        return torch.full_like(score, float("nan")) if number == 1 else score

    main(config(tmp_path), judged_by(sometimes))
    assert [told["scores_not_finite"] for told in metrics(tmp_path)] == [1, 32, 1]
    assert metrics(tmp_path)[1]["score"] is None
    assert "32 clips left out" in "".join(capfd.readouterr())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(tmp_path).values())


def test_20_rounds_without_a_finite_score_change_no_weight_and_too_many_stop_the_run(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=30), judged_by(lambda codes, _: torch.full((len(codes),), float("nan"))))
    assert "no finite score" in figures["stopped"]
    assert figures["steps"] == 5
    assert all(float(tensor.abs().max()) == 0 for name, tensor in weights(tmp_path).items() if "lora_B" in name)
