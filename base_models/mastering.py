"""Mastering: a generated wav [C, L] -> a track that sits beside released music. Classical signal processing, no network.

    high-pass 30 Hz -> resample -> adaptive shelves -> compressor -> stereo from mono -> fades -> gain <-> look-ahead limiter

Each stage is a function of its own. The chain is deterministic and does not depend on the input's level. Loudness follows
ITU-R BS.1770-4, true peak its annex 2 (four-fold oversampling); -14 LUFS and -1 dBTP are what streaming services ask for
(AES TD1008). The compressor and limiter follow Giannoulis, Massberg and Reiss 2012, "Digital dynamic range compressor design".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

from base_models import audio
from base_models.errors import UserError

TARGET_LUFS = -14.0
CEILING_DBTP = -1.0
MIN_DURATION_S = 0.4
"""One gating block of BS.1770: a shorter clip has no loudness."""
SAMPLE_RATES = (8_000, 192_000)

TARGET_SLOPE_DB_PER_OCTAVE = -5.0
"""Power density of released popular music falls by about 5 dB an octave from 100 Hz to 4 kHz (Pestana et al. 2013, AES 135)."""
LOW_BAND_HZ, MID_BAND_HZ, HIGH_BAND_HZ = (50.0, 200.0), (250.0, 2_500.0), (3_000.0, 7_000.0)
MAX_SHELF_DB = 4.0
EMPTY_BAND_DB = 30.0
"""A band so far under the fullest holds nothing (a flute has no bass): raising it would raise noise, so it is left alone."""

THRESHOLD_DB, RATIO, KNEE_DB = -15.0, 2.0, 6.0
"""Against the clip's level once it stands at the target loudness."""
ATTACK_S, RELEASE_S = 0.010, 0.120
CONTROL_RATE = 1_000.0
"""The compressor's gain is computed at this rate (Hz) and interpolated: exact branching, and hundreds of times real time."""

SIDE_DB, SIDE_FROM_HZ = -9.0, 250.0
LOOK_AHEAD_S, LIMITER_RELEASE_S = 0.003, 0.060
MAX_LIMITING_DB = 20.0
"""Sparse clicks would need more to reach the target: they stay quieter, and `lufs` says so."""
LOUDNESS_TOLERANCE = 0.02
PEAK_MARGIN_DB = 0.15
"""Four-fold oversampling can read a peak short by this much; a finer meter shall find no over either."""

Wav = NDArray[np.float32]
Samples = NDArray[np.float64]


@dataclass(frozen=True)
class MasteredTrack:
    """A finished track and what was done to it. `lufs` and `true_peak_dbfs` are measured on `wav`; both are -inf for silence."""

    wav: Wav
    """[C, L] float32."""
    sample_rate: int
    lufs: float
    true_peak_dbfs: float
    eq_low_db: float
    eq_high_db: float
    compression_db: float
    """The most that the compressor took off."""
    limiting_db: float
    """The most that the limiter took off."""

    @property
    def duration_s(self) -> float:
        return self.wav.shape[1] / self.sample_rate

    def save(self, path: str | Path) -> Path:
        """Write the file that the suffix names: wav, flac, ogg or mp3."""
        audio.write_audio(path, self.wav, self.sample_rate)
        return Path(path)


