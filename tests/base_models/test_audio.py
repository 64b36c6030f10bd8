"""Files come back as they were written; what cannot be read is named; levels agree with ITU-R BS.1770."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from base_models import audio
from base_models.errors import UserError


def sine(hz: float, sr: int, seconds: float = 2.0, level: float = 1.0, phase: float = 0.0) -> np.ndarray:
    """[1, L] float32."""
    return (level * np.sin(2 * np.pi * hz * np.arange(round(sr * seconds)) / sr + phase))[None].astype(np.float32)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_lossless_formats_return_the_samples_to_16_bits(tmp_path: Path, suffix: str) -> None:
    wav = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 5000)).astype(np.float32)
    audio.write_audio(tmp_path / f"a{suffix}", wav, 22050)
    read, sample_rate = audio.read_audio(tmp_path / f"a{suffix}")
    assert sample_rate == 22050
    assert read.shape == wav.shape
    assert read.dtype == np.float32
    assert np.abs(read - wav).max() <= 1.5 / 32768


@pytest.mark.parametrize("suffix", [".ogg", ".mp3", ".MP3"])
def test_lossy_formats_return_the_same_length_and_the_same_sound(tmp_path: Path, suffix: str) -> None:
    wav = sine(440, 44100, level=0.5)
    audio.write_audio(tmp_path / f"a{suffix}", wav, 44100)
    read, sample_rate = audio.read_audio(tmp_path / f"a{suffix}")
    assert (sample_rate, read.shape) == (44100, wav.shape)
    assert np.corrcoef(read[0, 4000:-4000], wav[0, 4000:-4000])[0, 1] > 0.99


@pytest.mark.parametrize("name", ["Ünïcødé 音楽 🎵.wav", "space and 'quotes\".flac", "ночь.ogg", "été.mp3"])
def test_any_file_name_can_be_written_and_read(tmp_path: Path, name: str) -> None:
    audio.write_audio(tmp_path / name, sine(440, 16000, level=0.5), 16000)
    assert audio.read_audio(tmp_path / name)[0].shape == (1, 32000)


def test_one_dimensional_audio_is_one_channel(tmp_path: Path) -> None:
    audio.write_audio(tmp_path / "a.wav", sine(440, 16000)[0], 16000)
    assert audio.probe(tmp_path / "a.wav") == audio.AudioInfo(2.0, 16000, 1, 32000)


def test_samples_beyond_full_scale_are_clipped_not_wrapped(tmp_path: Path) -> None:
    audio.write_audio(tmp_path / "a.wav", np.array([[2.0, -2.0, 0.5]]), 16000)
    read, _ = audio.read_audio(tmp_path / "a.wav")
    assert read[0] == pytest.approx([1, -1, 0.5], abs=1e-4)


def test_minutes_of_ogg_are_written_without_a_crash(tmp_path: Path) -> None:
    audio.write_audio(tmp_path / "long.ogg", np.zeros((1, 16000 * 180)), 16000)
    assert audio.probe(tmp_path / "long.ogg").duration_s == 180


def broken(tmp_path: Path, kind: str) -> Path:
    """A file that cannot be used, of each kind."""
    path = tmp_path / f"{kind.replace(' ', '-')}.{'mp3' if 'mp3' in kind else 'flac' if 'flac' in kind else 'wav'}"
    whole = tmp_path / f"whole{path.suffix}"
    audio.write_audio(whole, np.random.default_rng(0).normal(0, 0.1, (1, 48000)), 16000)
    content = whole.read_bytes()
    if kind == "a folder":
        path.mkdir()
    elif kind == "zero bytes":
        path.touch()
    elif kind == "text":
        path.write_text("no sound at all " * 100)
    elif kind == "only a header":
        path.write_bytes(content[:30])
    elif kind == "no samples":
        soundfile.write(path, np.zeros((0, 1)), 16000)
    elif kind.startswith("half"):
        path.write_bytes(content[: len(content) // 2])
    elif kind == "nan":
        soundfile.write(path, np.array([0.0, math.nan, 0.0]), 16000, subtype="FLOAT")
    elif kind == "infinity":
        soundfile.write(path, np.array([0.0, math.inf, 0.0]), 16000, subtype="FLOAT")
    elif kind == "long":
        soundfile.write(path, np.zeros(16000 * 11), 16000)
    return path


@pytest.mark.parametrize(
    ("kind", "got"),
    [
        ("missing", "does not exist"),
        ("a folder", "is a folder"),
        ("zero bytes", "0 bytes"),
        ("text", "cannot be decoded"),
        ("only a header", "cannot be decoded"),
        ("no samples", "without samples"),
        ("half a wav", "cut short"),
        ("half a flac", "cannot be decoded|cut short"),
        ("half an mp3", "cut short"),
        ("nan", "NaN or infinite"),
        ("infinity", "NaN or infinite"),
        ("long", "11 s"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, kind: str, got: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(UserError, match=got) as caught:
        audio.read_audio(path, max_duration_s=10)
    assert path.name in caught.value.got
    assert caught.value.remedy


def test_a_wav_from_a_pipe_has_no_length_in_its_header_and_is_read_all_the_same(tmp_path: Path) -> None:
    audio.write_audio(tmp_path / "a.wav", sine(440, 16000), 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff\xff\xff\xff"
    content[4:8] = b"\xff\xff\xff\xff"
    (tmp_path / "pipe.wav").write_bytes(content)
    assert audio.read_audio(tmp_path / "pipe.wav")[0].shape == (1, 32000)


@pytest.mark.parametrize(
    ("name", "wav", "rate", "got"),
    [
        ("a.aiff", np.zeros((1, 8)), 16000, "a.aiff"),
        ("a", np.zeros((1, 8)), 16000, "file name a"),
        ("a.wav", np.zeros((1, 0)), 16000, "without samples"),
        ("a.wav", np.zeros((1, 1, 8)), 16000, "shape"),
        ("a.wav", np.zeros((1, 8), dtype=np.int16), 16000, "int16"),
        ("a.wav", np.zeros((8000, 2)), 16000, "8000 channels"),
        ("a.wav", np.array([[math.nan]]), 16000, "NaN"),
        ("a.wav", np.zeros((1, 8)), 0, "0 Hz"),
        ("a.mp3", np.zeros((1, 8)), 96000, "96000 Hz"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path, name: str, wav: np.ndarray, rate: int, got: str) -> None:
    with pytest.raises(UserError, match=got):
        audio.write_audio(tmp_path / name, wav, rate)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio.write_audio(tmp_path / "a.wav", sine(440, 16000), 16000)
    before = (tmp_path / "a.wav").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(soundfile.SoundFile, "write", fail)
    with pytest.raises(OSError, match="no space"):
        audio.write_audio(tmp_path / "a.wav", sine(880, 16000), 16000)
    assert (tmp_path / "a.wav").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


# ---- sample rates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sr_in", "sr_out"), [(44100, 16000), (16000, 44100), (48000, 16000), (22050, 24000)])
def test_resampling_keeps_a_tone_where_it_was(sr_in: int, sr_out: int) -> None:
    resampled = audio.resample(sine(1000, sr_in, level=0.5), sr_in, sr_out)
    expected = sine(1000, sr_out, level=0.5)
    assert resampled.shape == expected.shape
    assert resampled.dtype == np.float32
    assert np.abs(resampled - expected)[0, 500:-500].max() < 0.01


def test_resampling_removes_what_the_lower_rate_cannot_hold() -> None:
    resampled = audio.resample(sine(11000, 44100), 44100, 16000)
    assert np.abs(resampled[0, 500:-500]).max() < 0.02  # else it would fold back to 5 kHz


def test_resampling_to_the_same_rate_changes_nothing() -> None:
    wav = sine(440, 16000)
    assert np.array_equal(audio.resample(wav, 16000, 16000), wav)


def test_resampling_refuses_a_rate_of_zero() -> None:
    with pytest.raises(UserError, match="0 Hz"):
        audio.resample(sine(440, 16000), 16000, 0)


# ---- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sr", "tolerance"), [(48000, 0.005), (44100, 0.01), (16000, 0.06)])
def test_a_full_scale_sine_of_997_hz_in_one_channel_has_minus_3_01_lufs(sr: int, tolerance: float) -> None:
    assert audio.integrated_lufs(sine(997, sr), sr) == pytest.approx(-3.01, abs=tolerance)


def test_two_equal_channels_are_3_db_louder_and_half_the_level_is_6_db_softer() -> None:
    wav = sine(997, 48000)
    assert audio.integrated_lufs(np.vstack([wav, wav]), 48000) == pytest.approx(0.0, abs=0.01)
    assert audio.integrated_lufs(wav / 2, 48000) == pytest.approx(-3.01 - 6.02, abs=0.01)


def test_silence_between_is_gated_away() -> None:
    tone = sine(997, 48000, seconds=4, level=0.1)
    with_silence = np.hstack([tone, np.zeros((1, 48000 * 20), np.float32)])
    assert audio.integrated_lufs(with_silence, 48000) == pytest.approx(audio.integrated_lufs(tone, 48000), abs=0.3)


@pytest.mark.parametrize("sr", [11025, 16000, 44100])
def test_what_comes_after_the_last_whole_block_does_not_count(sr: int) -> None:
    soft = sine(997, sr, seconds=2, level=0.01)
    burst = sine(997, sr, seconds=0.09)
    assert audio.integrated_lufs(np.hstack([soft, burst]), sr) == audio.integrated_lufs(soft, sr)
    assert audio.integrated_lufs(np.hstack([soft, burst, burst]), sr) > audio.integrated_lufs(soft, sr) + 10


def test_silence_and_clips_shorter_than_a_block_have_a_loudness_too() -> None:
    assert audio.integrated_lufs(np.zeros((2, 48000)), 48000) == -math.inf
    assert math.isfinite(audio.integrated_lufs(sine(997, 48000, seconds=0.1), 48000))


def test_a_peak_between_two_samples_is_found() -> None:
    wav = sine(12000, 48000, phase=math.pi / 4)  # every sample is at 0.707, the wave between them reaches 1
    assert 20 * math.log10(np.abs(wav).max()) == pytest.approx(-3.01, abs=0.01)
    assert audio.true_peak_dbfs(wav, 48000) == pytest.approx(0.0, abs=0.2)


def test_the_true_peak_is_never_below_the_highest_sample_and_silence_has_none() -> None:
    wav = np.random.default_rng(0).uniform(-1, 1, (2, 4000)).astype(np.float32)
    assert audio.true_peak_dbfs(wav, 44100) >= 20 * math.log10(np.abs(wav).max())
    assert audio.true_peak_dbfs(np.zeros((1, 100)), 44100) == -math.inf


@pytest.mark.parametrize("measure", [audio.integrated_lufs, audio.true_peak_dbfs])
def test_levels_of_nan_or_nothing_are_refused(measure) -> None:
    with pytest.raises(UserError, match="NaN"):
        measure(np.array([[0.0, math.nan]]), 48000)
    with pytest.raises(UserError, match="without samples"):
        measure(np.zeros((1, 0)), 48000)


def test_the_module_never_loads_torch() -> None:
    code = "import sys, base_models.audio; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
