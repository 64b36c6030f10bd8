from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.preferences import X, training_pairs
from rlhf.reward_committee import Committee
from rlhf.reward_folds import choose_committee, cross_calibrated, loss_by_fold, ordering, unseen_raters, unseen_scores
from tests.rlhf.reward_toys import BLIND, PLAIN, toy_votes

HEARS, DEAF, BOTH = Committee((PLAIN,)), Committee((BLIND,)), Committee((BLIND, PLAIN))
AMONG = (DEAF, BOTH, HEARS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy_votes(tmp_path_factory.mktemp("toy"))


def test_every_clip_of_a_vote_has_a_row_and_pairs_name_it(world):
    snapshot, clips, _ = world
    preferences = training_pairs(snapshot, known=clips.known)
    pairs = clips.pairs(preferences)
    for index in (0, 50):
        np.testing.assert_array_equal(clips.codes[int(pairs.chosen[index])][0], preferences[index].chosen_codes)
    votes = ordering(snapshot.votes)
    single = clips.single(votes)
    assert [clips.row[vote.clip_x if vote.choice == X else vote.clip_y] for vote in votes] == single.chosen.tolist()
    assert len(clips) == 240


def test_the_committee_that_hears_is_chosen_by_every_fold(world):
    snapshot, clips, folds = world
    pairs = clips.pairs(training_pairs(snapshot, known=clips.known))
    choice = choose_committee(folds, pairs, AMONG)
    assert choice.best == HEARS
    assert choice.chosen == [HEARS] * 5
    assert choice.losses[HEARS] < choice.losses[BOTH] < choice.losses[DEAF]


def test_a_fold_has_no_say_in_its_own_scores(world):
    """Whatever its votes said, the committee, the scores and the inner scores of a fold stay the same."""
    snapshot, clips, folds = world
    pairs = clips.pairs(training_pairs(snapshot, known=clips.known))
    held = folds.of(pairs) == 2
    turned = replace(
        pairs, chosen=torch.where(held, pairs.rejected, pairs.chosen), rejected=torch.where(held, pairs.chosen, pairs.rejected)
    )
    before, after = choose_committee(folds, pairs, AMONG), choose_committee(folds, turned, AMONG)
    assert before.chosen[2] == after.chosen[2]
    torch.testing.assert_close(before.inner[2], after.inner[2], rtol=0, atol=0)
    one, two = (unseen_scores(folds, told, before.chosen, 2, seed=0) for told in (pairs, turned))
    assert torch.equal(one[2], two[2])
    assert not torch.equal(one[1], two[1])


def test_calibration_of_a_fold_comes_from_the_others(world):
    snapshot, clips, folds = world
    pairs = clips.pairs(training_pairs(snapshot, known=clips.known))
    margin = 9 * folds.margins(unseen_scores(folds, pairs, [HEARS] * 5, 1, 0), pairs)
    held = folds.of(pairs) == 0
    told = cross_calibrated(margin, pairs, folds)
    changed = cross_calibrated(torch.where(held, -margin, margin), pairs, folds)
    torch.testing.assert_close(changed[held], -told[held])
    assert loss_by_fold(told, pairs, folds).sum() < np.log(2) * float(pairs.weight.sum())


def test_strangers_votes_are_foretold_without_their_votes(world):
    snapshot, clips, folds = world
    votes = ordering(snapshot.votes)

    def pairs_of(known):
        seen.append({vote.rater for vote in known})
        return training_pairs(replace(snapshot, votes=tuple(known)), known=clips.known)

    seen = []
    margin = unseen_raters(folds, clips, votes, pairs_of, [HEARS] * 5, seed=0)
    assert (margin > 0).float().mean() > 0.65
    assert sorted(map(len, seen)) == [4] * 5
    assert set.intersection(*seen) == set()
    assert unseen_raters(folds, clips, [vote for vote in votes if vote.rater == "r0"], pairs_of, [HEARS] * 5, seed=0) is None
