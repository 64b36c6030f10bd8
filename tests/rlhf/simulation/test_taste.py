import io

import numpy as np
import pytest
import soundfile
from scipy import signal

from rlhf.simulation import taste

RATE = taste.SAMPLE_RATE


def music(seed=0, bright=0.0, noise=0.0, notes_per_s=2.0, jitter_s=0.0, bass=0.35, swell=0.35, duration_s=6.0):
    """A little piece of plucked notes over a bass: harmonic, moving, with a beat."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(duration_s * RATE)) / RATE
    out = np.zeros_like(t)
    for index in range(int(duration_s * notes_per_s)):
        start = max(0.0, index / notes_per_s + jitter_s * rng.normal())
        pitch = 220 * 2 ** (rng.choice([0, 3, 5, 7, 10, 12]) / 12)
        since = np.maximum(t - start, 0)
        envelope = np.exp(-3 * since) * (t >= start)
        out += envelope * sum(np.sin(2 * np.pi * pitch * h * t) / h ** (2.0 - bright) for h in range(1, 9))
        out += bass * envelope * np.sin(2 * np.pi * pitch / 4 * t)
    out *= 1 + swell * np.sin(2 * np.pi * t / duration_s)
    return 0.2 * out / np.abs(out).max() + noise * rng.normal(size=len(t))


def test_score_does_not_depend_on_loudness():
    wav = music()
    assert taste.score(0.1 * wav, RATE) == pytest.approx(taste.score(wav, RATE), abs=0.02)
    assert taste.score(wav, RATE, gain_db=-20) == pytest.approx(taste.score(wav, RATE), abs=0.02)


def test_score_hardly_depends_on_the_sample_rate_or_on_stereo():
    wav = music()
    at_48k = signal.resample_poly(wav, 3, 1)
    assert taste.score(at_48k, 48_000) == pytest.approx(taste.score(wav, RATE), abs=0.15)
    assert taste.score(np.stack([wav, wav], 1), RATE) == taste.score(wav, RATE)


@pytest.mark.parametrize(
    "wav",
    [np.zeros(6 * RATE), np.zeros(10), np.full(6 * RATE, np.nan), 1e-6 * np.ones(6 * RATE)],
    ids=["silence", "hardly a sample", "NaN", "inaudible"],
)
def test_nothing_to_hear_is_worst(wav):
    worst = taste.score(wav, RATE)
    assert np.isfinite(worst)
    for other in (music(noise=0.05), np.random.default_rng(0).normal(0, 0.1, 6 * RATE)):
        assert worst < taste.score(other, RATE) - 3


def test_degenerate_sounds_are_liked_less_than_music():
    t = np.arange(6 * RATE) / RATE
    clicks = np.zeros(6 * RATE)
    clicks[:: RATE // 4] = 0.8
    dull = {
        "noise": np.random.default_rng(0).normal(0, 0.1, 6 * RATE),
        "one sine": 0.3 * np.sin(2 * np.pi * 440 * t),
        "clicks": clicks,
        "mostly silence": np.where(t < 1, music(), 0.0),
    }
    liked = taste.score(music(), RATE)
    for name, wav in dull.items():
        assert taste.score(wav, RATE) < liked - 0.5, name


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({}, {"bright": 1.6}),
        ({}, {"noise": 0.05}),
        ({"notes_per_s": 1.5}, {"notes_per_s": 6.0}),
        ({}, {"bass": 0.0, "bright": 0.5}),
    ],
    ids=["warm over bright", "tonal over noisy", "unhurried over hectic", "with bass over thin"],
)
def test_each_trait_can_be_heard(better, worse):
    gains = [taste.score(music(seed, **better), RATE) - taste.score(music(seed, **worse), RATE) for seed in range(4)]
    assert np.mean(gains) > 0.2


def test_a_kept_beat_is_heard_as_such():
    steady = [taste.traits(music(seed, notes_per_s=3), RATE).beat for seed in range(4)]
    loose = [taste.traits(music(seed, notes_per_s=3, jitter_s=0.15), RATE).beat for seed in range(4)]
    assert np.mean(steady) > np.mean(loose) + 0.1


def test_clipping_is_disliked():
    wav = music()
    assert taste.score(wav, RATE, gain_db=30) < taste.score(wav, RATE) - 0.5


def test_an_optimum_is_one_at_its_best_and_falls_on_both_sides():
    assert taste._at_best(3, 3, 2) == 1
    assert taste._at_best(1, 3, 2) == taste._at_best(5, 3, 2) == 0.5
    assert taste._more(-9, 0, 1) == pytest.approx(0, abs=1e-6)
    assert taste._more(0, 0, 1) == 0.5


def test_bytes_and_waveform_score_alike():
    wav = music()
    buffer = io.BytesIO()
    soundfile.write(buffer, wav, RATE, format="FLAC", subtype="PCM_16")
    assert taste.score_bytes(buffer.getvalue()) == pytest.approx(taste.score(wav, RATE), abs=0.02)
