"""Audio files and levels on numpy, scipy and soundfile alone: the annotators' server imports this, so torch must never come in.

Everywhere wav is [C, L] float32 in [-1, 1]. A file that cannot be used is a UserError that names the file and the reason.
"""

from __future__ import annotations

import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyloudnorm
import soundfile
from numpy.typing import NDArray
from scipy import signal

from base_models.atomic import atomic_file
from base_models.errors import UserError

Wav = NDArray[np.float32]
Path_ = str | os.PathLike[str]

MAX_DURATION_S = 3600.0
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
SUBTYPES = {".wav": "PCM_16", ".flac": "PCM_16", ".ogg": "VORBIS", ".mp3": "MPEG_LAYER_III"}
MP3_SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
WRITE_FRAMES = 65536
"""Written piece by piece: libsndfile's Vorbis encoder overflows the stack when it is given minutes at once."""
HEADER_SLACK = 4096
"""Bytes by which careless writers misstate the length of a WAV; more than that is missing sound."""
BLOCK_S = 0.4
"""The gating block of ITU-R BS.1770: anything shorter is measured as one block, padded with silence."""
BLOCK_STEP_S = 0.1
"""A new gating block begins every 100 ms: each overlaps the one before by 75 %."""


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says."""

    duration_s: float
    sample_rate: int
    channels: int
    frames: int


def probe(path: Path_) -> AudioInfo:
    """Read the header only. Raises UserError for a file that is missing, empty, corrupt or holds no samples."""
    file = Path(path)
    _check_file(file)
    try:
        info = soundfile.info(str(file), verbose=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise _corrupt(file, error) from error
    # libsndfile reads what is left of a shortened WAV and mentions the broken promise in its log only. A size with the top bit
    # set is no promise: it is what programs write into a pipe, where they cannot know it.
    promise = re.search(r"^data : (-?\d+) \(should be (\d+)\)", info.extra_info, re.MULTILINE)
    if promise is not None and int(promise[2]) + HEADER_SLACK < int(promise[1]) < 2**31 - 2**16:
        raise UserError(f"{file} cut short: {promise[2]} of {promise[1]} bytes", "a whole audio file", "copy or export it again")
    if info.frames <= 0 or info.samplerate <= 0 or info.channels <= 0:
        raise UserError(f"{file} without samples", "an audio file with at least one sample", "export the clip again")
    return AudioInfo(info.frames / info.samplerate, info.samplerate, info.channels, info.frames)


def read_audio(path: Path_, *, max_duration_s: float = MAX_DURATION_S) -> tuple[Wav, int]:
    """Read a whole file -> (wav [C, L] float32, sample_rate).

    Raises: UserError for a file that is missing, zero-length, corrupt, cut short, not finite or longer than `max_duration_s`.
    """
    file = Path(path)
    info = probe(file)
    if info.duration_s > max_duration_s:
        raise UserError(f"{file} of {info.duration_s:.0f} s", f"at most {max_duration_s:.0f} s", "cut it, or raise the limit on purpose")
    try:
        samples, sample_rate = soundfile.read(str(file), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise _corrupt(file, error) from error
    # The header of an MP3 may be off by a frame or two; half a song missing is another matter.
    if len(samples) < (info.frames * 0.95 if file.suffix.lower() == ".mp3" else info.frames):
        raise UserError(f"{file} cut short: {len(samples)} of {info.frames} samples", "a whole audio file", "copy or export it again")
    if not np.isfinite(samples).all():
        raise UserError(f"{file} with NaN or infinite samples", "finite samples", "export the clip again")
    return np.ascontiguousarray(samples.T), sample_rate


def check_suffix(path: Path_) -> str:
    """The suffix of a file that can be written. Raises UserError for another one."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"the file name {Path(path).name}", f"one of {', '.join(FORMATS)}", "choose one of these suffixes")
    return suffix


