"""Captions say true things in many ways; prompts cover what they claim to cover."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from base_models.corpus.captions import TEMPO_WORDS, Facts, captions, demo_prompts, tempo_words
from base_models.corpus.styles import BANDS, GENRE_NAMES, GENRES, HELD_OUT_MOOD, MOODS
from base_models.errors import UserError

ALL_TEMPO_WORDS = sorted({word for _, words in TEMPO_WORDS for word in words}, key=len, reverse=True)


def written(genre: str, mood: str, tempo_bpm: float, n: int = 40) -> list[str]:
    band = BANDS[genre][0]
    facts = Facts(genre, mood, band.instrument_names, tempo_bpm, "Eb minor", band.name)
    rng = np.random.default_rng(5)
    return [caption for _ in range(n) for caption in captions(facts, rng)]


def tempo_word_in(caption: str, names: tuple[str, ...]) -> str | None:
    for name in names:
        caption = caption.replace(name, "")
    return next((word for word in ALL_TEMPO_WORDS if re.search(rf"\b{word}\b", caption)), None)


@pytest.mark.parametrize("tempo_bpm", [50, 65.9, 66, 85, 86, 113, 114, 143, 144, 190])
def test_tempo_words_and_bpm_agree_in_every_caption(tempo_bpm: float):
    seen = set()
    for genre in GENRES:
        for caption in written(genre, "dark", tempo_bpm):
            word = tempo_word_in(caption, (BANDS[genre][0].name,))
            assert word is None or word in tempo_words(tempo_bpm), caption
            seen.add(word)
            for number in re.findall(r"(\d+) BPM", caption):
                assert int(number) == round(tempo_bpm)
    assert tempo_words(tempo_bpm)[0] in seen


def test_tempo_words_rise_with_tempo():
    assert [tempo_words(bpm)[0] for bpm in (60, 80, 100, 130, 170)] == ["very slow", "slow", "mid-tempo", "fast", "very fast"]


def test_a_clip_has_four_captions_and_most_name_the_genre():
    band = BANDS["jazz"][0]
    facts = Facts("jazz", "sad", band.instrument_names, 90, "C minor", band.name)
    rng = np.random.default_rng(0)
    sets = [captions(facts, rng) for _ in range(200)]
    assert all(len(four) == 4 for four in sets)
    flat = [caption for four in sets for caption in four]
    assert np.mean(["jazz" in caption for caption in flat]) > 0.9
    assert np.mean(["90 BPM" in caption for caption in flat]) == pytest.approx(0.25)
    assert len(set(flat)) > 150
    assert min(map(len, flat)) < 12
    assert max(map(len, flat)) > 60


@pytest.mark.parametrize("genre", GENRES)
def test_captions_say_nothing_untrue(genre: str):
    other_moods = [word for mood in MOODS.values() if mood.name != "calm" for word in mood.words]
    other_bands = [band.name for bands in BANDS.values() for band in bands if band is not BANDS[genre][0]]
    for caption in written(genre, "calm", 92):
        assert not any(re.search(rf"\b{word}\b", caption) for word in other_moods), caption
        assert not any(name in caption for name in other_bands), caption
        assert " minor" not in caption or "Eb minor" in caption


def test_a_slow_piece_is_never_upbeat():
    assert not any("upbeat" in caption for caption in written("folk", "happy", 80, 200))
    assert any("upbeat" in caption for caption in written("folk", "happy", 120, 200))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_prompts_cover_the_genres_evenly_with_no_two_alike(split: str):
    rows = demo_prompts(120, split, seed=1)
    assert Counter(row["genre"] for row in rows) == dict.fromkeys(GENRES, 10)
    assert len({row["prompt"] for row in rows}) == 120
    assert all(set(row) == {"prompt", "genre", "mood", "instruments", "tempo_bpm", "split"} for row in rows)
    assert {row["split"] for row in rows} == {split}


def test_heldout_prompts_ask_only_for_held_out_pairs_and_train_prompts_never_do():
    assert {(row["genre"], row["mood"]) for row in demo_prompts(240, "heldout")} == set(HELD_OUT_MOOD.items())
    trained = {(row["genre"], row["mood"]) for row in demo_prompts(240, "train")}
    assert not trained & set(HELD_OUT_MOOD.items())
    assert len(trained) == 36


def test_half_of_the_prompts_name_the_tempo_that_the_row_holds():
    rows = demo_prompts(240)
    assert sum(row["tempo_bpm"] is not None for row in rows) == 120
    for row in rows:
        numbers = re.findall(r"(\d+) BPM", row["prompt"])
        assert numbers == ([] if row["tempo_bpm"] is None else [f"{row['tempo_bpm']:.0f}"])


def test_every_prompt_says_its_genre_its_mood_and_its_instruments():
    for row in demo_prompts(240, "heldout", seed=2):
        assert any(name in row["prompt"] for name in GENRE_NAMES[row["genre"]])
        assert any(word in row["prompt"] for word in MOODS[row["mood"]].words)
        assert all(name in row["prompt"] for name in row["instruments"])


def test_prompts_depend_on_the_seed_alone_and_more_prompts_begin_with_the_same_ones():
    assert demo_prompts(24, "train", 3) == demo_prompts(24, "train", 3)
    assert demo_prompts(24, "train", 3) != demo_prompts(24, "train", 4)
    assert demo_prompts(48, "train", 3)[:24] == demo_prompts(24, "train", 3)
    assert demo_prompts(0) == []


def test_an_unknown_split_is_refused_with_a_remedy():
    with pytest.raises(UserError, match="'train' or 'heldout'"):
        demo_prompts(3, "test")
