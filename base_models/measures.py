"""Measures of sound for evaluation, independent of every model that they judge: numpy, scipy and scikit-learn, no torch.

    log_mel_l1       how far a codec's output lies from its input        opus_roundtrip   the rival at a bitrate
    estimate_tempo   beats a minute from the onset envelope              GenreProbe       does it sound like its genre?

wav is [L] or [C, L] float in [-1, 1]; channels are mixed down.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from base_models.atomic import atomic_file
from base_models.audio import resample
from base_models.errors import UserError

Array = NDArray[np.floating]

N_MELS = 80
N_FFT = 1024
HOP_LENGTH = 256
MAGNITUDE_FLOOR = 1e-2
"""Of the magnitudes of a 1024-point Hann spectrum, where a full-scale sine has 256: about -88 dB."""

OPUS_SAMPLE_RATES = (8000, 12000, 16000, 24000, 48000)
OPUS_MIN_BPS, OPUS_RANGE_BPS = 6000, 250000
MIN_BPM, MAX_BPM = 40.0, 240.0


# ---- spectra ---------------------------------------------------------------------------------------------------------


def _mono(wav: Array) -> Array:
    samples = np.asarray(wav, dtype=np.float64)
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise UserError(f"audio of shape {samples.shape}", "samples [L] or [C, L], at least one", "check what made it")
    if not np.isfinite(samples).all():
        raise UserError("audio with NaN or infinite samples", "finite samples", "check what made it")
    return np.asarray(samples.mean(0)) if samples.ndim == 2 else samples


def _magnitudes(mono: Array, n_fft: int, hop_length: int) -> Array:
    """|STFT| [n_fft/2+1, frames], Hann window, frame t centred on sample t * hop_length, the ends mirrored."""
    padded = np.pad(mono, n_fft // 2, mode="reflect" if len(mono) > n_fft // 2 else "constant")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    return np.abs(np.fft.rfft((frames * window).astype(np.float32), axis=1)).T


def _slaney_mel(hz: Array) -> Array:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    return np.where(hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1000) / 1000) * 27 / np.log(6.4))


@functools.lru_cache(maxsize=16)
def mel_filters(sr: int, n_fft: int = N_FFT, n_mels: int = N_MELS) -> Array:
    """Triangles of height one, spaced evenly on Slaney's mel scale from 0 to sr / 2: [n_mels, n_fft/2+1]."""
    mels = np.linspace(0, float(_slaney_mel(np.asarray(sr / 2))), n_mels + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    bins = np.arange(n_fft // 2 + 1) * sr / n_fft
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling))


def log_mel(wav: Array, sr: int, *, n_fft: int = N_FFT, hop_length: int = HOP_LENGTH, n_mels: int = N_MELS) -> Array:
    """ln(max(mel magnitudes, 0.01)) [n_mels, frames], frames = 1 + L // hop_length. The defaults are meant for 16 kHz."""
    return np.log(np.maximum(mel_filters(sr, n_fft, n_mels) @ _magnitudes(_mono(wav), n_fft, hop_length), MAGNITUDE_FLOOR))


def log_mel_l1(a: Array, b: Array, sr: int) -> float:
    """Mean |log_mel(a) - log_mel(b)| over 80 bands and all frames, nepers. A longer one is cut to the shorter's length."""
    left, right = _mono(a), _mono(b)
    length = min(len(left), len(right))
    if abs(len(left) - len(right)) > 0.05 * max(len(left), len(right)):
        raise UserError(f"clips of {len(left)} and {len(right)} samples", "two takes of one clip", "compare like with like")
    return float(np.abs(log_mel(left[:length], sr) - log_mel(right[:length], sr)).mean())


