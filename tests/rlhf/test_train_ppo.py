"""PPO as a whole, on the toy policy: it learns, it stays put when it should, and it can be killed at any time."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from adapters.library import load_adapter, read_adapter
from base_models.audio import probe
from base_models.checkpoint import latest_training_state, load_tensors, read_json
from base_models.errors import UserError
from rlhf.ppo_run import Run
from rlhf.ppo_task import read_prompts, share_of_code_3, toy_task
from rlhf.train_ppo import TOY, Config, check, check_task, main
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


def test_a_part_of_weight_zero_is_plotted_and_changes_no_weight(tmp_path: Path) -> None:
    main(config(tmp_path / "watched", weights="human=1,code_5=0"))
    main(config(tmp_path / "alone"))
    assert largest_difference(weights(tmp_path / "watched"), weights(tmp_path / "alone")) == 0
    assert all("reward_code_5" in row for row in metrics(tmp_path / "watched"))
    assert not any("reward_code_5" in row for row in metrics(tmp_path / "alone"))


def test_a_judge_that_is_watched_is_asked_at_looks_alone_and_moves_neither_weight_nor_brake(tmp_path: Path) -> None:
    asked: list[int] = []

    def horrified(codes: Tensor, prompts: list[str]) -> Tensor:
        """It likes every clip less than the one before."""
        asked.append(len(codes))
        return -1e3 * len(asked) + torch.arange(len(codes))

    how: dict[str, Any] = {"steps": 4, "look_every": 2, "patience": 1}
    main(config(tmp_path / "alone", **how))
    figures = main(config(tmp_path / "watched", **how), dataclasses.replace(toy_task(0), watched=horrified))
    assert asked == [16, 16, 16]  # at steps 0, 2 and 4
    assert largest_difference(weights(tmp_path / "watched"), weights(tmp_path / "alone")) == 0
    assert figures["stopped"] == "steps"
    assert figures["heldout_reward_watched"] == pytest.approx(-3e3 + 7.5)
    assert figures["heldout_reward_watched_z"] == pytest.approx(-2e3 / float(torch.arange(16.0).std(correction=0)), rel=1e-4)
    assert [("heldout_reward_watched" in row, "reward_watched" in row) for row in metrics(tmp_path / "watched")] == [
        (False, False),
        (True, False),
    ] * 2
    with pytest.raises(UserError, match="weights for"):
        main(config(tmp_path / "learnt", weights="human=1,watched=1"), dataclasses.replace(toy_task(0), watched=horrified))


def test_a_check_is_learnt_where_no_listener_is_asked(tmp_path: Path) -> None:
    main(config(tmp_path, steps=20, weights="human=0,code_5=1"), dataclasses.replace(toy_task(0), score=None))
    rows = metrics(tmp_path)
    assert rows[-1]["reward_code_5"] > rows[0]["reward_code_5"] + 0.15
    assert not any("reward_human" in row for row in rows)


# -- the same result however it is cut


def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="samples-per-prompt"):
        check(config(tmp_path, baseline="loo"), world=1)
    with pytest.raises(UserError, match="whole groups"):
        check(config(tmp_path, baseline="loo", samples_per_prompt=5), world=1)
    with pytest.raises(UserError, match="name=number"):
        check(config(tmp_path, weights="human"), world=1)
    with pytest.raises(UserError, match="below 1"):
        check(config(tmp_path, look_every=0), world=1)
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


# -- interruptions


def test_resuming_with_another_base_is_refused(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1))
    with pytest.raises(UserError, match="base_sha256"):
        main(config(tmp_path, resume=True), toy_task(1))


def test_a_used_folder_is_refused_without_resume(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1))
    with pytest.raises(UserError, match="--resume"):
        main(config(tmp_path, steps=2))


# -- brakes


def test_the_kl_budget_stops_the_run_with_its_reason_and_keeps_the_adapter(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=STEPS, kl_budget=1.0))
    assert "exceeds the budget of 1" in figures["stopped"]
    assert figures["kl"] > 1.0
    assert figures["steps"] < STEPS
    assert read_adapter(tmp_path / "adapter").manifest.figures["stopped"] == figures["stopped"]


def collapsing(out: Path, **changes: Any) -> Config:
    """The toy's best clip is one code throughout: as it learns, clips of one prompt become alike."""
    return config(out, **{"steps": STEPS, "look_every": 2, "heldout_clips": 8, "min_diversity": 0.8, "patience": 1, **changes})


def test_a_fall_of_diversity_rewinds_to_the_best_look_and_says_why(tmp_path: Path) -> None:
    figures = main(collapsing(tmp_path, brake="rewind"))
    assert "of the base's diversity (limit 0.8)" in figures["stopped"]
    assert 0 <= figures["rewound_to"] < figures["steps"] < STEPS
    manifest = read_adapter(tmp_path / "adapter").manifest
    assert (manifest.figures["stopped"], manifest.figures["rewound_to"]) == (figures["stopped"], figures["rewound_to"])
    newest = latest_training_state(tmp_path)
    assert newest is not None
    assert largest_difference(weights(tmp_path), load_tensors(newest / "best.safetensors")) == 0
    assert largest_difference(weights(tmp_path), load_tensors(newest / "adapter.safetensors")) > 0
    looks = {row["step"]: row for row in metrics(tmp_path) if "heldout_score" in row}
    good = [step for step, row in looks.items() if row["heldout_diversity_of_base"] >= 0.8]
    assert figures["rewound_to"] == max(good, key=lambda step: looks[step]["heldout_score"])
    assert figures["kl"] == pytest.approx(looks[figures["rewound_to"]]["heldout_kl"], abs=1e-3)


