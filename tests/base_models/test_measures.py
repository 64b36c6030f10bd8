"""The measures see what they should and nothing else: parity with an independent mel bank, known tempi, known bitrates."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers.audio_utils import mel_filter_bank

from base_models import measures
from base_models.errors import UserError
from base_models.measures import GenreProbe

SR = 16000


def noise(seed: int, seconds: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(SR * seconds))


def clicks(bpm: float, seconds: float = 6.0, *, offbeat: float = 0.0) -> np.ndarray:
    """A decaying click on each beat, `offbeat` times as loud between the beats, over soft noise."""
    wav = noise(0, seconds) * 0.01
    decay = np.exp(-np.arange(1600) / 200) * np.random.default_rng(1).normal(0, 0.5, 1600)
    for i in range(int(seconds * bpm / 60 * 2)):
        start = round(i * 30 / bpm * SR)
        part = wav[start : start + 1600]
        part += decay[: len(part)] * (1.0 if i % 2 == 0 else offbeat)
    return wav


def music(seed: int, seconds: float = 6.0) -> np.ndarray:
    """Tones that come and go, with a little noise: something that a codec has to work for."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(SR * seconds)) / SR
    wav = rng.normal(0, 0.004, len(t))
    for _ in range(24):
        hz, start = rng.uniform(80, 4000), rng.uniform(0, seconds)
        wav += 0.1 * np.sin(2 * np.pi * hz * t) * np.exp(-3 * np.maximum(0, t - start)) * (t > start)
    return wav


# ---- log mel ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sr", "n_fft", "n_mels"), [(16000, 1024, 80), (44100, 2048, 128)])
def test_the_mel_bank_equals_an_independent_one(sr: int, n_fft: int, n_mels: int) -> None:
    theirs = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sr / 2, sr, norm=None, mel_scale="slaney")
    assert measures.mel_filters(sr, n_fft, n_mels) == pytest.approx(theirs.T, abs=1e-6)


def test_a_log_mel_has_80_bands_and_a_frame_each_256_samples() -> None:
    assert measures.log_mel(noise(0), SR).shape == (80, 1 + 2 * SR // 256)
    assert measures.log_mel(np.zeros((2, SR)), SR) == pytest.approx(math.log(1e-2))
    assert measures.log_mel(np.ones(10), SR).shape == (80, 1)


def test_a_tone_is_loudest_in_its_own_band_and_a_gain_is_a_shift() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(SR) / SR)
    mel = measures.log_mel(tone, SR)
    loudest = measures.mel_filters(SR)[:, round(1000 / SR * 1024)].argmax()
    assert (mel[:, 5:-5].argmax(0) == loudest).all()
    assert mel[loudest] - measures.log_mel(tone / 2, SR)[loudest] == pytest.approx(math.log(2), abs=1e-3)


def test_the_distance_of_a_clip_to_itself_is_zero_and_grows_with_what_is_lost() -> None:
    wav = music(0)
    soft, loud = wav + noise(1, 6) * 0.02, wav + noise(1, 6) * 0.2
    assert measures.log_mel_l1(wav, wav, SR) == 0
    assert 0 < measures.log_mel_l1(wav, soft, SR) < measures.log_mel_l1(wav, loud, SR)
    assert measures.log_mel_l1(wav, soft, SR) == measures.log_mel_l1(soft, wav, SR)
    assert measures.log_mel_l1(wav, wav[:-300], SR) < 0.05  # codecs cut the last frame


def test_clips_of_quite_different_lengths_are_not_compared() -> None:
    with pytest.raises(UserError, match="two takes"):
        measures.log_mel_l1(noise(0, 2), noise(0, 1), SR)


@pytest.mark.parametrize("wav", [np.zeros(0), np.zeros((1, 1, 5)), np.array([0.0, math.nan])])
def test_what_is_no_audio_is_refused(wav: np.ndarray) -> None:
    with pytest.raises(UserError):
        measures.log_mel(wav, SR)


def test_chroma_hears_the_pitch_class_in_every_octave() -> None:
    t = np.arange(SR * 2) / SR
    for hz in (220, 440, 880):
        chroma = measures.chroma(np.sin(2 * np.pi * hz * t), SR)
        assert (chroma[:, 2:-2].argmax(0) == 9).all()
        assert chroma[:, 2:-2].sum(0) == pytest.approx(1)
    assert measures.chroma(np.zeros(SR), SR).max() == 0