def master(
    wav: NDArray[np.floating],
    sample_rate: int,
    target_lufs: float = TARGET_LUFS,
    sample_rate_out: int | None = 44_100,
    stereo: bool = True,
) -> MasteredTrack:
    """Master wav [C, L], C of 1 or 2, to `target_lufs` within .3 LU and at most -1 dBTP.

    Args: sample_rate_out: None keeps the input's. stereo: two channels out (a mono input is widened), else their mean.
    Silence, that is anything under the -70 LUFS gate, comes back as silence. Raises UserError for what cannot be mastered.
    """
    clip = _checked(wav, sample_rate)
    rate = sample_rate_out or sample_rate
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        raise UserError(f"an output at {rate} Hz", f"{SAMPLE_RATES[0]} to {SAMPLE_RATES[1]} Hz", "ask for 44100 or 16000")
    if not -40.0 <= target_lufs <= -6.0:
        raise UserError(f"a target of {target_lufs} LUFS", "-40 to -6 LUFS", "ask for -14, the level of streaming services")
    if not stereo:
        clip = clip.mean(0, keepdims=True)
    clip = high_pass(clip, sample_rate)
    if rate != sample_rate:
        clip = np.asarray(audio.resample(clip.astype(np.float32), sample_rate, rate), np.float64)
    channels = 2 if stereo else 1
    loudness = _lufs(clip, rate)
    if loudness == -math.inf:
        silence = np.zeros((channels, clip.shape[1]), np.float32)
        return MasteredTrack(silence, rate, -math.inf, -math.inf, 0.0, 0.0, 0.0, 0.0)
    clip = clip * 10 ** ((target_lufs - loudness) / 20)
    low_db, high_db = shelf_gains(clip, rate, bandwidth_hz=min(sample_rate, rate) / 2)
    clip = shelves(clip, rate, low_db, high_db)
    clip, compression_db = compress(clip, rate)
    if stereo and len(clip) == 1:
        clip = widen(clip[0], rate)
    clip = fade_ends(clip, rate)
    clip, limiting_db = _to_loudness(clip, rate, target_lufs)
    out = np.ascontiguousarray(clip, np.float32)
    return MasteredTrack(out, rate, _lufs(out, rate), audio.true_peak_dbfs(out, rate), low_db, high_db, compression_db, limiting_db)


def _checked(wav: NDArray[np.floating], sample_rate: int) -> Samples:
    """wav as float64 [C, L], or UserError."""
    clip = np.asarray(wav)
    if clip.ndim != 2 or clip.shape[0] not in (1, 2) or not np.issubdtype(clip.dtype, np.floating):
        raise UserError(f"audio of shape {clip.shape} and type {clip.dtype}", "float samples [1 or 2, L]", "pass wav [C, L]")
    if not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        raise UserError(f"a sample rate of {sample_rate} Hz", f"{SAMPLE_RATES[0]} to {SAMPLE_RATES[1]} Hz", "check the rate")
    if clip.shape[1] < round(MIN_DURATION_S * sample_rate):
        raise UserError(
            f"a clip of {clip.shape[1] / sample_rate:.3f} s",
            f"at least {MIN_DURATION_S} s, the shortest that BS.1770 gives a loudness",
            "master a longer clip",
        )
    if bad := int(np.count_nonzero(~np.isfinite(clip))):
        raise UserError(f"{bad} samples that are NaN or infinite", "finite samples", "check the decoder or the file it came from")
    return clip.astype(np.float64)


def _lufs(clip: NDArray[np.floating], sample_rate: int) -> float:
    return float(audio.integrated_lufs(np.asarray(clip, np.float32), sample_rate))


# ---- equaliser ---------------------------------------------------------------------------------------------------------


def high_pass(clip: Samples, sample_rate: int, cutoff_hz: float = 30.0) -> Samples:
    """Take away rumble and any constant offset: second-order Butterworth, [C, L] -> [C, L]."""
    sos = signal.butter(2, cutoff_hz, "highpass", fs=sample_rate, output="sos")
    return signal.sosfilt(sos, clip - clip.mean(-1, keepdims=True), axis=-1)


