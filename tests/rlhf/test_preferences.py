import dataclasses
import json
from functools import partial

import numpy as np
import pytest

from base_models.errors import UserError
from rlhf.preferences import (
    both_bad,
    clip_marks,
    content_sha256,
    decided,
    load_snapshot,
    pairs_sha256,
    prompt_folds,
    prompt_groups,
    shuffled,
    split_by_prompt,
    training_pairs,
)
from rlhf.snapshot import Mark
from tests.rlhf.vote_toys import clip, write_snapshot


@pytest.fixture
def snapshot_of(tmp_path):
    return partial(write_snapshot, tmp_path / "snapshot")


def test_chosen_codes_are_those_of_the_clip_that_was_voted_for(snapshot_of):
    folder = snapshot_of([(0, "a", "y", {}), (1, "a", "x", {})])
    by_pair = {pair.pair_id: pair for pair in training_pairs(load_snapshot(folder))}
    np.testing.assert_array_equal(by_pair["0"].chosen_codes, np.load(folder / "codes" / "1.npy"))
    np.testing.assert_array_equal(by_pair["0"].rejected_codes, np.load(folder / "codes" / "0.npy"))
    np.testing.assert_array_equal(by_pair["1"].chosen_codes, np.load(folder / "codes" / "2.npy"))
    assert by_pair["0"].chosen_codes.dtype == np.int64
    assert by_pair["0"].tempo_bpm == 120.0


def test_votes_on_held_out_prompts_are_counted_and_never_learnt_from(snapshot_of):
    votes = [(0, "a", "x", {"split": "train"}), (0, "b", "y", {"split": "heldout"}), (1, "a", "x", {"split": "heldout"})]
    snapshot = load_snapshot(snapshot_of(votes))
    assert [pair.pair_id for pair in training_pairs(snapshot)] == ["0"]
    assert training_pairs(snapshot)[0].rater == "a"
    assert snapshot.n_excluded == {"split_heldout": 2}


def test_a_snapshot_of_held_out_prompts_alone_teaches_nothing(snapshot_of):
    with pytest.raises(UserError, match=r"without a usable vote \(excluded: 1 split_heldout\)"):
        load_snapshot(snapshot_of([(0, "a", "x", {"split": "heldout"})]))


def test_votes_of_one_pair_are_joined_into_a_soft_label(snapshot_of):
    votes = [(0, "a", "x", {}), (0, "b", "x", {}), (0, "c", "y", {}), (0, "d", "tie", {})]
    (pair,) = training_pairs(load_snapshot(snapshot_of(votes)))
    assert pair.p == pytest.approx(2.5 / 4)
    assert pair.chosen_sha256 == clip(0)
    assert pair.rater == "a,b,c,d"


def test_reliable_raters_outweigh_careless_ones(snapshot_of):
    votes = [(0, "good", "x", {}), (0, "bad", "y", {}), (0, "worse", "y", {})]
    (pair,) = training_pairs(load_snapshot(snapshot_of(votes)), {"good": 3.0, "bad": 0.5, "worse": 0.0})
    assert (pair.chosen_sha256, pair.p) == (clip(0), pytest.approx(3 / 3.5))


def test_a_rater_below_zero_counts_the_other_way_round(snapshot_of):
    votes = [(0, "good", "x", {}), (0, "liar", "y", {}), (1, "liar", "tie", {})]
    turned, tied = training_pairs(load_snapshot(snapshot_of(votes)), {"good": 1.0, "liar": -1.0})
    assert (turned.chosen_sha256, turned.p, tied.p) == (clip(0), 1.0, 0.5)
    assert turned.weight == pytest.approx(2 * tied.weight)


def test_a_snapshot_of_ties_gives_half_labels_and_nothing_decided(snapshot_of):
    pairs = training_pairs(load_snapshot(snapshot_of([(i, "a", "tie", {}) for i in range(4)])))
    assert [pair.p for pair in pairs] == [0.5] * 4
    assert decided(pairs) == []


def test_both_bad_is_an_absolute_judgement_and_no_pair(snapshot_of):
    snapshot = load_snapshot(snapshot_of([(0, "a", "both_bad", {}), (1, "a", "x", {}), (2, "a", "both_bad", {"gold": "x"})]))
    assert [pair.pair_id for pair in training_pairs(snapshot)] == ["1"]
    assert [(judged.pair_id, judged.clip_x) for judged in both_bad(snapshot)] == [("0", clip(0))]
    with pytest.raises(UserError, match="no pair that is ordered"):
        training_pairs(load_snapshot(snapshot_of([(0, "a", "both_bad", {})])))


