"""Which pairs are learnt from and which are measured on, and what a resumed run is bound to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from base_models.checkpoint import latest_training_state, save_training_state
from base_models.errors import UserError
from rlhf.dpo_pairs import learnt_and_held_out, parents_of
from rlhf.dpo_task import Task, toy_task
from rlhf.flat_kto import BadClip
from rlhf.train_dpo import Config

CFG = Config(toy=True, toy_reward=True, held_out=0.2)


@pytest.fixture(scope="module")
def task() -> Task:
    return toy_task(CFG)


def names(pairs: list[Any]) -> list[tuple[str, str]]:
    return [(pair.chosen_sha256, pair.rejected_sha256) for pair in pairs]


def test_each_pair_is_on_one_side_and_so_is_each_prompt(task: Task) -> None:
    learnt, held_out = learnt_and_held_out(CFG, task)
    assert held_out
    assert sorted(names(learnt) + names(held_out)) == sorted(names(task.pairs))
    assert not {pair.prompt_id for pair in learnt} & {pair.prompt_id for pair in held_out}
    assert learnt_and_held_out(replace(CFG, held_out=0.0), replace(task, own=None)) == (task.pairs, [])


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_no_pair_of_a_prompt_whose_own_clips_are_held_out_is_learnt_from(task: Task, share: float) -> None:
    """The two sides of rated prompts and of prompts to play are drawn apart, and differ where the prompts do."""
    assert task.own is not None
    watched = {task.own.prompts[place] for place in (1, 2, 3)}
    cfg, played = replace(CFG, held_out=share), replace(task, own=replace(task.own, held_out=[1, 2, 3]))
    learnt, held_out = learnt_and_held_out(cfg, played)
    assert watched & {pair.prompt for pair in task.pairs}
    assert not watched & {pair.prompt for pair in learnt}
    assert sorted(names(learnt) + names(held_out)) == sorted(names(task.pairs))
    assert {pair.prompt for pair in held_out} > watched if share else {pair.prompt for pair in held_out} == watched


def test_dropped_ties_are_on_neither_side(task: Task) -> None:
    assert any(pair.p == 0.5 for pair in task.pairs)
    learnt, held_out = learnt_and_held_out(replace(CFG, ties="drop"), task)
    assert len(learnt) + len(held_out) == sum(pair.p != 0.5 for pair in task.pairs)


def test_a_shuffle_turns_learnt_pairs_alone(task: Task) -> None:
    before, after = (learnt_and_held_out(replace(CFG, shuffle_votes=seed), task) for seed in (None, 3))
    assert after[1] == before[1]
    assert names(after[0]) != names(before[0])
    assert sorted(map(sorted, names(after[0]))) == sorted(map(sorted, names(before[0])))


def test_a_resumed_run_is_bound_to_pairs_order_weights_codes_prompts_tempi_and_loss_but_to_no_folder(task: Task) -> None:
    bound = parents_of(CFG, task, task.pairs)
    assert parents_of(replace(CFG, out=Path("elsewhere")), task, task.pairs) == bound
    assert task.own is not None
    other_codes = replace(task.pairs[0], rejected_codes=task.pairs[0].rejected_codes + 1)
    bad = BadClip("0", "toy prompt 0", None, task.pairs[0].rejected_codes, 1.0)
    slower = replace(task.table, tempo_bpm=torch.full((len(task.table),), 60.0))
    others = [
        (CFG, task, [other_codes, *task.pairs[1:]]),
        (CFG, replace(task, bad=(bad,)), task.pairs),
        (CFG, replace(task, table=slower), task.pairs),
        (CFG, task, task.pairs[::-1]),
        (CFG, task, [replace(task.pairs[0], weight=2.0), *task.pairs[1:]]),
        (CFG, replace(task, own=replace(task.own, prompts=task.own.prompts[1:])), task.pairs),
        (CFG, replace(task, own=replace(task.own, ears_sha256="0" * 64)), task.pairs),
        (replace(CFG, loss="ipo"), task, task.pairs),
    ]
    assert all(parents_of(*other) != bound for other in others)


def test_a_run_without_rated_clips_and_tempi_goes_on_from_checkpoints_that_know_neither(task: Task, tmp_path: Path) -> None:
    bound = parents_of(CFG, replace(task, pairs=[]), [])
    before = {name: value for name, value in bound.items() if name not in ("codes_sha256", "tempi_sha256")}
    save_training_state(tmp_path, 1, {}, {}, before)
    assert latest_training_state(tmp_path, bound)
    with pytest.raises(UserError, match="without codes_sha256: an earlier version began it"):
        latest_training_state(tmp_path, parents_of(CFG, task, task.pairs) | {"ordered_pairs_sha256": bound["ordered_pairs_sha256"]})
