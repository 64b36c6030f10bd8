"""The policy's own clips as pairs: ordered by the reward, in rounds, on a KL budget, and resumable."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.library import read_adapter
from adapters.lora import attach_lora
from base_models.checkpoint import load_training_state
from base_models.errors import UserError
from rlhf import train_dpo
from rlhf.average import Average
from rlhf.dense import redraw
from rlhf.dpo_arguments import training_arguments
from rlhf.dpo_pairs import parents_of
from rlhf.dpo_task import Task, held_out_prompts, toy_task
from rlhf.edits import expected_difference
from rlhf.flat_policy import FlatCausalLM, flat_order, unflatten_ids
from rlhf.own_pairs import VERIFY, OwnPairs
from rlhf.rewards import HOLD_MOST, Mixed, Part, Reward
from rlhf.round_plan import round_plan
from rlhf.round_price import Price
from rlhf.round_rows import edited_codes, label, pair_up
from rlhf.rounds import Rounds
from rlhf.train_dpo import PRESETS, Config
from tests.rlhf.two_processes import launch

K, V, T = 4, 32, 12


def config(out: Path, **changes: Any) -> Config:
    return dataclasses.replace(Config(**PRESETS["smoke_reward"]), out=out, precision="fp32", **changes)


def rounds(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "round" in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The preset: a toy policy that is judged by the share of its codes in the lower half."""
    out = tmp_path_factory.mktemp("own") / "run"
    return train_dpo.main(config(out)), out


def own_pairs(tmp_path: Path, task: Task, **changes: Any) -> OwnPairs:
    cfg = config(tmp_path, **changes)
    plan = round_plan(cfg, 0)
    flat = FlatCausalLM(task.lm, task.table).eval()
    attach_lora(task.lm, r=2, alpha=4)
    assert task.own is not None
    args = training_arguments(cfg, plan.n_rows)
    return OwnPairs(flat, args, plan, task.own.prompts, task.own.first_row, task.own.held_out, task.own.score)


# -- pairs


def test_the_best_and_the_worst_make_the_pair_and_unjudged_clips_none():
    assert pair_up(torch.tensor([0.1, 0.9, -3.0, 0.5]), "best_worst") == [(1, 2)]
    assert pair_up(torch.tensor([math.nan, 1.0, math.inf, 2.0]), "best_worst") == [(3, 1)]
    assert pair_up(torch.tensor([1.0, 1.0]), "best_worst") == []
    assert pair_up(torch.tensor([math.nan, 1.0]), "best_worst") == []


def test_all_pairs_are_all_ordered_pairs():
    pairs = pair_up(torch.tensor([2.0, 0.0, 1.0, 1.0]), "all")
    assert set(pairs) == {(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)}


def test_soft_labels_are_what_the_calibrated_reward_says():
    assert label(math.log(3), "soft") == pytest.approx(0.75)
    assert label(math.log(3), "hard") == 1.0


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_rounds_rows_hold_the_clips_that_were_played_in_the_order_of_their_scores(tmp_path, labels):
    task = toy_task(config(tmp_path))
    own = own_pairs(tmp_path, task, labels=labels)
    rows, figures = own.round(0)
    assert len(rows) == own.plan.n_rows == figures["own/pairs"] + figures["own/pairs_unordered"]
    assert task.own is not None
    gaps = []
    for row in rows:
        chosen, rejected = (unflatten_ids(torch.tensor([row[name]]), K, V) for name in ("chosen_ids", "rejected_ids"))
        gap = float(task.own.score(chosen, [""]) - task.own.score(rejected, [""]))
        gaps.append(gap)
        assert gap > 0
        assert row["p_chosen"] == (1.0 if labels == "hard" else pytest.approx(label(gap, "soft")))
    assert sum(gaps) / len(gaps) == pytest.approx(figures["own/gap"], abs=1e-5)