def chroma(wav: Array, sr: int, *, n_fft: int = 4096, hop_length: int = 1024) -> Array:
    """How the energy from 55 Hz to 4 kHz falls on the 12 pitch classes (0 = C): [12, frames], each frame summing to 1 or 0."""
    magnitudes = _magnitudes(_mono(wav), n_fft, hop_length)
    bins = np.arange(n_fft // 2 + 1) * sr / n_fft
    audible = (bins >= 55) & (bins <= min(4000, sr / 2))
    classes = np.round(12 * np.log2(bins[audible] / 440) + 69).astype(int) % 12
    folded = (np.arange(12)[:, None] == classes).astype(magnitudes.dtype) @ magnitudes[audible] ** 2
    total = folded.sum(0, keepdims=True)
    return np.divide(folded, total, out=np.zeros_like(folded), where=total > 1e-9)


# ---- Opus, the rival of the codec ------------------------------------------------------------------------------------


def opus_encode(wav: Array, sr: int, kbps: float) -> bytes:
    """Mono Ogg Opus at `kbps` (6 to 256) as libsndfile writes it.

    libsndfile sets the bitrate a channel to (1 - compression_level) * 250000 + 6000 bit/s, constrained VBR. (soundfile's
    `bitrate_mode` is no help: libsndfile ignores it for Opus, and refuses it next to a level.) On 60 held-out clips of 6 s
    `opus_bitrate` found 5.99, 11.95 and 24.55 kbps for 6, 12 and 24; the Ogg container adds 1.8 kbps at that length.
    """
    if sr not in OPUS_SAMPLE_RATES:
        raise UserError(f"{sr} Hz for Opus", f"one of {OPUS_SAMPLE_RATES}", "resample it with base_models.audio.resample")
    level = 1 - (kbps * 1000 - OPUS_MIN_BPS) / OPUS_RANGE_BPS
    if not 0 <= level <= 1:
        raise UserError(f"{kbps} kbps", f"{OPUS_MIN_BPS / 1000:g} to {(OPUS_MIN_BPS + OPUS_RANGE_BPS) / 1000:g}", "choose one")
    buffer = io.BytesIO()
    kind = {"format": "OGG", "subtype": "OPUS", "compression_level": level}
    with soundfile.SoundFile(buffer, "w", sr, 1, **kind) as file:
        file.write(np.clip(_mono(wav), -1, 1).astype(np.float32))
    return buffer.getvalue()


def opus_bitrate(encoded: bytes, duration_s: float) -> float:
    """kbps of the Opus packets alone: the sizes of the Ogg pages' segments without the two header packets (RFC 3533, 7845)."""
    position = page = payload = 0
    while position < len(encoded):
        if encoded[position : position + 4] != b"OggS":
            raise UserError(f"no Ogg page at byte {position}", "an Ogg Opus stream", "encode it with opus_encode")
        segments = encoded[position + 26]
        size = sum(encoded[position + 27 : position + 27 + segments])
        payload += size if page >= 2 else 0
        position += 27 + segments + size
        page += 1
    return payload * 8 / duration_s / 1000


def opus_roundtrip(wav: Array, sr: int, kbps: float) -> NDArray[np.float32]:
    """What Opus at `kbps` leaves of a clip: mono [L] float32, as long as the input and in step with it."""
    decoded, _ = soundfile.read(io.BytesIO(opus_encode(wav, sr, kbps)), dtype="float32")
    length = np.asarray(wav).shape[-1]
    return np.pad(decoded[:length], (0, max(0, length - len(decoded))))


# ---- tempo -----------------------------------------------------------------------------------------------------------


def onset_envelope(wav: Array, sr: int, frame_rate: float = 100.0) -> tuple[Array, float]:
    """(how much louder the mel bands became at each frame [frames], frames a second). Spectral flux, its slow trend removed."""
    hop_length = max(1, round(sr / frame_rate))
    flux = np.maximum(0, np.diff(log_mel(wav, sr, hop_length=hop_length), axis=1)).mean(0)
    width = min(len(flux), round(sr / hop_length))
    if width == 0:
        return np.zeros(1), sr / hop_length
    trend = np.convolve(flux, np.ones(width), "same") / np.convolve(np.ones(len(flux)), np.ones(width), "same")
    return np.maximum(0, flux - trend), sr / hop_length


def estimate_tempo(wav: Array, sr: int, *, prior_bpm: float = 120.0, prior_octaves: float = 1.0) -> float:
    """Beats a minute, from 40 to 240, or NaN where nothing recurs (silence, a drone).

    The lag at which the onset envelope resembles itself most, supported by twice and half that lag, weighed by a log-normal
    prior around `prior_bpm`. Weights and prior were chosen on the demo corpus's val split (`tempo_matches` .90 there, .96 on
    the 299 clips of test_piece). The idea of Ellis 2007, "Beat tracking by dynamic programming", J. New Music Research 36(1), section 3.2.
    """
    envelope, frame_rate = onset_envelope(wav, sr)
    if len(envelope) < 2 * frame_rate or envelope.max() < 1e-6:
        return math.nan
    n = len(envelope)
    spectrum = np.fft.rfft(envelope - envelope.mean(), 2 * n)
    autocorrelation = np.fft.irfft(np.abs(spectrum) ** 2)[:n]
    autocorrelation /= autocorrelation[0] * (1 - 0.5 * np.arange(n) / n)  # half way to the unbiased one: long lags are few
    lags = np.arange(math.ceil(60 * frame_rate / MAX_BPM), min(math.floor(60 * frame_rate / MIN_BPM), n - 2) + 1)
    twice, half = (np.interp(lags * factor, np.arange(n), autocorrelation, right=0.0) for factor in (2, 0.5))
    prior = np.exp(-0.5 * (np.log2(60 * frame_rate / lags / prior_bpm) / prior_octaves) ** 2)
    scores = (autocorrelation[lags] + 0.5 * twice + 0.25 * half) * prior
    best = int(np.argmax(scores))
    if scores[best] <= 0:
        return math.nan
    left, middle, right = autocorrelation[lags[best] - 1 : lags[best] + 2]
    bend = left - 2 * middle + right
    shift = 0.5 * (left - right) / bend if bend < 0 else 0.0  # the top of the parabola through three points
    return float(60 * frame_rate / (lags[best] + min(0.5, max(-0.5, shift))))


def tempo_matches(estimate: float, true: float, tolerance: float = 0.08) -> bool:
    """Within `tolerance` of the tempo, its double or its half (the octave of a tempo is a matter of taste). NaN never is."""
    return any(abs(estimate - true * factor) <= tolerance * true * factor for factor in (0.5, 1.0, 2.0))


# ---- genre -----------------------------------------------------------------------------------------------------------

PROBE_SAMPLE_RATE = 16000
PROBE_RMS = 0.1
MODULATION_EDGES_HZ = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0, 31.0)
MODULATION_BANDS = 8


