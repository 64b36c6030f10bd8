from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf import train_reward
from rlhf.preferences import X, load_snapshot, training_pairs
from rlhf.reward_extras import acceptable_pairs, aspect_pairs, auc, fit_acceptable, fit_aspect, level_of
from rlhf.reward_folds import Clips, Folds, choose_heads, cross_calibrated, loss_by_fold, ordering, unseen_raters, unseen_scores
from rlhf.reward_model import Head

PLAIN, BLIND = Head("linear", ("all",), 3.0), Head("linear", ("nothing",), 3.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy's votes, and heads over what the toy's raters hear (PLAIN) or over noise (BLIND)."""
    folder = tmp_path_factory.mktemp("toy")
    train_reward.write_toy_snapshot(folder, "b" * 64, seed=0)
    snapshot = load_snapshot(folder)
    clips = Clips(snapshot, 2, 32)
    heard = torch.stack([codes[0].float().mean(1) / 4 for codes in clips.codes])
    noise = torch.randn(heard.shape, generator=torch.Generator().manual_seed(0))
    folds = Folds({BLIND: noise, PLAIN: heard}, clips.fold_of_prompt(5, 0), 5)
    return snapshot, clips, folds


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


def test_the_head_that_hears_is_chosen_by_every_fold(world):
    snapshot, clips, folds = world
    pairs = clips.pairs(training_pairs(snapshot, known=clips.known))
    choice = choose_heads(folds, pairs)
    assert choice.best == PLAIN
    assert choice.chosen == [PLAIN] * 5
    assert choice.losses[PLAIN] < choice.losses[BLIND]


def test_a_fold_has_no_say_in_its_own_scores(world):
    """Whatever its votes said, the head, the scores and the inner scores of a fold stay the same."""
    snapshot, clips, folds = world
    pairs = clips.pairs(training_pairs(snapshot, known=clips.known))
    held = folds.of(pairs) == 2
    turned = replace(
        pairs, chosen=torch.where(held, pairs.rejected, pairs.chosen), rejected=torch.where(held, pairs.chosen, pairs.rejected)
    )
    before, after = choose_heads(folds, pairs), choose_heads(folds, turned)
    assert before.chosen[2] == after.chosen[2]
    torch.testing.assert_close(before.inner[2], after.inner[2], rtol=0, atol=0)
    one, two = (unseen_scores(folds, told, before.chosen, 2, seed=0) for told in (pairs, turned))
    assert torch.equal(one[2], two[2])
    assert not torch.equal(one[1], two[1])


def test_calibration_of_a_fold_comes_from_the_others(world):
    snapshot, clips, folds = world
    pairs = clips.pairs(training_pairs(snapshot, known=clips.known))
    margin = 9 * folds.margins(unseen_scores(folds, pairs, [PLAIN] * 5, 1, 0), pairs)
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
    margin = unseen_raters(folds, clips, votes, pairs_of, [PLAIN] * 5, seed=0)
    assert (margin > 0).float().mean() > 0.65
    assert sorted(map(len, seen)) == [4] * 5
    assert set.intersection(*seen) == set()
    assert unseen_raters(folds, clips, [vote for vote in votes if vote.rater == "r0"], pairs_of, [PLAIN] * 5, seed=0) is None


def test_an_aspect_turns_pairs_to_the_side_that_is_better_at_it(world):
    snapshot, clips, _ = world
    preferences = training_pairs(snapshot, known=clips.known)
    pairs = aspect_pairs(clips, preferences, "musicality")
    told = [pair for pair in preferences if "musicality" in pair.aspects]
    for row, pair in enumerate(told):
        better = pair.chosen_sha256 if pair.aspects["musicality"] >= 0 else pair.rejected_sha256
        assert int(pairs.chosen[row]) == clips.row[better]
        assert float(pairs.p[row]) == pytest.approx(0.5 + abs(pair.aspects["musicality"]) / 4)
    assert any(pair.aspects["musicality"] < 0 for pair in told)


def test_an_aspect_has_a_head_of_its_own(world):
    """The toy's aspect follows the first book; its votes follow both."""
    snapshot, clips, folds = world
    found = fit_aspect(folds, clips, training_pairs(snapshot, known=clips.known), "musicality", [PLAIN] * 5, PLAIN, 3, 0)
    assert found.figures["ci"][0] > 0.8
    first, second = found.extra.members.mean(0).tolist()
    assert first < 0
    assert abs(first) > 3 * abs(second)


def test_few_judgements_make_no_head(world):
    snapshot, clips, folds = world
    few = training_pairs(snapshot, known=clips.known)[:20]
    assert fit_aspect(folds, clips, few, "musicality", [PLAIN] * 5, PLAIN, 3, 0).extra is None
    made = fit_acceptable(folds, clips, few, snapshot.votes[:20], None, [PLAIN] * 5, PLAIN, 3, 0)
    assert made.extra is None
    assert made.figures["auc"] is None


def test_clips_called_bad_meet_winners_of_their_own_fold_only(world):
    snapshot, clips, folds = world
    votes = list(snapshot.votes)
    bad = [vote for vote in votes if vote.choice == "both_bad"]
    order = clips.pairs(training_pairs(snapshot, known=clips.known))
    pairs = acceptable_pairs(clips, folds, order, bad, clips.single(ordering(votes)), seed=0)
    more = pairs.index(torch.arange(len(order), len(pairs)))
    assert len(more) == 2 * len(bad) > 0
    assert folds.fold[clips.prompt[more.chosen]].tolist() == folds.fold[clips.prompt[more.rejected]].tolist() == folds.of(more).tolist()
    assert set(more.rejected.tolist()) == {clips.row[clip] for vote in bad for clip in (vote.clip_x, vote.clip_y)}


def test_the_level_of_both_bad_is_recovered():
    rng = np.random.default_rng(0)
    s = rng.normal(size=20_000)
    bad = rng.random(20_000) < 1 / (1 + np.exp(-3 * (-1.0 - s)))
    level, slope = level_of(s[bad], s[~bad])
    assert level == pytest.approx(-1, abs=0.05)
    assert slope == pytest.approx(3, rel=0.07)
    assert auc(np.array([0.0, 1.0]), np.array([1.0, 2.0])) == 0.875
