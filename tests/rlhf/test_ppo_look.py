"""What a PPO run's looks at held-out prompts tell, what they brake, and which adapter they keep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.library import read_adapter
from base_models.audio import probe
from base_models.checkpoint import latest_training_state, load_tensors
from base_models.errors import UserError
from rlhf.ppo_task import share_of_code_3, toy_task
from rlhf.train_ppo import main
from tests.rlhf.ppo_toys import collapsing, config, judged_by, largest_difference, metrics, weights

STEPS = 30


def test_a_judge_that_is_watched_is_asked_at_looks_alone_and_moves_neither_weight_nor_brake(tmp_path: Path) -> None:
    asked: list[int] = []

    def horrified(codes: Tensor, prompts: list[str]) -> Tensor:
        """It likes every clip less than the one before."""
        asked.append(len(codes))
        return -1e3 * len(asked) + torch.arange(len(codes))

    how: dict[str, Any] = {"steps": 4, "look_every": 2, "patience": 1, "seed": 1}
    main(config(tmp_path / "alone", **how))
    figures = main(config(tmp_path / "watched", **how), dataclasses.replace(toy_task(1), watched=horrified))
    assert asked == [16, 16, 16]  # at steps 0, 2 and 4
    assert largest_difference(weights(tmp_path / "watched"), weights(tmp_path / "alone")) == 0
    assert figures["stopped"] == "steps"
    assert figures["heldout_reward_watched"] == pytest.approx(-3e3 + 7.5)
    assert figures["heldout_reward_watched_z"] == pytest.approx(-2e3 / float(torch.arange(4.0).std()), rel=1e-4)  # 4 clips a prompt
    assert [("heldout_reward_watched" in row, "reward_watched" in row) for row in metrics(tmp_path / "watched")] == [
        (False, False),
        (True, False),
    ] * 2
    with pytest.raises(UserError, match="weights for"):
        main(config(tmp_path / "learnt", weights="human=1,watched=1"), dataclasses.replace(toy_task(0), watched=horrified))


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


def test_the_brake_stops_where_it_stands_or_not_at_all(tmp_path: Path) -> None:
    stopped = main(collapsing(tmp_path / "stop"))
    assert "diversity" in stopped["stopped"]
    assert "rewound_to" not in stopped
    going = main(collapsing(tmp_path / "off", brake="off", kl_budget=0.1, steps=stopped["steps"] + 2))
    assert going["stopped"] == "steps"


def test_members_that_disagree_stop_the_run(tmp_path: Path) -> None:
    figures = main(collapsing(tmp_path, min_diversity=0.0, max_disagreement=1.3))
    assert "members disagree" in figures["stopped"]
    assert figures["steps"] < STEPS


def test_a_reward_that_falls_on_held_out_prompts_stops_the_run(tmp_path: Path) -> None:
    def memorised(codes: Tensor, prompts: list[str]) -> Tensor:
        """What pleases on the prompts of training displeases on the others."""
        heldout = torch.tensor([int(prompt.split()[-1]) >= 8 for prompt in prompts])
        return share_of_code_3(codes, prompts) * torch.where(heldout, -1.0, 1.0)

    figures = main(collapsing(tmp_path, min_diversity=0.0), judged_by(memorised, toy_task(0).heldout))
    assert "below that of step" in figures["stopped"]
    assert figures["steps"] < STEPS


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