def shelf_gains(clip: Samples, sample_rate: int, bandwidth_hz: float) -> tuple[float, float]:
    """Half of the way from the long-term spectrum to the target slope, as (low, high) shelf gains in dB, within +-4.

    bandwidth_hz: up to where the recording has content (its own Nyquist frequency before resampling).
    """
    size = min(clip.shape[1], 4096)
    frequency, power = signal.welch(clip, sample_rate, nperseg=size, axis=-1)
    power = power.mean(0)

    def deviation(band: tuple[float, float]) -> float:
        """Mean level over a band in dB, each octave counted alike, after the target slope is taken out."""
        inside = (frequency >= band[0]) & (frequency <= min(band[1], 0.9 * bandwidth_hz))
        if not inside.any():
            return -math.inf
        octaves = np.log2(frequency[inside] / 1_000.0)
        flattened = power[inside] * 10 ** (-TARGET_SLOPE_DB_PER_OCTAVE * octaves / 10)
        level = float((flattened / frequency[inside]).sum() / (1 / frequency[inside]).sum())
        return 10 * math.log10(level) if level > 0 else -math.inf

    low, mid, high = deviation(LOW_BAND_HZ), deviation(MID_BAND_HZ), deviation(HIGH_BAND_HZ)
    present = max(low, mid, high) - EMPTY_BAND_DB

    def gain(level: float) -> float:
        return float(np.clip((mid - level) / 2, -MAX_SHELF_DB, MAX_SHELF_DB)) if min(level, mid) > present else 0.0

    return gain(low), gain(high)


def shelves(clip: Samples, sample_rate: int, low_db: float, high_db: float) -> Samples:
    """A low shelf at 220 Hz and a high shelf at 2.8 kHz, [C, L] -> [C, L]."""
    sos = np.stack([_shelf(220.0, low_db, sample_rate, high=False), _shelf(2_800.0, high_db, sample_rate, high=True)])
    return signal.sosfilt(sos, clip, axis=-1)


def _shelf(corner_hz: float, gain_db: float, sample_rate: int, high: bool) -> Samples:
    """One second-order section [6] of a shelf with slope 1 (R. Bristow-Johnson, "Audio EQ Cookbook")."""
    a = 10 ** (gain_db / 40)
    w = 2 * math.pi * min(corner_hz, 0.45 * sample_rate) / sample_rate
    cos, alpha = math.cos(w) * (-1 if high else 1), math.sin(w) / math.sqrt(2)
    sign, root = (-1 if high else 1), 2 * math.sqrt(a) * alpha
    b = [a * (a + 1 - (a - 1) * cos + root), sign * 2 * a * (a - 1 - (a + 1) * cos), a * (a + 1 - (a - 1) * cos - root)]
    c = [a + 1 + (a - 1) * cos + root, sign * -2 * (a - 1 + (a + 1) * cos), a + 1 + (a - 1) * cos - root]
    return np.array([*b, *c]) / c[0]


# ---- dynamics ----------------------------------------------------------------------------------------------------------