def write_audio(path: Path_, wav: NDArray[np.floating], sample_rate: int) -> None:
    """Write wav [C, L] (or [L]) as wav, flac, ogg (Vorbis) or mp3, chosen by the suffix; atomic, 16 bit where lossless.

    Samples beyond full scale are clipped, as every player would. Raises: UserError for another suffix, a wrong shape, no
    samples, samples that are not finite, or a sample rate that the format does not have.
    """
    file, suffix = Path(path), check_suffix(path)
    samples = _checked(wav, f"audio for {file.name}")
    if sample_rate <= 0 or (suffix == ".mp3" and sample_rate not in MP3_SAMPLE_RATES):
        allowed = f"one of {MP3_SAMPLE_RATES}" if suffix == ".mp3" else "a positive rate"
        raise UserError(f"{sample_rate} Hz for {file.name}", allowed, "resample it with base_models.audio.resample")
    clipped = np.clip(samples, -1.0, 1.0).astype(np.float32).T
    kind = {"format": FORMATS[suffix], "subtype": SUBTYPES[suffix], "channels": clipped.shape[1]}
    encoded = io.BytesIO()  # libsndfile tells a full disk as "System error", Python's own files tell it as what it is
    with soundfile.SoundFile(encoded, "w", sample_rate, **kind) as out:
        for start in range(0, len(clipped), WRITE_FRAMES):
            out.write(clipped[start : start + WRITE_FRAMES])
    with atomic_file(file) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def resample(wav: NDArray[np.floating], sr_in: int, sr_out: int) -> Wav:
    """Change the sample rate with a polyphase filter: [..., L] -> [..., ceil(L * sr_out / sr_in)] float32."""
    if sr_in <= 0 or sr_out <= 0:
        raise UserError(f"sample rates {sr_in} and {sr_out} Hz", "positive rates", "look at the file's header")
    samples = np.asarray(wav, dtype=np.float32)
    if sr_in == sr_out or samples.shape[-1] == 0:
        return samples
    common = math.gcd(sr_in, sr_out)
    return np.asarray(signal.resample_poly(samples, sr_out // common, sr_in // common, axis=-1), dtype=np.float32)


def integrated_lufs(wav: NDArray[np.floating], sr: int) -> float:
    """Integrated loudness, LUFS, gated.   ITU-R BS.1770-4 through pyloudnorm; silence is -inf, as the formula says.

    pyloudnorm's "DeMan" filters are the standard's own, moved to `sr` (a full-scale 997 Hz sine reads -3.01 at 48 kHz); its
    default ones are 0.05 to 0.2 LU off. A gating block that the clip's end cuts short does not count, says the standard; pyloudnorm
    counts it from half a step on as if silence followed (2 LU off for a clip that ends loud), so the clip ends here on a whole step.

    A clip shorter than one gating block (0.4 s) is padded with silence to one block. wav [C, L] with 1 to 5 channels.
    """
    samples = _checked(wav, "audio to measure").astype(np.float64)
    if len(samples) > 5:
        raise UserError(f"{len(samples)} channels", "1 to 5 channels, which BS.1770 weighs", "mix the clip down first")
    block = math.ceil(BLOCK_S * sr) + 1
    if samples.shape[1] < block:
        samples = np.pad(samples, ((0, 0), (0, block - samples.shape[1])))
    steps = math.floor(samples.shape[1] / (BLOCK_STEP_S * sr))
    samples = samples[:, : math.ceil(steps * BLOCK_STEP_S * sr)]
    with np.errstate(divide="ignore"):  # log10(0) of a silent block is the -inf that the formula means
        return float(pyloudnorm.Meter(sr, filter_class="DeMan").integrated_loudness(samples.T))


def true_peak_dbfs(wav: NDArray[np.floating], sr: int) -> float:
    """The highest peak between the samples too, dBTP, by 4x oversampling (ITU-R BS.1770-4, annex 2); silence is -inf."""
    samples = _checked(wav, "audio to measure").astype(np.float64)
    factor = 4 if sr < 96000 else 2
    peak = max(np.abs(samples).max(), np.abs(signal.resample_poly(samples, factor, 1, axis=-1)).max())
    return 20 * math.log10(peak) if peak > 0 else -math.inf


def _checked(wav: NDArray[np.floating], what: str) -> NDArray[np.floating]:
    """wav as [C, L] float, or a UserError that says what is wrong with it."""
    samples = np.asarray(wav)
    if samples.ndim == 1:
        samples = samples[None]
    if samples.ndim != 2 or not np.issubdtype(samples.dtype, np.floating):
        raise UserError(f"{what} of shape {samples.shape} and type {samples.dtype}", "float samples [C, L]", "reshape it")
    if samples.size == 0:
        raise UserError(f"{what} without samples", "at least one sample", "check what made it")
    if samples.shape[0] > 64:
        raise UserError(f"{what} with {samples.shape[0]} channels", "wav [C, L], channels first", "transpose it")
    if not np.isfinite(samples).all():
        raise UserError(f"{what} with NaN or infinite samples", "finite samples", "check what made it")
    return samples


def _check_file(file: Path) -> None:
    if not file.is_file():
        got = f"{file}, which is a folder" if file.is_dir() else f"{file}, which does not exist"
        raise UserError(got, "an audio file", "check the path")
    if file.stat().st_size == 0:
        raise UserError(f"{file} of 0 bytes", "an audio file", "copy or export it again")


def _corrupt(file: Path, error: Exception) -> UserError:
    reason = getattr(error, "error_string", None) or str(error)
    if "does not exist" in reason:  # what libsndfile says of an MP3 without a single frame
        reason = "no audio in it"
    return UserError(f"{file}, which cannot be decoded ({reason})", "wav, flac, ogg or mp3", "convert or export it again")
