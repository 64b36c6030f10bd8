"""What a run writes down: nothing twice, nothing half, and each trainer by the same words."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.lora import adapter_disabled
from base_models.errors import UserError
from rlhf import train_dpo, train_grpo, train_ppo, train_sft
from rlhf.dpo_task import toy_task
from rlhf.journal import Journal, speeds, timed
from rlhf.played import kl_figures, play_now
from rlhf.ppo_task import toy_sound
from rlhf.tracking import Kind
from tests.rlhf.ppo_toys import conditions, tiny_lm

TRAINERS: dict[str, Any] = {"ppo": train_ppo, "dpo": train_dpo, "grpo": train_grpo, "sft": train_sft}


@dataclass(frozen=True)
class Settings:
    out: Path
    tracker: Kind = "tensorboard"
    listen: int = 2


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_journal_forgets_what_came_after_its_checkpoint_and_says_nothing_twice(tmp_path: Path) -> None:
    journal = Journal(Settings(tmp_path), "toy", 0, True)
    for step in range(4):
        journal.tell(step, {"loss": 1.0 / (step + 1)})
    journal.tell(2, {"held_out": float("nan")})
    journal.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as handle:
        handle.write('{"step": 2, "lo')  # as a kill leaves it
    journal = Journal(Settings(tmp_path), "toy", 2, True)
    assert journal.rows == [{"step": step, "loss": pytest.approx(1 / (step + 1))} for step in range(3)]
    journal.tell(2, {"loss": 1.0 / 3})
    journal.tell(2, {"held_out": float("nan")})
    journal.tell(3, {"loss": 0.25})
    journal.close()
    assert rows(tmp_path) == journal.rows
    assert [(row["step"], "loss" in row) for row in rows(tmp_path)] == [(0, True), (1, True), (2, True), (2, False), (3, True)]
    assert rows(tmp_path)[3]["held_out"] is None


def test_a_journal_keeps_no_more_clips_than_were_asked_for_and_is_silent_on_other_processes(tmp_path: Path) -> None:
    clips = [(f"prompt {i}", torch.zeros(2, 5, dtype=torch.long)) for i in range(4)]
    for speaks, name in ((True, "first"), (False, "second")):
        journal = Journal(Settings(tmp_path / name), "toy", 0, speaks)
        journal.tell(1, {"loss": 1.0})
        journal.play(1, clips, toy_sound)
        journal.close()
    assert sorted(p.name for p in (tmp_path / "first" / "clips" / "step_00000001").iterdir()) == [
        "0-prompt-0.png",
        "0-prompt-0.wav",
        "1-prompt-1.png",
        "1-prompt-1.wav",
    ]
    assert not (tmp_path / "second").exists()


def test_speeds_are_codes_over_the_seconds_of_play_judge_and_learn() -> None:
    seconds: dict[str, float] = {}
    for _ in range(2):
        with timed(seconds, "look"):
            time.sleep(0.01)
    assert seconds["look"] >= 0.02
    told = speeds({"play": 2.0, "judge": 1.0, "learn": 1.0, "look": 50.0}, 400)
    assert (told["tokens_per_second_play"], told["tokens_per_second"], told["seconds_look"]) == (200, 100, 50)
    assert speeds({"learn": 2.0}, 400) == {"seconds_learn": 2.0, "tokens_per_second": 200}
    assert "tokens_per_second" not in speeds({"play": 2.0}, 400)


def test_kl_by_codebook_adds_up_to_the_kl_of_what_is_played() -> None:
    lm = tiny_lm()
    state = torch.get_rng_state()
    played = play_now(lm, conditions(3), 7, 5, seed=1, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert played.rows == [0, 1, 2, 0, 1, 2, 0]
    cond = conditions(3).index(played.rows)
    logps = lm.logps(played.codes, cond)
    with adapter_disabled(lm):
        base = lm.logps(played.codes, cond)
    torch.testing.assert_close(played.book_kl.sum(1), (logps - base).sum(1), atol=1e-4, rtol=1e-4)
    figures = kl_figures(played.book_kl.mean(0))
    assert figures["kl"] == pytest.approx(sum(figures[f"kl_book_{k}"] for k in range(lm.n_q)))


@pytest.mark.parametrize("name", list(TRAINERS))
def test_each_trainer_tells_by_the_same_flags(name: str, tmp_path: Path) -> None:
    script = TRAINERS[name]
    cfg = dataclasses.replace(script.Config(**script.PRESETS["smoke"]), out=tmp_path / "run")
    assert (cfg.tracker, cfg.listen) == ("tensorboard", 2)
    with pytest.raises(UserError, match="pip install trackio"):
        script.main(dataclasses.replace(cfg, tracker="trackio"))


def test_toys_can_be_heard() -> None:
    task = toy_task(train_dpo.Config())
    assert task.sound is not None
    assert task.sound(torch.zeros(4, 12, dtype=torch.long))[0].shape == (1, 12 * 400)
