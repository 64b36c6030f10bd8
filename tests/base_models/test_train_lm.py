from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from base_models import train_lm
from base_models.caption_bank import build_caption_bank
from base_models.checkpoint import load_tensors
from base_models.corpus.tokens import synthetic_tokens
from base_models.distil_guidance import Config as DistilConfig
from base_models.distil_guidance import caption_of, distillation_loss, guided_samples, guided_target
from base_models.errors import UserError
from base_models.evaluate_base import nearest_training_clip, ngram_bits
from base_models.lm import MusicLM, MusicLMConfig, load_lm
from base_models.train_lm import PRESETS, Config, learning_rate, load_data, main

SCRIPT = Path(__file__).resolve().parents[2] / "base_models" / "train_lm.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("captions")


def smoke(out: Path, cache: Path, **changes) -> Config:
    return Config(**{**PRESETS["smoke"], "out": out, "cache": cache, "tensorboard": False, **changes})


def command(out: Path, cache: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--preset", "smoke", "--out", str(out), "--cache", str(cache), "--no-tensorboard", *more]


def test_smoke_preset_learns_and_is_launched_as_a_file_from_another_folder(tmp_path, cache):
    subprocess.run(command(tmp_path / "run", cache), cwd=tmp_path, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 30
    assert rows[-1]["val_bits"] < 4.3  # five bits is uniform over 32 codes
    assert len({row["step"] for row in rows}) == len(rows)
    assert load_lm(tmp_path / "run" / "lm").config.card == 32


def test_resumed_run_has_the_same_weights_as_an_unbroken_one(tmp_path, cache):
    main(smoke(tmp_path / "whole", cache, steps=8, save_every=4))
    main(smoke(tmp_path / "broken", cache, steps=8, save_every=4))
    last = tmp_path / "broken" / "checkpoints" / "step_00000008"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()  # as if it had been killed after step 4
    main(smoke(tmp_path / "broken", cache, steps=8, save_every=4, resume=True))
    whole, broken = (load_tensors(tmp_path / name / "lm" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_bad_input_ends_with_exit_code_2(tmp_path, cache):
    ended = subprocess.run(command(tmp_path / "run", cache, "--tokens", str(tmp_path)), check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "remedy" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_without_being_told_to_resume(tmp_path, cache):
    main(smoke(tmp_path / "run", cache, steps=2, save_every=1))
    with pytest.raises(UserError, match="--resume"):
        main(smoke(tmp_path / "run", cache, steps=2))


def test_killed_run_goes_on_from_a_valid_checkpoint(tmp_path, cache):
    arguments = command(tmp_path / "run", cache, "--steps", "4000", "--save-every", "2", "--eval-every", "5000")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step_*/state.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = max(int(p.parent.name[5:]) for p in (tmp_path / "run").glob("checkpoints/step_*/state.json"))
    finished = subprocess.run(
        command(tmp_path / "run", cache, "--steps", str(killed_at + 3), "--resume"), check=True, capture_output=True, text=True
    )
    assert f"step {killed_at + 3}" in finished.stdout


def test_batches_tell_the_tempo_that_the_caption_states(cache):
    from base_models.text_encoder import load_text_encoder

    data = load_data(synthetic_tokens(), load_text_encoder(), cache)["train"]
    generator = torch.Generator().manual_seed(0)
    _, cond = data.batch(torch.arange(30), generator, None)
    told = torch.isfinite(cond.tempo_bpm)
    assert 0 < told.sum() < 30
    assert torch.equal(cond.tempo_bpm[told], data.tempo_bpm[:30][told])
    _, dropped = data.batch(torch.arange(30), generator, Config(drop_conditions=1.0))
    assert not dropped.mask.any()
    assert torch.isnan(dropped.tempo_bpm).all()


def test_a_tempo_that_the_caption_alone_states_is_told_as_prompts_are_read(cache):
    from base_models.text_encoder import load_text_encoder

    corpus = synthetic_tokens()
    bare = [{key: value for key, value in row.items() if key != "tempo_bpm"} | {"captions": ["techno, 130 BPM"]} for row in corpus.rows]
    data = load_data(dataclasses.replace(corpus, rows=bare), load_text_encoder(), cache)["train"]
    _, cond = data.batch(torch.arange(4), torch.Generator().manual_seed(0), None)
    assert cond.tempo_bpm.tolist() == [130.0] * 4
    assert caption_of(data, torch.arange(4)).tempo_bpm.tolist() == [130.0] * 4


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"sample_every": 3}, "--sample-every without --codec"), ({"d_model": 64, "resume": True}, "a run of another shape")],
)
def test_settings_that_cannot_work_are_refused_before_the_first_step(changes, match, tmp_path, cache, monkeypatch):
    main(smoke(tmp_path / "run", cache, steps=1, save_every=1))
    monkeypatch.setattr(train_lm, "nll", None)
    out = tmp_path / ("run" if "resume" in changes else "other")
    with pytest.raises(UserError, match=match):
        main(smoke(out, cache, **changes))


def test_fp16_in_shards_is_refused_before_anything_is_opened(tmp_path, cache, monkeypatch):
    """Its gradients would be clipped 65,536 times too large, and one that overflows would make all weights NaN: nobody unscales them."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(train_lm, "open_accelerator", None)
    with pytest.raises(UserError, match=r"got --dtype fp16 with a launch configuration of fsdp; .* --dtype bf16"):
        main(smoke(tmp_path / "run", cache, dtype="fp16"))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_tokens(tmp_path, cache, monkeypatch):
    main(smoke(tmp_path / "run", cache, steps=1, save_every=1))
    other = dataclasses.replace(synthetic_tokens(), sha256="other")
    monkeypatch.setattr(train_lm, "synthetic_tokens", lambda: other)
    with pytest.raises(UserError, match=r"of tokens_sha256 .*, now other"):
        main(smoke(tmp_path / "run", cache, steps=2, resume=True))


def test_without_a_warm_up_the_rate_begins_at_its_peak():
    assert learning_rate(Config(warmup=0), 0, 0.0) == Config().lr


def test_the_teachers_clips_are_kept_for_the_same_teacher_and_settings_alone(tmp_path, cache):
    from base_models.text_encoder import load_text_encoder

    torch.manual_seed(0)
    shape = MusicLMConfig(card=32, d_model=32, n_layers=1, n_heads=2, d_ff=64, text_dim=384)
    teacher, other = MusicLM(shape).eval(), MusicLM(shape).eval()
    data = load_data(synthetic_tokens(), load_text_encoder(), cache)["train"]
    cfg = DistilConfig(out=tmp_path, clips=2, top_k=0)
    accelerator = Accelerator(cpu=True)
    first, rows = guided_samples(teacher, data, cfg, accelerator)
    again, _ = guided_samples(teacher, data, cfg, accelerator)
    assert torch.equal(first, again)
    assert len(list(tmp_path.glob("guided-*"))) == 1
    assert len(guided_samples(teacher, data, dataclasses.replace(cfg, clips=3), accelerator)[1]) == 3
    assert not torch.equal(guided_samples(other, data, cfg, accelerator)[0], first)
    assert len(rows) == 2


def test_caption_bank_is_read_back_from_its_cache(cache):
    from base_models.text_encoder import load_text_encoder

    encoder = load_text_encoder()
    bank = build_caption_bank(["sad piano", "a fast techno piece"], encoder, cache)
    again = build_caption_bank(["sad piano", "a fast techno piece"], encoder, cache)
    assert torch.equal(bank.states, again.states)
    states, mask = bank.batch([1, 0])
    expected, expected_mask = encoder.encode(["a fast techno piece", "sad piano"])
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(states, expected, atol=2e-3, rtol=2e-3)


def test_learning_rate_warms_up_and_falls_to_a_fiftieth():
    cfg = Config(lr=1.0, warmup=10)
    assert learning_rate(cfg, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(cfg, 9, 0.0) == pytest.approx(1.0)
    assert learning_rate(cfg, 100, 1.0) == pytest.approx(0.02)
    assert learning_rate(cfg, 100, 7.0) == pytest.approx(0.02)


def test_distillation_loss_is_zero_exactly_at_the_target(tiny_lm, tiny_conditions):
    codes = torch.randint(0, 32, (3, 4, 6))
    target = guided_target(tiny_lm, codes, tiny_conditions, DistilConfig(cfg_coef=2.0, temperature=0.9, top_k=5))
    assert (target.exp() > 0).sum(-1).max() == 5
    logits = target.masked_fill(torch.isinf(target), -1e4)
    assert distillation_loss(logits, target).abs() < 1e-6
    assert distillation_loss(tiny_lm(codes, tiny_conditions), target) > 0.5


def test_guided_target_of_guidance_one_is_the_model_itself(tiny_lm, tiny_conditions):
    codes = torch.randint(0, 32, (3, 4, 6))
    target = guided_target(tiny_lm, codes, tiny_conditions, DistilConfig(cfg_coef=1.0, temperature=1.0, top_k=0))
    torch.testing.assert_close(target, tiny_lm(codes, tiny_conditions).log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_ngram_bits_of_known_sources():
    coin = torch.randint(0, 2, (200, 1, 100), generator=torch.Generator().manual_seed(0))
    unigram, bigram = ngram_bits(coin[:150], coin[150:], 2)
    assert unigram == pytest.approx(1.0, abs=0.01)
    assert bigram == pytest.approx(1.0, abs=0.01)
    alternating = (torch.arange(100)[None, None] + torch.arange(200)[:, None, None]) % 2
    unigram, bigram = ngram_bits(alternating[:150], alternating[150:], 2)
    assert unigram == pytest.approx(1.0, abs=0.01)
    assert bigram < 0.45  # half of it is the unigram: -log2(.75)


def test_a_copied_clip_is_found_also_when_it_is_shifted():
    train = torch.randint(0, 1024, (30, 4, 60), generator=torch.Generator().manual_seed(0))
    shifted = torch.randint(0, 1024, (1, 4, 60))
    shifted[:, :, 5:] = train[7, :, :-5]
    fresh = torch.randint(0, 1024, (1, 4, 60), generator=torch.Generator().manual_seed(9))
    near = nearest_training_clip(torch.cat([train[:1], shifted, fresh]), train)
    assert near[0] == 1
    assert near[1] == 1
    assert near[2] < 0.2
