"""A part of the reward that no clip of the base was asked for has no unit: nothing is trained on it, and that is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf.ppo_task import toy_task
from rlhf.rewards import Part, Reward
from rlhf.train_ppo import main, unsaid_tempi
from tests.rlhf.ppo_toys import config, metrics

NAN = float("nan")


def rare(codes: Tensor, prompts: list[str]) -> Tensor:
    """Asked by one toy prompt alone, which the first round does not play; in nats, as a classifier's answers are."""
    asked = torch.tensor([prompt.endswith(" 3") for prompt in prompts])
    return torch.where(asked, -6 + 0.1 * (codes == 5).float().mean((1, 2)), NAN)


def test_a_part_that_the_first_round_did_not_ask_does_not_drown_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = toy_task(0)
    task = dataclasses.replace(task, checks={"rare": rare, "movement": task.checks["movement"]})
    few = {"batch_size": 4, "samples_per_prompt": 2, "minibatches": 1, "look_every": 2, "heldout_clips": 2, "listen": 0}
    main(config(tmp_path, steps=6, weights="human=1,rare=0.8,movement=0.2", hold="rare", **few), task)
    rows = metrics(tmp_path)
    asked = [row for row in rows if row["reward_rare_not_asked"] < 1]
    assert asked
    assert all(row["reward_rare"] < -5 for row in asked)
    assert not any("reward_rare_z" in row for row in rows)
    assert all(abs(row["score"]) < 2 for row in asked)  # -2.4 and less, as .8 x the raw mark
    said = capsys.readouterr().out
    assert "not held: rare" in said
    assert "not trained on: rare" in said


def test_what_has_no_scale_weighs_nothing_beside_others_and_all_alone() -> None:
    parts = {name: Part(lambda codes, prompts: torch.zeros(len(codes)), weight, asked=True) for name, weight in (("a", 1.0), ("b", 2.0))}
    reward = Reward(parts)
    reward.measure(torch.tensor([[0.0, NAN], [2.0, NAN]]), ["x", "x"])
    marks = torch.tensor([[1.0, -6.0], [3.0, NAN]])
    alone = Reward({"a": parts["a"]})
    alone.measure(torch.tensor([[0.0], [2.0]]), ["x", "x"])
    z = alone.in_spreads(marks[:, :1])["a"]
    assert torch.equal(reward.judge(marks, ["x", "x"]).total, z)
    assert reward.worth(["x", "x"])["b"] == 0.0
    assert (reward.without_scale, alone.without_scale) == (("b",), ())
    assert Reward({"b": parts["b"]}).worth(["x"]) == {"b": 2.0}


def test_a_tempo_that_words_do_not_say_is_told_where_tempo_is_trained_on() -> None:
    task = toy_task(0)
    tempi = torch.full((len(task.prompts),), NAN)
    assert unsaid_tempi(task) is None
    tempi[1] = 96.0
    note = unsaid_tempi(dataclasses.replace(task, table=dataclasses.replace(task.table, tempo_bpm=tempi)))
    assert note is not None
    assert note.startswith(f"1 of {len(task.prompts)} prompts have a tempo_bpm that their words do not say, such as {task.prompts[1]!r}")


def test_looks_of_the_base_without_prompts_for_them_are_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(tmp_path, base_looks=4, steps=1), dataclasses.replace(toy_task(0), heldout=None))
    assert "--base-looks 4 changes nothing without --heldout-prompts" in capsys.readouterr().out


def test_the_manifest_has_the_kl_of_the_adapter_it_describes(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=3))
    main(config(tmp_path, steps=4, resume=True))
    assert figures["kl"] == pytest.approx(metrics(tmp_path)[3]["kl"], abs=1e-4)