def compress(clip: Samples, sample_rate: int) -> tuple[Samples, float]:
    """Feed-forward compressor with a soft knee, its channels linked. Returns the clip and the most that it took off, in dB."""
    hop = max(1, round(sample_rate / CONTROL_RATE))
    n = -(-clip.shape[1] // hop)
    padded = np.pad((clip**2).mean(0), (0, n * hop - clip.shape[1]))
    power = ndimage.uniform_filter1d(padded.reshape(n, hop).mean(1), 5, mode="nearest")
    over = 10 * np.log10(power + 1e-12) - THRESHOLD_DB
    slope = 1 - 1 / RATIO
    knee = np.clip(over + KNEE_DB / 2, 0, KNEE_DB)
    wanted = slope * (knee**2 / (2 * KNEE_DB) + np.maximum(over - KNEE_DB / 2, 0))
    step_s = hop / sample_rate
    attack, release = math.exp(-step_s / ATTACK_S), math.exp(-step_s / RELEASE_S)
    reduction, now = np.empty(n), 0.0
    for i, target in enumerate(wanted.tolist()):
        now = target + (attack if target > now else release) * (now - target)
        reduction[i] = now
    at = (np.arange(n) + 0.5) * hop
    smooth = np.interp(np.arange(clip.shape[1]), at, reduction)
    return clip * 10 ** (-smooth / 20), float(reduction.max())


def peak_envelope_db(clip: Samples) -> Samples:
    """The true peak around each sample over all channels, in dBFS: [C, L] -> [L]. Four-fold oversampling (BS.1770 annex 2)."""
    fine = np.abs(signal.resample_poly(clip, 4, 1, axis=-1)).max(0)
    per_sample = ndimage.maximum_filter1d(fine, 5)[::4][: clip.shape[1]]
    return 20 * np.log10(np.maximum(per_sample, 1e-9))


def limiter_reduction_db(peaks_db: Samples, sample_rate: int, ceiling_db: float) -> Samples:
    """How far to turn down at each sample so that no peak passes the ceiling: [L] -> [L], in dB, all >= 0.

    The reduction is held over the look-ahead by a running maximum, falls back exponentially, and is smoothed by a window no
    longer than that hold, so it is never less than needed. The exponential fall r[n] = max(x[n], q r[n - 1]) has the closed
    form q^n max_k<=n x[k] q^-k, which a running maximum of logarithms computes at once.
    """
    need = np.maximum(peaks_db - ceiling_db, 0.0)
    half = max(1, round(LOOK_AHEAD_S * sample_rate / 2))
    held = ndimage.maximum_filter1d(need, 2 * half + 1)
    decay = np.arange(len(held)) / (LIMITER_RELEASE_S * sample_rate)
    with np.errstate(divide="ignore"):  # where nothing is to be taken off the logarithm is -inf, and its exponential 0
        falling = np.exp(np.maximum.accumulate(np.log(held) + decay) - decay)
    window = signal.windows.hann(2 * half + 3)[1:-1]
    return ndimage.convolve1d(falling, window / window.sum(), mode="nearest")


def fade_ends(clip: Samples, sample_rate: int) -> Samples:
    """A clip cut out of the middle of a sound would click: 3 ms in and 12 ms out, raised cosine."""
    out = clip.copy()
    for seconds, part in ((0.003, slice(None, None, 1)), (0.012, slice(None, None, -1))):
        size = round(seconds * sample_rate)
        out[:, part][:, :size] *= 0.5 - 0.5 * np.cos(np.pi * (np.arange(size) + 0.5) / size)
    return out


def _to_loudness(clip: Samples, sample_rate: int, target_lufs: float) -> tuple[Samples, float]:
    """Gain and limiter together: limiting costs loudness, so the gain is found by iteration. Returns clip, most limiting."""
    peaks = peak_envelope_db(clip)
    highest_gain = CEILING_DBTP + MAX_LIMITING_DB - float(peaks.max())
    gain = min(target_lufs - _lufs(clip, sample_rate), highest_gain)
    for _ in range(16):
        reduction = limiter_reduction_db(peaks + gain, sample_rate, CEILING_DBTP - PEAK_MARGIN_DB)
        out = clip * 10 ** ((gain - reduction) / 20)
        missing = target_lufs - _lufs(out, sample_rate)
        if abs(missing) < LOUDNESS_TOLERANCE or (gain >= highest_gain and missing > 0):
            break
        gain = min(gain + missing, highest_gain)
    over = audio.true_peak_dbfs(np.asarray(out, np.float32), sample_rate) - CEILING_DBTP
    if over > 0:  # a moving gain can raise a peak between samples by a few hundredths of a dB
        out = out * 10 ** (-(over + 0.001) / 20)
    return out, float(reduction.max())


# ---- stereo ------------------------------------------------------------------------------------------------------------


def widen(mid: Samples, sample_rate: int) -> Samples:
    """Mono [L] -> stereo [2, L] = mid +- side; the mean of the two channels is the input again, so mono players lose nothing.

    The side is the mid above 250 Hz through a 20 ms all-pass of random phase (the same on every call), 9 dB down: it has
    the mid's spectrum and almost none of its waveform.
    """
    size = round(0.020 * sample_rate)
    noise = np.random.default_rng(0).standard_normal(size) * np.exp(-np.arange(size) / (0.006 * sample_rate))
    spectrum = np.fft.rfft(noise)
    response = np.fft.irfft(spectrum / np.maximum(np.abs(spectrum), 1e-9), size)
    sos = signal.butter(2, SIDE_FROM_HZ, "highpass", fs=sample_rate, output="sos")
    side = signal.oaconvolve(signal.sosfilt(sos, mid), response)[: len(mid)] * 10 ** (SIDE_DB / 20)
    return np.stack([mid + side, mid - side])
