"""GRPO and RLOO over the flat view: they learn, they judge what was played, and they can be interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.library import read_adapter
from base_models.errors import UserError
from base_models.sampling import generate
from rlhf import flat_grpo
from rlhf.flat_grpo import Judge
from rlhf.flat_policy import flatten_codes
from rlhf.train_grpo import PRESETS, Config, check, main, toy_task, training_arguments
from tests.rlhf.two_processes import launch


def config(out: Path, **changes: Any) -> Config:
    return dataclasses.replace(Config(**PRESETS["smoke"]), **{"out": out, "steps": 3, **changes})


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
    judge = Judge(lambda codes, prompts: torch.tensor([1.0, math.nan, math.inf]), ["a"], 4, 32)
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


@pytest.mark.parametrize("changes", [{"method": "rloo"}, {"method": "grpo", "epochs": 2, "minibatches": 2}])
def test_a_resumed_run_ends_bitwise_where_the_unbroken_one_does(tmp_path, changes):
    settings: dict[str, Any] = {"steps": 4, "save_every": 2, **changes}
    main(config(tmp_path / "whole", **settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    shutil.rmtree(sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1])
    main(config(tmp_path / "cut", resume=True, **settings))
    one, two = (read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_play_what_one_plays_when_launched_as_a_file_from_another_folder(tmp_path):
    done = launch(tmp_path, "train_grpo.py", "--preset", "smoke", "--steps", "3", "--out", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    main(config(tmp_path / "one"))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("reward", "kl_nats_per_clip"):
            assert two[name] == pytest.approx(one[name], abs=1e-3), name


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
