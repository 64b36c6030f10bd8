"""Clips of which everything is known: leads, genres and moods do not go together."""

from __future__ import annotations

import numpy as np
import pytest

from base_models.corpus.known import CHOIR, LEADS, MORE_LEADS, OTHER, Player, lead_name
from base_models.corpus.styles import BANDS, GENRES, MOODS
from base_models.errors import UserError


@pytest.fixture
def player() -> Player:
    return Player(16_000, 1.0, ("val",))


def test_the_same_numbers_play_the_same_samples(player: Player) -> None:
    wav, facts = player.play("sad", 0, np.random.default_rng(3))
    again, same = player.play("sad", 0, np.random.default_rng(3))
    assert np.array_equal(wav, again)
    assert facts == same
    assert facts.mood == "sad"
    assert facts.key.endswith(MOODS["sad"].valence)
    assert wav.shape == (16_000,)
    assert 0.01 < float(np.abs(wav).max()) <= 1


def test_any_lead_plays_in_any_genre_but_a_choir_sings_itself(player: Player) -> None:
    sax = 66
    for genre in ("techno", "chamber", CHOIR):
        _, facts = player.play("calm", sax, np.random.default_rng(0), genre)
        assert facts.genre == genre
        assert (facts.program == sax) == (genre != CHOIR)


def test_a_bands_own_lead_stays_where_none_is_asked_for(player: Player) -> None:
    _, facts = player.play("happy", None, np.random.default_rng(1))
    assert facts.program in {band.lead.program for band in BANDS[facts.genre]}


def test_every_genre_needs_a_melody() -> None:
    with pytest.raises(UserError, match="no melody for choral"):
        Player(16_000, 1.0, (), [CHOIR])
    assert set(Player(16_000, 1.0, ("test",)).pools) == set(GENRES)


def test_a_program_has_one_name() -> None:
    named = [program for programs in (*LEADS.values(), *MORE_LEADS.values()) for program in programs]
    assert len(set(named)) == len(named)
    assert lead_name(0) == "piano"
    assert lead_name(4) == OTHER  # an electric piano is not what "piano" asks for
    assert lead_name(4, {**LEADS, **MORE_LEADS}) == "electric piano"
