"""Training ears: what is learnt from is apart from what is told, and probabilities mean what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from rlhf.ears import load_ears
from rlhf.train_ears import CLASSES, PRESETS, Config, fit_head, fit_temperature, known_clips, main


def test_a_run_writes_ears_that_load_and_renders_nothing_twice(tmp_path) -> None:
    cfg = replace(Config(**PRESETS["smoke"]), out=tmp_path / "run", known=tmp_path / "known", clips=40, test_clips=6, n_frames=25)
    figures = main(cfg)
    codec = load_policy(PRETRAINED).codec
    ears = load_ears(tmp_path / "run" / "ears", codec)
    assert ears.classes == CLASSES
    assert ears.sha256() == figures["sha256"]
    assert figures["heard"]["mood"]["n_apart"] + figures["heard"]["mood"]["n_usual"] == 6
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "known").rglob("*.npz")}
    assert {path.parent.name.split("-")[1] for path in files} == {"train", "val", "test"}
    clips = known_clips(cfg, codec, 40, "train")
    assert clips.codes.shape == (40, 4, 25)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "known").rglob("*.npz")} == files
    drawn = {bucket: torch.stack([*known_clips(cfg, codec, 6, bucket).labels.values()]) for bucket in ("val", "test")}
    drawn["train"] = torch.stack([names[:6] for names in clips.labels.values()])
    assert len({str(labels.tolist()) for labels in drawn.values()}) == 3  # no clip has its twin in another bucket


def test_a_head_learns_what_is_there_and_never_hears_a_name_it_did_not_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (300,), generator=generator)
    z = F.one_hot(labels, 8).float() * 3 + torch.randn((300, 8), generator=generator)
    weight, bias = fit_head(z, torch.where(torch.arange(300) < 20, -1, labels), 4, C=0.1)
    logits = z @ weight.T + bias
    assert float((logits.argmax(1) == labels).float().mean()) > 0.85
    assert float(logits.softmax(1)[:, 3].max()) < 1e-4
    with pytest.raises(UserError, match="clips of 2 names"):
        fit_head(z, labels.clamp(max=1), 4, C=0.1)


@pytest.mark.parametrize(("factor", "found"), [(3.0, 3.0), (0.5, 1.0)])
def test_the_temperature_softens_what_is_too_sure_and_sharpens_nothing(factor, found) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((4000, 5), generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(factor * logits, labels) == pytest.approx(found, rel=0.1)
