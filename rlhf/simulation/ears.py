"""What is heard of a clip: how much it is liked, how loud it is played, and where it is worst. Each clip is analysed once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping

import numpy as np

from rlhf.simulation import sound, taste

STRETCH_S = 1.0
"""How long a stretch is that gets marked."""


class Ears:
    """Scores by taste, content and gain, shared by all raters of a run."""

    def __init__(self, name: str = taste.DEFAULT) -> None:
        self.name = name
        self._known: dict[tuple[str, str, float], float] = {}
        self._lock = threading.Lock()

    def _once(self, what: str, audio: bytes, gain_db: float) -> float:
        """A figure of the clip: gold by the taste `what`, or `loudness`, or `worst` (ms)."""
        key = (what, hashlib.sha256(audio).hexdigest(), round(gain_db, 2))
        with self._lock:
            known = self._known.get(key)
        if known is None:
            if what == "loudness":
                known = played_db(audio, gain_db)
            elif what.startswith("worst:"):
                known = float(worst_stretch_ms(audio, what.removeprefix("worst:")))
            else:
                known = taste.score_bytes(audio, gain_db, what)
            with self._lock:
                self._known[key] = known
        return known

    def score(self, audio: bytes, gain_db: float, tastes: Mapping[str, float] | None = None) -> float:
        """How much the clip is liked: by the run's taste, or by a mixture of tastes."""
        if not tastes:
            return self._once(self.name, audio, gain_db)
        return sum(weight * self._once(name, audio, gain_db) for name, weight in tastes.items())

    def loudness_db(self, audio: bytes, gain_db: float) -> float:
        """Level at which the clip is heard, dBFS."""
        return self._once("loudness", audio, gain_db)

    def worst_ms(self, audio: bytes, name: str | None = None) -> int:
        """Where the stretch begins that is liked least."""
        return int(self._once(f"worst:{name or self.name}", audio, 0.0))


def played_db(audio: bytes, gain_db: float) -> float:
    """RMS of the moments that are heard, after the gain; loudness matching by BS.1770 leaves differences here."""
    mono = sound.to_mono(*sound.read(audio))
    moments = sound.moments_db(mono, 0.1)
    heard = moments[moments > moments.max() - 20]
    return float(10 * np.log10(np.mean(10 ** (heard / 10)))) + gain_db


def worst_stretch_ms(audio: bytes, name: str) -> int:
    """The start of the stretch of STRETCH_S, in halves of it, that scores lowest by itself."""
    mono = sound.to_mono(*sound.read(audio))
    size = int(STRETCH_S * sound.SAMPLE_RATE)
    starts = range(0, max(1, len(mono) - size + 1), size // 2)
    scores = [taste.score(mono[start : start + size], sound.SAMPLE_RATE, name=name) for start in starts]
    return int(1000 * starts[int(np.argmin(scores))] / sound.SAMPLE_RATE)
