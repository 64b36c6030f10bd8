"""What all tastes share: one loudness, spectra and moments, the shapes of liking, and what nobody likes.

wav [L] or [L, C] -> mono [L] at 16 kHz -> one loudness. numpy and scipy only."""

from __future__ import annotations

import io

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy import signal

Array = NDArray[np.float64]

SAMPLE_RATE = 16_000
LEVEL_DBFS = -20.0
SILENT_DBFS = -70.0
"""Below this the clip holds nothing to judge."""
FLOOR = 1e-12
BANDS_HZ: Array = 55 * 2 ** (np.arange(40) / 6)
"""Edges of bands a whole tone wide, 55 Hz to 5 kHz."""


def read(audio: bytes) -> tuple[Array, int]:
    """An audio file's bytes (wav, flac or ogg) -> wav [L] or [L, C], sample rate."""
    wav, sample_rate = soundfile.read(io.BytesIO(audio), dtype="float64")
    return wav, int(sample_rate)


def to_mono(wav: NDArray[np.floating], sample_rate: int) -> Array:
    """wav [L] or [L, C] -> [L] at 16 kHz."""
    mono: Array = np.asarray(wav, dtype=np.float64)
    mono = mono.mean(axis=1) if mono.ndim == 2 else mono
    if sample_rate != SAMPLE_RATE:
        divisor = int(np.gcd(sample_rate, SAMPLE_RATE))
        mono = signal.resample_poly(mono, SAMPLE_RATE // divisor, sample_rate // divisor)
    return mono


def moments_db(mono: Array, length_s: float) -> Array:
    """Loudness (RMS) of consecutive moments, dBFS."""
    size = int(length_s * SAMPLE_RATE)
    whole = len(mono) // size * size
    moments = mono[:whole].reshape(-1, size) if whole else mono[None]
    level: Array = 10 * np.log10(np.mean(moments**2, axis=1) + FLOOR)
    return level


def at_one_loudness(mono: Array) -> Array:
    """Scale so that the moments that are heard (within 20 dB of the loudest) have an RMS of LEVEL_DBFS."""
    moments = moments_db(mono, 0.1)
    heard = moments[moments > moments.max() - 20]
    scaled: Array = mono * 10 ** ((LEVEL_DBFS - 10 * np.log10(np.mean(10 ** (heard / 10)))) / 20)
    return scaled


def from_loudspeaker(wav: NDArray[np.floating], sample_rate: int, gain_db: float = 0.0) -> tuple[Array, float] | None:
    """The clip after `gain_db`, cut at full scale: mono [L] at one loudness, and the share of samples standing at its top.

    None when there is nothing to hear: under half a second, not finite, or inaudible."""
    mono = to_mono(wav, sample_rate) * 10 ** (gain_db / 20)
    if len(mono) < SAMPLE_RATE // 2 or not np.isfinite(mono).all() or moments_db(mono, 0.1).max() < SILENT_DBFS:
        return None
    mono = np.clip(mono, -1.0, 1.0)
    top = np.abs(mono).max()
    clipped = float(np.mean(np.abs(mono) > 0.995 * top)) if top > 0.5 else 0.0
    return at_one_loudness(mono), clipped


def power_spectrum(mono: Array, window: int, hop: int) -> tuple[Array, Array]:
    """Hz [F] and power [F, T] of a Hann-windowed spectrum, never zero."""
    frequency, _, spectrum = signal.stft(mono, SAMPLE_RATE, nperseg=window, noverlap=window - hop, padded=False)
    return frequency, np.abs(spectrum) ** 2 + FLOOR


def loud_frames(power: Array, range_db: float = 30.0) -> NDArray[np.bool_]:
    """Which frames of power [F, T] are heard beside the loud ones: [T]."""
    frame_db = 10 * np.log10(power.sum(axis=0))
    heard: NDArray[np.bool_] = frame_db > np.percentile(frame_db, 95) - range_db
    return heard


def tonality_db(power: Array) -> float:
    """Minus the spectral flatness of power [F, T], mean over frames: notes are high, noise is about 2.5."""
    return float((10 * np.log10(power.mean(axis=0)) - 10 * np.log10(power).mean(axis=0)).mean())


def band_amplitudes(frequency: Array, power: Array, edges_hz: Array = BANDS_HZ) -> Array:
    """Power [F, T] -> amplitude of the bands between the edges, those that hold a bin: [bands, T]."""
    place = np.digitize(frequency, edges_hz)
    amplitudes: Array = np.sqrt(np.stack([power[place == band].sum(axis=0) for band in range(1, len(edges_hz)) if (place == band).any()]))
    return amplitudes


def fullness(bands: Array) -> float:
    """How many of the bands [bands, T] share the energy; 1 is a single tone."""
    share = (bands**2).sum(axis=1) / (bands**2).sum()
    return float(1 / (share**2).sum())


def dead_air(mono: Array) -> float:
    """Share of the time, in moments of 200 ms, more than 40 dB under the loud ones."""
    moments = moments_db(mono, 0.2)
    return float(np.mean(moments < np.percentile(moments, 95) - 40))


# ---- shapes of liking ------------------------------------------------------------------------------------------------


def at_best(value: float, best: float, width: float) -> float:
    """1 at `best`, 1/2 at one width away, falling slowly: there is always a direction in which to improve."""
    return 1.0 / (1.0 + ((value - best) / width) ** 2)


def more(value: float, middle: float, width: float) -> float:
    """0 for little, 1/2 at `middle`, 1 for much."""
    return float(0.5 + 0.5 * np.tanh((value - middle) / width))


def ramp(value: float, start: float, full: float) -> float:
    """0 up to `start`, 1 from `full` on (which may lie below `start`), a straight line between: for guards."""
    return float(np.clip((value - start) / (full - start), 0, 1))
