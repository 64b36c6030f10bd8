import io

import numpy as np
import pytest
import soundfile
from scipy import signal, stats

from rlhf.simulation import sound, taste
from tests.rlhf.simulation.piece import RATE, music, pad

EACH = pytest.mark.parametrize("name", sorted(taste.TASTES))
# What each listener would put on: the standard against which sounds that are no music are held.
LIKED = {
    "warm": lambda: music(),
    "drive": lambda: music(notes_per_s=4, bright=0.8, decay=8.0, swell=0.0, grow=0.15),
    "space": lambda: pad(rest=0.15),
}


def test_there_are_three_tastes_and_the_demo_keeps_its_own():
    assert len(taste.TASTES) == 3
    assert taste.DEFAULT == "warm"
    assert taste.score(music(), RATE) == taste.score(music(), RATE, name="warm")


@EACH
def test_score_does_not_depend_on_loudness(name):
    wav = LIKED[name]()
    told = taste.score(wav, RATE, name=name)
    assert taste.score(0.1 * wav, RATE, name=name) == pytest.approx(told, abs=0.02)
    assert taste.score(wav, RATE, gain_db=-20, name=name) == pytest.approx(told, abs=0.02)


@EACH
def test_score_hardly_depends_on_the_sample_rate_or_on_stereo(name):
    wav = LIKED[name]()
    told = taste.score(wav, RATE, name=name)
    at_48k = signal.resample_poly(wav, 3, 1)
    assert taste.score(at_48k, 48_000, name=name) == pytest.approx(told, abs=0.15)
    assert taste.score(np.stack([wav, wav], 1), RATE, name=name) == told


@EACH
@pytest.mark.parametrize(
    "wav",
    [np.zeros(6 * RATE), np.zeros(10), np.full(6 * RATE, np.nan), 1e-6 * np.ones(6 * RATE)],
    ids=["silence", "hardly a sample", "NaN", "inaudible"],
)
def test_nothing_to_hear_is_worst(name, wav):
    worst = taste.score(wav, RATE, name=name)
    assert np.isfinite(worst)
    for other in (music(noise=0.05), pad(), np.random.default_rng(0).normal(0, 0.1, 6 * RATE)):
        assert worst < taste.score(other, RATE, name=name) - 3


@EACH
def test_degenerate_sounds_are_liked_less_than_music(name):
    t = np.arange(6 * RATE) / RATE
    rng = np.random.default_rng(0)
    clicks = np.zeros(6 * RATE)
    clicks[:: RATE // 4] = 0.8
    liked = LIKED[name]()
    dull = {
        "noise": rng.normal(0, 0.1, 6 * RATE),
        "noise in bursts": rng.normal(0, 0.1, 6 * RATE) * np.exp(-8 * (t % 0.25)),
        "one sine": 0.3 * np.sin(2 * np.pi * 440 * t),
        "one sine in pulses": 0.3 * np.sin(2 * np.pi * 440 * t) * np.exp(-8 * (t % 0.25)),
        "clicks": clicks,
        "mostly silence": np.where(t < 1, liked, 0.0),
    }
    told = taste.score(liked, RATE, name=name)
    assert told > 1.0
    for what, wav in dull.items():
        assert taste.score(wav, RATE, name=name) < told - 1.0, what


@EACH
def test_clipping_is_disliked(name):
    wav = LIKED[name]()
    assert taste.score(wav, RATE, gain_db=30, name=name) < taste.score(wav, RATE, name=name) - 0.5


def test_listeners_disagree():
    pieces = [
        *(music(notes_per_s=n, bright=b, decay=d, duration_s=3.0) for n in (1, 3, 5) for b in (0.0, 1.0) for d in (1.0, 6.0)),
        *(pad(0, tones, moves, duration_s=3.0) for tones in ((0, 4, 7), (0, 1, 2)) for moves in (False, True)),
    ]
    scores = [[taste.score(wav, RATE, name=name) for wav in pieces] for name in sorted(taste.TASTES)]
    for one in range(3):
        for other in range(one):
            assert stats.spearmanr(scores[one], scores[other])[0] < 0.5


@EACH
def test_bytes_and_waveform_score_alike(name):
    wav = LIKED[name]()
    buffer = io.BytesIO()
    soundfile.write(buffer, wav, RATE, format="FLAC", subtype="PCM_16")
    assert taste.score_bytes(buffer.getvalue(), name=name) == pytest.approx(taste.score(wav, RATE, name=name), abs=0.05)


def test_an_optimum_is_one_at_its_best_and_falls_on_both_sides():
    assert sound.at_best(3, 3, 2) == 1
    assert sound.at_best(1, 3, 2) == sound.at_best(5, 3, 2) == 0.5
    assert sound.more(-9, 0, 1) == pytest.approx(0, abs=1e-6)
    assert sound.more(0, 0, 1) == 0.5


def test_a_guard_is_nothing_before_its_start_and_whole_from_its_end_in_both_directions():
    assert [sound.ramp(v, 1, 3) for v in (0, 1, 2, 3, 9)] == [0, 0, 0.5, 1, 1]
    assert [sound.ramp(v, 3, 1) for v in (9, 3, 2, 1, 0)] == [0, 0, 0.5, 1, 1]
