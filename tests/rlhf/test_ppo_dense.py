"""Credit code by code inside a PPO run (the equations have their tests in test_dense.py)."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base_models.errors import UserError
from rlhf.ppo_task import toy_task
from rlhf.rewards import HUMAN
from rlhf.train_ppo import main
from tests.rlhf.ppo_toys import SCRIPT, alone, config, judged_by, largest_difference, metrics, untimed, weights

CODES = {"credit": "codes", "lr": 1e-2, "kl_coef": 0.002}


def test_a_tenth_of_the_clips_teach_what_scores_alone_hardly_do(tmp_path: Path) -> None:
    by_codes = main(config(tmp_path / "codes", steps=12, batch_size=8, **CODES))
    by_score = main(config(tmp_path / "score", steps=12, batch_size=8, lr=1e-2, kl_coef=0.002))
    assert by_codes["credit"] == "codes"
    assert by_codes["score_last"] > by_codes["score_first"] + 0.25
    assert by_codes["score_last"] > by_score["score_last"] + 0.1


def test_the_first_update_starts_at_ratio_one_with_nothing_clipped_and_no_kl(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1, epochs=1, minibatches=1, **CODES))
    (row,) = metrics(tmp_path)
    assert row["ratio_first"] == pytest.approx(1, abs=1e-5)
    assert row["dense_clipfrac"] == 0
    assert row["dense_kl"] == pytest.approx(0, abs=1e-6)
    assert row["kl"] == pytest.approx(0, abs=1e-6)


def test_a_large_price_of_drift_keeps_the_policy_where_it_is(tmp_path: Path) -> None:
    free, dear = (main(config(tmp_path / str(price), steps=8, **{**CODES, "kl_coef": price})) for price in (0.002, 5.0))
    assert dear["kl"] < 0.05 * free["kl"]


def test_microbatches_change_nothing(tmp_path: Path) -> None:
    for size in (5, 32):
        main(config(tmp_path / str(size), microbatch=size, **CODES))
    assert largest_difference(weights(tmp_path / "5"), weights(tmp_path / "32")) < 1e-5


def test_a_resumed_run_ends_in_bitwise_the_same_adapter(tmp_path: Path) -> None:
    main(config(tmp_path / "whole", steps=4, save_every=2, **CODES))
    main(config(tmp_path / "parts", steps=4, save_every=2, max_minutes=1e-9, **CODES))
    main(config(tmp_path / "parts", steps=4, save_every=2, resume=True, **CODES))
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


def test_two_gloo_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    settings = {**CODES, "steps": 2, "batch_size": 32}
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    everything = [*command, "--preset", "smoke", "--processes", "2", "--out", "two", *flags]
    done = subprocess.run(everything, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=alone(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    main(config(tmp_path / "one", **settings))
    assert largest_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-5
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in untimed(one):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name


def test_a_clip_without_a_finite_score_teaches_nothing(tmp_path: Path) -> None:
    task = toy_task(0)
    known = task.slopes[HUMAN]

    def broken(codes, prompts):
        slope, score = known(codes, prompts)
        score[0], slope[0] = float("nan"), float("nan")
        return slope, score

    main(config(tmp_path, steps=2, **CODES), dataclasses.replace(task, slopes={HUMAN: broken}))
    assert all(row["scores_not_finite"] == 1 and row["updates_skipped"] == 0 for row in metrics(tmp_path))
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())


def test_auto_takes_codes_where_there_is_a_slope_and_codes_is_refused_where_there_is_none(tmp_path: Path) -> None:
    assert main(config(tmp_path / "a", steps=1, credit="auto"))["credit"] == "codes"
    assert main(config(tmp_path / "b", steps=1, credit="auto", weights="human=1,code_5=1"))["credit"] == "score"
    flat = judged_by(lambda codes, prompts: codes.float().mean((1, 2)))
    assert main(config(tmp_path / "c", steps=1, credit="auto"), flat)["credit"] == "score"
    with pytest.raises(UserError, match="human, without a slope"):
        main(config(tmp_path / "d", steps=1, credit="codes"), flat)
    with pytest.raises(UserError, match="ent-coef"):
        main(config(tmp_path / "e", credit="codes", ent_coef=0.1))
