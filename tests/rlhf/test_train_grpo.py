"""GRPO and RLOO over the flat view: they learn, they judge what was played, and they can be interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerState

from adapters.library import read_adapter
from base_models.errors import UserError
from base_models.sampling import generate
from rlhf import flat_grpo
from rlhf.flat_grpo import Judge
from rlhf.flat_policy import flatten_codes
from rlhf.ppo_task import Task
from rlhf.rewards import Part, Reward, weighted
from rlhf.train_grpo import PRESETS, Config, check, main, toy_task, training_arguments
from tests.rlhf.two_processes import launch


def config(out: Path, **changes: Any) -> Config:
    return dataclasses.replace(Config(**PRESETS["smoke"]), **{"out": out, "steps": 3, **changes})


def even(codes: Tensor, prompts: list[str]) -> Tensor:
    """Share of the codes that are even: nothing that the toy's own score asks for."""
    return (codes % 2 == 0).float().mean((1, 2))


def with_even() -> Task:
    task = toy_task(0)
    return dataclasses.replace(task, checks={**task.checks, "even": even})


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_the_toy_reward_rises_and_kl_begins_at_zero(tmp_path, method):
    figures = main(config(tmp_path / "run", method=method, steps=24, kl_budget=1e3))
    rows = metrics(tmp_path / "run")
    assert len(rows) == 24
    assert abs(rows[0]["kl_nats_per_clip"]) < 1e-3
    assert rows[0]["reward"] == pytest.approx(5.0, abs=0.7)  # half of the codes lie in the lower half
    assert figures["score_last"] > figures["score_first"] + 1.0
    assert rows[-1]["kl_nats_per_clip"] > 1.0
    adapter = read_adapter(tmp_path / "run" / "adapter")
    assert (adapter.manifest.method, adapter.manifest.base_sha256) == (method, toy_task(0).base_sha256)
    assert adapter.manifest.figures == figures
    suffixes = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".md", ".wav", ".png"}
    last = rows[-1]
    assert last["kl_nats_per_clip"] == pytest.approx(sum(last[f"kl_book_{k}"] for k in range(4)), abs=1e-4)
    seconds = [last[f"seconds_{phase}"] for phase in ("play", "judge", "learn")]
    assert min(seconds) > 0
    assert last["tokens_per_second"] * sum(seconds) == pytest.approx(32 * 4 * 12, rel=1e-6)
    assert sorted(p.name for p in (tmp_path / "run" / "clips").iterdir()) == ["step_00000010", "step_00000020"]
    assert len(list((tmp_path / "run" / "clips" / "step_00000020").glob("*.png"))) == 2


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_the_judge_hears_the_codes_that_were_played(tmp_path, monkeypatch, method):
    played: list[Tensor] = []
    heard: list[Tensor] = []

    def listening(*args: Any, **kwargs: Any) -> Any:
        made = generate(*args, **kwargs)
        played.append(made.codes)
        return made

    task = toy_task(0)

    def score(codes: Tensor, prompts: list[str]) -> Tensor:
        heard.append(codes)
        assert len(set(prompts)) == 8  # 32 clips, four a prompt
        return task.score(codes, prompts)

    monkeypatch.setattr(flat_grpo, "generate", listening)
    main(config(tmp_path / "run", method=method, steps=2), dataclasses.replace(task, score=score))
    assert torch.equal(torch.cat(played), torch.cat(heard))


def test_sampling_one_way_and_scoring_another_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(flat_grpo, "generate", lambda *args, **kwargs: generate(*args, **{**kwargs, "temperature": 0.9}))
    with pytest.raises(RuntimeError, match="sampler and scorer differ"):
        main(config(tmp_path / "run"))


def test_temperature_enters_sampler_and_scorer_alike(tmp_path):
    main(config(tmp_path / "run", temperature=0.8, steps=1))
    assert abs(metrics(tmp_path / "run")[0]["kl_nats_per_clip"]) < 1e-3


