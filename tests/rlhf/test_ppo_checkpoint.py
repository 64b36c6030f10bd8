"""A PPO run that is taken up again: what it must find, and what it has kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.library import read_adapter
from base_models.conditions import Conditions
from base_models.errors import UserError
from rlhf import rewards
from rlhf.ppo_task import Task, toy_task
from rlhf.train_ppo import main
from tests.rlhf.ppo_toys import CODES, collapsing, config, largest_difference, metrics, weights


def test_resuming_with_another_base_is_refused(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1))
    with pytest.raises(UserError, match="base_sha256"):
        main(config(tmp_path, resume=True), toy_task(1))


@pytest.mark.parametrize("tempi", [(None, None), (180.0, None), (60.0, 180.0)])
def test_resuming_with_other_tempi_is_refused(tempi: tuple[float | None, float | None], tmp_path: Path) -> None:
    main(config(tmp_path, steps=1), at_tempi(60.0, None))
    with pytest.raises(UserError, match="tempi_sha256"):
        main(config(tmp_path, resume=True), at_tempi(*tempi))


def at_tempi(learnt: float | None, heldout: float | None) -> Task:
    """The toy, with tempi in its conditions."""
    task = toy_task(0)
    assert task.heldout is not None

    def said(table: Conditions, tempo: float | None) -> Conditions:
        return table if tempo is None else dataclasses.replace(table, tempo_bpm=torch.full((len(table),), tempo))

    table = said(task.heldout.table, heldout)
    return dataclasses.replace(task, table=said(task.table, learnt), heldout=dataclasses.replace(task.heldout, table=table))


def test_a_used_folder_is_refused_without_resume(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1))
    with pytest.raises(UserError, match="--resume"):
        main(config(tmp_path, steps=2))


def test_a_braked_run_that_is_resumed_ends_at_once_with_the_same_adapter(tmp_path: Path) -> None:
    figures = main(collapsing(tmp_path, brake="rewind"))
    before = weights(tmp_path)
    again = main(collapsing(tmp_path, brake="rewind", resume=True))
    assert largest_difference(weights(tmp_path), before) == 0
    assert (again["stopped"], again["rewound_to"], again["kl"]) == (figures["stopped"], figures["rewound_to"], figures["kl"])


def test_a_resumed_run_takes_held_weights_up_again(tmp_path: Path) -> None:
    settings = {"weights": "human=1,movement=0.02", "hold": "movement", "steps": 4, "save_every": 2, "look_every": 1}
    main(config(tmp_path / "whole", **settings))
    main(config(tmp_path / "parts", **settings, max_minutes=1e-9))
    main(config(tmp_path / "parts", **settings, resume=True))
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


def test_a_resumed_run_takes_up_the_weights_of_every_kind_of_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards.KINDS, "movement", lambda prompt: "even" if int(prompt[-1]) % 2 == 0 else "odd")
    settings = {"weights": "human=1,movement=0.02", "hold": "movement", "steps": 4, "save_every": 2, "look_every": 1, **CODES}
    settings |= {"credit": "score", "average": 0.5}
    main(config(tmp_path / "whole", **settings))
    main(config(tmp_path / "parts", **settings, max_minutes=1e-9))
    main(config(tmp_path / "parts", **settings, resume=True))
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    now = [read_adapter(tmp_path / name / "adapter").manifest.objective["now"] for name in ("whole", "parts")]
    assert now[0] == now[1]
    assert {"movement/even", "movement/odd"} < now[0].keys()
    assert len(set(now[0].values())) == 4  # human, all, even, odd


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 1e-4},
        {"n_frames": 8},
        {"heldout_clips": 2},
        {"kl_coef": 0.5},
        {"weights": "human=2"},
        {"look_every": 3},
        {"min_diversity": 0.1},
    ],
)
def test_resuming_with_another_setting_is_refused_by_its_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    main(config(tmp_path, steps=1))
    with pytest.raises(UserError, match=f"of {next(iter(changes))} "):
        main(config(tmp_path, resume=True, steps=2, **changes))


def test_a_run_that_is_made_longer_ends_at_the_learning_rate_that_it_was_told(tmp_path: Path) -> None:
    main(config(tmp_path, steps=3, lr_end=0.1))
    main(config(tmp_path, steps=5, lr_end=0.1, resume=True))
    rates = [row["lr"] for row in metrics(tmp_path)]
    lr = config(tmp_path).lr
    assert rates == pytest.approx([lr, 0.55 * lr, 0.1 * lr, 0.325 * lr, 0.1 * lr])


def test_a_braked_run_goes_on_with_a_larger_budget_and_forgets_nothing_without(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=30, kl_budget=1.0))
    told = (tmp_path / "metrics.jsonl").read_text()
    again = main(config(tmp_path, steps=30, kl_budget=1.0, resume=True))
    assert (again["stopped"], again["kl"]) == (figures["stopped"], pytest.approx(figures["kl"], abs=1e-4))
    assert (tmp_path / "metrics.jsonl").read_text() == told  # the round that went too far among it
    longer = main(config(tmp_path, steps=figures["steps"] + 1, kl_budget=1e3, resume=True))
    assert longer["steps"] == figures["steps"] + 1
    assert longer["stopped"] == "steps"
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, longer["steps"] + 1))
