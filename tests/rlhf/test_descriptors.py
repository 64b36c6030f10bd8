import math

import pytest
import torch

from rlhf.descriptors import autocorrelation, chromagram, describe, names, onset_strength
from rlhf.details import detail
from rlhf.details import names as names_of_details
from tests.rlhf.sounds import HOP, N_FFT, RATE, clicks, magnitude_of, noise, struck, tones

HZ = torch.linspace(0, RATE / 2, N_FFT // 2 + 1)


def of(wav):
    return dict(zip(names(), describe(magnitude_of(wav[None]), RATE, HOP)[0].tolist()))


MEASURES = pytest.mark.parametrize(("measure", "named"), [(describe, names), (detail, names_of_details)])


@MEASURES
def test_every_number_has_its_own_name_and_is_finite_for_any_clip(measure, named):
    assert len(set(named())) == len(named()) > 60
    for frames in (1, 3, 31, 200):
        for magnitude in (torch.zeros(2, frames, 513), torch.rand(2, frames, 513)):
            made = measure(magnitude, RATE, HOP)
            assert made.shape == (2, len(named()))
            assert made.isfinite().all()


@MEASURES
@pytest.mark.parametrize("clip", [clicks(0.5), struck(0.1)])
def test_turning_a_clip_up_changes_nothing(measure, named, clip):
    magnitude = magnitude_of(clip[None])
    torch.testing.assert_close(measure(magnitude, RATE, HOP), measure(10 * magnitude, RATE, HOP), atol=2e-3, rtol=1e-3)


@MEASURES
@pytest.mark.parametrize("clip", [clicks(0.4), struck(0.1)])
def test_batch_mates_change_nothing(measure, named, clip):
    both = torch.stack([clip, noise()])
    together = measure(magnitude_of(both), RATE, HOP)
    alone = torch.cat([measure(magnitude_of(row[None]), RATE, HOP) for row in both])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_details_are_over_two_hundred():
    assert len(names_of_details()) > 200


@pytest.mark.parametrize("period_s", [0.4, 0.5, 0.75])
def test_a_steady_pulse_is_clear_and_its_period_is_found(period_s):
    steady, formless = of(clicks(period_s)), of(noise())
    assert steady["pulse_clarity"] > 0.6 > formless["pulse_clarity"] + 0.2
    octaves = steady["pulse_period_log2_s"] - math.log2(period_s)
    assert abs(octaves - round(octaves)) < 0.05  # the period, or a multiple by two of it
    assert steady["onsets_strong_per_s"] == pytest.approx(1 / period_s, rel=0.15)


def test_a_major_chord_is_major_and_a_minor_one_minor():
    c, e, e_flat, g = 1046.5, 1318.5, 1244.5, 1568.0  # high, where a semitone is wider than a bin
    assert of(tones(c, e, g, 2 * c))["major_against_minor"] > 0.02
    assert of(tones(c, e_flat, g, 2 * c))["major_against_minor"] < -0.02


def test_the_chroma_of_440_hz_is_a():
    chroma = chromagram(magnitude_of(tones(440.0)[None]).square(), HZ).mean(1)[0]
    assert int(chroma.argmax()) == 9
    assert float(chroma.sum()) == pytest.approx(1, abs=1e-4)


def test_noise_is_flat_and_bright_and_a_low_tone_is_neither():
    low, flat = of(tones(200.0)), of(noise())
    assert flat["flatness_db_mean"] > low["flatness_db_mean"] + 20
    assert flat["centroid_octaves_mean"] > low["centroid_octaves_mean"] + 2
    assert low["held_pitch_share"] > 0.95 > flat["held_pitch_share"]


def test_a_crescendo_rises_and_its_mirror_falls():
    ramp = torch.logspace(-2, 0, 4 * RATE)
    up, down = of(noise() * ramp), of(noise() * ramp.flip(0))
    assert up["level_trend_db"] > 5
    assert down["level_trend_db"] < -5


def test_a_close_second_is_rougher_than_an_octave():
    assert of(tones(440.0, 470.0))["roughness"] > 2 * of(tones(440.0, 880.0))["roughness"]


def test_autocorrelation_of_a_period_is_one_at_the_period_and_at_zero():
    series = torch.sin(2 * math.pi * torch.arange(200) / 20)[None]
    found = autocorrelation(series)[0]
    assert found[[0, 20, 40]].tolist() == pytest.approx([1, 1, 1], abs=0.02)
    assert found[10] == pytest.approx(-1, abs=0.02)


def test_onset_strength_is_zero_where_nothing_rises():
    steady = torch.ones(1, 50, 513)
    assert onset_strength(steady, HZ).abs().max() == 0