def test_gold_questions_teach_nothing(snapshot_of):
    snapshot = load_snapshot(snapshot_of([(0, "a", "x", {"gold": "x"}), (1, "a", "x", {})]))
    assert [pair.pair_id for pair in training_pairs(snapshot)] == ["1"]


def test_weights_have_mean_one_and_grow_with_votes(snapshot_of):
    snapshot = load_snapshot(snapshot_of([(0, "a", "x", {}), (0, "b", "x", {}), (0, "c", "x", {}), (1, "a", "y", {})]))
    three, one = training_pairs(snapshot)
    assert three.weight + one.weight == pytest.approx(2)
    assert three.weight == pytest.approx(3 * one.weight)


def test_pairs_do_not_depend_on_the_order_of_votes(snapshot_of):
    votes = [(0, "a", "x", {}), (1, "a", "y", {}), (2, "b", "x", {}), (0, "b", "y", {})]
    there = training_pairs(load_snapshot(snapshot_of(votes)))
    back = training_pairs(load_snapshot(snapshot_of(votes[::-1])))
    assert [(p.pair_id, p.chosen_sha256, p.p) for p in there] == [(p.pair_id, p.chosen_sha256, p.p) for p in back]


def test_splits_share_no_prompt_and_lose_no_pair(snapshot_of):
    pairs = training_pairs(load_snapshot(snapshot_of([(i, "a", "x", {}) for i in range(40)], n_pairs=40)))
    train, held = split_by_prompt(pairs, 0.2, seed=3)
    assert {p.prompt_id for p in train}.isdisjoint(p.prompt_id for p in held)
    assert len(train) + len(held) == 40
    assert len({p.prompt_id for p in held}) == 4
    assert split_by_prompt(pairs[::-1], 0.2, seed=3)[1] == held[::-1]
    assert {p.prompt_id for p in split_by_prompt(pairs, 0.2, seed=4)[1]} != {p.prompt_id for p in held}


def test_with_fewer_prompts_than_folds_one_prompt_is_held_out(snapshot_of):
    pairs = training_pairs(load_snapshot(snapshot_of([(i, "a", "x", {}) for i in range(6)], n_pairs=6)))
    train, held = split_by_prompt(pairs, 0.1)
    assert len({p.prompt_id for p in held}) == 1
    assert len(train) + len(held) == len(pairs)


def test_fewer_prompts_than_folds_is_an_error():
    with pytest.raises(UserError, match="more prompts"):
        prompt_folds(["a", "b"], 3)


def test_shuffling_turns_half_of_the_pairs_of_every_prompt_and_keeps_the_clips(snapshot_of):
    pairs = training_pairs(load_snapshot(snapshot_of([(i, "a", "x", {}) for i in range(200)], n_pairs=200)))
    control = shuffled(pairs, seed=1)
    turned = [before.chosen_sha256 != after.chosen_sha256 for before, after in zip(pairs, control)]
    assert sum(turned) == 100
    by_prompt = {}
    for pair, was_turned in zip(pairs, turned):
        by_prompt.setdefault(pair.prompt_id, []).append(was_turned)
    assert all(sum(group) == 1 for group in by_prompt.values())  # two pairs a prompt: one of them
    for before, after in zip(pairs, control):
        assert {before.chosen_sha256, before.rejected_sha256} == {after.chosen_sha256, after.rejected_sha256}
        if before.chosen_sha256 != after.chosen_sha256:
            np.testing.assert_array_equal(before.chosen_codes, after.rejected_codes)


def test_another_seed_turns_other_pairs(snapshot_of):
    pairs = training_pairs(load_snapshot(snapshot_of([(i, "a", "x", {}) for i in range(40)], n_pairs=40)))
    one, same, other = (
        [before.chosen_sha256 != after.chosen_sha256 for before, after in zip(pairs, shuffled(pairs, seed))] for seed in (1, 1, 2)
    )
    assert one == same != other


def test_aspects_say_how_much_better_the_chosen_clip_is(snapshot_of):
    """The file counts from -2 (x much better) to 2 (y much better), whichever side was shown first."""
    votes = [
        (0, "a", "x", {"aspects": {"musicality": -2, "prompt_fit": 1}}),
        (0, "b", "x", {"aspects": {"musicality": 0}}),
        (1, "a", "y", {"aspects": {"musicality": 2}}),
    ]
    snapshot = load_snapshot(snapshot_of(votes))
    assert snapshot.votes[0].aspects == {"musicality": 2, "prompt_fit": -1}
    by_pair = {pair.pair_id: pair for pair in training_pairs(snapshot)}
    assert by_pair["0"].aspects == {"musicality": 1.0, "prompt_fit": -1.0}
    assert by_pair["1"].aspects == {"musicality": 2.0}
    weighted = training_pairs(snapshot, {"a": 3.0, "b": 1.0})[0]
    assert weighted.aspects["musicality"] == pytest.approx(1.5)
    assert training_pairs(snapshot, {"a": 0.0, "b": 1.0})[0].aspects == {"musicality": 0.0}


