"""Where a run can be watched: TensorBoard by default, W&B or trackio by name; and clips to listen to, with their pictures.

    tracker = open_tracker("tensorboard", out, "ppo", to_mapping(cfg))
    tracker.scalars({"score": 0.3, "kl": 1.2}, step=10)
    tracker.clip("calm piano", wav, 32_000, step=10)      # also out/clips/step_00000010/calm-piano.wav and .png

W&B and trackio are no dependencies: they are imported when somebody asks for them. Whoever wants nothing to leave the machine sets
WANDB_MODE=offline; TensorBoard and trackio write to the disk. On all processes but the first a tracker does nothing.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import matplotlib
import matplotlib.image
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from base_models.atomic import atomic_file
from base_models.audio import read_audio, write_audio
from base_models.errors import UserError
from base_models.measures import MAGNITUDE_FLOOR, log_mel

Kind = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "encore"
LOUDEST = 100.0
"""The mel magnitude that is painted white; a full-scale sine has 256."""


class Board(Protocol):
    """What a service must be able to show."""

    def scalars(self, figures: Mapping[str, float], step: int) -> None: ...
    def media(self, tag: str, wav_file: Path, picture_file: Path, step: int, caption: str) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """A run's figures and clips on one board; on silent processes on none."""

    def __init__(self, out: Path, board: Board | None) -> None:
        self.out, self.board = out, board

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Figures by name; those that are not finite are left out (metrics.jsonl has them as null)."""
        if self.board is not None:
            self.board.scalars({name: float(value) for name, value in figures.items() if math.isfinite(value)}, step)

    def clip(self, tag: str, wav: NDArray[np.floating], sample_rate: int, step: int, caption: str = "") -> None:
        """wav [C, L] and its mel picture, on the board and in out/clips/step_XXXXXXXX/."""
        if self.board is None:
            return
        stem = self.out / "clips" / f"step_{step:08d}" / (re.sub(r"[^a-z0-9]+", "-", tag.lower()).strip("-")[:60] or "clip")
        peak = float(np.abs(wav).max(initial=0.0))
        write_audio(stem.with_suffix(".wav"), wav / max(1.0, peak / 0.99), sample_rate)
        with atomic_file(stem.with_suffix(".png")) as temporary:
            matplotlib.image.imsave(temporary, mel_picture(wav, sample_rate), format="png")
        self.board.media(stem.name, stem.with_suffix(".wav"), stem.with_suffix(".png"), step, caption or tag)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def mel_picture(wav: NDArray[np.floating], sample_rate: int) -> NDArray[np.uint8]:
    """wav [C, L] -> log-mel spectrogram [H, W, 3], low notes below; one scale of brightness for all, so that pictures compare."""
    low, high = math.log(MAGNITUDE_FLOOR), math.log(LOUDEST)
    level = (log_mel(wav, sample_rate) - low) / (high - low)
    painted = matplotlib.colormaps["magma"](np.clip(level[::-1], 0, 1))[..., :3]
    return np.repeat((painted * 255).astype(np.uint8), 2, axis=0)


def open_tracker(kind: Kind, out: Path, name: str, config: Mapping[str, Any], first_step: int = 0, speaks: bool = True) -> Tracker:
    """A tracker for the run in `out`. Args: first_step: what was told of later steps before an interruption is forgotten where the
    service can. speaks: False on all processes but the first. Raises UserError when the service is not installed."""
    if not speaks:
        return Tracker(out, None)
    out.mkdir(parents=True, exist_ok=True)
    if kind == "tensorboard":
        return Tracker(out, TensorBoard(out, first_step))
    module = wanted(kind)
    title = f"{name} {'/'.join(out.resolve().parts[-2:])}"
    made = WandB(module, out, title, config, first_step > 0) if kind == "wandb" else Trackio(module, title, config, first_step > 0)
    return Tracker(out, made)


def wanted(kind: str) -> ModuleType:
    """Import what `--tracker` names."""
    try:
        return importlib.import_module(kind)
    except ModuleNotFoundError as error:
        if error.name != kind:
            raise
        remedy = f"`pip install {kind}` into this environment, or use --tracker tensorboard"
        raise UserError(f"--tracker {kind}, which is not installed", "an installed tracker", remedy) from error


class TensorBoard:
    """Event files in out/tensorboard."""

    def __init__(self, out: Path, first_step: int) -> None:
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run's points are on the disk

    def media(self, tag: str, wav_file: Path, picture_file: Path, step: int, caption: str) -> None:
        wav, sample_rate = read_audio(wav_file)
        self.writer.add_audio(tag, torch.from_numpy(wav.mean(0)), step, sample_rate)
        self.writer.add_image(tag, matplotlib.image.imread(picture_file)[..., :3], step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; a resumed run goes on under its own id."""

    def __init__(self, wandb: Any, out: Path, title: str, config: Mapping[str, Any], resumed: bool) -> None:
        self.wandb = wandb
        remembered = out / "wandb_id.txt"
        run_id = remembered.read_text(encoding="utf-8").strip() if resumed and remembered.is_file() else None
        self.run = wandb.init(project=PROJECT, name=title, dir=str(out), config=dict(config), id=run_id, resume="allow")
        with atomic_file(remembered) as temporary:
            temporary.write_text(self.run.id, encoding="utf-8")

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def media(self, tag: str, wav_file: Path, picture_file: Path, step: int, caption: str) -> None:
        shown = {f"{tag}/audio": self.wandb.Audio(str(wav_file), caption=caption), f"{tag}/mel": self.wandb.Image(str(picture_file))}
        self.run.log(shown, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """trackio: W&B's calls on a local database."""

    def __init__(self, trackio: Any, title: str, config: Mapping[str, Any], resumed: bool) -> None:
        self.trackio = trackio
        trackio.init(project=PROJECT, name=title, config=dict(config), resume="allow" if resumed else "never", embed=False)

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(figures), step=step)

    def media(self, tag: str, wav_file: Path, picture_file: Path, step: int, caption: str) -> None:
        audio = self.trackio.Audio(str(wav_file), caption=caption)
        self.trackio.log({f"{tag}/audio": audio, f"{tag}/mel": self.trackio.Image(str(picture_file), caption=caption)}, step=step)

    def close(self) -> None:
        self.trackio.finish()
