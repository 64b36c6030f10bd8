"""Rendered clips: the same bytes for the same notes, stems that add up, one loudness, no clipping."""

from __future__ import annotations

import numpy as np
import pyloudnorm
import pytest

from base_models.corpus.arrange import Arrangement
from base_models.corpus.harmony import Note
from base_models.corpus.phrases import Track
from base_models.corpus.render import PEAK_CAP, TARGET_LUFS, RenderedClip, Synth, render, soundfont_path
from base_models.corpus.styles import BANDS, GENRES, MOODS, STEMS

SAMPLE_RATE = 16000
DURATION_S = 2.0


@pytest.fixture(scope="module")
def synth() -> Synth:
    return Synth(SAMPLE_RATE)


def make_arrangement(genre: str = "house", velocity: int = 90, band_index: int = 0) -> Arrangement:
    """A scale over a held chord, a bass pedal and, for bands with a kit, kicks."""
    band = BANDS[genre][band_index]
    scale = [Note(i * 0.25, 0.25, 60 + i, velocity) for i in range(8)]
    chord = [Note(0.0, 2.0, pitch, velocity) for pitch in (60, 64, 67)]
    kicks = [Note(i * 0.5, 0.2, 36, velocity) for i in range(4)]
    stems = {
        "lead": [Track(scale, band.lead.program)],
        "backing": [Track(chord, band.comp.program)],
        "bass": [Track([Note(0.0, 2.0, 36, velocity)], band.bass.program)] if band.bass else [],
        "drums": [Track(kicks, band.kit, is_drum=True)] if band.kit is not None else [],
    }
    return Arrangement(stems, [], [], 120.0, 0, "major", [0], False, DURATION_S)


def play(synth: Synth, genre: str = "house", mood: str = "happy", velocity: int = 90) -> RenderedClip:
    return render(make_arrangement(genre, velocity), BANDS[genre][0], MOODS[mood], synth, np.random.default_rng(0))


def centroid_hz(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples.astype(float)))
    return float((np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE) * spectrum).sum() / spectrum.sum())


def test_the_soundfont_is_found_without_importing_its_package():
    assert soundfont_path().stat().st_size > 5_000_000


@pytest.mark.parametrize("genre", GENRES)
def test_stems_add_up_to_the_mix_within_two_steps(synth: Synth, genre: str):
    clip = play(synth, genre)
    total = sum(clip.stems[stem].astype(np.int32) for stem in STEMS)
    assert np.abs(total - clip.mix).max() <= 2
    assert clip.mix.dtype == np.int16
    assert clip.mix.shape == (int(DURATION_S * SAMPLE_RATE),)
    assert np.abs(clip.mix).max() > 1000


@pytest.mark.parametrize("genre", GENRES)
def test_clips_are_at_the_target_loudness_or_at_the_peak_cap(synth: Synth, genre: str):
    clip = play(synth, genre)
    mix = clip.mix / 32767
    loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(mix)
    peak = max(np.abs(mix).max(), *(np.abs(stem).max() / 32767 for stem in clip.stems.values()))
    assert peak <= PEAK_CAP + 1e-4
    assert loudness == pytest.approx(TARGET_LUFS, abs=0.05) or (peak > PEAK_CAP - 1e-3 and loudness < TARGET_LUFS)


def test_what_was_played_before_leaves_no_trace(synth: Synth):
    alone = play(Synth(SAMPLE_RATE), "cinematic", "sad")
    for genre in ("techno", "ambient", "choral"):
        play(synth, genre, velocity=127)
    after_others = play(synth, "cinematic", "sad")
    np.testing.assert_array_equal(alone.mix, after_others.mix)
    for stem in STEMS:
        np.testing.assert_array_equal(alone.stems[stem], after_others.stems[stem])


def test_notes_sound_at_their_pitch_and_only_while_they_last(synth: Synth):
    audio = synth.render([Track([Note(0.5, 0.5, 69, 100)], 73)], DURATION_S)  # A4 on a flute
    before, during, after = (audio[int(a * SAMPLE_RATE) : int(b * SAMPLE_RATE)] for a, b in ((0, 0.5), (0.6, 0.9), (1.5, 2)))
    assert np.abs(before).max() == 0
    assert np.abs(after).max() < 0.02 * np.abs(during).max()
    spectrum = np.abs(np.fft.rfft(during * np.hanning(len(during)), 1 << 16))
    band = np.fft.rfftfreq(1 << 16, 1 / SAMPLE_RATE)
    near = (band > 300) & (band < 600)
    assert band[near][spectrum[near].argmax()] == pytest.approx(440, rel=0.02)


def test_nine_melodic_tracks_leave_the_drum_channel_to_the_drums(synth: Synth):
    tracks = [Track([Note(0.0, 0.1, 60, 1)], 0) for _ in range(9)]
    tenth = Track([Note(0.5, 1.0, 69, 110)], 73)
    alone, among = synth.render([tenth], DURATION_S), synth.render([*tracks, tenth], DURATION_S)
    later = slice(int(0.8 * SAMPLE_RATE), int(1.4 * SAMPLE_RATE))
    assert np.corrcoef(alone[later], among[later])[0, 1] > 0.99


def test_sad_sounds_darker_than_happy(synth: Synth):
    for genre in ("folk", "rock", "chamber"):
        assert centroid_hz(play(synth, genre, "sad").mix) < 0.9 * centroid_hz(play(synth, genre, "happy").mix)


def test_house_ducks_its_chords_under_the_kick(synth: Synth):
    organ = next(i for i, band in enumerate(BANDS["house"]) if band.comp.name == "organ")  # sustains: what dips is the pump
    arrangement = make_arrangement("house", band_index=organ)
    clip = render(arrangement, BANDS["house"][organ], MOODS["happy"], synth, np.random.default_rng(0))
    backing = clip.stems["backing"].astype(float)
    at_kick, between = (np.sqrt((backing[int(t * SAMPLE_RATE) :][:800] ** 2).mean()) for t in (1.01, 1.42))
    assert at_kick < 0.8 * between


def test_a_silent_arrangement_stays_silent(synth: Synth):
    nothing = Arrangement({stem: [] for stem in STEMS}, [], [], 120.0, 0, "major", [0], False, DURATION_S)
    clip = render(nothing, BANDS["rock"][0], MOODS["happy"], synth, np.random.default_rng(0))
    assert not clip.mix.any()


def test_other_sample_rates_give_the_same_music():
    clip = play(Synth(32000), "folk")
    assert clip.mix.shape == (64000,)
    assert clip.sample_rate == 32000
    low = play(Synth(SAMPLE_RATE), "folk").mix.astype(float)
    spectrum_low = np.abs(np.fft.rfft(low))[200:8000]
    spectrum_high = np.abs(np.fft.rfft(clip.mix.astype(float)))[200:8000]
    assert np.corrcoef(spectrum_low, spectrum_high)[0, 1] > 0.9