def _spread(values: Array) -> Array:
    """Mean, std and three percentiles of each row: [rows * 5]."""
    return np.concatenate([values.mean(1), values.std(1), *np.percentile(values, (10, 50, 90), axis=1)])


def probe_features(wav: Array, sr: int) -> Array:
    """What a clip sounds like, whatever its level and key [F]: timbre, how it moves, how busy it is, how it is tuned.

    Log-mel statistics and frame-to-frame changes; energy of the modulation (0.25 to 31 Hz) in 8 groups of bands; chroma sorted
    within the clip and the magnitudes of its Fourier transform over pitch classes (both blind to transposition); onset rate.
    """
    mono = np.asarray(resample(_mono(wav), sr, PROBE_SAMPLE_RATE), dtype=np.float64)
    rms = math.sqrt(float(np.mean(mono**2)))
    mono = mono * (PROBE_RMS / rms) if rms > 1e-6 else mono
    if len(mono) < PROBE_SAMPLE_RATE:
        mono = np.pad(mono, (0, PROBE_SAMPLE_RATE - len(mono)))
    mel = log_mel(mono, PROBE_SAMPLE_RATE)
    change = np.diff(mel, axis=1)
    groups = np.stack([part.mean(0) for part in np.array_split(mel, MODULATION_BANDS)])
    window = np.hanning(groups.shape[1])
    modulation = np.abs(np.fft.rfft((groups - groups.mean(1, keepdims=True)) * window, axis=1)) / window.sum()
    rates = np.fft.rfftfreq(groups.shape[1], HOP_LENGTH / PROBE_SAMPLE_RATE)
    places = [(rates >= low) & (rates < high) for low, high in itertools.pairwise(MODULATION_EDGES_HZ)]
    energy = [np.log(1e-3 + modulation[:, place].sum(1)) for place in places]
    pitch = chroma(mono, PROBE_SAMPLE_RATE)
    average = np.sort(pitch.mean(1))[::-1]
    harmony = np.abs(np.fft.rfft(pitch, axis=0))[1:]
    envelope, frame_rate = onset_envelope(mono, PROBE_SAMPLE_RATE)
    peaks = (envelope[1:-1] > envelope[:-2]) & (envelope[1:-1] >= envelope[2:]) & (envelope[1:-1] > envelope.mean() * 2)
    onsets = [peaks.sum() / len(envelope) * frame_rate, envelope.mean(), envelope.std()]
    parts = [_spread(mel), change.std(1), np.maximum(0, change).mean(1), *energy, average, _spread(harmony), onsets]
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])


