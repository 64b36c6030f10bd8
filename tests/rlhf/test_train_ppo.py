"""PPO as a whole, on the toy policy: it learns, it stays put when it should, and it can be killed at any time."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from adapters.library import load_adapter, read_adapter
from base_models.checkpoint import read_json
from base_models.errors import UserError
from base_models.sampling import generate
from rlhf.ppo_run import Run
from rlhf.ppo_task import movement, share_of_code_3, toy_task
from rlhf.rewards import spread_within
from rlhf.train_ppo import TOY, Config, check, check_task, idle_settings, main, played_too
from tests.rlhf.ppo_toys import config, judged_by, largest_difference, metrics, weights

STEPS = 30


# -- it learns, and only where it should


def test_what_a_prompt_always_scores_does_not_drown_what_the_clip_did(tmp_path: Path) -> None:
    def unfair(codes: Tensor, prompts: list[str]) -> Tensor:
        return share_of_code_3(codes, prompts) + torch.tensor([0.1 * float(prompt[-1]) for prompt in prompts])

    share = {}
    for baseline in ("none", "prompt", "loo"):
        out = tmp_path / baseline
        main(config(out, steps=14, baseline=baseline, samples_per_prompt=4), judged_by(unfair))
        share[baseline] = metrics(out)[-1]["score"] - 0.35  # each of the 8 prompts is played four times a round
    assert share["prompt"] > share["none"] + 0.1
    assert share["loo"] > share["none"] + 0.1


def test_several_rewards_are_learnt_by_their_weights(tmp_path: Path) -> None:
    main(config(tmp_path, steps=20, weights="human=-0.1,code_5=1"), judged_by(share_of_code_3))
    rows = metrics(tmp_path)
    assert rows[-1]["reward_code_5"] > rows[0]["reward_code_5"] + 0.15
    assert rows[-1]["reward_human"] < rows[0]["reward_human"]
    assert rows[0]["reward_code_5_not_asked"] == 0.5
    assert rows[0]["score"] == pytest.approx(0, abs=1e-5)  # the base is the origin


@pytest.mark.parametrize(
    ("more", "heldout", "said"),
    [
        ({}, True, None),
        ({"heldout_clips": 1}, True, "--heldout-clips 2"),
        ({"heldout_clips": 1, "base_looks": 2}, True, None),
        ({"heldout_clips": 1, "samples_per_prompt": 2}, True, "--heldout-clips 2"),
        ({"heldout_clips": 1, "weights": "human=1"}, True, None),
        ({}, False, None),  # 64 clips a round of 8 prompts
        ({"batch_size": 8}, False, "--samples-per-prompt 2"),
        ({"batch_size": 8, "samples_per_prompt": 2}, False, None),
    ],
)
def test_spreads_that_no_prompt_can_measure_are_told(
    more: dict[str, Any], heldout: bool, said: str | None, tmp_path: Path, capsys: Any
) -> None:
    task = toy_task(0) if heldout else dataclasses.replace(toy_task(0), heldout=None)
    main(config(tmp_path / "run", **{"weights": "human=1,code_5=0.5", "steps": 1} | more), task)
    told = capsys.readouterr().out
    assert ("no prompt has two clips" in told) == bool(said)
    assert said is None or said in told


def test_levels_and_spreads_go_by_looks_of_the_base_with_other_seeds_too(tmp_path: Path) -> None:
    """Of many looks the level is the base's own, and not that of the clips which looks happen to play."""
    levels, spreads = [], []
    for looks in (1, 2, 64):
        main(config(tmp_path / str(looks), steps=1, weights="human=1,movement=0.5", base_looks=looks))
        objective = read_adapter(tmp_path / str(looks) / "adapter").manifest.objective
        assert objective is not None
        levels.append(objective["scales"]["movement"][0])
        spreads.append(objective["scales"]["movement"][1])
    task = toy_task(0)
    assert task.heldout is not None
    rows = list(range(4)) * 256
    made = generate(task.lm, task.heldout.table.index(rows), 12, seeds=range(len(rows)))
    marks = movement(made.codes, [])
    assert levels[2] == pytest.approx(marks.mean().item(), abs=3 * marks.std().item() / 16)
    assert spreads[2] == pytest.approx(spread_within(marks, rows), rel=0.1)
    assert len(set(levels)) == len(set(spreads)) == 3


def test_a_part_of_weight_zero_is_plotted_and_changes_no_weight(tmp_path: Path) -> None:
    main(config(tmp_path / "watched", weights="human=1,code_5=0"))
    main(config(tmp_path / "alone"))
    assert largest_difference(weights(tmp_path / "watched"), weights(tmp_path / "alone")) == 0
    assert all("reward_code_5" in row for row in metrics(tmp_path / "watched"))
    assert not any("reward_code_5" in row for row in metrics(tmp_path / "alone"))


def test_a_check_is_learnt_where_no_listener_is_asked(tmp_path: Path) -> None:
    main(config(tmp_path, steps=20, weights="human=0,code_5=1"), dataclasses.replace(toy_task(0), score=None))
    rows = metrics(tmp_path)
    assert rows[-1]["reward_code_5"] > rows[0]["reward_code_5"] + 0.15
    assert not any("reward_human" in row for row in rows)


