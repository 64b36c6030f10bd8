"""Training the audio-text embedding, as a function and as a script."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import base_models
from base_models import settings, train_contrastive
from base_models.checkpoint import load_tensors
from base_models.contrastive import load_contrastive
from base_models.corpus.tokens import synthetic_tokens
from base_models.errors import UserError
from base_models.text_encoder import load_text_encoder
from base_models.train_contrastive import PRESETS, Config, draw, evaluate, load_split, main
from tests.rlhf.elsewhere import Away

SCRIPT = Path(base_models.__file__).parent / "train_contrastive.py"
SMOKE = settings.from_mapping(Config, PRESETS["smoke"])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    main(dataclasses.replace(SMOKE, out=out))
    return out


@pytest.fixture(scope="module")
def split():
    return load_split(synthetic_tokens(), "train", load_text_encoder())


def test_a_batch_pairs_each_clip_with_one_of_its_captions(split):
    codes, pooled, same = draw(split, SMOKE, 32, np.random.default_rng(0))
    assert codes.shape[:2] == (12, 4)
    assert 12 <= codes.shape[2] <= 25
    assert pooled.shape == (12, 384)
    assert same.shape == (12, 12)
    assert bool(same.diagonal().all())
    assert 12 < int(same.sum()) < 144


def test_noise_replaces_about_its_share_of_codes_and_none_at_zero(split):
    cfg = dataclasses.replace(SMOKE, excerpt=(1.0, 1.0), noise=0.0)
    clean, _, _ = draw(split, cfg, 32, np.random.default_rng(0))
    assert {tuple(row.flatten().tolist()) for row in clean} <= {tuple(row.flatten().tolist()) for row in split.codes}
    noisy, _, _ = draw(split, dataclasses.replace(cfg, noise=0.5), 32, np.random.default_rng(0))
    assert 0.35 < (noisy != clean).float().mean() < 0.6


def test_recall_is_told_where_the_model_lies_on_another_device(split):
    class Elsewhere:
        def eval(self):
            pass

        def embed_codes(self, codes):
            return Away(torch.nn.functional.normalize(codes.float().flatten(1)[:, :8], dim=-1))

        def embed_pooled(self, pooled):
            assert pooled.device.type == "meta"  # brought to where the model lies
            return Away(torch.nn.functional.normalize(torch.rand(len(pooled), 8), dim=-1))

    assert 0 <= evaluate(Elsewhere(), split)["r10_all"] <= 1


def test_a_run_does_not_go_on_with_other_tokens(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    other = dataclasses.replace(synthetic_tokens(), sha256="other")
    monkeypatch.setattr(train_contrastive, "synthetic_tokens", lambda: other)
    with pytest.raises(UserError, match=r"of tokens_sha256 .*, now other"):
        main(dataclasses.replace(SMOKE, out=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tokens_sha256"] == synthetic_tokens().sha256  # as it was


def test_training_teaches_which_text_belongs_to_which_clip(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    model = load_contrastive(run / "contrastive")
    tokens = synthetic_tokens()
    heldout = tokens.split("test_piece")
    with torch.no_grad():
        audio = model.embed_codes(torch.from_numpy(tokens.codes[heldout]).long())
        text = model.embed_text(["techno", "folk", "ambient"])
    guessed = [("techno", "folk", "ambient")[i] for i in (audio @ text.T).argmax(1).tolist()]
    right = [tokens.rows[i]["genre"] for i in heldout]
    assert np.mean([g == r for g, r in zip(guessed, right)]) > 0.6
    figures = json.loads((run / "figures.json").read_text())
    assert figures["r10_full"] >= figures["chance_full"]


def test_a_resumed_run_ends_in_the_same_bits_as_an_uninterrupted_one(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000020")
    shutil.rmtree(copy / "contrastive")
    main(dataclasses.replace(SMOKE, out=copy))
    one, two = (load_tensors(folder / "contrastive" / "model.safetensors") for folder in (run, copy))
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_tokens_without_their_codec_are_refused(tmp_path):
    (tmp_path / "tokens").mkdir()
    with pytest.raises(UserError, match="0 tokenised corpora"):
        main(dataclasses.replace(SMOKE, tokens=tmp_path / "tokens", out=tmp_path / "run"))


def test_a_split_that_the_tokens_lack_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        main(dataclasses.replace(SMOKE, heldout_split="nothing", out=tmp_path))


def test_the_script_runs_from_another_folder_and_prints_its_recall(tmp_path):
    command = [sys.executable, str(SCRIPT), "--preset", "smoke", "--steps", "4", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "r10_over_chance_full" in json.loads(done.stdout)
    load_contrastive(tmp_path / "run" / "contrastive")
