"""The consistency benchmark: what is judged was never trained on, and its judges hear what they say they hear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from base_models.corpus.known import LEADS, OTHER, lead_name
from base_models.corpus.styles import MOODS
from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from benchmarks.consistency import ASKED, Config, asked, cell, learnt_from, prompts, sources
from benchmarks.consistency_judges import (
    FACTS,
    OTHERS,
    Judges,
    Known,
    above,
    known_clips,
    load_clips,
    mode_features,
    save_clips,
)
from rlhf.asked import instrument_versions, mood_versions

FRAMES = 50


def clip(mood: str, lead: str, features: np.ndarray) -> Known:
    return Known(mood, lead, "jazz", 120.0, "C minor", torch.zeros(4, 2, dtype=torch.long), features)


def test_no_pair_of_mood_and_instrument_is_both_trained_on_and_judged() -> None:
    pairs = {part: {asked(prompt) for prompt in prompts(part)} for part in ("train", "tuning", "heldout")}
    assert pairs["train"].isdisjoint(pairs["heldout"])
    assert pairs["train"].isdisjoint(pairs["tuning"])
    assert pairs["tuning"].isdisjoint(pairs["heldout"])
    assert set.union(*pairs.values()) == {(mood, lead) for mood in MOODS for lead in LEADS}
    assert ASKED in prompts("heldout")


def test_a_pair_is_learnt_from_all_its_words_and_from_no_other_pair() -> None:
    assert learnt_from(Config()) == ["sad piano", "melancholic piano", "wistful piano", "gloomy piano"]
    assert {asked(prompt) for prompt in learnt_from(Config(pair="dark violin"))} == {("dark", "violin")}
    assert ("sad", "piano") not in {asked(prompt) for prompt in learnt_from(Config(learn="others"))}


@pytest.mark.parametrize("pair", ["sad kazoo", "piano", "jolly piano", ""])
def test_a_pair_that_nobody_knows_is_refused(pair: str) -> None:
    with pytest.raises(UserError, match=r"expected one of happy, calm, sad, dark and one of piano"):
        learnt_from(Config(pair=pair))


@pytest.mark.parametrize("part", ["train", "tuning", "heldout"])
def test_every_mood_and_every_instrument_is_asked_for_in_each_part(part) -> None:
    asks = [asked(prompt) for prompt in prompts(part)]
    assert {mood for mood, _ in asks} == set(MOODS)
    assert {lead for _, lead in asks} == set(LEADS)


def test_the_checks_understand_every_prompt() -> None:
    for part in ("train", "tuning", "heldout"):
        assert all(mood_versions(prompt) and instrument_versions(prompt) for prompt in prompts(part))


def test_leads_that_are_judged_and_others_do_not_mix() -> None:
    assert not {program for programs in LEADS.values() for program in programs} & set(OTHERS)
    assert {lead_name(program) for program in OTHERS} == {OTHER}


def test_judges_learn_and_are_told_by_melodies_that_ears_never_met() -> None:
    assert {bucket for _, buckets, _, _ in sources(Config()) for bucket in buckets} == {"val", "test"}
    fit, *told = (set(buckets) for _, buckets, _, _ in sources(Config()))
    assert all(fit.isdisjoint(buckets) for buckets in told)


def test_the_mode_is_heard_in_any_key_and_minor_is_not_major() -> None:
    triad = {"minor": (0, 3, 7), "major": (0, 4, 7)}
    heard = {}
    for mode, steps in triad.items():
        pitches = np.full(12, 0.02)
        pitches[list(steps)] = 0.25
        told = [mode_features(np.roll(pitches, tonic)) for tonic in range(12)]
        assert np.allclose(told, told[0])
        heard[mode] = told[0][2]
    assert heard["minor"] > 0.1
    assert heard["major"] < -0.05


def test_known_clips_are_what_they_are_called_and_come_back_from_disk(tmp_path: Path) -> None:
    codec = load_policy(PRETRAINED).codec
    clips = known_clips(codec, 2, ("test",), FRAMES, seed=5)
    again = known_clips(codec, 1, ("test",), FRAMES, seed=5)
    assert np.array_equal(clips[0].features, again[0].features)
    assert not np.array_equal(clips[0].features, clips[1].features)
    assert all(one.codes.shape == (4, FRAMES) and one.mood in MOODS and one.lead in {*LEADS, OTHER} for one in clips)
    assert all(one.key.endswith(MOODS[one.mood].valence) for one in clips)
    save_clips(tmp_path / "clips.npz", clips)
    for one, other in zip(clips, load_clips(tmp_path / "clips.npz"), strict=True):
        assert torch.equal(one.codes, other.codes)
        assert np.array_equal(one.features, other.features)
        assert [getattr(one, name) for name in FACTS] == [getattr(other, name) for name in FACTS]


def test_judges_tell_how_well_they_hear_clips_that_they_were_not_fitted_on() -> None:
    rng = np.random.default_rng(0)

    def some(n: int) -> list[Known]:
        made = []
        for _ in range(n):
            sad, piano = rng.integers(2, size=2)
            features = np.concatenate([[3.0 * sad, 3.0 * piano], np.zeros(4)]) + rng.normal(size=6)
            made.append(clip("sad" if sad else "happy", "piano" if piano else "flute", features))
        return made

    judges = Judges.fit(some(300))
    told = judges.hearing(some(300))
    for kind in ("mood", "lead"):
        assert told[kind]["accuracy"] > 0.85
        assert told[kind]["guess"] < 0.65
    assert told["mood"]["auc sad"] > 0.9
    sure = judges.probability("mood", np.array([[3.0, 0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0, 0]]), ["sad", "sad"])
    assert sure[0] > 0.6 > 0.4 > sure[1]


def test_judges_of_noise_hear_nothing() -> None:
    rng = np.random.default_rng(1)
    noise = [clip(("sad", "dark")[i % 2], ("piano", "flute")[i // 2 % 2], rng.normal(size=6)) for i in range(600)]
    told = Judges.fit(noise[:200]).hearing(noise[200:])
    assert abs(told["mood"]["accuracy"] - 0.5) < 0.1
    assert abs(told["lead"]["auc piano"] - 0.5) < 0.1


def test_equal_scores_count_half() -> None:
    assert above(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == 0.875


def test_a_gain_is_told_with_its_interval() -> None:
    assert cell({"mean": 0.5}) == "0.500"
    assert cell({"mean": 0.5, "gain": 0.1, "ci": [-0.02, 0.22]}) == "0.500 (+0.100 [-0.020, +0.220])"
    assert cell(None) == "-"
