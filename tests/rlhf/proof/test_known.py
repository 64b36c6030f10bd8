import numpy as np
import pytest

from base_models.corpus.build import piece_bucket
from base_models.corpus.known import Player
from base_models.corpus.styles import GENRES
from base_models.corpus.tunes import load_tunes
from base_models.errors import UserError
from base_models.measures import GenreProbe
from base_models.policy import PRETRAINED, load_policy
from rlhf.proof.known import BUCKET, fit_known, is_held, rendering


@pytest.fixture(scope="module")
def codec():
    return load_policy(PRETRAINED).codec


def test_the_second_judge_knows_all_genres_and_hears_them_on_other_melodies(codec, tmp_path):
    told = fit_known(codec, 60, 2.0, 5, tmp_path)
    assert GenreProbe.load(tmp_path / "probe.npz").classes == tuple(sorted(GENRES))
    assert told["clips"] + told["held_out"] == 60
    assert told["held_out"] > 0
    assert told["accuracy"] > 3 / len(GENRES)


def test_its_melodies_are_the_corpus_test_melodies_and_no_group_is_on_both_sides():
    groups = {tune.group for tune in load_tunes() if piece_bucket(tune.group) == BUCKET}
    player = Player(16_000, 1.0, [BUCKET])
    assert {tune.group for pool in player.pools.values() for tune in pool} <= groups  # no genre plays some of them
    assert 0.1 < sum(map(is_held, groups)) / len(groups) < 0.4


def test_a_number_plays_the_clip_that_it_has_always_played():
    """The figures of docs/proof.md come from a judge that was fitted on these."""
    player = Player(16_000, 0.5, [BUCKET])
    facts = [rendering(player, genre, np.random.default_rng([90, index]))[1] for index, genre in enumerate(GENRES[:4])]
    assert [(told.genre, told.mood, told.tempo_bpm, told.key, told.group) for told in facts] == [
        ("jazz", "sad", 87.0, "Eb minor", "airdsAirs:book6.abc:1135"),
        ("bossa", "dark", 153.0, "Bb minor", "ryansMammoth:FlipMcGildersReel.abc:1"),
        ("techno", "sad", 118.0, "A minor", "miscFolk:northumbrianminstrelsyopus.abc:18"),
        ("house", "calm", 123.0, "G major", "oneills1850:1376-1475.abc:1381"),
    ]


def test_fewer_clips_than_genres_are_refused(codec, tmp_path):
    with pytest.raises(UserError, match="one a genre"):
        fit_known(codec, 5, 2.0, 0, tmp_path)
