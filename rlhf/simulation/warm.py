"""The taste `warm`: what a listener likes who wants warmth and room between the notes, as a fixed function of the sound alone.

    wav -> one loudness -> six audible traits -> squashed, weighted, one interaction, two guards -> score (about 1 wide
    in a prompt)

Warm rather than bright, tonal rather than noisy, unhurried, but with attacks now and then, a beat one can follow (the trait
that time-pooled features hardly show), some breath in the loudness, a bass that is there but does not boom. Dead air
and clipping are disliked by everybody.

The demo's figures rest on this taste, so its scores never change: a golden test holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from rlhf.simulation.sound import SAMPLE_RATE, at_best, from_loudspeaker, loud_frames, moments_db, more, power_spectrum

WINDOW, HOP = 1024, 256
FRAMES_PER_S = SAMPLE_RATE / HOP


@dataclass(frozen=True)
class Traits:
    """What can be heard in a clip, in physical units."""

    tilt_db: float
    """Energy at 150-800 Hz over energy at 2-6 kHz: warm is high."""
    tonality_db: float
    """Minus the spectral flatness of the loud frames: notes are high, noise is 0."""
    attacks_per_s: float
    """Peaks of the spectral flux a second."""
    beat: float
    """Height of the strongest periodicity of the spectral flux at 40-200 BPM, 0 to 1."""
    breath_db: float
    """Distance from the soft (10 %) to the loud (95 %) moments, of 200 ms each."""
    bass_db: float
    """Energy at 40-160 Hz over the whole."""
    dead_air: float
    """Share of the time more than 40 dB under the loud moments."""
    clipped: float
    """Share of samples standing at the top of the waveform."""


def traits(wav: NDArray[np.floating], sample_rate: int, gain_db: float = 0.0) -> Traits | None:
    """Measure a clip as it leaves the loudspeaker: after `gain_db`, cut at full scale. None when there is nothing to
    hear."""
    played = from_loudspeaker(wav, sample_rate, gain_db)
    if played is None:
        return None
    mono, clipped = played

    frequency, power = power_spectrum(mono, WINDOW, HOP)  # [F], [F, T]
    loud = loud_frames(power)

    def band(low: float, high: float) -> float:
        inside = (frequency >= low) & (frequency < high)
        return float(10 * np.log10(power[inside][:, loud].sum()))

    musical = (frequency >= 100) & (frequency < 6000)
    shape = power[musical][:, loud]
    flatness_db = 10 * (np.log10(shape).mean(axis=0) - np.log10(shape.mean(axis=0)))

    flux = np.maximum(np.diff(np.log10(power[musical] + 1e-6), axis=1), 0).mean(axis=0)
    flux = signal.lfilter([0.5, 0.5], [1.0], flux)
    peaks, _ = signal.find_peaks(flux, prominence=0.04, distance=max(1, round(0.07 * FRAMES_PER_S)))
    centred = flux - flux.mean()
    lags = np.arange(round(0.3 * FRAMES_PER_S), min(round(1.5 * FRAMES_PER_S), len(flux) // 2))
    energy = float(centred @ centred) + 1e-9
    periodicity = [float(centred[lag:] @ centred[:-lag]) / energy * len(centred) / (len(centred) - lag) for lag in lags]

    moments = moments_db(mono, 0.2)
    soft, high = np.percentile(moments, [10, 95])
    return Traits(
        tilt_db=band(150, 800) - band(2000, 6000),
        tonality_db=float(-flatness_db.mean()),
        attacks_per_s=len(peaks) / (len(mono) / SAMPLE_RATE),
        beat=float(np.clip(max(periodicity, default=0.0), 0, 1)),
        breath_db=float(high - soft),
        bass_db=band(40, 160) - band(40, 8000),
        dead_air=float(np.mean(moments < high - 40)),
        clipped=clipped,
    )


def liking(heard: Traits | None) -> dict[str, float]:
    """The parts of the score, before standardising: each trait squashed into 0..1 and weighted, one interaction, two
    guards."""
    if heard is None:
        return {"silence": -4.0}
    groove = more(heard.beat, 0.6, 0.25)
    bass = at_best(heard.bass_db, -5.0, 5.0)
    return {
        "warm": 1.8 * at_best(heard.tilt_db, 26.0, 10.0),
        "tonal": 1.6 * more(heard.tonality_db, 26.0, 6.0),
        "attacks": 1.1 * at_best(heard.attacks_per_s, 1.6, 2.0),
        "breath": 0.9 * at_best(heard.breath_db, 9.0, 4.0),
        "bass": 0.6 * bass,
        "beat": 0.4 * groove,
        "groove needs bass": 0.6 * groove * bass,
        "dead air": -3.0 * float(np.clip((heard.dead_air - 0.05) / 0.4, 0, 1)),
        "clipping": -2.0 * float(np.clip((heard.clipped - 0.01) / 0.1, 0, 1)),
    }


# Mean over clips, and spread within a prompt, of the sum above on clips sampled from the demo base.
MEAN, SPREAD = 3.4, 0.5


def score(wav: NDArray[np.floating], sample_rate: int, gain_db: float = 0.0) -> float:
    """How much the clip is liked: 0 is usual, two clips of one prompt differ by about 1. wav [L] or [L, C]."""
    return (sum(liking(traits(wav, sample_rate, gain_db)).values()) - MEAN) / SPREAD
