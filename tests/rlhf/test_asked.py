"""What prompts ask for, read from their words."""

from __future__ import annotations

import pytest

from base_models.corpus.styles import GENRE_NAMES
from rlhf.asked import (
    FAMILIES,
    asked_genre,
    asked_keys,
    asked_lead,
    asked_mood,
    asked_tempo,
    genre_versions,
    instrument_versions,
    instrument_words,
    key_name,
    mood_versions,
    mood_words,
)


def test_words_for_a_tempo_are_the_captions_ranges_and_the_longer_one_counts():
    assert asked_tempo("a very slow piece") == (30.0, 66, False)
    assert asked_tempo("slow, sad") == (66, 86, False)
    assert asked_tempo("very fast techno") == (144, 300.0, False)
    low, high, stated = asked_tempo("fast house, 120 BPM")
    assert (low, high, stated) == (pytest.approx(110.4), pytest.approx(129.6), True)
    assert asked_tempo("breakfast music") is None


def test_keys_are_read_with_their_accidentals():
    assert asked_keys("in C major") == [0]
    assert asked_keys("jazz in Eb minor, fast") == [12 + 3]
    assert asked_keys("F# minor") == asked_keys("gb min") == [12 + 6]
    assert asked_keys("B flat major") == [10]
    assert asked_keys("Cb major") == [11]
    assert asked_keys("in A minor") == [12 + 9]
    assert asked_keys("something in a minor key") == list(range(12, 24))
    assert asked_keys("sad, minor") == list(range(12, 24))
    assert asked_keys("a D-flat major waltz") == [1]
    assert asked_keys("F-sharp minor") == [12 + 6]
    assert asked_keys("in Eb maj") == [3]
    assert asked_keys("a 2 min ambient piece") is asked_keys("piano, 3 min") is None  # minutes
    assert asked_keys("a majority vote") is None
    assert [asked_keys(key_name(key)) for key in range(24)] == [[key] for key in range(24)]


def test_versions_exchange_the_stated_word_and_leave_the_rest():
    versions, same = mood_versions("Sad piano with warm pad, slow")
    assert len(versions) == len(same) == len(mood_words())
    assert all(version.endswith(" piano with warm pad, slow") for version in versions)
    assert {v.split(" piano")[0] for v, keep in zip(versions, same) if keep} == {"sad", "melancholic", "wistful", "gloomy"}
    assert mood_versions("techno with warm pad") is None  # "warm" is the pad's name here, no mood
    versions, same = instrument_versions("sad electric piano, slow")
    assert versions[0] == "sad electric piano, slow"
    assert same == [True] + [False] * (len(FAMILIES) - 1)
    assert "sad violin, slow" in versions
    assert "sad piano, slow" not in versions


def test_each_instrument_of_the_demo_belongs_to_one_family():
    assert instrument_words()["jazz guitar"] == "guitar"
    assert instrument_words()["church organ"] == "organ"
    assert set(instrument_words().values()) == set(FAMILIES)


def test_a_genre_is_not_read_out_of_an_instruments_name():
    versions, same = genre_versions("calm roots reggae with house piano")
    assert len(versions) == len(same) == len(GENRE_NAMES)
    assert [v for v, keep in zip(versions, same) if keep] == ["calm roots reggae with house piano"]
    assert "calm jazz with house piano" in versions
    assert genre_versions("sad house piano, slow") is None
    assert genre_versions("something slow") is None


def test_an_instrument_is_not_read_out_of_a_genres_name():
    assert asked_genre("dark guitar rock, fast") == "rock"
    assert asked_lead("dark guitar rock, fast") is None
    assert instrument_versions("choir music") is None
    assert asked_lead("guitar rock with electric guitar") == "guitar"


def test_what_is_named_is_read_by_one_name():
    prompt = "gloomy swing jazz with tenor sax and piano"
    assert (asked_mood(prompt), asked_genre(prompt), asked_lead(prompt)) == ("sad", "jazz", "saxophone")
    assert asked_lead("sad piano") == asked_lead("house piano") == "piano"
    assert asked_lead("sad electric piano") == "electric piano"
    assert asked_lead("techno with metallic pad") is None  # no lead of a name
    assert asked_mood("something slow") is asked_genre("something slow") is asked_lead("something slow") is None