def test_a_round_is_a_function_of_policy_seed_and_number_and_held_out_prompts_never_enter_it(tmp_path):
    task = toy_task(config(tmp_path))
    own = own_pairs(tmp_path, task, round_prompts=28)
    one, two, next_one = own.round(0)[0], own.round(0)[0], own.round(1)[0]
    assert one == two
    assert one[0]["chosen_ids"] != next_one[0]["chosen_ids"]
    held = {own.flat.sequence(row, torch.zeros(K, 1))[0][0] for row in own.held_out}
    assert held
    assert not held & {row["prompt_ids"][0] for row in one + next_one}
    assert len({row["prompt_ids"][0] for row in one}) == len(own.learnt)


def test_reference_log_probs_of_own_clips_are_the_bases(tmp_path):
    task = toy_task(config(tmp_path))
    own = own_pairs(tmp_path, task)
    with torch.no_grad():
        for name, parameter in task.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    rows, _ = own.round(0)
    base = toy_task(config(tmp_path)).lm
    for row in rows[:4]:
        codes = unflatten_ids(torch.tensor([row["chosen_ids"]]), K, V)
        with torch.no_grad():
            expected = base.logps(codes, task.table.index([row["prompt_ids"][0] - 2 - K * V])).sum()
        assert row["ref_chosen_logps"] == pytest.approx(float(expected), abs=1e-3)


def test_prompts_that_make_no_pair_are_told_and_weigh_nothing(tmp_path):
    task = toy_task(config(tmp_path))
    assert task.own is not None
    blind = dataclasses.replace(task.own, score=lambda codes, prompts: torch.full((len(codes),), math.nan))
    rows, figures = own_pairs(tmp_path, dataclasses.replace(task, own=blind)).round(0)
    assert {row["weight"] for row in rows} == {0.0}
    assert figures["own/pairs"] == 0
    assert figures["own/pairs_unordered"] == 32


# -- rounds