class GenreProbe:
    """Multinomial logistic regression on standardised `probe_features`: a judge of genre that is trained on real clips only."""

    def __init__(self, classes: Sequence[str], mean: Array, scale: Array, coef: Array, intercept: Array) -> None:
        """mean, scale [F]; coef [n_classes, F]; intercept [n_classes]. Use `fit` or `load`."""
        self.classes = tuple(classes)
        self.mean, self.scale, self.coef, self.intercept = mean, scale, coef, intercept

    @classmethod
    def fit(cls, wavs: Sequence[Array], sr: int, labels: Sequence[str], *, C: float = 0.02) -> GenreProbe:
        """Train on clips and their genres. C: the inverse of the L2 penalty (there are 653 features, often few clips).

        Raises: UserError for no clips, fewer than two genres, or a number of labels that differs from the number of clips.
        """
        if len(wavs) != len(labels) or len(set(labels)) < 2:
            raise UserError(
                f"{len(wavs)} clips and {len(labels)} labels of {len(set(labels))} genres",
                "a label for each clip and at least two genres",
                "check the split that was read",
            )
        return cls.fit_features(np.stack([probe_features(wav, sr) for wav in wavs]), labels, C=C)

    @classmethod
    def fit_features(cls, features: Array, labels: Sequence[str], *, C: float = 0.02) -> GenreProbe:
        """The same from `probe_features` [N, F] that were computed before."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(features)
        model = LogisticRegression(C=C, max_iter=5000).fit(scaler.transform(features), np.asarray(labels, dtype=str))
        coef, intercept = model.coef_, model.intercept_
        if len(coef) == 1:  # two classes share one row: zero for the first is the same model
            coef, intercept = np.vstack([np.zeros_like(coef), coef]), np.array([0.0, intercept[0]])
        return cls([str(name) for name in model.classes_], scaler.mean_, scaler.scale_, coef, intercept)

    def probabilities(self, wavs: Sequence[Array], sr: int) -> Array:
        """[N, n_classes], rows summing to one, columns as `classes`."""
        return self.probabilities_of(np.stack([probe_features(wav, sr) for wav in wavs]))

    def probabilities_of(self, features: Array) -> Array:
        """The same from `probe_features` [N, F]."""
        logits = (features - self.mean) / self.scale @ self.coef.T + self.intercept
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def predict(self, wavs: Sequence[Array], sr: int) -> list[str]:
        """The likeliest genre of each clip."""
        return [self.classes[i] for i in self.probabilities(wavs, sr).argmax(1)] if len(wavs) else []

    def accuracy(self, wavs: Sequence[Array], sr: int, labels: Sequence[str]) -> float:
        """The share of clips whose likeliest genre is their label."""
        if len(wavs) != len(labels) or not len(wavs):
            raise UserError(f"{len(wavs)} clips and {len(labels)} labels", "one label a clip, at least one", "check the split")
        return float(np.mean([guess == label for guess, label in zip(self.predict(wavs, sr), labels)]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz of plain arrays, atomically."""
        arrays = {"mean": self.mean, "scale": self.scale, "coef": self.coef, "intercept": self.intercept}
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, classes=np.array(json.dumps(self.classes)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GenreProbe:
        """Read what `save` wrote. Raises UserError for a file that is missing, damaged, pickled or made for other features."""
        file = Path(path)
        if not file.is_file():
            raise UserError(f"no genre probe at {file}", "a file written by GenreProbe.save", "fit and save one first")
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as data:
                names = [str(name) for name in json.loads(str(data["classes"]))]
                mean, scale, coef, intercept = (data[name] for name in ("mean", "scale", "coef", "intercept"))
        except Exception as error:
            raise UserError(f"{file}, which is no genre probe ({error})", "a file written by GenreProbe.save", "fit it again") from error
        n_features = len(probe_features(np.zeros(PROBE_SAMPLE_RATE), PROBE_SAMPLE_RATE))
        if coef.shape != (len(names), n_features) or mean.shape != scale.shape or mean.shape != (n_features,):
            raise UserError(f"{file} for {coef.shape[-1]} features", f"{n_features} features", "fit it again with this version")
        return cls(names, mean, scale, coef, intercept)