# -- what is refused


def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="samples-per-prompt"):
        check(config(tmp_path, baseline="loo"), world=1)
    with pytest.raises(UserError, match="whole groups"):
        check(config(tmp_path, baseline="loo", samples_per_prompt=5), world=1)
    with pytest.raises(UserError, match="differs from nothing"):
        check(config(tmp_path, weights="human=1,diversity=0.2"), world=1)
    with pytest.raises(UserError, match="name=number"):
        check(config(tmp_path, weights="human"), world=1)
    with pytest.raises(UserError, match="below 1"):
        check(config(tmp_path, look_every=0), world=1)
    for least in (-0.1, 0.02):
        with pytest.raises(UserError, match="--kl-coef-least"):
            check(config(tmp_path, kl_coef=0.01, kl_coef_least=least), world=1)
    with pytest.raises(UserError, match="--watch-command without"):
        check(dataclasses.replace(config(tmp_path, watch_command="judge"), toy=False), world=1)


def test_a_brake_that_has_nothing_to_go_by_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--heldout-prompts"):
        check_task(config(tmp_path, brake="rewind"), judged_by(share_of_code_3))
    lonely = dataclasses.replace(toy_task(0).heldout, texts=["one"])
    with pytest.raises(UserError, match="2 or more"):
        check_task(config(tmp_path), judged_by(share_of_code_3, lonely))


def test_a_wrong_number_of_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchrun"):
        check(config(tmp_path, processes=2), world=1)
    with pytest.raises(UserError, match="multiple of 4"):
        check(config(tmp_path, batch_size=6), world=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"save_every": 0}, "--save-every 0"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"lr_end": 1.5}, "--lr-end 1.5"),
        ({"target_kl": 0.0}, "--target-kl 0"),
        ({"target_kl": 5.0, "kl_horizon": 6}, "--kl-horizon 6 and --batch-size 32"),
        ({"weights": "human=1,diversity=1", "samples_per_prompt": 3}, "32 clips a process"),
    ],
)
def test_a_number_that_would_end_the_run_later_is_refused_at_once(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        check(config(tmp_path, **changes), world=1)


def test_groups_of_a_prompt_that_two_processes_would_cut_are_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path, weights="human=1,diversity=1", batch_size=12, minibatches=1, samples_per_prompt=4)
    check(cfg, world=1)
    with pytest.raises(UserError, match="6 clips a process"):
        check(cfg, world=2)


# -- what ends a run, or does not


def test_the_kl_budget_stops_the_run_with_its_reason_and_keeps_the_adapter(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=STEPS, kl_budget=1.0))
    assert "exceeds the budget of 1" in figures["stopped"]
    assert figures["kl"] > 1.0
    assert figures["steps"] < STEPS
    assert read_adapter(tmp_path / "adapter").manifest.figures["stopped"] == figures["stopped"]
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, figures["steps"] + 2))  # the round that went too far is among them
    assert [row["kl"] > 1.0 for row in rows] == [False] * figures["steps"] + [True]


@pytest.mark.parametrize(
    ("changes", "unseen"),
    [
        ({"steps": 1}, []),
        ({"steps": 1, "heldout_clips": 1}, ["diversity"]),
        ({"steps": 1, "brake": "off"}, []),
    ],
)
def test_a_run_says_which_signs_its_brake_cannot_see(tmp_path: Path, changes: dict[str, Any], unseen: list[str], capsys) -> None:
    figures = main(config(tmp_path, **changes))
    assert figures["brake_unseen"] == unseen == read_adapter(tmp_path / "adapter").manifest.figures["brake_unseen"]
    assert ("the brake does not watch" in capsys.readouterr().out) == bool(unseen)


def test_without_held_out_prompts_no_sign_but_kl_is_watched_and_the_run_says_so(tmp_path: Path, capsys) -> None:
    figures = main(config(tmp_path, steps=1), dataclasses.replace(toy_task(0), heldout=None))
    assert figures["brake_unseen"] == ["the held-out score", "diversity", "disagreement"]
    assert "give --heldout-prompts" in capsys.readouterr().out


def test_settings_of_the_critic_are_named_where_there_is_none(tmp_path: Path) -> None:
    cfg = config(tmp_path, lam=0.5, critic_lr=Config.critic_lr)
    assert idle_settings(cfg, "codes") == ["--lam"]
    assert idle_settings(cfg, "score") == []


def test_time_stops_the_run_after_a_whole_round(tmp_path: Path) -> None:
    figures = main(config(tmp_path, max_minutes=1e-6))
    assert figures["steps"] == 1
    assert "minutes are over" in figures["stopped"]


def test_an_update_with_a_broken_gradient_is_skipped_and_counted(tmp_path: Path) -> None:
    run = Run(config(tmp_path), toy_task(0), Accelerator(cpu=True))
    rollout, _ = run.judge(run.play())
    before = [parameter.detach().clone() for parameter in run.parameters()]
    rollout.logps[0, 0] = -float("inf")
    figures = run.learn(rollout)
    assert figures["updates_skipped"] > 0
    assert all(bool(torch.isfinite(parameter).all()) for parameter in run.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, run.parameters()))