def test_the_reward_of_held_out_prompts_rises_from_round_to_round(run):
    figures, out = run
    told = rounds(out)
    assert [row["round"] for row in told] == list(range(len(told)))
    assert told[0]["held_out/preferred_to_base"] == 0.5
    assert abs(told[0]["held_out/kl"]) < 1e-4
    assert told[-1]["held_out/score"] > told[0]["held_out/score"] + 1.0
    assert figures["held_out_preferred_to_base"] > 0.8
    assert told[-1]["held_out/kl"] > told[1]["held_out/kl"] > 0
    assert figures["first_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert figures["stopped"] == "rounds"


def test_rounds_tell_kl_by_codebook_what_was_played_and_how_long_it_took(run):
    figures, out = run
    told = rounds(out)
    for row in told:
        assert row["held_out/kl"] == pytest.approx(sum(row[f"held_out/kl_book_{k}"] for k in range(K)), abs=1e-5)
        assert len(list((out / "clips" / f"step_{row['step']:08d}").glob("*.wav"))) == 2
        assert row["seconds_look"] > 0
    n_codes = 32 * 4 * K * T
    before, after = told[1], told[2]
    assert before["tokens_per_second_play"] * before["seconds_play"] == pytest.approx(n_codes, rel=1e-6)
    whole = before["seconds_play"] + before["seconds_judge"] + after["seconds_learn"]
    assert after["tokens_per_second"] * whole == pytest.approx(n_codes, rel=1e-6)
    assert "seconds_learn" not in told[0]  # nothing was learnt yet
    assert "seconds_play" not in told[-1]  # nothing is left to play for
    assert figures["steps"] == told[-1]["step"]


def test_the_manifest_says_that_the_clips_were_its_own(run):
    _, out = run
    assert read_adapter(out / "adapter").manifest.method == "dpo_own"


def test_rated_pairs_take_their_share_of_a_round_at_their_weight(tmp_path):
    cfg = config(tmp_path, rated_share=0.25)
    assert round_plan(cfg, n_rated=56).n_rated == round(32 / 3)
    assert round_plan(cfg, n_rated=0).n_rated == 0
    assert round_plan(dataclasses.replace(cfg, rated_share=0.0), n_rated=56).n_rated == 0
    with pytest.raises(UserError, match="rated-share"):
        round_plan(dataclasses.replace(cfg, rated_share=1.0), 56)


def test_the_run_ends_when_the_kl_budget_is_spent_and_a_resumed_one_learns_nothing_more(tmp_path):
    changes: dict[str, Any] = {"kl_budget": 0.5, "lr": 3e-2, "rounds": 4}
    figures = train_dpo.main(config(tmp_path / "run", **changes))
    assert "budget" in figures["stopped"]
    assert figures["rounds"] < 4
    before = read_adapter(tmp_path / "run" / "adapter").lora.tensors
    again = train_dpo.main(config(tmp_path / "run", resume=True, **changes))
    assert "budget" in again["stopped"]
    after = read_adapter(tmp_path / "run" / "adapter").lora.tensors
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_without_rated_pairs_knows_its_held_out_prompts_too(tmp_path):
    """Resumed with another --held-out it would be measured on prompts that it has learnt from."""
    some, more = (parents_of(cfg, toy_task(cfg), []) for cfg in (config(tmp_path, held_out=share) for share in (0.1, 0.4)))
    assert {name for name in some if some[name] != more[name]} == {"held_out_sha256"}


def test_the_clock_ends_a_run_between_rounds_each_of_which_is_kept(tmp_path):
    train_dpo.main(config(tmp_path / "whole", rounds=2))
    first = train_dpo.main(config(tmp_path / "parts", rounds=2, max_minutes=1e-6))
    assert first["rounds"] == 1
    assert train_dpo.main(config(tmp_path / "parts", rounds=2, resume=True))["rounds"] == 2
    one, two = (read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    preset = Config(**PRESETS["rounds"])
    assert training_arguments(dataclasses.replace(preset, reward=tmp_path), 200).save_steps == 10  # a round


@pytest.mark.parametrize("average", [0.0, 0.7])
def test_a_steered_run_beyond_its_budget_is_drawn_back_and_goes_on_resumed_or_not(tmp_path, average):
    changes: dict[str, Any] = {"kl_budget": 0.5, "target_kl": 0.3, "kl_weight": 1e-4, "lr": 3e-2, "rounds": 4, "save_every": 1}
    changes |= {"average": average}
    for name in ("whole", "broken"):
        figures = train_dpo.main(config(tmp_path / name, **changes))
        assert figures["stopped"] == "rounds"
    told = rounds(tmp_path / "whole")
    drawn = [row for row in told if "held_out/kl_before" in row]
    assert drawn
    came_to = "held_out/kl_round" if average else "held_out/kl"
    assert all(row[came_to] <= 0.5 < row["held_out/kl_before"] for row in drawn)
    first = told.index(drawn[0])
    assert told[first]["kl_weight"] == 2 * told[first - 1]["kl_weight"]  # by the KL that it had gone to
    assert "held_out/kl_before" in told[-2]  # the checkpoint that it goes on from is of a policy that was not drawn back yet
    shutil.rmtree(sorted((tmp_path / "broken" / "checkpoints").iterdir())[-1])
    shutil.rmtree(tmp_path / "broken" / "adapter")
    train_dpo.main(config(tmp_path / "broken", resume=True, **changes))
    one, two = (read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_draw_back_and_average_as_one_does(tmp_path):
    """4 pairs a process x 2 are the 8 pairs of the single run, and the first process's figures decide for both."""
    steered: dict[str, Any] = {"kl_budget": 0.5, "target_kl": 0.3, "kl_weight": 1e-4, "lr": 3e-2, "rounds": 3, "average": 0.7}
    steered |= {"rated_share": 0.0}  # 32 rows a round: whole batches
    one = train_dpo.main(config(tmp_path / "one", **steered))
    flags = [part for name, value in steered.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = launch(tmp_path, "train_dpo.py", "--preset", "smoke_reward", "--out", "two", "--precision", "fp32", "--batch-size", "4", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, both = rounds(tmp_path / "one"), rounds(tmp_path / "two")
    drawn = [[row.get("held_out/kl_before") for row in rows] for rows in (alone, both)]
    assert any(drawn[0])
    assert drawn[1] == [value and pytest.approx(value, rel=1e-2) for value in drawn[0]]
    assert both[-1]["held_out/kl_round"] == pytest.approx(one["held_out_kl_round"], rel=1e-2)
    tensors = [read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("one", "two")]
    assert all(torch.allclose(tensors[0][name], tensors[1][name], atol=2e-3) for name in tensors[0])


@pytest.mark.parametrize(
    ("measured", "scaled", "goes_on", "ramp"),  # KL of the policy as it is, each time that it is measured
    [
        ([0.4], [], True, 1),
        ([2.0, 0.2], [0.5], True, 1),
        ([4.0, 0.2], [0.25], True, 8),  # to what the fourth round of a ramp of eight is steered to, half of the whole target
        ([8.0, 2.0, 0.5], [0.25, 0.5], True, 1),
        ([8.0, 8.0, 8.0, 8.0], [0.25, 0.25, 0.25], False, 1),
        ([float("inf")], [], False, 1),
        ([float("nan")], [], False, 1),
    ],
)
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_how_far_a_round_is_drawn_back(measured, scaled, goes_on, ramp, average, monkeypatch, tmp_path):
    factors: list[float] = []
    told = iter(measured)
    monkeypatch.setattr("rlhf.rounds.scale_adapter", lambda lm, factor: factors.append(factor))

    def look(number: int) -> dict[str, float]:
        return {"held_out/kl": next(told)}

    lm = attach_lora(toy_task(config(Path())).lm, 2, 4.0)
    mean = Average(lm, average)
    mean.update()
    stub: Any = SimpleNamespace(lm=lm, plan=SimpleNamespace(kl_budget=1.0))
    stub.measure, stub.drift = (lambda number: {"held_out/kl": 0.1}, look) if average else (look, None)
    price = Price(0.1, 0.5, tmp_path / "price.json", writes=False, ramp=ramp)
    run = Rounds(stub, stub, 1, SimpleNamespace(), price, mean)  # type: ignore[arg-type]
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([weight])
    weight.sum().backward()
    adam.step()
    run.trainer = SimpleNamespace(optimizer=adam)  # type: ignore[assignment]
    figures, kl, gone = run._measure(3)
    assert factors == scaled
    assert gone == measured[0] or math.isnan(gone)
    assert kl == measured[-1] or math.isnan(kl)
    assert (kl <= 1.0) == goes_on
    if average:
        assert figures["held_out/kl"] == 0.1  # the mean's
        assert mean.rounds == 1 + goes_on  # what ends the run is no part of it
    assert figures.get("held_out/kl_before") == (measured[0] if scaled else None)
    assert bool(adam.state[weight]["exp_avg"].any()) == (not scaled)
    assert bool(adam.state[weight]["exp_avg_sq"].all())


def test_a_run_leaves_the_mean_of_what_its_rounds_left(tmp_path):
    changes: dict[str, Any] = {"rounds": 4, "save_every": 1}
    train_dpo.main(config(tmp_path / "plain", **changes))
    train_dpo.main(config(tmp_path / "mean", average=0.5, **changes))
    _, saved, _, extra = load_training_state(max((tmp_path / "mean" / "checkpoints").iterdir()))
    last, mean = saved["adapter"], saved["average"]
    assert extra["rounds_averaged"] == 3  # a round is saved before it is looked at
    ended = read_adapter(tmp_path / "plain" / "adapter").lora.tensors
    assert all(torch.equal(last[name], ended[name]) for name in last)  # the mean is looked at, and changes nothing of what is learnt
    left = read_adapter(tmp_path / "mean" / "adapter").lora.tensors
    assert all(torch.allclose(left[name], 0.5 * mean[name] + 0.5 * last[name], atol=1e-7) for name in left)
    assert not all(torch.allclose(left[name], last[name], atol=1e-4) for name in left)
    told, plain = rounds(tmp_path / "mean"), rounds(tmp_path / "plain")
    assert [row["held_out/kl_round"] for row in told[1:]] == pytest.approx([row["held_out/kl"] for row in plain[1:]], abs=1e-5)
    assert told[-1]["held_out/kl"] < told[-1]["held_out/kl_round"]
    assert told[-1]["held_out/score"] > told[0]["held_out/score"]
    with pytest.raises(UserError, match="average"):
        train_dpo.main(config(tmp_path / "mean", average=0.6, resume=True, **changes))


@pytest.mark.parametrize("average", [0.0, 0.7])
def test_a_run_resumed_between_rounds_ends_bitwise_where_the_unbroken_one_does(tmp_path, average):
    changes: dict[str, Any] = {"rounds": 3, "save_every": 1, "average": average}
    train_dpo.main(config(tmp_path / "whole", **changes))
    train_dpo.main(config(tmp_path / "broken", **changes))
    saved = sorted((tmp_path / "broken" / "checkpoints").iterdir())
    shutil.rmtree(saved[-1])
    shutil.rmtree(tmp_path / "broken" / "adapter")
    train_dpo.main(config(tmp_path / "broken", resume=True, **changes))
    one, two = (read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rounds(tmp_path / "whole")[-1]["held_out/score"] == rounds(tmp_path / "broken")[-1]["held_out/score"]


def test_a_constant_reward_makes_no_pair_and_moves_nothing(tmp_path, monkeypatch):
    def constant(codes: Tensor, prompts: list[str]) -> Tensor:
        return torch.ones(len(codes))

    def no_taste(cfg: Config) -> Task:
        task = toy_task(cfg)
        assert task.own is not None
        return dataclasses.replace(task, own=dataclasses.replace(task.own, score=constant), pairs=[])

    monkeypatch.setattr(train_dpo, "toy_task", no_taste)
    figures = train_dpo.main(config(tmp_path / "run", rounds=2))
    assert abs(figures["held_out_kl"]) < 1e-4


# -- refusals


def test_a_reward_without_prompts_is_refused(tmp_path):
    with pytest.raises(UserError, match="--prompts None"):
        train_dpo.main(Config(out=tmp_path / "run", reward=tmp_path))


def test_some_prompts_are_always_held_out():
    assert len(held_out_prompts([str(i) for i in range(16)], 0.0, 0)) == 1
    assert 2 <= len(held_out_prompts([str(i) for i in range(40)], 0.1, 0)) <= 6


# -- clips edited both ways


def test_edits_of_one_clip_are_ordered_as_meant_and_share_most_of_their_codes(tmp_path):
    task = toy_task(config(tmp_path))
    own = own_pairs(tmp_path, task, pairing="edits", edit_price=0.3)
    own.measure()
    rows, figures = own.round(0)
    assert len(rows) == own.plan.n_rows == own.plan.n_prompts * own.plan.n_clips
    assert figures["own/pairs"] + figures["own/pairs_unordered"] == len(rows)
    assert figures["own/pairs"] > 0.7 * len(rows)
    assert figures["own/gap"] > 0
    for row in rows[:8]:
        better, worse = (unflatten_ids(torch.tensor([row[name]]), K, V) for name in ("chosen_ids", "rejected_ids"))
        assert (better == worse).float().mean() > 0.4
        assert row["chosen_mask"] == row["rejected_mask"]
        assert sum(row["chosen_mask"]) == int((better != worse).sum()) > 0
        if row["weight"]:
            assert (better < V // 2).sum() > (worse < V // 2).sum()


def test_only_codes_that_differ_count_in_a_pair_of_edits():
    better = torch.arange(6).view(2, 3)
    worse = better.clone()
    worse[1, 0] = 9  # book 1 of frame 0: said at step 1 beside book 0 of frame 1
    book, frame = flat_order(2, 3)
    expected = [int((k, t) == (1, 0)) for k, t in zip(book.tolist(), frame.tolist())]
    assert edited_codes(better, worse) == expected
    assert sum(edited_codes(better, better)) == 6  # an unused pair: nothing differs, and no sum may be empty


def test_edits_of_a_clip_do_not_depend_on_the_clips_beside_it(tmp_path):
    task = toy_task(config(tmp_path))
    own = own_pairs(tmp_path, task, pairing="edits")
    own.measure()
    whole, _ = own.round(0)
    own.plan = dataclasses.replace(own.plan, score_batch=3)
    parts, _ = own.round(0)
    assert [row["chosen_ids"] for row in parts] == [row["chosen_ids"] for row in whole]
    assert [row["weight"] for row in parts] == [row["weight"] for row in whole]


@pytest.mark.parametrize(("labels", "one_in"), [("hard", VERIFY), ("soft", 1)])
def test_of_hard_labels_every_fourth_edit_is_judged_and_of_soft_ones_all(tmp_path, labels, one_in):
    task = toy_task(config(tmp_path))
    assert task.own is not None
    parts, asked = task.own.score.reward.parts, list[int]()
    judge = parts["human"].score

    def counting(codes: Tensor, prompts: list[str]) -> Tensor:
        asked.append(len(codes))
        return judge(codes, prompts)

    parts["human"] = dataclasses.replace(parts["human"], score=counting)
    own = own_pairs(tmp_path, task, pairing="edits", labels=labels)
    own.measure()
    asked.clear()
    own.round(0)
    assert sum(asked) == 2 * own.plan.n_prompts * own.plan.n_clips // one_in  # slopes bring their scores with them


def test_a_flat_reward_edits_nothing_and_its_pairs_weigh_nothing(tmp_path):
    task = toy_task(config(tmp_path))
    assert task.own is not None
    flat = task.own.score.slopes["human"]
    task.own.score.slopes["human"] = lambda codes, prompts: (torch.zeros_like(flat(codes, prompts)[0]), flat(codes, prompts)[1])
    own = own_pairs(tmp_path, task, pairing="edits")
    own.measure()
    rows, _ = own.round(0)
    assert {row["weight"] for row in rows} == {0.0}


def test_rounds_of_edits_raise_the_held_out_score(tmp_path):
    figures = train_dpo.main(config(tmp_path, pairing="edits", edit_price=0.3, round_clips=2))
    assert figures["held_out_score"] > figures["held_out_score_base"] + 1.0


def test_a_judge_without_a_slope_cannot_edit(tmp_path):
    task = toy_task(config(tmp_path))
    assert task.own is not None
    task.own.score.slopes = {}
    own = own_pairs(tmp_path, task, pairing="edits")
    own.measure()
    with pytest.raises(UserError, match="without a slope"):
        own.round(0)


def test_looks_tell_what_each_part_says_in_spreads_of_the_base_those_without_a_weight_too(tmp_path):
    task = toy_task(config(tmp_path))
    assert task.own is not None

    def even(codes: Tensor, prompts: list[str]) -> Tensor:
        return (codes % 2 == 0).float().mean((1, 2))

    low = task.own.score.reward.parts["human"].score
    reward = Reward({"human": Part(low), "even": Part(even, 0.0, asked=True)}, every_round=["human"])
    own = own_pairs(tmp_path, dataclasses.replace(task, own=dataclasses.replace(task.own, score=Mixed(reward, {}, torch.zeros(K, V, 1)))))
    first = own.measure(0)
    assert [first[f"held_out/reward_{name}_z"] for name in ("human", "even")] == pytest.approx([0, 0], abs=1e-4)
    assert own.base_scores is not None
    base = first["held_out/reward_even"]
    for parameter in task.lm.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    second = own.measure(1)
    heard = even(own.heard.codes, []).mean().item()
    assert second["held_out/reward_even"] == pytest.approx(heard, abs=1e-6)
    assert second["held_out/reward_even_z"] == pytest.approx((heard - base) / reward.scales["even"][1], abs=1e-4)
    assert second["held_out/score"] == pytest.approx(low(own.heard.codes, [""] * len(own.heard.codes)).mean().item(), abs=1e-5)


def test_levels_and_spreads_go_by_looks_of_the_base_with_other_seeds_too_also_where_the_policy_has_moved_on(tmp_path):
    task = toy_task(config(tmp_path))
    assert task.own is not None

    def even(codes: Tensor, prompts: list[str]) -> Tensor:
        return (codes % 2 == 0).float().mean((1, 2))

    listeners = task.own.score.reward.parts["human"]
    own = own_pairs(tmp_path, task)

    def scales(n: int, std: float = 0.0) -> dict[str, tuple[float, float]]:
        reward = Reward({"human": listeners, "even": Part(even, 0.5)})
        own.plan = dataclasses.replace(own.plan, base_looks=n)
        own.score, own.base_scores = Mixed(reward, {}, torch.zeros(K, V, 1)), None
        for parameter in task.lm.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(0))
        own.measure(0)
        return reward.scales

    few, many = scales(1), scales(4)
    for name in few:
        assert few[name] != many[name]
        assert few[name] == pytest.approx(many[name], rel=0.3)
    assert scales(4, std=0.3) == many  # as when a run is resumed


def test_held_weights_move_between_rounds_from_where_the_round_before_had_left_them(tmp_path):
    cfg = config(tmp_path)
    task = toy_task(cfg)
    assert task.own is not None

    def even(codes: Tensor, prompts: list[str]) -> Tensor:
        return (codes % 2 == 0).float().mean((1, 2))

    low = task.own.score.reward.parts["human"].score
    reward = Reward({"human": Part(low), "even": Part(even, 0.5, asked=True)})
    own = own_pairs(tmp_path, dataclasses.replace(task, own=dataclasses.replace(task.own, score=Mixed(reward, {}, torch.zeros(K, V, 1)))))
    own.plan = dataclasses.replace(own.plan, held=("even",), hold_rate=0.7, hold_slack=0.5)
    assert own.measure(0)["held_out/weight_even"] == pytest.approx(0.5, abs=1e-5)  # the base stands at its own level
    for parameter in task.lm.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    moved = own.measure(1)
    missed = reward.judge(reward.marks(own.heard.codes, [""] * len(own.heard.codes)), [""] * len(own.heard.codes)).parts["even"].mean()
    slack = 0.5 / math.sqrt(len(own.heard.codes))
    assert moved["held_out/weight_even"] == pytest.approx(min(max(0.5 - 0.7 * (float(missed) + slack), 0.5), HOLD_MOST))
    assert moved["held_out/weight_even"] != 0.5
    assert own.measure(1) == moved  # a run that is resumed measures its round again
    shutil.rmtree(tmp_path)  # as on a node whose disk never had held.json
    tmp_path.mkdir()
    further = own.measure(2)
    assert further["held_out/score"] == moved["held_out/score"]  # judged by the weights of the start
    assert abs(further["held_out/weight_even"] - 0.5) >= abs(moved["held_out/weight_even"] - 0.5)


# -- edits in expectation


def test_the_expected_difference_is_the_mean_over_edits_that_are_drawn():
    """One place of 12 codes: the mean log-ratio of 20,000 better and worse redraws against the closed form."""
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits, gain = (torch.randn(1, 1, 1, 12, generator=generator) for _ in range(3))
    log_probs, log_ratio = logits.log_softmax(-1), (logits.log_softmax(-1) - ref_logits.log_softmax(-1))[0, 0, 0]
    n = 20_000
    codes = torch.multinomial(log_probs.exp().flatten(), n, replacement=True, generator=generator).view(n, 1, 1)
    many = log_probs.expand(n, 1, 1, 12)
    sides = [redraw(codes, many, sign * gain.expand(n, 1, 1, 12), 0.7, generator) for sign in (1, -1)]
    better, worse = (log_ratio[side.flatten()] for side in sides)
    error = float((better - worse).std() / n**0.5)
    assert float(expected_difference(logits, ref_logits, gain, 0.7)) == pytest.approx(float((better - worse).mean()), abs=4 * error)


def test_learning_from_expected_edits_follows_the_gain_and_leaves_the_edits_themselves_alone():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gain = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    margin = expected_difference(logits, logits.detach(), gain, 0.5)
    assert margin.abs().max() == 0  # policy and reference are one
    margin.sum().backward()
    apart = (logits.detach() + 2 * gain).softmax(-1) - (logits.detach() - 2 * gain).softmax(-1)
    assert torch.allclose(logits.grad, apart, atol=1e-6)
    assert (logits.grad * gain).sum(-1).min() > 0


def test_a_round_of_expected_edits_is_the_clips_with_their_slopes(tmp_path):
    task = toy_task(config(tmp_path))
    own = own_pairs(tmp_path, task, pairing="expected", rated_share=0.0)
    own.measure()
    rows, figures = own.round(0)
    assert len(rows) == own.plan.n_rows == own.plan.n_prompts * own.plan.n_clips == figures["own/pairs"]
    assert all(row["chosen_ids"] == row["rejected_ids"] for row in rows)
    codes = torch.cat([unflatten_ids(torch.tensor([row["chosen_ids"]]), K, V) for row in rows[:4]])
    slope, _ = task.own.score.slope(codes, [own.prompts[row["prompt_ids"][0] - 2 - K * V] for row in rows[:4]])
    mine = torch.stack([row["slope"] for row in rows[:4]])
    assert torch.nn.functional.cosine_similarity(mine.flatten(1), slope.flatten(1)).min() > 0.999


def test_rounds_of_expected_edits_raise_the_held_out_score_from_a_first_loss_of_log_2(tmp_path):
    figures = train_dpo.main(config(tmp_path, pairing="expected", edit_price=0.3, round_clips=2, rated_share=0.0))
    assert figures["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures["held_out_score"] > figures["held_out_score_base"] + 1.0


@pytest.mark.parametrize("changes", [{"loss": "ipo"}, {"labels": "soft"}, {"rated_share": 0.5}])
def test_expected_edits_are_refused_where_there_are_two_clips_to_compare(tmp_path, changes):
    with pytest.raises(UserError, match="--pairing expected"):
        round_plan(config(tmp_path, **{"pairing": "expected", "rated_share": 0.0, **changes}), 10)


def test_clips_of_a_prompt_are_played_and_judged_together(tmp_path):
    cfg = dataclasses.replace(Config(**PRESETS["smoke_reward"]), out=tmp_path, round_clips=6, batch_size=8, sample_batch=64)
    plan = round_plan(cfg, n_rated=0)
    assert (plan.score_batch, plan.sample_batch) == (12, 60)
    assert round_plan(dataclasses.replace(cfg, round_clips=24), n_rated=0).score_batch == 24  # one prompt at least
    assert round_plan(dataclasses.replace(cfg, round_clips=2), n_rated=0).score_batch == 16


def test_looks_have_several_clips_of_a_prompt_however_few_they_are(tmp_path):
    """Else nothing is known of what compares a prompt's clips, and it cannot be held (once missed: 48 clips of 48 prompts)."""
    own = own_pairs(tmp_path, toy_task(config(tmp_path)), round_clips=2, held_out_clips=4)
    assert len(own.held_out) >= 2
    own.measure(0)
    assert own.heard is not None
    first, second = own.held_out[:2]
    assert own.heard.rows == [first, first, second, second]


def test_a_held_part_that_no_look_tells_anything_of_is_named(tmp_path, capsys):
    task = toy_task(config(tmp_path))
    assert task.own is not None
    heard = task.own.score
    silent = Part(lambda codes, prompts: torch.full((len(codes),), math.nan), 0.5, asked=True)
    assert isinstance(heard, Mixed)
    mixed = Mixed(Reward({**heard.reward.parts, "silent": silent}), heard.slopes, heard.codebooks)
    own = own_pairs(tmp_path, dataclasses.replace(task, own=dataclasses.replace(task.own, score=mixed)))
    own.plan = dataclasses.replace(own.plan, held=("silent",))
    own.measure(0)
    assert "not held: silent" in capsys.readouterr().out
