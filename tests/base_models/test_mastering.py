"""Mastering reaches its loudness under its ceiling, and does nothing that a mono listener or a second run would notice."""

from __future__ import annotations

import math

import numpy as np
import pyloudnorm
import pytest
from scipy import signal

from base_models import mastering
from base_models.errors import UserError
from base_models.mastering import MasteredTrack, master

RATE = 16_000
SECONDS = 3


def coloured_noise(slope_db_per_octave: float, seconds: float = SECONDS, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Noise [1, L] whose power density falls by `slope_db_per_octave`, peak .5."""
    size = int(seconds * rate)
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(size))
    octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / rate), 20.0) / 1_000.0)
    noise = np.fft.irfft(spectrum * 10 ** (slope_db_per_octave * octaves / 20), size)
    return (0.5 * noise / np.abs(noise).max())[None].astype(np.float32)


def tone(frequency: float, level: float = 0.3, rate: int = RATE) -> np.ndarray:
    return (level * np.sin(2 * math.pi * frequency * np.arange(SECONDS * rate) / rate))[None].astype(np.float32)


def drums() -> np.ndarray:
    """A bar of kicks and hats: sharp attacks and short decays, 12 hits in 3 s."""
    clip = np.zeros(SECONDS * RATE)
    for hit in range(12):
        start, size = hit * 4_000, 3_200 if hit % 2 else 4_000
        decay = np.exp(-np.arange(size) / (400 if hit % 2 else 1_600))
        sound = coloured_noise(3, size / RATE, seed=hit)[0] if hit % 2 else np.sin(2 * math.pi * 60 * np.arange(size) / RATE)
        clip[start : start + size] += sound * decay
    return (0.8 * clip)[None].astype(np.float32)


def chords() -> np.ndarray:
    notes = [tone(f * h, 0.1 / h)[0] for f in (220.0, 277.2, 329.6) for h in (1, 2, 3, 4)]
    return (sum(notes) * np.exp(-np.arange(SECONDS * RATE) % RATE / 6_000))[None].astype(np.float32)


SIGNALS = {
    "tone": tone(440),
    "bass": tone(55),
    "near Nyquist": tone(7_000),
    "white": coloured_noise(0),
    "pink": coloured_noise(-3),
    "dull": coloured_noise(-12),
    "drums": drums(),
    "chords": chords(),
    "quiet": 0.003 * chords(),
    "clipped": np.clip(8 * chords(), -1, 1),
    "offset": 0.2 * coloured_noise(-3) + np.float32(0.5),
    "stereo": np.concatenate([drums(), chords()]),
    "half silent": np.concatenate([coloured_noise(-3, 1.5), np.zeros((1, 24_000), np.float32)], 1),
}


@pytest.fixture(scope="module")
def tracks() -> dict[str, MasteredTrack]:
    return {name: master(clip, RATE) for name, clip in SIGNALS.items()}


@pytest.mark.parametrize("name", SIGNALS)
def test_loudness_is_within_three_tenths_of_the_target(tracks: dict[str, MasteredTrack], name: str) -> None:
    track = tracks[name]
    measured = pyloudnorm.Meter(track.sample_rate).integrated_loudness(track.wav.T.astype(np.float64))
    assert measured == pytest.approx(-14.0, abs=0.3)
    assert track.lufs == pytest.approx(measured, abs=0.05)


@pytest.mark.parametrize("name", SIGNALS)
def test_no_true_peak_passes_the_ceiling_even_when_oversampled_eightfold(tracks: dict[str, MasteredTrack], name: str) -> None:
    track = tracks[name]
    fine = signal.resample_poly(track.wav.astype(np.float64), 8, 1, axis=-1)
    assert 20 * math.log10(np.abs(fine).max()) < -1.0
    assert track.true_peak_dbfs <= -1.0 + 1e-4


@pytest.mark.parametrize("name", SIGNALS)
def test_a_track_has_two_channels_at_44100_hz_and_keeps_its_length(tracks: dict[str, MasteredTrack], name: str) -> None:
    track = tracks[name]
    assert track.wav.shape == (2, SECONDS * 44_100)
    assert track.wav.dtype == np.float32
    assert track.sample_rate == 44_100
    assert track.duration_s == SECONDS


def test_the_source_rate_and_one_channel_can_be_kept() -> None:
    track = master(SIGNALS["stereo"], RATE, sample_rate_out=None, stereo=False)
    assert track.wav.shape == (1, SECONDS * RATE)
    assert track.sample_rate == RATE
    assert track.lufs == pytest.approx(-14.0, abs=0.3)


def test_another_target_is_met() -> None:
    assert master(chords(), RATE, target_lufs=-23.0).lufs == pytest.approx(-23.0, abs=0.3)


def test_the_same_input_gives_the_same_samples() -> None:
    assert np.array_equal(master(drums(), RATE).wav, master(drums(), RATE).wav)


def test_the_input_is_left_as_it_was() -> None:
    clip = chords()
    master(clip, RATE)
    assert np.array_equal(clip, chords())


def test_the_input_level_does_not_matter() -> None:
    loud, soft = master(chords(), RATE), master(chords() / 64, RATE)
    assert np.abs(loud.wav - soft.wav).max() < 1e-3


def test_silence_stays_silence() -> None:
    track = master(np.zeros((1, RATE), np.float32), RATE)
    assert track.wav.shape == (2, 44_100)
    assert not track.wav.any()
    assert track.lufs == -math.inf
    assert track.true_peak_dbfs == -math.inf


def test_noise_under_the_loudness_gate_is_not_raised() -> None:
    assert not master(1e-5 * coloured_noise(-3), RATE).wav.any()


def test_a_lone_click_stays_quieter_than_the_target_and_says_so() -> None:
    click = 1e-4 * coloured_noise(-3)
    click[0, RATE] = 1.0
    track = master(click, RATE)
    assert track.lufs < -14.3
    assert track.limiting_db == pytest.approx(mastering.MAX_LIMITING_DB, abs=0.2)


@pytest.mark.parametrize(
    ("clip", "rate", "got"),
    [
        (np.zeros((1, 100), np.float32), RATE, "0.006 s"),
        (np.zeros((1, 0), np.float32), RATE, "0.000 s"),
        (np.full((1, RATE), np.nan, np.float32), RATE, "16000 samples that are NaN"),
        (np.zeros(RATE, np.float32), RATE, r"shape \(16000,\)"),
        (np.zeros((3, RATE), np.float32), RATE, r"shape \(3, 16000\)"),
        (np.zeros((1, RATE), np.int16), RATE, "type int16"),
        (np.zeros((1, RATE), np.float32), 100, "100 Hz"),
    ],
)
def test_what_cannot_be_mastered_is_refused_with_a_remedy(clip: np.ndarray, rate: int, got: str) -> None:
    with pytest.raises(UserError, match=got):
        master(clip, rate)


def test_an_impossible_target_or_rate_is_refused() -> None:
    with pytest.raises(UserError, match=r"target of 0\.0 LUFS"):
        master(chords(), RATE, target_lufs=0.0)
    with pytest.raises(UserError, match="output at 1 Hz"):
        master(chords(), RATE, sample_rate_out=1)


def test_widening_keeps_the_mono_sum_and_makes_two_different_channels() -> None:
    mid = coloured_noise(-5)[0].astype(np.float64)
    left, right = mastering.widen(mid, RATE)
    assert np.abs((left + right) / 2 - mid).max() < 1e-12
    assert 0.3 < np.corrcoef(left, right)[0, 1] < 0.98


def test_widening_leaves_the_bass_in_the_middle() -> None:
    left, right = mastering.widen(tone(60)[0].astype(np.float64), RATE)
    assert np.sqrt(np.mean((left - right) ** 2)) < 0.05 * np.sqrt(np.mean((left + right) ** 2))


def test_the_mono_sum_of_a_widened_track_is_the_mono_track_but_for_its_level() -> None:
    wide = master(chords(), RATE, target_lufs=-26.0)
    mono = master(chords(), RATE, target_lufs=-26.0, stereo=False)
    assert wide.limiting_db == mono.limiting_db == 0.0
    assert np.corrcoef(wide.wav.mean(0), mono.wav[0])[0, 1] > 1 - 1e-6


def test_a_stereo_clip_keeps_its_own_image() -> None:
    left_only = np.concatenate([chords(), np.zeros_like(chords())])
    assert not master(left_only, RATE).wav[1].any()


@pytest.mark.parametrize("gain_db", [-4.0, 3.0])
def test_shelves_reach_their_gain_at_the_ends_and_leave_the_middle(gain_db: float) -> None:
    impulse = np.zeros((1, 1 << 15))
    impulse[0, 0] = 1.0
    response = np.abs(np.fft.rfft(mastering.shelves(impulse, 44_100, gain_db, -gain_db)[0]))
    at = [20 * math.log10(response[round(f / 44_100 * (1 << 15))]) for f in (20, 800, 15_000)]
    assert at == pytest.approx([gain_db, 0.0, -gain_db], abs=0.35)


def test_a_spectrum_on_the_target_slope_is_left_alone() -> None:
    clip = coloured_noise(mastering.TARGET_SLOPE_DB_PER_OCTAVE, 10).astype(np.float64)
    assert mastering.shelf_gains(clip, RATE, RATE / 2) == pytest.approx((0.0, 0.0), abs=0.4)


def test_a_dull_clip_is_brightened_and_a_bright_one_darkened() -> None:
    assert mastering.shelf_gains(coloured_noise(-8).astype(np.float64), RATE, RATE / 2)[1] > 1.0
    assert mastering.shelf_gains(coloured_noise(0).astype(np.float64), RATE, RATE / 2)[1] < -1.0


@pytest.mark.parametrize("frequency", [80, 1_000, 6_000])
def test_a_band_that_holds_nothing_is_not_raised(frequency: float) -> None:
    assert mastering.shelf_gains(tone(frequency).astype(np.float64), RATE, RATE / 2) == (0.0, 0.0)


def test_the_high_pass_takes_away_a_constant_offset_without_a_click() -> None:
    out = mastering.high_pass(np.full((1, RATE), 0.5), RATE)
    assert np.abs(out).max() < 1e-6


def test_a_clip_begins_and_ends_without_a_click() -> None:
    wav = master(np.full((1, RATE), 0.3, np.float32) + tone(440)[:, 100 : RATE + 100], RATE).wav
    assert np.abs(wav[:, [0, -1]]).max() < 0.01


def test_the_compressor_narrows_the_range_and_leaves_quiet_passages_alone() -> None:
    loud, soft = tone(440, 0.9).astype(np.float64), tone(440, 0.05).astype(np.float64)
    pressed, reduction_db = mastering.compress(loud, RATE)
    steady = 20 * math.log10(np.abs(pressed[0, RATE:]).max() / 0.9)
    over = 20 * math.log10(0.9 / math.sqrt(2)) - mastering.THRESHOLD_DB
    assert steady == pytest.approx(-over * (1 - 1 / mastering.RATIO), abs=0.3)
    assert reduction_db == pytest.approx(-steady, abs=0.3)
    assert np.array_equal(mastering.compress(soft, RATE)[0], soft)


def test_the_limiter_never_takes_off_less_than_needed() -> None:
    peaks_db = np.random.default_rng(0).normal(-10, 8, 4_000)
    reduction = mastering.limiter_reduction_db(peaks_db, RATE, -1.0)
    assert (reduction >= 0).all()
    assert (peaks_db - reduction).max() <= -1.0 + 1e-9


def test_the_limiter_lets_go_after_a_peak() -> None:
    peaks_db = np.full(RATE, -20.0)
    peaks_db[1_000] = 5.0
    reduction = mastering.limiter_reduction_db(peaks_db, RATE, -1.0)
    assert reduction[1_000] == pytest.approx(6.0)
    assert reduction[0] == 0.0
    assert reduction[-1] < 1e-4