# ---- Opus ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kbps", [12, 24, 48])
def test_opus_spends_the_bitrate_that_its_name_says(kbps: float) -> None:
    clips = [music(seed, 8) for seed in range(3)]
    spent = [measures.opus_bitrate(measures.opus_encode(clip, SR, kbps), 8) for clip in clips]
    assert np.mean(spent) == pytest.approx(kbps, rel=0.12)


def test_opus_returns_a_clip_as_long_and_in_step_and_better_for_more_bits() -> None:
    clip = music(3)[:95_123]
    distances = []
    for kbps in (6, 12, 24, 64):
        decoded = measures.opus_roundtrip(clip, SR, kbps)
        assert decoded.shape == clip.shape
        assert decoded.dtype == np.float32
        distances.append(measures.log_mel_l1(clip, decoded, SR))
    assert distances == sorted(distances, reverse=True)
    best = np.argmax(np.correlate(decoded[20_000:40_000], clip[20_000:40_000], "full")) - 19_999
    assert best == 0
    assert np.corrcoef(decoded, clip)[0, 1] > 0.95


def test_opus_mixes_down_and_refuses_what_it_cannot_do() -> None:
    assert measures.opus_roundtrip(np.stack([music(0)] * 2), SR, 16).shape == (6 * SR,)
    with pytest.raises(UserError, match="44100 Hz"):
        measures.opus_roundtrip(noise(0), 44100, 12)
    with pytest.raises(UserError, match="2 kbps"):
        measures.opus_roundtrip(noise(0), SR, 2)
    with pytest.raises(UserError, match="no Ogg page"):
        measures.opus_bitrate(b"RIFF" * 20, 1)


# ---- tempo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bpm", [63, 80, 97.5, 120, 133, 150, 174])
@pytest.mark.parametrize("offbeat", [0.0, 0.4])
def test_the_tempo_of_clicks_is_found_up_to_its_octave(bpm: float, offbeat: float) -> None:
    assert measures.tempo_matches(measures.estimate_tempo(clicks(bpm, offbeat=offbeat), SR), bpm, 0.02)


@pytest.mark.parametrize("bpm", [90, 110, 130])
def test_a_moderate_tempo_is_found_exactly(bpm: float) -> None:
    assert measures.estimate_tempo(clicks(bpm), SR) == pytest.approx(bpm, rel=0.02)


def test_neither_level_nor_sample_rate_nor_channels_change_the_tempo() -> None:
    wav = clicks(120)
    assert measures.estimate_tempo(wav * 0.1, SR) == pytest.approx(120, rel=0.02)
    assert measures.estimate_tempo(np.stack([wav, wav]), SR) == measures.estimate_tempo(wav, SR)
    assert measures.estimate_tempo(wav, 44100) == pytest.approx(120 * 44100 / SR, rel=0.05) or measures.tempo_matches(
        measures.estimate_tempo(wav, 44100), 120 * 44100 / SR
    )


@pytest.mark.parametrize("wav", [np.zeros(SR * 6), clicks(120, 0.5), np.zeros(100)])
def test_where_nothing_recurs_there_is_no_tempo(wav: np.ndarray) -> None:
    assert math.isnan(measures.estimate_tempo(wav, SR))


def test_a_tempo_matches_its_double_and_half_but_nothing_else() -> None:
    assert measures.tempo_matches(120, 120)
    assert measures.tempo_matches(60, 120)
    assert measures.tempo_matches(240, 120)
    assert measures.tempo_matches(129, 120)
    assert not measures.tempo_matches(131, 120)
    assert not measures.tempo_matches(180, 120)
    assert not measures.tempo_matches(40, 120)
    assert not measures.tempo_matches(math.nan, 120)


# ---- genre -----------------------------------------------------------------------------------------------------------


def pulse(seed: int) -> np.ndarray:
    return clicks(np.random.default_rng(seed).uniform(110, 140), 2) + noise(seed) * 0.03


def drone(seed: int) -> np.ndarray:
    t = np.arange(SR * 2) / SR
    hz = np.random.default_rng(seed).uniform(100, 300)
    return 0.2 * np.sin(2 * np.pi * hz * t) + noise(seed) * 0.01