def test_a_braked_run_that_is_resumed_ends_at_once_with_the_same_adapter(tmp_path: Path) -> None:
    figures = main(collapsing(tmp_path, brake="rewind"))
    before = weights(tmp_path)
    again = main(collapsing(tmp_path, brake="rewind", resume=True))
    assert largest_difference(weights(tmp_path), before) == 0
    assert (again["stopped"], again["rewound_to"], again["kl"]) == (figures["stopped"], figures["rewound_to"], figures["kl"])


def test_the_brake_stops_where_it_stands_or_not_at_all(tmp_path: Path) -> None:
    stopped = main(collapsing(tmp_path / "stop"))
    assert "diversity" in stopped["stopped"]
    assert "rewound_to" not in stopped
    going = main(collapsing(tmp_path / "off", brake="off", kl_budget=0.1, steps=stopped["steps"] + 2))
    assert going["stopped"] == "steps"


def test_heads_that_disagree_stop_the_run(tmp_path: Path) -> None:
    figures = main(collapsing(tmp_path, min_diversity=0.0, max_disagreement=1.3))
    assert "heads disagree" in figures["stopped"]
    assert figures["steps"] < STEPS


def test_a_reward_that_falls_on_held_out_prompts_stops_the_run(tmp_path: Path) -> None:
    def memorised(codes: Tensor, prompts: list[str]) -> Tensor:
        """What pleases on the prompts of training displeases on the others."""
        heldout = torch.tensor([int(prompt.split()[-1]) >= 8 for prompt in prompts])
        return share_of_code_3(codes, prompts) * torch.where(heldout, -1.0, 1.0)

    figures = main(collapsing(tmp_path, min_diversity=0.0), judged_by(memorised, toy_task(0).heldout))
    assert "below that of step" in figures["stopped"]
    assert figures["steps"] < STEPS


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


def test_every_look_tells_all_parts_of_the_reward_and_keeps_clips_to_listen_to(learned_toy: tuple[Path, dict[str, Any]]) -> None:
    out, figures = learned_toy
    looks = {row["step"]: row for row in metrics(out) if "heldout_score" in row}
    assert list(looks) == [10, 20, 30]
    names = {"heldout_gain", "heldout_kl", "heldout_spread_of_base", "heldout_diversity_of_base", "seconds_look"}
    parts = {"heldout_reward_human", "heldout_reward_code_5", "heldout_reward_movement"}
    assert all(names | parts <= row.keys() for row in looks.values())
    assert looks[30]["heldout_gain"] == figures["heldout_gain"] > 0.5
    assert looks[30]["heldout_diversity_of_base"] < 0.8
    for step in (0, 10, 20, 30):
        clips = out / "clips" / f"step_{step:08d}"
        assert sorted(path.name for path in clips.glob("*.wav")) == ["0-toy-prompt-8.wav", "1-toy-prompt-9.wav"]
        assert len(list(clips.glob("*.png"))) == 2
        assert probe(clips / "0-toy-prompt-8.wav").sample_rate == 8000


def test_without_held_out_prompts_the_rounds_own_clips_are_kept(tmp_path: Path) -> None:
    main(config(tmp_path, look_every=3, listen=1), judged_by(share_of_code_3))
    assert len(list((tmp_path / "clips" / "step_00000003").glob("*.wav"))) == 1


WATCH = """
import json, os, sys
for line in sys.stdin:
    files = json.loads(line)["files"]
    print(json.dumps({"scores": [os.getpid() + os.path.getsize(name) / 1e9 for name in files]}), flush=True)
"""


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


def test_prompts_are_read_from_text_and_jsonl(tmp_path: Path) -> None:
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("calm piano\n\n fast rock, 150 BPM \n")
    rows.write_text('{"prompt": "calm piano", "tempo_bpm": 90, "genre": "x"}\n{"prompt": "rock"}\n')
    assert read_prompts(text) == (["calm piano", "fast rock, 150 BPM"], [None, None])
    assert read_prompts(rows) == (["calm piano", "rock"], [90.0, None])


@pytest.mark.parametrize("line", ["not json", '{"text": "calm"}', '["calm"]', '{"prompt": "x", "tempo_bpm": "fast"}'])
def test_a_broken_prompt_row_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "calm piano"}}\n{line}\n')
    with pytest.raises(UserError, match="line 2"):
        read_prompts(path)


def test_missing_or_empty_prompts_and_missing_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for path in (tmp_path / "none.txt", tmp_path / "empty.txt"):
        with pytest.raises(UserError, match="prompt"):
            read_prompts(path)
    with pytest.raises(UserError, match="--reward"):
        main(dataclasses.replace(config(tmp_path / "run"), toy=False))


def test_a_held_part_stays_near_the_bases_level_where_a_small_weight_would_let_it_go(tmp_path: Path) -> None:
    """Whoever plays code 3 most of the time repeats himself."""
    settings = {"weights": "human=1,movement=0.02", "steps": 30, "look_every": 5}
    main(config(tmp_path / "free", **settings))
    main(config(tmp_path / "held", **settings, hold="movement"))
    free, held = (metrics(tmp_path / name)[-1] for name in ("free", "held"))
    assert "reward_movement_weight" not in free
    assert held["reward_movement_weight"] > 0.1
    assert free["heldout_reward_movement_z"] < -2
    assert held["heldout_reward_movement_z"] > free["heldout_reward_movement_z"] / 2
    assert held["heldout_reward_human_z"] > 1


def test_a_resumed_run_takes_held_weights_up_again(tmp_path: Path) -> None:
    settings = {"weights": "human=1,movement=0.02", "hold": "movement", "steps": 4, "save_every": 2, "look_every": 1}
    main(config(tmp_path / "whole", **settings))
    main(config(tmp_path / "parts", **settings, max_minutes=1e-9))
    main(config(tmp_path / "parts", **settings, resume=True))
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
