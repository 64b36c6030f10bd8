import numpy as np
import pytest
import torch

from rlhf.preferences import training_pairs
from rlhf.reward_committee import Committee
from rlhf.reward_extras import Bench, acceptable_pairs, aspect_pairs, auc, fit_acceptable, fit_aspect, level_of
from rlhf.reward_folds import ordering
from tests.rlhf.reward_toys import PLAIN, toy_votes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy_votes(tmp_path_factory.mktemp("toy"))


def bench(clips, folds):
    return Bench(folds, clips, [Committee((PLAIN,))] * 5, Committee((PLAIN,)), 3, 0)


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
    found = fit_aspect(bench(clips, folds), training_pairs(snapshot, known=clips.known), "musicality")
    assert found.figures["ci"][0] > 0.8
    first, second = found.extra.members.mean(0).tolist()
    assert first < 0
    assert abs(first) > 3 * abs(second)


def test_few_judgements_make_no_head(world):
    snapshot, clips, folds = world
    few = training_pairs(snapshot, known=clips.known)[:20]
    assert fit_aspect(bench(clips, folds), few, "musicality").extra is None
    made = fit_acceptable(bench(clips, folds), few, snapshot.votes[:20], None)
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