def hiss(seed: int) -> np.ndarray:
    return noise(seed)


KINDS = {"pulse": pulse, "drone": drone, "hiss": hiss}


def clips(seeds: range) -> tuple[list[np.ndarray], list[str]]:
    return [make(seed) for make in KINDS.values() for seed in seeds], [name for name in KINDS for _ in seeds]


@pytest.fixture(scope="module")
def probe() -> GenreProbe:
    wavs, labels = clips(range(6))
    return GenreProbe.fit(wavs, SR, labels)


def test_a_probe_knows_new_clips_of_the_genres_it_learned(probe: GenreProbe) -> None:
    wavs, labels = clips(range(100, 103))
    assert probe.classes == ("drone", "hiss", "pulse")
    assert probe.accuracy(wavs, SR, labels) == 1
    assert probe.predict(wavs[:1], SR) == ["pulse"]
    assert probe.predict([], SR) == []
    assert probe.probabilities(wavs, SR).sum(1) == pytest.approx(1)


def test_shuffled_labels_teach_nothing() -> None:
    wavs, labels = clips(range(6))
    wrong = GenreProbe.fit(wavs, SR, list(np.random.default_rng(0).permutation(labels)))
    fresh, truth = clips(range(100, 104))
    assert wrong.accuracy(fresh, SR, truth) < 0.8


def test_neither_level_nor_transposition_changes_what_a_probe_hears() -> None:
    t = np.arange(SR * 2) / SR

    def chord(root: float) -> np.ndarray:
        return sum(0.1 * np.sin(2 * np.pi * root * 2 ** (step / 12) * t) for step in (0, 4, 7))

    features = measures.probe_features(chord(220), SR)
    assert measures.probe_features(chord(220) * 0.05, SR) == pytest.approx(features, abs=1e-2)
    harmony = slice(-45, -3)  # sorted chroma and its Fourier magnitudes
    assert measures.probe_features(chord(220 * 2 ** (3 / 12)), SR)[harmony] == pytest.approx(features[harmony], abs=0.05)


def test_every_clip_has_finite_features_even_silence_and_a_single_sample() -> None:
    shapes = {measures.probe_features(wav, SR).shape for wav in (np.zeros(SR), np.ones(1), noise(0), np.ones((2, 40_000)))}
    assert len(shapes) == 1
    assert np.isfinite(measures.probe_features(np.zeros(SR), SR)).all()


def test_a_saved_probe_says_the_same_and_holds_no_pickle(probe: GenreProbe, tmp_path: Path) -> None:
    probe.save(tmp_path / "probe.npz")
    loaded = GenreProbe.load(tmp_path / "probe.npz")
    wavs, _ = clips(range(200, 201))
    assert loaded.classes == probe.classes
    assert np.array_equal(loaded.probabilities(wavs, SR), probe.probabilities(wavs, SR))
    with np.load(tmp_path / "probe.npz", allow_pickle=False) as data:
        assert all(data[name].dtype != object for name in data.files)


def test_two_genres_are_enough_and_one_is_not() -> None:
    wavs, labels = clips(range(4))
    two = GenreProbe.fit(wavs[:8], SR, labels[:8])
    assert two.accuracy([pulse(50), drone(50)], SR, ["pulse", "drone"]) == 1
    with pytest.raises(UserError, match="1 genres"):
        GenreProbe.fit(wavs[:4], SR, labels[:4])
    with pytest.raises(UserError, match="labels"):
        GenreProbe.fit(wavs, SR, labels[:4])
    with pytest.raises(UserError, match="0 clips"):
        two.accuracy([], SR, [])


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "pickled", "other features"])
def test_a_file_that_is_no_probe_is_refused(probe: GenreProbe, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "probe.npz"
    probe.save(path)
    if kind == "missing":
        path.unlink()
    elif kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "pickled":
        np.savez(path, classes=np.array([{}], dtype=object))
    else:
        GenreProbe(probe.classes, probe.mean[1:], probe.scale[1:], probe.coef[:, 1:], probe.intercept).save(path)
    with pytest.raises(UserError, match="probe"):
        GenreProbe.load(path)


def test_the_module_never_loads_torch() -> None:
    code = "import sys, base_models.measures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
