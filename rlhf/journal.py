"""What a run writes down: config.json, metrics.jsonl, the board it is watched on, clips to hear, a bar, and how long its phases took.

    journal = Journal(cfg, "ppo", first_step, speaks)
    with timed(seconds, "play"):
        ...
    journal.tell(step, figures | speeds(seconds, n_codes))
    journal.play(step, [("calm piano", codes)], sound)        # at most cfg.listen of them

PPO, DPO, GRPO and SFT all tell by it, so that one phase has one name in each of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from base_models.atomic import atomic_file
from base_models.checkpoint import append_jsonl, write_json
from base_models.policy import Policy
from base_models.settings import to_mapping
from rlhf.tracking import Kind, open_tracker

Sound = Callable[[Tensor], tuple[NDArray[np.float32], int]]
"""codes [K, T] -> wav [C, L] and its sample rate."""
Examples = Sequence[tuple[str, Tensor]]
"""Clips to listen to, with what they are: prompt, codes [K, T]."""


class Settings(Protocol):
    """What is asked of a run's configuration, a dataclass."""

    @property
    def out(self) -> Path: ...
    @property
    def tracker(self) -> Kind: ...
    @property
    def listen(self) -> int: ...


class Journal:
    """A run's figures and clips; silent on all processes but the first."""

    def __init__(self, cfg: Settings, name: str, first_step: int, speaks: bool) -> None:
        """first_step: that of the checkpoint which the run goes on from. What was told of later steps is forgotten, half-written lines
        too: it will be told again."""
        self.cfg, self.name, self.first_step, self.speaks = cfg, name, first_step, speaks
        self.path = cfg.out / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []
        self.tracker = open_tracker(cfg.tracker, cfg.out, name, to_mapping(cfg), first_step, speaks)
        if speaks:
            write_json(cfg.out / "config.json", to_mapping(cfg))
            self.rows = read_metrics(self.path, first_step)
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def tell(self, step: int, figures: Mapping[str, float]) -> None:
        """One row: nine digits, as many as a float32 has; NaN as null. What was told at the checkpoint's own step, after it was written,
        is not told twice."""
        if not self.speaks:
            return
        told = {name: float(f"{value:.9g}") if math.isfinite(value) else None for name, value in figures.items()}
        row = {"step": step, **told}
        if step == self.first_step and any(old["step"] == step and _subject(old) == _subject(row) for old in self.rows):
            return
        self.rows.append(row)
        append_jsonl(self.path, row)
        self.tracker.scalars(figures, step)

    def play(self, step: int, examples: Examples, sound: Sound | None) -> None:
        """The first `cfg.listen` clips, as sound and as a mel picture, where there is a codec to hear them by."""
        if self.speaks and sound is not None:
            for number, (prompt, codes) in enumerate(examples[: self.cfg.listen]):
                wav, sample_rate = sound(codes)
                self.tracker.clip(f"{number} {prompt}", wav, sample_rate, step, prompt)

    def bar(self, total: int) -> Any:
        """A progress bar over steps, with the time that is left."""
        return tqdm(total=total, initial=self.first_step, desc=self.name, unit="step", dynamic_ncols=True, disable=not self.speaks)

    def close(self) -> None:
        self.tracker.close()


def _subject(row: Mapping[str, Any]) -> set[str]:
    """What a row speaks of, apart from the time it took: a resumed run does not know how long the round before had learnt."""
    return {name for name in row if not name.startswith(("seconds_", "tokens_per_second"))}


def sound_of(policy: Policy) -> Sound:
    """How a policy's clips are heard."""

    def sound(codes: Tensor) -> tuple[NDArray[np.float32], int]:
        return policy.decode(codes[None])[0].float().cpu().numpy(), policy.codec.sample_rate

    return sound


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that the block takes to `seconds[phase]`."""
    began = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


def speeds(seconds: Mapping[str, float], n_codes: float) -> dict[str, float]:
    """Seconds by phase -> what is told of them: the seconds, the codes played a second, and the codes that went through play, judge and
    learn a second, where the round is complete."""
    told = {f"seconds_{phase}": value for phase, value in seconds.items()}
    if "play" in seconds:
        told["tokens_per_second_play"] = n_codes / seconds["play"]
    if "learn" in seconds:
        told["tokens_per_second"] = n_codes / sum(seconds.get(phase, 0.0) for phase in ("play", "judge", "learn"))
    return told


def read_metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The rows up to a step: what came after the checkpoint, half-written lines too, will be told again."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] > last_step:
                break
            rows.append(row)
    return rows
