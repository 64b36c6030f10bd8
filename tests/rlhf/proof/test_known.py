import numpy as np
import pytest

from base_models.corpus.build import piece_bucket
from base_models.corpus.styles import GENRES
from base_models.corpus.tunes import load_tunes
from base_models.errors import UserError
from base_models.measures import GenreProbe
from base_models.policy import PRETRAINED, load_policy
from rlhf.proof.known import BUCKET, fit_known, is_held


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
    tunes = [tune for tune in load_tunes() if piece_bucket(tune.group) == BUCKET]
    sides = {side: {tune.group for tune in tunes if is_held(tune) == side} for side in (False, True)}
    assert not sides[False] & sides[True]
    assert 0.1 < len(sides[True]) / sum(map(len, sides.values())) < 0.4
    assert np.array_equal(sorted({tune.group for tune in tunes}), sorted(sides[False] | sides[True]))


def test_fewer_clips_than_genres_are_refused(codec, tmp_path):
    with pytest.raises(UserError, match="one a genre"):
        fit_known(codec, 5, 2.0, 0, tmp_path)