def test_marks_follow_their_clip_and_silenced_raters_mark_nothing(snapshot_of):
    bad = [{"side": "y", "t0_ms": 500, "t1_ms": 900, "tag": "bad"}, {"side": "x", "t0_ms": 0, "t1_ms": 100, "tag": "click"}]
    snapshot = load_snapshot(snapshot_of([(0, "a", "x", {"marks": bad}), (0, "b", "both_bad", {"marks": [{**bad[0], "t0_ms": 100}]})]))
    assert snapshot.votes[0].marks == (Mark(clip(1), 500, 900, "bad"), Mark(clip(0), 0, 100, "click"))
    (pair,) = training_pairs(snapshot)
    assert pair.chosen_marks == ((0, 100),)
    assert pair.rejected_marks == ((100, 900), (500, 900))
    assert clip_marks(snapshot, {"b": 1.0}) == {clip(1): ((100, 900),)}


def test_shuffling_turns_aspects_and_marks_with_their_clips(snapshot_of):
    told = {"aspects": {"musicality": -1}, "marks": [{"side": "y", "t0_ms": 0, "t1_ms": 9, "tag": "bad"}]}
    pairs = training_pairs(load_snapshot(snapshot_of([(i, "a", "x", told) for i in range(4)])))
    for before, after in zip(pairs, shuffled(pairs, seed=0)):
        same = before.chosen_sha256 == after.chosen_sha256
        assert after.aspects == {"musicality": 1.0 if same else -1.0}
        assert (after.rejected_marks if same else after.chosen_marks) == ((0, 9),)


def test_prompts_that_share_an_artist_are_held_out_together(snapshot_of):
    """Pair p plays clips 2p and 2p + 1 of prompt p // 2: prompts 0 and 2 share one artist, 2 and 3 another, so all three go together."""
    folder = snapshot_of([(i, "a", "x", {}) for i in range(10)], n_pairs=10)
    artist = {0: "ada", 8: "ada", 10: "bo", 12: "bo"}
    lines = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    for number, name in artist.items():
        lines[number] |= {"gen": {"artist": name}} if number == 0 else {"artist": name}
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "snapshot.json").write_text(json.dumps({"name": "test", "sha256": content_sha256(folder)}))
    groups = prompt_groups(load_snapshot(folder))
    assert groups["p0"] == groups["p2"] == groups["p3"]
    assert len({groups["p0"], groups["p1"], groups["p4"]}) == 3


def test_prompts_that_share_a_clip_are_held_out_together(snapshot_of):
    """The same bytes may answer two prompts; a model that has learnt from one of them knows the clip of the other."""
    snapshot = load_snapshot(snapshot_of([(i, "a", "x", {}) for i in range(10)], n_pairs=10))
    alone = prompt_groups(snapshot)
    of = {name: next(vote for vote in snapshot.votes if vote.prompt_id == name) for name in ("p0", "p3")}
    votes = [dataclasses.replace(vote, clip_y=of["p0"].clip_x) if vote is of["p3"] else vote for vote in snapshot.votes]
    together = prompt_groups(dataclasses.replace(snapshot, votes=votes))
    assert len(set(alone.values())) == len(alone)
    assert {name for name in alone if together[name] != alone[name]} == {"p3"}
    assert together["p3"] == together["p0"]


def test_a_training_set_is_known_by_its_content(snapshot_of):
    votes = [(0, "a", "x", {}), (1, "a", "y", {}), (2, "b", "x", {})]
    pairs = training_pairs(load_snapshot(snapshot_of(votes)))
    assert pairs_sha256(pairs) == pairs_sha256(pairs[::-1]) == pairs_sha256(training_pairs(load_snapshot(snapshot_of(votes[::-1]))))
    changed = [
        [(0, "a", "y", {}), *votes[1:]],
        [(0, "a", "x", {"aspects": {"musicality": 1}}), *votes[1:]],
        [(0, "a", "x", {"marks": [{"side": "x", "t0_ms": 0, "t1_ms": 1}]}), *votes[1:]],
        votes[1:],
    ]
    assert len({pairs_sha256(pairs), *(pairs_sha256(training_pairs(load_snapshot(snapshot_of(v)))) for v in changed)}) == 5
    folder = snapshot_of(votes)
    np.save(folder / "codes" / "0.npy", np.zeros((2, 5), dtype=np.int16))  # other codes under the name of the same clip
    assert pairs_sha256(training_pairs(load_snapshot(folder))) != pairs_sha256(pairs)
