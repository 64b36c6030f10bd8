"""Marked stretches in a PPO run: a frame that sounds worse than the rest of its clip costs the steps that play it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from base_models.errors import UserError
from base_models.policy import load_policy
from rlhf.frame_reward import FrameHead, frame_features
from rlhf.ppo_run import Run
from rlhf.ppo_task import Task, toy_task
from rlhf.reward_model import load_reward
from rlhf.rewards import HUMAN
from rlhf.rollout import frames_on_steps
from rlhf.train_ppo import Config, check_task, main
from tests.rlhf.ppo_toys import CODES, config, metrics

BOOKS = torch.stack([(torch.arange(16) == code).float() for code in (3, 7)], 1).expand(2, 16, 2)
"""Latents that count codes 3 and 7."""


def marked(codes: Tensor, prompts: list[str]) -> Tensor:
    """Raters mark code 7 as bad wherever it stands."""
    bad = (codes == 7).float().mean(1)
    return bad.mean(1, keepdim=True) - bad


def slope_of_marked(codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    slope = torch.tensor([0.0, -0.5])[None, :, None].expand(len(codes), 2, codes.shape[2])
    return slope, marked(codes, prompts)


def constant(codes: Tensor, prompts: list[str]) -> Tensor:
    return torch.ones(len(codes))


def flat(codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(codes), 2, codes.shape[2]), constant(codes, prompts)


def share_of_code_7(codes: Tensor, prompts: list[str]) -> Tensor:
    return (codes == 7).float().mean((1, 2))


def task(**changes: Any) -> Task:
    """The toy whose listeners like every clip alike, but mark code 7."""
    known = {"score": constant, "slopes": {HUMAN: flat}, "codebooks": BOOKS, "frames": marked, "frame_slope": slope_of_marked}
    return dataclasses.replace(toy_task(0), **{**known, "checks": {"code_7": share_of_code_7}, **changes})


def test_a_frames_worth_lands_in_equal_parts_on_the_steps_that_play_its_codes() -> None:
    frames = torch.zeros(2, 8)
    frames[0, 3:5] = -3.0
    steps = frames_on_steps(frames, n_q=3)
    assert steps[0].tolist() == [0, 0, 0, -1, -2, -2, -1, 0, 0, 0]
    assert steps[1].abs().max() == 0


def test_the_penalty_of_a_marked_stretch_lands_on_its_steps_and_not_on_those_after_it(tmp_path: Path) -> None:
    def stretch(codes: Tensor, prompts: list[str]) -> Tensor:
        bad = torch.zeros(len(codes), codes.shape[2])
        bad[:, 4:7] = 1.0
        return bad.mean(1, keepdim=True) - bad

    run = Run(config(tmp_path, batch_size=4, kl_coef=0.0, frame_weight=3.0), task(frames=stretch), Accelerator(cpu=True))
    rollout, told = run.judge(run.play())
    assert rollout.rewards.abs().max() == 0  # the score itself stays as it was
    assert (rollout.frames[:, 4:8] < 0).all()  # of two codebooks, frames 4 to 6 are played at steps 4 to 7
    assert (rollout.frames[:, :4] > 0).all()
    assert (rollout.frames[:, 8:] > 0).all()
    torch.testing.assert_close(rollout.frames.sum(1), torch.zeros(4), atol=1e-6, rtol=0)
    assert told["frames_worst"] == pytest.approx(-0.75)
    advantages, _, _ = run.advantages(rollout)
    assert (advantages[:, 4:7] < advantages[:, 8:].min()).all()
    assert (advantages[:, 8:] > 0).all()


@pytest.mark.parametrize("how", [{}, CODES], ids=["score", "codes"])
def test_a_policy_learns_not_to_play_what_is_marked_though_every_clip_scores_alike(how: dict[str, Any], tmp_path: Path) -> None:
    left = {}
    for weight in (0.0, 5.0):
        out = tmp_path / str(weight)
        figures = main(config(out, **how, steps=10, weights="human=1,code_7=0", frame_weight=weight), task())
        assert figures["credit"] == how.get("credit", "score")
        left[weight] = metrics(out)[-1]["reward_code_7"] / metrics(out)[0]["reward_code_7"]
    assert left[0.0] > 0.8
    assert left[5.0] < 0.6


def test_frames_that_nobody_judges_are_refused_and_those_without_a_slope_where_codes_want_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="learnt from marked stretches"):
        check_task(config(tmp_path, frame_weight=1.0), toy_task(0))
    with pytest.raises(UserError, match="frames, without a slope"):
        main(config(tmp_path / "codes", frame_weight=1.0, **CODES), task(frame_slope=None))
    assert main(config(tmp_path / "auto", frame_weight=1.0, credit="auto", steps=1), task(frame_slope=None))["credit"] == "score"
    assert "frames has no slope" in capsys.readouterr().out


def test_a_reward_model_that_learnt_from_marks_is_asked_where_clips_are_bad(policy_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    policy = load_policy(policy_dir)
    reward = load_reward(reward_dir, policy)
    codes = torch.randint(0, policy.codec.card, (4, policy.codec.n_q, 20), generator=torch.Generator().manual_seed(0))
    table = frame_features(policy.codec, codes).flatten(0, 1)
    reward.frames = FrameHead(table.mean(0), table.std(0) + 1e-3, torch.randn(table.shape[1], generator=torch.Generator().manual_seed(1)))
    shutil.copytree(reward_dir, tmp_path / "reward")
    reward.save(tmp_path / "reward")
    (tmp_path / "prompts.txt").write_text("calm piano\ndark rock, 120 BPM\n")
    files: dict[str, Any] = {"policy": policy_dir, "reward": tmp_path / "reward", "prompts": tmp_path / "prompts.txt"}
    small: dict[str, Any] = {"n_frames": 16, "steps": 1, "batch_size": 4, "minibatches": 1, "precision": "fp32"}
    assert main(Config(out=tmp_path / "run", frame_weight=2.0, **files, **small))["credit"] == "codes"
    assert metrics(tmp_path / "run")[0]["frames_worst"] < 0
