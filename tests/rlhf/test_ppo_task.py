"""Prompts as PPO reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from rlhf import ears
from rlhf.consistency import asked_of_ears
from rlhf.ppo_task import load_task, read_prompts
from rlhf.train_ppo import main
from tests.rlhf.ppo_toys import config


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


def test_ears_are_loaded_once_for_checks_slopes_and_the_hash_that_binds_a_run_to_them(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "prompts.txt").write_text("sad piano\n")
    loaded, load = [], ears.load_ears
    monkeypatch.setattr(ears, "load_ears", lambda *given: loaded.append(load(*given)) or loaded[-1])
    task = load_task(PRETRAINED, None, tmp_path / "prompts.txt", listeners=False)
    assert {"mood", "genre"} <= task.checks.keys() & task.slopes.keys()
    assert task.ears_sha256 == asked_of_ears(loaded[0])
    assert len(loaded) == 1
    assert ears.ears_of(load_policy(PRETRAINED)) is not loaded[0]  # the next run reads what then lies in the folder
