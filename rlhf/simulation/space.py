"""The taste `space`: what a listener likes who wants to sink into a sound, as a fixed function of the sound alone.

    wav -> one loudness -> six audible traits -> squashed, weighted, one interaction, four guards -> score (about 1 wide in
    a prompt)

Sound that lasts without standing still, a clear middle and upper register, soft attacks, and three traits that statistics
pooled over time hardly show: the partials that sound together are consonant, the end has come to another place than the
beginning, and it comes to rest there. A held tone, noise, dead air and clipping are no space.
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
    loud_frames,
    moments_db,
    more,
    power_spectrum,
    ramp,
    tonality_db,
)

WINDOW, HOP = 4096, 1600
FRAMES_PER_S = SAMPLE_RATE // HOP
PARTIALS = 16
"""How many of the strongest partials are heard together."""


@dataclass(frozen=True)
class Traits:
    """What can be heard in a clip, in physical units."""

    sustain: float
    """Likeness of the spectrum to itself 0.4 s later, 0 to 1."""
    journey: float
    """How far the spectrum of the last third lies from that of the first, 0 (the same) to 1."""
    roughness: float
    """Beating among the partials that sound together: consonant is low."""
    air_db: float
    """Energy at 1-4 kHz over that at 0.15-8 kHz."""
    strike_db: float
    """The steepest rises of loudness (95 %) from one moment of 50 ms to the next."""
    settle_db: float
    """The last 0.8 s over the whole."""
    fullness: float
    """How many bands share the sound; 1 is a single tone."""
    tonality_db: float
    """Minus the spectral flatness: notes are high, noise is about 2.5."""
    dead_air: float
    """Share of the time more than 40 dB under the loud moments."""
    clipped: float
    """Share of samples standing at the top of the waveform."""


def roughness(frequency: Array, amplitude: Array) -> float:
    """Sensory roughness of one moment, freed of its loudness: sum over pairs of partials of a_i a_j (exp(-3.5 s d) -
    exp(-5.75 s d)) over sum a^2, with d the distance in Hz and s = 0.24 / (0.0207 f_low + 18.96). Sethares 1993.

    Args: frequency [F] Hz, amplitude [F]."""
    peaks, _ = signal.find_peaks(amplitude, height=amplitude.max() * 0.03)
    peaks = peaks[np.argsort(amplitude[peaks])[-PARTIALS:]]
    if len(peaks) < 2:
        return 0.0
    left, right = np.triu_indices(len(peaks), 1)
    f, a = frequency[peaks], amplitude[peaks]
    distance = np.abs(f[left] - f[right])
    s = 0.24 / (0.0207 * np.minimum(f[left], f[right]) + 18.96)
    return float((a[left] * a[right] * (np.exp(-3.5 * s * distance) - np.exp(-5.75 * s * distance))).sum() / (a @ a))


def traits(wav: NDArray[np.floating], sample_rate: int, gain_db: float = 0.0) -> Traits | None:
    """Measure a clip as it leaves the loudspeaker: after `gain_db`, cut at full scale. None when there is nothing to
    hear."""
    played = from_loudspeaker(wav, sample_rate, gain_db)
    if played is None:
        return None
    mono, clipped = played

    frequency, power = power_spectrum(mono, WINDOW, HOP)  # [F], [F, T]

    def energy(low: float, high: float) -> float:
        return float(power[(frequency >= low) & (frequency < high)].sum())

    bands = band_amplitudes(frequency, power)
    shape = bands / np.linalg.norm(bands, axis=0)  # unit columns [bands, T]
    later = min(round(0.4 * FRAMES_PER_S), shape.shape[1] - 1)
    third = max(1, shape.shape[1] // 3)
    first, last = shape[:, :third].mean(axis=1), shape[:, -third:].mean(axis=1)

    partials = np.sqrt(power[frequency < 4700])
    moments = 10 ** (moments_db(mono, 0.1) / 10)
    return Traits(
        sustain=float((shape[:, later:] * shape[:, : shape.shape[1] - later]).sum(axis=0).mean()),
        journey=float(1 - first @ last / (np.linalg.norm(first) * np.linalg.norm(last))),
        roughness=float(np.mean([roughness(frequency, partials[:, t]) for t in np.flatnonzero(loud_frames(power))])),
        air_db=float(10 * np.log10(energy(1000, 4000) / energy(150, 8000))),
        strike_db=float(np.percentile(np.diff(moments_db(mono, 0.05)), 95)),
        settle_db=float(10 * np.log10((moments[-8:].mean() + 1e-9) / (moments.mean() + 1e-9))),
        fullness=fullness(bands),
        tonality_db=tonality_db(power[(frequency >= 100) & (frequency < 7000)]),
        dead_air=dead_air(mono),
        clipped=clipped,
    )


def liking(heard: Traits | None) -> dict[str, float]:
    """The parts of the score, before standardising: each trait squashed into 0..1 and weighted, one interaction, four
    guards."""
    if heard is None:
        return {"silence": -4.0}
    lasts = at_best(heard.sustain, 0.86, 0.08)
    consonant = more(-heard.roughness, -0.09, 0.04)
    return {
        "lasts": 1.2 * lasts,
        "consonant": 0.9 * consonant,
        "travels": 0.8 * at_best(heard.journey, 0.2, 0.12),
        "air": 0.8 * at_best(heard.air_db, -8.0, 4.0),
        "soft": 0.7 * more(-heard.strike_db, -4.0, 2.5),
        "comes to rest": 0.6 * at_best(heard.settle_db, -1.5, 1.5),
        "a chord that lasts": 0.8 * lasts * consonant,
        "a held tone": -1.5 * ramp(heard.fullness, 2.5, 1.1) - 1.0 * ramp(heard.journey, 0.01, 0.0),
        "noise": -2.5 * ramp(heard.tonality_db, 10.0, 5.0),
        "dead air": -3.0 * ramp(heard.dead_air, 0.05, 0.45),
        "clipping": -2.0 * ramp(heard.clipped, 0.01, 0.11),
    }


# Mean over clips of the demo base, and what makes two clips of one prompt differ by about 1.
MEAN, SPREAD = 2.67, 0.78


def score(wav: NDArray[np.floating], sample_rate: int, gain_db: float = 0.0) -> float:
    """How much the clip is liked: 0 is usual, two clips of one prompt differ by about 1. wav [L] or [L, C]."""
    return (sum(liking(traits(wav, sample_rate, gain_db)).values()) - MEAN) / SPREAD