def test_unjudged_clips_move_nothing(tmp_path):
    reward = Reward({"human": Part(lambda codes, prompts: torch.tensor([1.0, math.nan, math.inf]))})
    judge = Judge(reward, ["a"], 4, 32)
    ids = flatten_codes(torch.zeros(3, 4, 5, dtype=torch.long), 32).tolist()
    assert judge(ids, row=[0, 0, 0]) == [1.0, None, None]
    constant = dataclasses.replace(toy_task(0), score=lambda codes, prompts: torch.ones(len(codes)))
    figures = main(config(tmp_path / "run", steps=4), constant)
    assert abs(figures["kl"]) < 0.05


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_scores_that_are_not_finite_are_counted_and_the_others_still_teach(tmp_path, method):
    task = toy_task(0)

    def score(codes: Tensor, prompts: list[str]) -> Tensor:
        scores = task.score(codes, prompts).clone()
        scores[::4] = math.nan
        return scores

    main(config(tmp_path / "run", method=method, steps=2), dataclasses.replace(task, score=score))
    rows = metrics(tmp_path / "run")
    assert [row["scores_not_finite"] for row in rows] == [8.0, 8.0]
    assert all(math.isfinite(row["reward"]) and row["grad_norm"] > 0 for row in rows)


def test_the_run_ends_when_the_kl_budget_is_spent(tmp_path):
    figures = main(config(tmp_path / "run", steps=12, kl_budget=0.5, lr=3e-2))
    assert "budget" in figures["stopped"]
    assert figures["steps"] < 12
    saved = config(tmp_path / "saved", steps=12, kl_budget=0.5, lr=3e-2, save_every=1)
    main(saved)
    before = read_adapter(tmp_path / "saved" / "adapter").lora.tensors
    shutil.rmtree(tmp_path / "saved" / "adapter")  # killed after the checkpoint of the round that spent it
    assert main(dataclasses.replace(saved, resume=True)) | {"seconds": 0} == figures | {"seconds": 0}
    after = read_adapter(tmp_path / "saved" / "adapter").lora.tensors
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "rloo"},
        {"method": "grpo", "epochs": 2, "minibatches": 2},
        {"method": "rloo", "weights": "human=1,code_5=0.5"},
        {"method": "grpo", "weights": "human=1,code_5=0.5", "epochs": 2, "minibatches": 2},
    ],
)
def test_a_resumed_run_ends_bitwise_where_the_unbroken_one_does(tmp_path, changes):
    settings: dict[str, Any] = {"steps": 4, "save_every": 2, **changes}
    main(config(tmp_path / "whole", **settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    shutil.rmtree(sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1])
    main(config(tmp_path / "cut", resume=True, **settings))
    one, two = (read_adapter(tmp_path / name / "adapter") for name in ("whole", "cut"))
    assert all(torch.equal(one.lora.tensors[name], two.lora.tensors[name]) for name in one.lora.tensors)
    assert one.manifest.objective == two.manifest.objective
    assert one.manifest.objective["scales"]
    last, same = (metrics(tmp_path / name)[-1] for name in ("whole", "cut"))
    assert all(last[name] == same[name] for name in last if name.startswith("reward"))
    with pytest.raises(UserError, match="weights"):
        main(config(tmp_path / "cut", resume=True, **{**settings, "steps": 6, "weights": "human=1,movement=0.5"}))
    main(config(tmp_path / "cut", resume=True, **{**settings, "steps": 8}))
    rates = [json.loads(line).get("learning_rate") for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert rates[len(rates) // 2] == pytest.approx(0.01 * 0.5)  # in the middle of the new plan, where the old one had ended at 0
    with pytest.raises(UserError, match=r"of lr 0\.01, now 0\.1"):
        main(config(tmp_path / "cut", resume=True, **{**settings, "steps": 6, "lr": 0.1}))


@pytest.mark.parametrize("updates", [{}, {"epochs": 2, "minibatches": 2}])
def test_rounds_that_the_clock_cuts_short_are_not_played_again(tmp_path, updates):
    settings: dict[str, Any] = {"steps": 3, "save_every": 10, **updates}
    main(config(tmp_path / "whole", **settings))
    for call in range(3):
        figures = main(config(tmp_path / "parts", **settings, max_minutes=1e-9, resume=call > 0))
        assert figures["stopped"] == ("time" if call < 2 else "steps")
    one, two = (read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_without_weights_the_listeners_score_is_taken_as_it_is_and_the_checks_change_nothing(tmp_path, method):
    task = toy_task(0)
    assert task.score is not None
    codes = torch.randint(0, 32, (8, 4, 12), generator=torch.Generator().manual_seed(0))
    words = [task.prompts[i // 4] for i in range(8)]
    judge = Judge(weighted({"human": 1.0}, task.score, task.checks), task.prompts, 4, 32)
    assert judge(flatten_codes(codes, 32).tolist(), row=[i // 4 for i in range(8)]) == task.score(codes, words).tolist()
    main(config(tmp_path / "checks", method=method), task)
    main(config(tmp_path / "none", method=method), dataclasses.replace(toy_task(0), checks={}))
    one, two = (read_adapter(tmp_path / name / "adapter") for name in ("checks", "none"))
    assert all(torch.equal(one.lora.tensors[name], two.lora.tensors[name]) for name in one.lora.tensors)
    assert one.manifest.objective["weights"] == {"human": 1.0}
    for row, alone in zip(metrics(tmp_path / "checks"), metrics(tmp_path / "none"), strict=True):
        assert row["reward"] == row["reward_human"] == alone["reward"]
        assert not {"reward_code_5", "reward_movement"} & set(alone)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_part_with_a_weight_rises_and_all_parts_are_told_in_units_of_the_base(tmp_path, method):
    settings: dict[str, Any] = {"method": method, "steps": 24, "kl_budget": 1e3, "listen": 0}
    main(config(tmp_path / "mixed", weights="human=0.5,even=1", **settings), with_even())
    main(config(tmp_path / "human", **settings), with_even())
    mixed, human = metrics(tmp_path / "mixed"), metrics(tmp_path / "human")
    rise = [sum(row["reward_even_z"] for row in rows[-5:]) / 5 for rows in (mixed, human)]
    assert rise[0] > 1.5
    assert rise[0] > rise[1] + 1.0
    for row in mixed + human:
        assert all(
            math.isfinite(row[f"reward_{name}{ending}"]) for name in ("human", "even", "code_5", "movement") for ending in ("", "_z")
        )
        assert 0 < row["reward_code_5_not_asked"] < 1
    assert all(abs(mixed[0][f"reward_{name}_z"]) < 1e-5 for name in ("human", "even", "code_5", "movement"))
    for row in mixed:  # `even` and `human` are asked of every prompt
        assert row["reward"] == pytest.approx(0.5 * row["reward_human_z"] + row["reward_even_z"], abs=1e-4)
    objective = read_adapter(tmp_path / "mixed" / "adapter").manifest.objective
    assert objective["weights"] == objective["now"] == {"human": 0.5, "even": 1.0}
    assert objective["scales"]["even"][0] == pytest.approx(mixed[0]["reward_even"], abs=1e-6)


def test_units_are_spreads_within_a_prompt_and_stand_still_after_the_first_round():
    marks, late = torch.tensor([1.0, 3.0, 11.0, 13.0]), torch.full((4,), math.nan)
    parts = {"human": Part(lambda codes, prompts: marks), "late": Part(lambda codes, prompts: late, 0.0, asked=True)}
    judge = Judge(Reward(parts), ["a", "b"], 4, 32)
    ids = flatten_codes(torch.zeros(4, 4, 5, dtype=torch.long), 32).tolist()
    judge(ids, row=[0, 0, 1, 1])
    assert judge.reward.scales["human"] == pytest.approx((7.0, math.sqrt(2.0)))  # of all clips it would be 5
    first = dict(judge.reward.scales)
    later = TrainerState()
    later.global_step = 1
    marks *= 10
    late.fill_(0.3)
    judge(ids, row=[0, 0, 1, 1], trainer_state=later)
    assert judge.reward.scales == first
    assert judge.figures["reward_human"] == pytest.approx(70.0)
    assert judge.figures["reward_late"] == pytest.approx(0.3)
    assert "reward_human_z" in judge.figures
    assert "reward_late_z" not in judge.figures  # it has no unit


def test_a_weight_of_what_no_clip_of_the_first_round_tells_is_refused(tmp_path):
    def silent() -> Task:
        return dataclasses.replace(toy_task(0), checks={"silent": lambda codes, prompts: torch.full((len(codes),), math.nan)})

    with pytest.raises(UserError, match="weight of silent"):
        main(config(tmp_path / "run", weights="human=1,silent=0.5", listen=0), silent())
    assert main(config(tmp_path / "plotted", steps=1, listen=0), silent())["steps"] == 1
    with pytest.raises(UserError, match="tone"):
        main(config(tmp_path / "unknown", weights="human=1,tone=0.5"), toy_task(0))


def test_checks_alone_can_be_the_reward(tmp_path):
    main(config(tmp_path / "run", weights="even=1", listen=0), dataclasses.replace(with_even(), score=None))
    assert all(row["reward"] == row["reward_even"] for row in metrics(tmp_path / "run"))
    check(config(tmp_path / "none", toy=False, prompts=tmp_path, weights="even=1"), world=1)
    with pytest.raises(UserError, match="--reward None"):
        check(config(tmp_path / "none", toy=False, prompts=tmp_path, weights="human=1,even=1"), world=1)


def test_a_weight_of_diversity_is_refused_where_a_process_holds_part_of_a_group(tmp_path):
    sizes: dict[str, Any] = {"batch_size": 24, "samples_per_prompt": 4}
    for weights, world in (("human=1,diversity=0.1", 2), ("human=1,diversity=0.1", 4), ("human=1,diversity=0", 4), ("human=1", 4)):
        cut = world == 4 and weights.endswith("0.1")
        with pytest.raises(UserError, match="whole groups on each process") if cut else contextlib.nullcontext():
            check(config(tmp_path, weights=weights, **sizes), world)


def test_two_processes_that_are_resumed_end_bitwise_where_unbroken_ones_do(tmp_path):
    """TRL seeds each process for itself, and each shuffles its own clips into minibatches."""
    sizes = {"steps": 4, "save-every": 2, "batch-size": 16, "minibatches": 2, "microbatch": 2, "n-frames": 4, "listen": 0}
    flags = ["--preset", "smoke", *(part for name, value in sizes.items() for part in (f"--{name}", str(value)))]
    done = launch(tmp_path, "train_grpo.py", *flags, "--out", "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    shutil.rmtree(sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1])
    done = launch(tmp_path, "train_grpo.py", *flags, "--out", "cut", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_is_not_resumed_with_other_tempi(tmp_path):
    task = toy_task(0)
    slower = dataclasses.replace(task, table=dataclasses.replace(task.table, tempo_bpm=torch.full((len(task.prompts),), 60.0)))
    main(config(tmp_path / "run", steps=1, save_every=1), task)
    with pytest.raises(UserError, match="tempi_sha256"):
        main(config(tmp_path / "run", steps=1, save_every=1, resume=True), slower)


def test_two_processes_play_what_one_plays_when_launched_as_a_file_from_another_folder(tmp_path):
    done = launch(tmp_path, "train_grpo.py", "--preset", "smoke", "--steps", "3", "--out", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    main(config(tmp_path / "one"))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("reward", "kl_nats_per_clip"):
            assert two[name] == pytest.approx(one[name], abs=1e-3), name


def test_two_processes_give_the_same_units_as_one(tmp_path):
    """TRL adds up what the processes make of their clips: were their units not the same, the score would be another too."""
    flags = ["--preset", "smoke", "--steps", "3", "--weights", "human=1,code_5=0.5", "--listen", "0"]
    done = launch(tmp_path, "train_grpo.py", *flags, "--out", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    main(config(tmp_path / "one", weights="human=1,code_5=0.5", listen=0))
    one, two = (read_adapter(tmp_path / name / "adapter").manifest.objective for name in ("one", "two"))
    assert one["weights"] == two["weights"]
    assert set(one["scales"]) == {"human", "code_5", "movement"}
    for name, scale in one["scales"].items():
        assert two["scales"][name] == pytest.approx(scale, abs=1e-6), name
    for row, shared in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("reward", "reward_human_z", "reward_code_5_z", "reward_movement", "reward_code_5_not_asked"):
            assert shared[name] == pytest.approx(row[name], abs=1e-3), name


def test_nothing_is_truncated_and_settings_that_cannot_work_are_refused(tmp_path):
    for method in ("grpo", "rloo"):
        assert training_arguments(config(tmp_path, method=method, n_frames=400), n_q=4).max_completion_length == 1600
    with pytest.raises(UserError, match="multiple of"):
        training_arguments(config(tmp_path, batch_size=30), n_q=4)
    with pytest.raises(UserError, match="samples-per-prompt"):
        training_arguments(config(tmp_path, samples_per_prompt=1), n_q=4)
    with pytest.raises(UserError, match="--reward None"):
        main(Config(out=tmp_path / "none"))
    with pytest.raises(UserError, match="torchrun"):
        check(config(tmp_path, processes=2), world=1)
