"""Prompts as PPO reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from rlhf import ears
from rlhf.consistency import asked_of_ears
from rlhf.ppo_task import load_prompts, load_task
from rlhf.train_ppo import main
from tests.rlhf.ppo_toys import config


def test_prompts_are_read_as_encore_sample_reads_them_with_their_tempi(tmp_path: Path) -> None:
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\ufeffcalm piano\n\n fast rock, 150 BPM \n", encoding="utf-8")  # with the mark that some editors begin a file with
    rows.write_text('{"prompt": "calm piano", "tempo_bpm": 90, "genre": "x"}\n{"prompt": "rock"}\n')
    policy = load_policy(PRETRAINED)
    assert load_prompts(policy, text).texts == ["calm piano", "fast rock, 150 BPM"]
    assert load_prompts(policy, rows).texts == ["calm piano", "rock"]
    assert load_prompts(policy, rows).table.tempo_bpm[0] == 90


@pytest.mark.parametrize("line", ["not json", '{"text": "calm"}', '["calm"]', '{"prompt": null}', '{"prompt": "x", "tempo_bpm": NaN}'])
def test_a_broken_prompt_row_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "calm piano"}}\n{line}\n')
    with pytest.raises(UserError, match="jsonl:2"):
        load_prompts(load_policy(PRETRAINED), path)


def test_missing_or_empty_prompts_and_missing_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for path in (tmp_path / "none.txt", tmp_path / "empty.txt"):
        with pytest.raises(UserError, match="prompt"):
            load_prompts(load_policy(PRETRAINED), path)
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
