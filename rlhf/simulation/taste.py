"""The gold tastes: what simulated listeners like. Three listeners who like different things, by name.

    score_file(path, "drive") -> how much the clip is liked: 0 is usual, two clips of one prompt differ by about 1

They stand in for human ears in tests, in the demo and in the proof, so they must be unknown to whatever learns from the
votes: no trainer may import this package (tests/rlhf/simulation proves it), and this package knows numpy and scipy only.
Each is a nonlinear function of the sound as it leaves the loudspeaker, at one loudness; each holds traits that lie in the
order of things; silence, noise and clipping please none of them.

They are no model of human taste, and nothing measured with them says that people would agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf.simulation import drive, space, warm
from rlhf.simulation.sound import read

TASTES: dict[str, Callable[[NDArray[np.floating], int, float], float]] = {
    "warm": warm.score,
    "drive": drive.score,
    "space": space.score,
}
DEFAULT = "warm"
"""The demo's taste, and the one that README's demo figures rest on."""


def score(wav: NDArray[np.floating], sample_rate: int, gain_db: float = 0.0, name: str = DEFAULT) -> float:
    """How much the clip is liked by the named taste. wav [L] or [L, C]."""
    return TASTES[name](wav, sample_rate, gain_db)


def score_bytes(audio: bytes, gain_db: float = 0.0, name: str = DEFAULT) -> float:
    """The score of an audio file's bytes (wav, flac or ogg)."""
    wav, sample_rate = read(audio)
    return score(wav, sample_rate, gain_db, name)


def score_file(path: Path, name: str = DEFAULT) -> float:
    return score_bytes(path.read_bytes(), name=name)
