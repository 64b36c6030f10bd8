import math

import pytest
import torch

from rlhf.descriptors import chromagram
from rlhf.details import detail, names
from tests.rlhf.sounds import HOP, N_FFT, RATE, magnitude_of, noise, struck, tones


def of(wav):
    return dict(zip(names(), detail(magnitude_of(wav[None]), RATE, HOP)[0].tolist()))


def melody(*frequencies, each_s=0.5):
    return torch.cat([tones(frequency, 2 * frequency, seconds=each_s) for frequency in frequencies])


def test_every_detail_has_a_slope_that_is_finite():
    magnitude = (torch.rand(1, 300, 129, generator=torch.Generator().manual_seed(0)) + 1e-6).requires_grad_()
    flat = []
    for name, one in zip(names(), detail(magnitude, RATE, HOP)[0]):
        (slope,) = torch.autograd.grad(one, magnitude, retain_graph=True)
        assert slope.isfinite().all(), name
        flat += [name] * (not slope.any())
    assert flat == []


def test_a_held_tone_lasts_and_a_melody_moves_on():
    held, moving = of(tones(440.0, 880.0)), of(melody(440.0, 523.3, 659.3, 784.0, 587.3, 493.9, 698.5, 440.0))
    for name in ("spectrum_held_0.5s", "pitch_held_all_0.5s", "stays_0.5s"):
        assert held[name] > 0.9 > moving[name] + 0.2, name
    assert moving["fundamental_moves"] > 10 * held["fundamental_moves"]
    assert moving["tonal_moves_fifths"] > 10 * held["tonal_moves_fifths"]


@pytest.mark.parametrize("semitones", range(1, 6))
def test_the_interval_that_sounds_is_found(semitones):
    low = 523.25
    told = of(tones(low, 2 * low, low * 2 ** (semitones / 12), 2 * low * 2 ** (semitones / 12)))
    heard = [told[f"interval_strong_{other}"] for other in range(1, 6)]
    assert heard.index(max(heard)) == semitones - 1
    whole = [told[f"interval_whole_{other}"] for other in range(1, 6)]
    assert whole.index(max(whole)) == semitones - 1


def test_a_register_hears_its_own_intervals_alone():
    low = of(tones(220.0, 233.1))  # a semitone, below 500 Hz
    high = of(tones(880.0, 932.3))
    assert low["interval_low_1"] > 0.5
    assert high["interval_high_1"] > 0.5
    assert high["interval_high_1"] - of(tones(880.0))["interval_high_1"] > 0.2


def test_a_tone_is_tonal_and_noise_is_not():
    tone, hiss = of(tones(220.0, 440.0, 660.0)), of(noise())
    assert tone["tonal_share_all"] > 0.8 > hiss["tonal_share_all"] + 0.2
    assert tone["salience_mean"] > hiss["salience_mean"]
    assert tone["fundamentals_mean"] < hiss["fundamentals_mean"]
    assert tone["spectral_entropy_mean"] < hiss["spectral_entropy_mean"]


@pytest.mark.parametrize("frequency", [220.0, 440.0])
def test_the_fundamental_is_where_it_sounds(frequency):
    harmonic = sum(tones(n * frequency) / n for n in range(1, 7))
    assert of(harmonic)["fundamental_octaves_mean"] == pytest.approx(math.log2(frequency / 440.0), abs=0.15)


def test_a_close_second_is_more_dissonant_than_an_octave():
    assert of(tones(440.0, 470.0))["dissonance_mean"] > 1.5 * of(tones(440.0, 880.0))["dissonance_mean"]


def test_a_long_decay_falls_less_steeply_than_a_short_one():
    short, long = of(struck(0.05)), of(struck(0.5))
    assert short["falls_0.1s_db"] > 3 * long["falls_0.1s_db"]
    assert short["soft_share"] > long["soft_share"] + 0.3
    assert short["steepest_fall_db_of_250hz"] > long["steepest_fall_db_of_250hz"]


def test_a_fade_out_ends_below_the_whole_and_its_mirror_starts_there():
    ramp = torch.logspace(0, -2, 4 * RATE)
    out, into = of(noise() * ramp), of(noise() * ramp.flip(0))
    assert out["end_0.5s_db"] < -10 < 10 < out["start_0.5s_db"]
    assert into["start_0.5s_db"] < -10 < 10 < into["end_0.5s_db"]
    assert out["weight_at"] < -0.3 < 0.3 < into["weight_at"]


def test_an_octave_that_pulses_is_told_from_one_that_stands_still():
    t = torch.arange(4 * RATE) / RATE
    told = of(tones(200.0) * (1 + 0.8 * torch.sin(2 * math.pi * 5 * t)) + tones(3000.0))
    assert told["level_sd_db_of_125hz"] > 2 * told["level_sd_db_of_2000hz"]
    assert told["modulation_4hz_of_125hz"] > told["modulation_0.5hz_of_125hz"] + 0.5


def test_a_steady_pulse_stands_out_in_the_range_of_its_period():
    told = of(struck(0.05, period_s=0.4))
    ranges = {name: value for name, value in told.items() if name.startswith("pulse_from")}
    assert ranges["pulse_from_0.3s"] > max(ranges["pulse_from_0.2s"], ranges["pulse_from_0.12s"])


def test_the_chroma_of_a_register_leaves_the_others_out():
    hz = torch.linspace(0, RATE / 2, N_FFT // 2 + 1)
    both = magnitude_of((tones(220.0) + tones(1046.5))[None]).square()  # A and C
    assert int(chromagram(both, hz, low=65.0, high=500.0).mean(1)[0].argmax()) == 9
    assert int(chromagram(both, hz, low=500.0).mean(1)[0].argmax()) == 0
