"""The gold taste: what the simulated listeners like, as a fixed function of the sound and of nothing else.

    wav -> one loudness -> six audible traits -> squashed, weighted, one interaction, two guards -> score (about 1 wide
    in a prompt)

It stands in for human ears in tests and in the demo, so it must be unknown to whatever learns from the votes: no
trainer may import this package (tests/rlhf/simulation proves it), and this package knows numpy and scipy only. The
taste: warm rather than bright, tonal rather than noisy, unhurried, but with attacks now and then, a beat one can follow (the trait
that time-pooled features hardly show), some breath in the loudness, a bass that is there but does not boom. Dead air
and clipping are disliked by everybody.

It is not a model of human taste, and nothing measured with it says that people would agree.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy import signal

Array = NDArray[np.float64]

SAMPLE_RATE = 16_000
WINDOW, HOP = 1024, 256
FRAMES_PER_S = SAMPLE_RATE / HOP
LEVEL_DBFS = -20.0
SILENT_DBFS = -70.0
"""Below this the clip holds nothing to judge."""


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


def to_mono(wav: NDArray[np.floating], sample_rate: int) -> Array:
    """wav [L] or [L, C] -> [L] at 16 kHz."""
    mono: Array = np.asarray(wav, dtype=np.float64)
    mono = mono.mean(axis=1) if mono.ndim == 2 else mono
    if sample_rate != SAMPLE_RATE:
        divisor = int(np.gcd(sample_rate, SAMPLE_RATE))
        mono = signal.resample_poly(mono, SAMPLE_RATE // divisor, sample_rate // divisor)
    return mono


def _moments_db(mono: Array, length_s: float) -> Array:
    """Loudness (RMS) of consecutive moments, dBFS."""
    size = int(length_s * SAMPLE_RATE)
    whole = len(mono) // size * size
    moments = mono[:whole].reshape(-1, size) if whole else mono[None]
    level: Array = 10 * np.log10(np.mean(moments**2, axis=1) + 1e-12)
    return level


def at_one_loudness(mono: Array) -> Array:
    """Scale so that the moments that are heard (within 20 dB of the loudest) have an RMS of LEVEL_DBFS."""
    moments = _moments_db(mono, 0.1)
    heard = moments[moments > moments.max() - 20]
    scaled: Array = mono * 10 ** ((LEVEL_DBFS - 10 * np.log10(np.mean(10 ** (heard / 10)))) / 20)
    return scaled


def traits(wav: NDArray[np.floating], sample_rate: int, gain_db: float = 0.0) -> Traits | None:
    """Measure a clip as it leaves the loudspeaker: after `gain_db`, cut at full scale. None when there is nothing to
    hear."""
    mono = to_mono(wav, sample_rate) * 10 ** (gain_db / 20)
    if len(mono) < SAMPLE_RATE // 2 or not np.isfinite(mono).all() or _moments_db(mono, 0.1).max() < SILENT_DBFS:
        return None
    mono = np.clip(mono, -1.0, 1.0)
    top = np.abs(mono).max()
    clipped = float(np.mean(np.abs(mono) > 0.995 * top)) if top > 0.5 else 0.0
    mono = at_one_loudness(mono)

    frequency, _, spectrum = signal.stft(mono, SAMPLE_RATE, nperseg=WINDOW, noverlap=WINDOW - HOP, padded=False)
    power = np.abs(spectrum) ** 2 + 1e-12  # [F, T]
    frame_db = 10 * np.log10(power.sum(axis=0))
    loud = frame_db > np.percentile(frame_db, 95) - 30

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

    moments = _moments_db(mono, 0.2)
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


def _at_best(value: float, best: float, width: float) -> float:
    """1 at `best`, 1/2 at one width away, falling slowly: there is always a direction in which to improve."""
    return 1.0 / (1.0 + ((value - best) / width) ** 2)


def _more(value: float, middle: float, width: float) -> float:
    """0 for little, 1/2 at `middle`, 1 for much."""
    return float(0.5 + 0.5 * np.tanh((value - middle) / width))


def liking(heard: Traits | None) -> dict[str, float]:
    """The parts of the score, before standardising: each trait squashed into 0..1 and weighted, one interaction, two
    guards."""
    if heard is None:
        return {"silence": -4.0}
    groove = _more(heard.beat, 0.6, 0.25)
    bass = _at_best(heard.bass_db, -5.0, 5.0)
    return {
        "warm": 1.8 * _at_best(heard.tilt_db, 26.0, 10.0),
        "tonal": 1.6 * _more(heard.tonality_db, 26.0, 6.0),
        "attacks": 1.1 * _at_best(heard.attacks_per_s, 1.6, 2.0),
        "breath": 0.9 * _at_best(heard.breath_db, 9.0, 4.0),
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


def score_bytes(audio: bytes, gain_db: float = 0.0) -> float:
    """The score of an audio file's bytes (wav, flac or ogg)."""
    wav, sample_rate = soundfile.read(io.BytesIO(audio), dtype="float64")
    return score(wav, sample_rate, gain_db)


def score_file(path: Path) -> float:
    return score_bytes(path.read_bytes())
