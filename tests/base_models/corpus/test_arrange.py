"""The arranger keeps its promises: key, tempo, ranges, harmony, and the same notes for the same seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from base_models.corpus.arrange import Arrangement, arrange, fits, flip_mode, instruments_of, swing_time
from base_models.corpus.harmony import CHORD_TONES, Chord, Note, harmonise, jazzify, join_repeats, voicing
from base_models.corpus.phrases import LEAD_RANGES, fit_range, thin
from base_models.corpus.styles import BANDS, GENRES, HELD_OUT_MOOD, MOODS, STEMS, draw_tempo, trained_moods
from base_models.corpus.tunes import Tune

C_MAJOR = {0, 2, 4, 5, 7, 9, 11}
C_MINOR = {0, 2, 3, 5, 7, 8, 10}
DURATION_S = 6.0


def make_tune(meter: tuple[int, int] = (4, 4), with_voices: bool = False) -> Tune:
    """Eight bars of a scale-wise melody in D major, with four voices and chords on request."""
    bar_beats = meter[0] * 4 / meter[1]
    scale = [62, 64, 66, 67, 69, 71, 73, 74]
    steps = int(bar_beats / 0.5)
    bars = [[(i * 0.5, 0.5, scale[(bar + i) % 8]) for i in range(steps)] for bar in range(8)]
    held = [[(0.0, bar_beats, pitch)] for pitch in (69, 66, 50)]
    return Tune(
        id="test:1",
        source="test",
        title="Test",
        composer="nobody",
        tonic=2,
        mode="major",
        meter=meter,
        bar_beats=bar_beats,
        bpm=None,
        bars=bars,
        chords=[[(beat, 2, "maj") for beat in range(int(bar_beats))] for _ in bars] if with_voices else None,
        parts=[[bar, *held] for bar in bars] if with_voices else None,
        lyrics=None,
        group="test",
    )


def play(genre: str, mood: str = "happy", band: int = 0, seed: int = 0, key: int = 0, **tune_changes: object) -> Arrangement:
    tune = replace(make_tune(with_voices=genre in ("choral", "chamber")), **tune_changes)
    if genre != "choral":
        tune = flip_mode(tune, MOODS[mood].valence)
    rng = np.random.default_rng(seed)
    return arrange(tune, BANDS[genre][band], MOODS[mood], rng, tempo_bpm=120, key=key, duration_s=DURATION_S)


EVERY_BAND = [(genre, i) for genre in GENRES for i in range(len(BANDS[genre]))]


def test_there_are_twelve_genres_and_thirty_seven_bands_with_names_of_their_own():
    names = {band.name for bands in BANDS.values() for band in bands}
    assert len(GENRES) == 12
    assert len(names) == len(EVERY_BAND) == 37


def test_each_genre_holds_out_one_mood_and_each_mood_is_held_out_equally_often():
    assert set(HELD_OUT_MOOD) == set(GENRES)
    assert {mood: list(HELD_OUT_MOOD.values()).count(mood) for mood in MOODS} == dict.fromkeys(MOODS, 3)
    for genre in GENRES:
        assert set(trained_moods(genre)) | {HELD_OUT_MOOD[genre]} == set(MOODS)
        assert len(trained_moods(genre)) == 3


@pytest.mark.parametrize(("genre", "band"), EVERY_BAND)
def test_every_band_plays_its_stems_within_the_clip(genre: str, band: int):
    arrangement = play(genre, band=band)
    assert set(arrangement.stems) == set(STEMS)
    assert arrangement.stems["lead"]
    assert arrangement.stems["backing"]
    assert bool(arrangement.stems["bass"]) == (BANDS[genre][band].bass is not None)
    assert bool(arrangement.stems["drums"]) == (BANDS[genre][band].kit is not None)
    for tracks in arrangement.stems.values():
        for track in tracks:
            for note in track.notes:
                assert 0 <= note.onset < DURATION_S
                assert note.length > 0
                assert 0 <= note.pitch <= 127
                assert 1 <= note.velocity <= 127


@pytest.mark.parametrize("genre", GENRES)
def test_the_same_seed_gives_the_same_notes_and_another_seed_does_not(genre: str):
    assert play(genre, seed=3) == play(genre, seed=3)
    assert play(genre, seed=3) != play(genre, seed=4)


@pytest.mark.parametrize("genre", GENRES)
def test_the_lead_stays_in_the_key_that_the_label_names(genre: str):
    for mood, scale in (("happy", C_MAJOR), ("sad", C_MINOR)):
        if genre == "choral" and mood == "sad":
            continue  # a choir is never flipped out of its own mode
        assert {pitch % 12 for _, _, pitch in play(genre, mood, key=0).melody} <= scale
        moved = {pitch % 12 for _, _, pitch in play(genre, mood, key=5).melody}
        assert {(pitch - 5) % 12 for pitch in moved} <= scale


def test_four_on_the_floor_falls_on_the_labelled_beat():
    for genre in ("techno", "house"):
        np.testing.assert_allclose(np.diff(play(genre).kicks), 60 / 120, atol=1e-6)


def test_a_jig_counts_dotted_quarters():
    straight, jig = play("folk"), play("folk", meter=(6, 8), bar_beats=3.0, bars=make_tune((6, 8)).bars)
    assert len(jig.melody) == pytest.approx(1.5 * len(straight.melody), rel=0.1)


def test_flipping_changes_the_third_and_drops_what_no_longer_holds():
    tune = make_tune(with_voices=True)
    flipped = flip_mode(tune, "minor")
    degrees = {(pitch - tune.tonic) % 12 for bar in flipped.bars for _, _, pitch in bar}
    assert degrees == C_MINOR
    assert flipped.parts is None
    assert flipped.chords is None
    assert flip_mode(tune, "major") is tune


def test_a_choir_refuses_a_tune_without_voices():
    assert not fits("choral", make_tune())
    assert fits("choral", make_tune(with_voices=True))
    assert not fits("techno", make_tune((3, 4)))
    assert fits("folk", make_tune((6, 8)))
    with pytest.raises(ValueError, match="four voices"):
        play("choral", parts=None, chords=None)


def test_harmony_of_a_melody_that_spells_triads_is_those_triads():
    triads = [[60, 64, 67], [65, 69, 72], [67, 71, 74], [60, 64, 67]]
    bars = [[(float(i), 1.0, pitch) for i, pitch in enumerate(triad)] for triad in triads]
    chords = harmonise(bars, tonic=0, mode="major", bar_beats=3.0, step_beats=3.0)
    assert [bar[0].name for bar in chords] == ["C:maj", "F:maj", "G:maj", "C:maj"]


@pytest.mark.parametrize("step", [1.0, 2.0, 4.0])
def test_harmony_fills_every_bar_without_gaps(step: float):
    tune = make_tune()
    for bar in harmonise(tune.bars, tune.tonic, "major", 4.0, step):
        assert bar[0].onset == 0
        assert sum(chord.length for chord in bar) == pytest.approx(4.0)


def test_jazz_colours_keep_the_triad_inside():
    chords = [Chord(0, 1, root, quality) for root in (0, 7) for quality in ("maj", "min", "dim")]
    for before, after in zip(chords, jazzify(chords, 0, np.random.default_rng(0))):
        assert set(CHORD_TONES[before.quality]) < set(CHORD_TONES[after.quality])
    assert jazzify([Chord(0, 1, 7, "maj")], 0, np.random.default_rng(0))[0].quality == "7"


@pytest.mark.parametrize("quality", list(CHORD_TONES))
def test_a_voicing_holds_the_chord_within_its_range(quality: str):
    for root in range(12):
        pitches = voicing(root, quality, 52, 70)
        assert {(pitch - root) % 12 for pitch in pitches} == {tone % 12 for tone in CHORD_TONES[quality]}
        assert min(pitches) >= 52
        assert max(pitches) <= 70


def test_equal_neighbours_become_one_chord():
    assert join_repeats([Chord(0, 2, 0, "maj"), Chord(2, 2, 0, "maj"), Chord(4, 2, 5, "maj")]) == [
        Chord(0, 4, 0, "maj"),
        Chord(4, 2, 5, "maj"),
    ]


def test_thinning_leaves_one_note_a_grid_step_and_fitting_only_moves_octaves():
    melody = [Note(i * 0.25, 0.25, 60 + i % 12, 80) for i in range(32)]
    line = thin(melody, 1.0, 8.0)
    assert len(line) == 8
    assert all(note.onset % 1 == 0 for note in line)
    fitted = fit_range(melody, 72, 84)
    assert all(72 <= note.pitch <= 84 for note in fitted)
    assert all((before.pitch - after.pitch) % 12 == 0 for before, after in zip(melody, fitted))


def test_every_lead_range_spans_an_octave_so_that_any_pitch_fits():
    assert all(high - low >= 12 for low, high in LEAD_RANGES.values())


def test_swing_moves_the_off_beat_and_nothing_else():
    assert swing_time(3.0, 0.66) == 3.0
    assert swing_time(3.5, 0.66) == pytest.approx(3.66)
    assert [swing_time(t, 0.5) for t in (0.0, 0.25, 1.75)] == [0.0, 0.25, 1.75]


def test_energetic_moods_are_faster_in_every_band():
    rng = np.random.default_rng(0)
    for bands in BANDS.values():
        for band in bands:
            slow = [draw_tempo(band, MOODS["calm"], rng) for _ in range(50)]
            fast = [draw_tempo(band, MOODS["happy"], rng) for _ in range(50)]
            assert max(slow) < min(fast)


def test_instruments_are_those_that_the_band_promises():
    for genre, band in EVERY_BAND:
        assert tuple(instruments_of(play(genre, band=band), BANDS[genre][band])) == BANDS[genre][band].instrument_names
