"""What code-by-code credit alone does in a PPO run: both credits' common claims are in test_ppo_checklist, the equations in test_dense."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from base_models.errors import UserError
from rlhf.dense import limited
from rlhf.ppo_run import Run
from rlhf.rewards import HUMAN, spread_within
from rlhf.train_ppo import main
from tests.rlhf.ppo_toys import CODES, config, judged_by, toy_task, two_slopes


def test_a_tenth_of_the_clips_teach_what_scores_alone_hardly_do(tmp_path: Path) -> None:
    by_codes = main(config(tmp_path / "codes", steps=12, batch_size=8, **CODES))
    by_score = main(config(tmp_path / "score", steps=12, batch_size=8, lr=1e-2, kl_coef=0.002))
    assert by_codes["credit"] == "codes"
    assert by_codes["score_last"] > by_codes["score_first"] + 0.25
    assert by_codes["score_last"] > by_score["score_last"] + 0.1


def test_auto_takes_codes_where_there_is_a_slope_else_says_what_has_none_and_codes_is_refused_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(config(tmp_path / "a", steps=1, credit="auto"))["credit"] == "codes"
    assert "has no slope" not in capsys.readouterr().out
    assert main(config(tmp_path / "b", steps=1, credit="auto", weights="human=1,code_5=1"))["credit"] == "score"
    assert "credit by score" in (said := capsys.readouterr().out)
    assert "code_5 has no slope" in said
    flat = judged_by(lambda codes, prompts: codes.float().mean((1, 2)))
    assert main(config(tmp_path / "c", steps=1, credit="auto"), flat)["credit"] == "score"
    with pytest.raises(UserError, match="human, without a slope"):
        main(config(tmp_path / "d", steps=1, credit="codes"), flat)
    with pytest.raises(UserError, match="ent-coef"):
        main(config(tmp_path / "e", credit="codes", ent_coef=0.1))


def test_the_first_round_weighs_slopes_by_the_spreads_of_its_own_clips_where_no_look_has_measured_them(tmp_path: Path) -> None:
    task = dataclasses.replace(two_slopes(), heldout=None)
    run = Run(config(tmp_path, weights="human=1,code_5=0.5", **CODES), task, Accelerator(cpu=True))
    mine = run.play()
    prompts = [task.prompts[row] for row in mine.prompt_ids.tolist()]
    judged, figures = run.judge(mine)
    assert set(run.reward.scales) == {HUMAN, "code_5"}
    total = torch.zeros_like(judged.slope)
    for name, weight in {HUMAN: 1.0, "code_5": 0.5}.items():
        slope, score = task.slopes[name](mine.codes, prompts)
        there = score[torch.isfinite(score)]
        spread = spread_within(there.double(), [prompt for prompt, use in zip(prompts, torch.isfinite(score).tolist()) if use])
        total += weight / spread * torch.nan_to_num(slope)
        assert figures[f"reward_{name}"] == pytest.approx(float(there.mean()))
    torch.testing.assert_close(judged.slope, limited(total))


def test_a_round_is_learnt_from_once_since_its_advantages_take_the_references_place(tmp_path: Path) -> None:
    run = Run(config(tmp_path, batch_size=8, **CODES), toy_task(0), Accelerator(cpu=True))
    rollout, _ = run.judge(run.play())
    assert rollout.choice_ref_logps.shape == (*rollout.codes.shape, run.lm.card)
    table = run.advantages_by_codes(rollout)
    assert table.advantages.data_ptr() == rollout.choice_ref_logps.data_ptr()
    with pytest.raises(AssertionError, match="learnt from once"):
        run.learn(rollout)


def test_a_run_that_gives_credit_by_score_keeps_no_choices(tmp_path: Path) -> None:
    run = Run(config(tmp_path, batch_size=8, credit="score"), toy_task(0), Accelerator(cpu=True))
    rollout, _ = run.judge(run.play())
    assert rollout.choice_logps.numel() == rollout.choice_ref_logps.numel() == 0


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_every_process_meets_as_many_of_its_own_clips_in_each_update_and_all_clips_once_a_pass(minibatches: int, tmp_path: Path) -> None:
    run = Run(config(tmp_path, batch_size=16, minibatches=minibatches, epochs=2, **CODES), toy_task(0), Accelerator(cpu=True))
    updates = run._minibatches(16)
    assert len(updates) == 2 * minibatches
    for updates_of_pass in (updates[:minibatches], updates[minibatches:]):
        assert sorted(torch.cat(updates_of_pass).tolist()) == list(range(16))
    first, again, run.step = [rows.tolist() for rows in updates], [rows.tolist() for rows in run._minibatches(16)], 1
    assert first == again
    assert minibatches == 1 or first != [rows.tolist() for rows in run._minibatches(16)]
    for world in (1, 2, 4):
        for rank in range(world):
            run.accelerator = SimpleNamespace(process_index=rank, num_processes=world)  # type: ignore[assignment]
            if 16 // world % minibatches == 0:
                assert {len(run._mine(rows, 16)) for rows in updates} == {16 // world // minibatches}
