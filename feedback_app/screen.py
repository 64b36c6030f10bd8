"""The headphone check: three tones, which is the softest?   Woods et al. 2017, doi:10.3758/s13414-017-1361-2.

One tone is 6 dB softer (the answer), one has its right channel turned over: over loudspeakers that one all but vanishes and is
taken for the softest. The server draws, plays and counts; the page is given sound and gives numbers back. What is drawn follows
from the server's secret, the rater and how many checks this rater has behind them, so nothing is stored while a check is open,
and a check that was answered cannot be answered again.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import wave
from collections.abc import Sequence

import numpy as np

TRIALS = 6
TONES = 3
SAMPLE_RATE = 8000
"""Hz. Plenty for tones of 200 Hz."""
TONE_HZ = 200.0
TONE_S, REST_S, EDGE_S = 1.0, 0.5, 0.1
LEVEL = 0.25
"""Peak of a tone, linear; the softest has half of it."""


class Checks:
    """Draws the trials of headphone checks. Args: secret: any string nobody else knows."""

    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def draw(self, rater_id: int, number: int, trial: int) -> tuple[int, int]:
        """(which tone is the softest, which is turned over), of TONES, in trial 0 to TRIALS - 1 of a rater's check `number`."""
        digest = hmac.digest(self._key, f"encore-screen:{rater_id}:{number}:{trial}".encode(), hashlib.sha256)
        drawn = int.from_bytes(digest) % (TONES * (TONES - 1))
        soft, step = divmod(drawn, TONES - 1)
        return soft, (soft + 1 + step) % TONES

    def sound(self, rater_id: int, number: int, trial: int) -> bytes:
        """A trial as a WAV, 16 bit, stereo."""
        return tones(*self.draw(rater_id, number, trial))

    def count_right(self, rater_id: int, number: int, answers: Sequence[int]) -> int:
        """How many of the answers, one a trial, name the softest tone."""
        return sum(answer == self.draw(rater_id, number, trial)[0] for trial, answer in enumerate(answers))


def tones(soft: int, turned: int) -> bytes:
    """TONES tones one after the other, as a WAV; tone `soft` is 6 dB softer, tone `turned` in antiphase between the ears."""
    t = np.arange(round(TONE_S * SAMPLE_RATE)) / SAMPLE_RATE
    edge = np.minimum(1.0, np.minimum(t, TONE_S - t) / EDGE_S)
    tone = LEVEL * edge * np.sin(2 * np.pi * TONE_HZ * t)
    rest = np.zeros((2, round(REST_S * SAMPLE_RATE)))
    parts = []
    for which in range(TONES):
        level = 0.5 if which == soft else 1.0
        parts += [np.vstack([tone, -tone if which == turned else tone]) * level, rest]
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.round(np.hstack(parts[:-1]).T * 32767).astype("<i2").tobytes())
    return out.getvalue()
