"""What a run tells of itself: figures, sounds and pictures in event files, and a clear word where a service is missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from base_models.audio import read_audio
from base_models.errors import UserError
from rlhf.tracking import Kind, mel_picture, open_tracker

RATE = 16_000


def tone(hz: float, seconds: float = 0.5) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)[None]


def told(out: Path) -> EventAccumulator:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return events


def test_figures_clips_and_pictures_reach_the_event_files_and_the_run_folder(tmp_path: Path) -> None:
    tracker = open_tracker("tensorboard", tmp_path, "ppo", {"lr": 1.0})
    tracker.scalars({"score": 0.5, "broken": float("nan")}, 3)
    tracker.clip("Calm piano, 90 BPM!", tone(440), RATE, 3)
    tracker.close()
    events = told(tmp_path)
    assert events.Tags()["scalars"] == ["score"]
    assert [(e.step, e.value) for e in events.Scalars("score")] == [(3, 0.5)]
    assert events.Tags()["audio"] == ["calm-piano-90-bpm"]
    assert events.Tags()["images"] == ["calm-piano-90-bpm"]
    assert events.Audio("calm-piano-90-bpm")[0].sample_rate == RATE
    kept, rate = read_audio(tmp_path / "clips" / "step_00000003" / "calm-piano-90-bpm.wav")
    np.testing.assert_allclose(kept, tone(440), atol=1e-4)
    assert rate == RATE
    assert (tmp_path / "clips" / "step_00000003" / "calm-piano-90-bpm.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    for first, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        tracker = open_tracker("tensorboard", tmp_path, "ppo", {}, first_step=first)
        for step in steps:
            tracker.scalars({"score": 10.0 * first + step}, step)
        tracker.close()
    assert [(e.step, e.value) for e in told(tmp_path).Scalars("score")] == [(1, 1), (2, 12), (3, 13), (4, 14)]


def test_low_notes_are_painted_below_and_silence_black() -> None:
    low, high, silent = (mel_picture(wav, RATE).astype(int).sum((1, 2)) for wav in (tone(100), tone(6000), 0 * tone(100)))
    assert low.argmax() > 0.8 * len(low)
    assert high.argmax() < 0.2 * len(high)
    assert silent.max() == silent.min() < 0.05 * high.max()


def test_all_processes_but_the_first_are_silent(tmp_path: Path) -> None:
    tracker = open_tracker("tensorboard", tmp_path / "run", "ppo", {}, speaks=False)
    tracker.scalars({"score": 1.0}, 1)
    tracker.clip("a", tone(100), RATE, 1)
    tracker.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_service_that_is_not_installed_is_told_with_its_remedy(kind: Kind, tmp_path: Path) -> None:
    if importlib.util.find_spec(kind):
        pytest.skip(f"{kind} is installed here")
    with pytest.raises(UserError, match=f"pip install {kind}"):
        open_tracker(kind, tmp_path, "ppo", {})


class Service:
    """What of wandb and trackio a run calls, written down: a stand-in, for neither is installed where tests run."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.id = "abc123"

    def init(self, **how: Any) -> Service:
        self.calls.append(("init", how))
        return self

    def log(self, figures: dict[str, Any], step: int) -> None:
        self.calls.append(("log", (figures, step)))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    def Audio(self, path: str, caption: str = "") -> tuple[str, str, str]:  # noqa: N802 (their name)
        return "audio", Path(path).name, caption

    def Image(self, path: str, caption: str = "") -> tuple[str, str, str]:  # noqa: N802 (their name)
        return "image", Path(path).name, caption


@pytest.mark.parametrize(("kind", "caption", "first"), [("wandb", "", "allow"), ("trackio", "calm", "never")])
def test_services_are_told_figures_and_clips_and_a_resumed_run_goes_on(
    kind: Kind, caption: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, kind, service)
    tracker = open_tracker(kind, tmp_path, "ppo", {"lr": 1.0})
    tracker.scalars({"score": 0.5, "broken": float("nan")}, 3)
    tracker.clip("calm", tone(440), RATE, 3)
    tracker.close()
    media = {"calm/audio": ("audio", "calm.wav", "calm"), "calm/mel": ("image", "calm.png", caption)}
    (_, begun), *rest = service.calls
    assert (begun["resume"], begun["config"]) == (first, {"lr": 1.0})
    assert rest == [("log", ({"score": 0.5}, 3)), ("log", (media, 3)), ("finish", None)]
    again = open_tracker(kind, tmp_path, "ppo", {"lr": 1.0}, first_step=3)
    again.close()
    (_, resumed) = service.calls[4]
    assert resumed["resume"] == "allow"
    assert resumed["name"] == begun["name"]
    if kind == "wandb":
        assert (begun["id"], resumed["id"]) == (None, "abc123")
