"""Training a codec: the loss, the schedule, and the script as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import base_models
from base_models import settings
from base_models.checkpoint import load_tensors
from base_models.codec import load_codec
from base_models.corpus.waves import synthetic_waves
from base_models.errors import UserError
from base_models.evaluate_codec import evaluate_codec
from base_models.measures import mel_filters
from base_models.train_codec import PRESETS, Config, codec_loss, learning_rate, main, mel_matrix

SCRIPT = Path(base_models.__file__).parent / "train_codec.py"
SMOKE = settings.from_mapping(Config, {**PRESETS["smoke"], "log_every": 2})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    main(dataclasses.replace(SMOKE, out=out))
    return out


def test_the_mel_filters_of_the_loss_are_those_of_the_measure():
    torch.testing.assert_close(mel_matrix(16000, 513).numpy().T, mel_filters(16000).astype(np.float32), atol=1e-4, rtol=1e-3)


def test_the_loss_is_zero_for_a_perfect_copy_and_falls_towards_it():
    torch.manual_seed(0)
    target = torch.rand(2, 5, 4 * 513)

    def expand(compressed: torch.Tensor) -> torch.Tensor:
        return compressed.clamp_min(1e-4).pow(1 / 0.3).reshape(2, 20, 513)

    mel = mel_matrix(16000, 513)
    losses = [codec_loss(target + x * torch.randn_like(target), target, expand, mel)[0].item() for x in (0, 0.05, 0.2)]
    assert losses[0] == 0
    assert losses[0] < losses[1] < losses[2]


def test_the_learning_rate_warms_up_and_ends_at_zero_by_steps_or_by_minutes():
    cfg = Config(steps=1000, warmup_steps=100, lr=1.0, max_minutes=10)
    assert learning_rate(cfg, 0, 0) == pytest.approx(0.01)
    assert learning_rate(cfg, 100, 0) > 0.95
    assert learning_rate(cfg, 1000, 0) == pytest.approx(0)
    assert learning_rate(cfg, 200, 600) == pytest.approx(0)
    assert learning_rate(cfg, 200, 300) == pytest.approx(0.5)


def test_training_lowers_the_loss_and_leaves_a_codec(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    codec = load_codec(run / "codec")
    waves = synthetic_waves(2, 1.0, codec.sample_rate, seed=9)
    figures = evaluate_codec(codec, [waves.clip(0), waves.clip(1)], n_decoded=1)
    assert 0 < figures["log_mel_l1"] < 2
    assert figures["opus12k_log_mel_l1"] > 0
    assert len(figures["codebook_use"]) == codec.n_q
    assert all(0 < use <= 1 for use in figures["codebook_use"])
    assert figures["bits"] == pytest.approx(25 * 4 * 5 / 1000)


def test_a_resumed_run_ends_in_the_same_bits_as_an_uninterrupted_one(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000020")
    shutil.rmtree(copy / "codec")
    main(dataclasses.replace(SMOKE, out=copy))
    one, two = (load_tensors(folder / "codec" / "model.safetensors") for folder in (run, copy))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_the_minute_budget_ends_a_run_early(tmp_path):
    main(dataclasses.replace(SMOKE, out=tmp_path, steps=100_000, max_minutes=0.02))
    assert load_codec(tmp_path / "codec").n_q == 4


def test_a_run_folder_of_another_shape_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(UserError, match="another shape"):
        main(dataclasses.replace(SMOKE, out=tmp_path / "copy", width=48))


def test_the_script_runs_from_another_folder_is_killed_and_goes_on(tmp_path):
    command = [sys.executable, str(SCRIPT), "--preset", "smoke", "--out", str(tmp_path / "run"), "--steps", "60"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run" / "checkpoints").glob("step_*/state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "codec").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "codec in" in done.stdout
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 60
    load_codec(tmp_path / "run" / "codec")


def test_a_missing_corpus_ends_with_exit_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, str(SCRIPT), "--corpus", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "metadata.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
