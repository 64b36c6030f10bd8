"""The taste `drive`: what a listener likes who wants to move, as a fixed function of the sound alone.

    wav -> one loudness -> five audible traits -> squashed, weighted, one interaction, four guards -> score (about 1 wide
    in a prompt)

Many events rather than few (but not a rattle), attacks that rise out of what came before, a clear top that is not shrill,
and two traits that lie in the order of things, which statistics pooled over time hardly show: the attacks stand on one
grid, and the music builds, so that the end is a little louder than the beginning. Bare tones, noise, holes and clipping do not drive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from rlhf.simulation.sound import (
    SAMPLE_RATE,
    Array,
    at_best,
    band_amplitudes,
    dead_air,
    from_loudspeaker,
    fullness,
    moments_db,
    more,
    power_spectrum,
    ramp,
    tonality_db,
)

WINDOW, HOP = 512, 160
FRAMES_PER_S = SAMPLE_RATE // HOP
GRID_S = np.geomspace(0.14, 0.5, 60)
"""Periods of the grids that attacks may stand on: 1/4 to 1/16 notes of usual tempi."""
FEWEST_ATTACKS = 5
"""Fewer make no rhythm that one could call steady."""


@dataclass(frozen=True)
class Traits:
    """What can be heard in a clip, in physical units."""

    attacks_per_s: float
    """Peaks of the spectral flux a second."""
    steady: float
    """How well the attacks stand on the best grid, 0 (anywhere) to 1 (exactly)."""
    punch_db: float
    """How far a usual attack rises over the 50 ms before it."""
    top_db: float
    """Energy at 2-7 kHz over that at 0.1-7 kHz."""
    lift_db: float
    """The last two fifths over the first two fifths."""
    fullness: float
    """How many bands share the sound; 1 is a single tone."""
    tonality_db: float
    """Minus the spectral flatness: notes are high, noise is about 2.5."""
    dead_air: float
    """Share of the time more than 40 dB under the loud moments."""
    holes: float
    """Share of moments of 50 ms more than 30 dB under the loud ones: clicks are all holes."""
    clipped: float
    """Share of samples standing at the top of the waveform."""


def grid_strength(times_s: Array, weights: Array) -> float:
    """Strength of the best grid under attacks: max over periods p of |sum w exp(2 pi i t / p)| / sum w, squared and freed
    of what n attacks at random would show, (n R^2 - 1) / (n - 1). 0 with too few attacks."""
    n = len(times_s)
    if n < FEWEST_ATTACKS:
        return 0.0
    resultant = np.abs(np.exp(2j * np.pi * times_s[None] / GRID_S[:, None]) @ weights) / weights.sum()
    return float(np.clip((n * resultant.max() ** 2 - 1) / (n - 1), 0, 1))


def traits(wav: NDArray[np.floating], sample_rate: int, gain_db: float = 0.0) -> Traits | None:
    """Measure a clip as it leaves the loudspeaker: after `gain_db`, cut at full scale. None when there is nothing to
    hear."""
    played = from_loudspeaker(wav, sample_rate, gain_db)
    if played is None:
        return None
    mono, clipped = played

    frequency, power = power_spectrum(mono, WINDOW, HOP)  # [F], [F, T]
    musical = power[(frequency >= 100) & (frequency < 7000)]
    flux = np.maximum(np.diff(np.log10(musical + 1e-6), axis=1), 0).mean(axis=0)
    flux = signal.lfilter([0.5, 0.5], [1.0], flux)
    peaks, found = signal.find_peaks(flux, prominence=0.06, distance=7)

    level = 10 * np.log10(power[frequency >= 60].sum(axis=0))
    rises = [level[peak : peak + 6].max() - level[max(0, peak - 6) : max(1, peak - 1)].mean() for peak in peaks]

    moments = 10 ** (moments_db(mono, 0.1) / 10)
    part = max(1, int(0.4 * len(moments)))
    short = moments_db(mono, 0.05)
    top = power[(frequency >= 2000) & (frequency < 7000)].sum() / musical.sum()
    return Traits(
        attacks_per_s=len(peaks) / (len(mono) / SAMPLE_RATE),
        steady=grid_strength(peaks / FRAMES_PER_S, np.sqrt(found["prominences"])),
        punch_db=float(np.median(rises)) if rises else 0.0,
        top_db=float(10 * np.log10(top)),
        lift_db=float(10 * np.log10((moments[-part:].mean() + 1e-9) / (moments[:part].mean() + 1e-9))),
        fullness=fullness(band_amplitudes(frequency, power)),
        tonality_db=tonality_db(musical),
        dead_air=dead_air(mono),
        holes=float(np.mean(short < np.percentile(short, 95) - 30)),
        clipped=clipped,
    )


def liking(heard: Traits | None) -> dict[str, float]:
    """The parts of the score, before standardising: each trait squashed into 0..1 and weighted, one interaction, four
    guards."""
    if heard is None:
        return {"silence": -4.0}
    steady = more(heard.steady, 0.45, 0.3)
    # One attack in a clip is no punch, however far it rises.
    punch = more(heard.punch_db, 5.0, 2.5) * heard.attacks_per_s / (heard.attacks_per_s + 1)
    return {
        "pace": 1.1 * at_best(heard.attacks_per_s, 4.3, 2.2),
        "steady": 1.0 * steady,
        "punch": 0.8 * punch,
        "clear top": 0.9 * at_best(heard.top_db, -14.0, 5.5),
        "builds": 0.8 * at_best(heard.lift_db, 2.0, 2.5),
        "the beat lands": 0.8 * steady * punch,
        "a bare tone": -2.0 * ramp(heard.fullness, 2.6, 1.3),
        "noise": -2.5 * ramp(heard.tonality_db, 10.0, 5.0),
        "dead air": -3.0 * ramp(heard.dead_air, 0.05, 0.45) - 2.0 * ramp(heard.holes, 0.15, 0.5),
        "clipping": -2.0 * ramp(heard.clipped, 0.01, 0.11),
    }


# Mean over clips of the demo base, and what makes two clips of one prompt differ by about 1.
MEAN, SPREAD = 2.36, 0.66


def score(wav: NDArray[np.floating], sample_rate: int, gain_db: float = 0.0) -> float:
    """How much the clip is liked: 0 is usual, two clips of one prompt differ by about 1. wav [L] or [L, C]."""
    return (sum(liking(traits(wav, sample_rate, gain_db)).values()) - MEAN) / SPREAD