# -- what it leaves behind


def test_the_adapter_names_its_parents_and_fits_its_base(learned_toy: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, figures = learned_toy
    adapter = read_adapter(out / "adapter")
    assert adapter.manifest.method == "ppo"
    assert adapter.manifest.base_sha256 == toy_task(0).base_sha256
    assert adapter.manifest.figures["score_last"] == figures["score_last"]
    assert adapter.manifest.config["kl_coef"] == TOY["kl_coef"]
    parents = dataclasses.replace(toy_task(0), reward_sha256="a" * 64, snapshot_sha256="b" * 64)
    main(config(tmp_path, steps=1), parents)
    manifest = read_adapter(tmp_path / "adapter").manifest
    assert (manifest.reward_sha256, manifest.snapshot_sha256) == ("a" * 64, "b" * 64)
    fresh = SimpleNamespace(lm=toy_task(0).lm, sha256=toy_task(0).base_sha256)
    assert load_adapter(fresh, out / "adapter") == [adapter.manifest]
    with pytest.raises(UserError, match="this base"):
        load_adapter(SimpleNamespace(lm=toy_task(1).lm, sha256=toy_task(1).base_sha256), out / "adapter")


def test_every_round_is_told_with_its_seconds_by_phase(learned_toy: tuple[Path, dict[str, Any]]) -> None:
    out, figures = learned_toy
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row[f"seconds_{phase}"] > 0 for row in rows for phase in ("play", "judge", "learn"))
    assert figures["seconds_learn"] > 0
    assert list((out / "tensorboard").glob("events.*"))
    assert read_json(out / "config.json")["steps"] == STEPS


def test_kl_is_told_by_codebook_and_tokens_by_second(learned_toy: tuple[Path, dict[str, Any]]) -> None:
    for row in metrics(learned_toy[0]):
        assert row["kl_book_0"] + row["kl_book_1"] == pytest.approx(row["kl"], abs=1e-3)
        assert row["tokens_per_second_play"] == pytest.approx(64 * 2 * 12 / row["seconds_play"], rel=1e-2)
        assert 0 < row["tokens_per_second"] < row["tokens_per_second_play"]


def test_without_held_out_prompts_the_rounds_own_clips_are_kept(tmp_path: Path) -> None:
    main(config(tmp_path, look_every=3, listen=1), judged_by(share_of_code_3))
    assert len(list((tmp_path / "clips" / "step_00000003").glob("*.wav"))) == 1


WATCH = """
import json, os, sys
for line in sys.stdin:
    files = json.loads(line)["files"]
    print(json.dumps({"scores": [os.getpid() + os.path.getsize(name) / 1e9 for name in files]}), flush=True)
"""


def test_held_out_prompts_that_are_played_too_are_told() -> None:
    task = toy_task(0)
    assert task.heldout is not None
    assert played_too(task) is None
    assert played_too(dataclasses.replace(task, heldout=None)) is None
    both = dataclasses.replace(task, prompts=[*task.prompts[1:], task.heldout.texts[2]])
    assert "1 of 4 held-out prompts are in --prompts too, such as 'toy prompt 10'" in (played_too(both) or "")


def test_a_policy_a_reward_and_files_of_prompts_make_a_run(policy_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("calm piano\ndark rock, 120 BPM\n")
    (tmp_path / "heldout.txt").write_text("sad piano in C major\nhappy jazz, 100 BPM\n")
    small: dict[str, Any] = {"n_frames": 16, "steps": 1, "batch_size": 4, "minibatches": 1, "look_every": 1, "heldout_clips": 2}
    files = {"policy": policy_dir, "reward": reward_dir, "prompts": tmp_path / "prompts.txt", "heldout_prompts": tmp_path / "heldout.txt"}
    (tmp_path / "watch.py").write_text(WATCH)
    watch = f"{sys.executable} {tmp_path / 'watch.py'}"
    worth = "human=1,similarity=0.3,tempo=0"
    figures = main(Config(out=tmp_path / "run", precision="fp32", weights=worth, watch_command=watch, **small, **files))
    assert figures["heldout_reward_watched"] > 1  # the process number
    assert round(figures["heldout_reward_watched"]) != os.getpid()
    assert figures["heldout_diversity_of_base"] > 0
    assert figures["heldout_spread_of_base"] > 0
    assert len(list((tmp_path / "run" / "clips").rglob("*.wav"))) == 4
    (row,) = metrics(tmp_path / "run")
    assert {"reward_human", "reward_similarity", "reward_tempo"} <= row.keys()
    assert row["reward_tempo_not_asked"] in (0.0, 0.5, 1.0)
    parts = ("human", "similarity", "tempo", "key", "mood", "instrument")
    assert all(f"heldout_reward_{part}" in row for part in parts)  # those that no weight names, too
    assert row["score"] == pytest.approx(row["reward_human_z"] + 0.3 * row["reward_similarity_z"], abs=1e-4)
