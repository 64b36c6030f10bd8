"""Ears: what they answer, what they are bound to, and that a step along their slope is heard."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from base_models.checkpoint import read_json, write_json
from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from rlhf.asked import asked_genre, lead_words
from rlhf.consistency import SOFTENED, checks, slopes
from rlhf.ears import FOLDER, Ears, ears_of, load_ears, sound_of_latents
from rlhf.judges import scores

DATA = Path(__file__).parent / "data"
CLASSES = {"genre": ("jazz", "techno"), "mood": ("sad", "happy", "calm")}


@pytest.fixture(scope="module")
def policy():
    return load_policy(PRETRAINED)


@pytest.fixture(scope="module")
def toy(policy) -> Ears:
    """Ears with weights by chance."""
    generator = torch.Generator().manual_seed(0)
    width = sound_of_latents(policy.codec, torch.zeros(1, policy.codec.latent_dim, 8)).shape[1]
    weight = {kind: 0.02 * torch.randn((len(names), width), generator=generator) for kind, names in CLASSES.items()}
    bias = {kind: torch.zeros(len(names)) for kind, names in CLASSES.items()}
    return Ears(policy.codec, CLASSES, torch.zeros(width), torch.ones(width), weight, bias)


@pytest.fixture(scope="module")
def real():
    """(codes [96, 4, 100], facts) of held-out clips of the demo corpus."""
    codes = np.load(DATA / "real_clips.npz", allow_pickle=False)["codes"].astype(np.int64)
    facts = [json.loads(line) for line in (DATA / "real_clips.jsonl").read_text(encoding="utf-8").splitlines()]
    return torch.from_numpy(codes), facts


def test_ears_come_back_from_disk_and_answer_the_same(toy: Ears, policy, real, tmp_path) -> None:
    toy.save(tmp_path / FOLDER)
    again = load_ears(tmp_path / FOLDER, policy.codec)
    latents = policy.codec.latents(real[0][:2])
    for kind, shares in toy.probabilities(latents).items():
        assert torch.allclose(shares.sum(1), torch.ones(2))
        assert torch.equal(shares, again.probabilities(latents)[kind])
    assert again.sha256() == toy.sha256()
    louder = replace(toy, bias={**toy.bias, "mood": torch.ones(3)})
    assert louder.sha256() != toy.sha256()


def test_ears_of_another_codec_or_version_are_refused(toy: Ears, policy, tmp_path) -> None:
    toy.save(tmp_path / FOLDER)
    config = read_json(tmp_path / FOLDER / "config.json")
    write_json(tmp_path / FOLDER / "config.json", {**config, "codec_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"ears of codec 0000.*; expected ears of this codec; remedy: train them on it"):
        load_ears(tmp_path / FOLDER, policy.codec)
    write_json(tmp_path / FOLDER / "config.json", {**config, "classes": {"genre": ["jazz"]}})
    with pytest.raises(UserError, match="other tensors"):
        load_ears(tmp_path / FOLDER, policy.codec)
    write_json(tmp_path / FOLDER / "config.json", {**config, "model_type": "bert"})
    with pytest.raises(UserError, match="model_type 'bert'"):
        load_ears(tmp_path / FOLDER, policy.codec)


def test_a_base_without_the_folder_has_none(policy, tmp_path) -> None:
    assert ears_of(SimpleNamespace(codec=policy.codec, path=tmp_path)) is None
    assert ears_of(policy) is not None


@torch.no_grad()
def test_shipped_ears_hear_clips_of_melodies_they_never_met(policy, real) -> None:
    """Of 96 clips as the corpus plays; any lead in any genre is told by rlhf/train_ears.py."""
    codes, facts = real
    ears = ears_of(policy)
    assert ears is not None
    parts = [ears.probabilities(policy.codec.latents(part)) for part in codes.split(32)]
    truth = {
        "genre": [row["genre"] for row in facts],
        "mood": [row["mood"] for row in facts],
        "instrument": [lead_words().get(row["instruments"][0], "") for row in facts],
    }
    for kind, least in {"genre": 0.95, "mood": 0.6, "instrument": 0.8}.items():
        best = torch.cat([part[kind] for part in parts]).argmax(1)
        rows = [row for row, name in enumerate(truth[kind]) if name in ears.classes[kind]]
        right = [ears.classes[kind][int(best[row])] == truth[kind][row] for row in rows]
        assert float(np.mean(right)) >= least


def test_checks_ask_the_ears_and_slopes_lead_upwards(policy, real) -> None:
    codes = real[0][:4]
    prompts = ["sad piano", "happy jazz with tenor sax", "techno with metallic pad", "120 BPM"]
    judges, ways = checks(policy), slopes(policy)
    asked = {"mood": [1, 1, 0, 0], "instrument": [1, 1, 0, 0], "genre": [0, 1, 1, 0]}
    ears = ears_of(policy)
    for kind, there in asked.items():
        score = judges[kind](codes, prompts)
        assert torch.isfinite(score).int().tolist() == there
        slope, same = ways[kind](codes, prompts)
        torch.testing.assert_close(score, same, equal_nan=True)
        length = slope.flatten(1).norm(dim=1)
        assert (length > 0).int().tolist() == there  # what is not asked pulls nowhere
        latents, step = policy.codec.latents(codes), 0.02 * slope / length.clamp_min(1e-9)[:, None, None]
        with torch.no_grad():
            told = [ears.log_probabilities_of(sound_of_latents(policy.codec, latents + sign * step))[kind] for sign in (1, -1)]
            up, down = ((side / SOFTENED.get(kind, 1.0)).log_softmax(1) for side in told)
        row, name = (1, {"mood": "happy", "instrument": "saxophone", "genre": "jazz"}[kind])
        gained = float((up - down)[row, ears.place(kind, name)])
        assert gained == pytest.approx(float(2 * (slope[row] * step[row]).sum()), rel=0.2, abs=1e-5)
        assert gained > 0


def test_what_ears_hear_serves_every_kind_and_clips_that_ask_nothing_are_not_heard(toy: Ears, policy, real, tmp_path, monkeypatch) -> None:
    toy.save(tmp_path / FOLDER)
    base = SimpleNamespace(codec=policy.codec, contrastive=None, path=tmp_path)
    codes, heard = real[0], []
    judges, listen = checks(base), Ears.log_probabilities_of
    monkeypatch.setattr(Ears, "log_probabilities_of", lambda self, sound: heard.append(len(sound)) or listen(self, sound))
    told = scores({kind: judges[kind] for kind in CLASSES}, codes[:3], ["sad jazz", "happy techno", "music"])
    assert heard == [2]
    alone = judges["genre"](codes[:3], ["jazz", "techno", "music"])
    torch.testing.assert_close(told["genre"], alone, equal_nan=True)
    assert torch.isnan(judges["genre"](codes[4:6], ["music", "noise"])).all()
    assert heard == [2, 2]  # nothing was asked


def test_a_clip_that_is_surely_something_else_is_pulled_hardest_and_a_right_one_is_not_let_go(policy, real) -> None:
    """The slope of a probability would leave the first where it is, that of its logarithm the second."""
    codes, facts = real
    way = slopes(policy)["genre"]
    rows = [i for i, row in enumerate(facts) if asked_genre(row["genre"]) is not None][:6]
    codes, right = codes[rows], [facts[i]["genre"] for i in rows]
    wrong = ["techno" if name not in ("techno", "house") else "jazz" for name in right]
    lost, told = way(codes, wrong)
    sure, fine = way(codes, right)
    assert told.max() < -2 < fine.min()
    pull, ease = lost.flatten(1).norm(dim=1), sure.flatten(1).norm(dim=1)
    assert bool((pull > 1.1 * ease).all())
    assert bool((ease > 0.05 * pull).all())
