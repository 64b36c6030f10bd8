import hashlib
import json
from functools import partial

import numpy as np
import pytest

from base_models.errors import UserError
from rlhf.preferences import prompt_groups, training_pairs
from rlhf.raters import reliability
from rlhf.snapshot import Mark, content_sha256, load_snapshot
from tests.rlhf.vote_toys import BASE, write_snapshot


@pytest.fixture
def snapshot_of(tmp_path):
    return partial(write_snapshot, tmp_path / "snapshot")


def test_the_hash_is_the_one_that_export_documents(snapshot_of):
    folder = snapshot_of([(0, "r", "x", {})])
    both = (folder / "votes.jsonl").read_bytes() + (folder / "clips.jsonl").read_bytes()
    assert content_sha256(folder) == hashlib.sha256(both).hexdigest()


@pytest.mark.parametrize("file", ["votes.jsonl", "clips.jsonl"])
def test_a_changed_snapshot_is_refused(snapshot_of, file):
    folder = snapshot_of([(0, "r", "x", {})])
    load_snapshot(folder)
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace("prompt 0", "prompt O"))
    with pytest.raises(UserError, match="hashes to"):
        load_snapshot(folder)


@pytest.mark.parametrize("file", ["snapshot.json", "votes.jsonl", "clips.jsonl"])
def test_a_missing_file_is_named(snapshot_of, file):
    folder = snapshot_of([(0, "r", "x", {})])
    (folder / file).unlink()
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        load_snapshot(folder)


def test_a_snapshot_without_votes_is_refused_with_the_reasons(snapshot_of):
    with pytest.raises(UserError, match="without a usable vote"):
        load_snapshot(snapshot_of([]))
    folder = snapshot_of([(0, "r", "x", {"excluded_reason": "rater_blocked"})])
    with pytest.raises(UserError, match="1 rater_blocked"):
        load_snapshot(folder)


def test_excluded_votes_are_counted_and_not_used(snapshot_of):
    folder = snapshot_of([(0, "a", "x", {}), (0, "b", "y", {"excluded_reason": "listened_too_little"})])
    snapshot = load_snapshot(folder)
    assert dict(snapshot.n_excluded) == {"listened_too_little": 1}
    assert [pair.p for pair in training_pairs(snapshot)] == [1.0]


def test_clips_of_another_base_are_refused(snapshot_of):
    folder = snapshot_of([(0, "a", "x", {})])
    assert load_snapshot(folder, BASE).policy_sha256 == BASE
    with pytest.raises(UserError, match="clips of base bbbbbbbbbbbb"):
        load_snapshot(folder, "c" * 64)


@pytest.mark.parametrize(
    ("lacks", "match"), [({"policy_sha256": None, "codes_uri": None}, "no base has made"), ({"codes_uri": None}, "without codes")]
)
def test_clips_that_were_rated_but_never_sampled_are_refused_in_plain_words(snapshot_of, lacks, match):
    """Folders of audio can be rated too; their rows have neither base nor codes."""
    folder = snapshot_of([(0, "r", "x", {}), (2, "r", "y", {})])
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        row.update(lacks)
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = json.loads((folder / "snapshot.json").read_text())
    (folder / "snapshot.json").write_text(json.dumps(meta | {"sha256": content_sha256(folder)}))
    with pytest.raises(UserError, match=match):
        training_pairs(load_snapshot(folder, BASE))


def recorded(folder, pairs, **more):
    """The same snapshot, with recordings as the clips of these pairs: made by no base, without codes."""
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    for pair in pairs:
        for row in rows[2 * pair : 2 * pair + 2]:
            row.update({"policy_sha256": None, "codes_uri": None, **more})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = json.loads((folder / "snapshot.json").read_text())
    (folder / "snapshot.json").write_text(json.dumps(meta | {"sha256": content_sha256(folder)}))
    return folder


def test_gold_questions_about_recordings_judge_raters_and_do_not_stand_in_the_way(snapshot_of):
    """Nothing is learnt from a gold question, so that nothing need be known of its clips; its answer tells who listens."""
    answers = [(0, rater, "x", {"gold": "x"}) for rater in ("ada", "bo")] + [(0, "cy", "y", {"gold": "x"})]
    folder = recorded(snapshot_of([*answers, (2, "ada", "x", {}), (3, "ada", "y", {})]), [0])
    snapshot = load_snapshot(folder, BASE)
    assert snapshot.policy_sha256 == load_snapshot(folder).policy_sha256 == BASE
    assert [pair.pair_id for pair in training_pairs(snapshot)] == ["2", "3"]
    found = reliability(snapshot.votes)
    assert found["ada"].accuracy > found["cy"].accuracy


def test_gold_questions_alone_teach_nothing_and_that_is_said(snapshot_of):
    folder = recorded(snapshot_of([(0, "ada", "x", {"gold": "x"}), (2, "ada", "x", {"excluded_reason": "late"})]), [0])
    for base in (BASE, None):
        with pytest.raises(UserError, match=r"without a usable vote \(1 on gold questions; excluded: 1 late\)"):
            load_snapshot(folder, base)


def test_one_artist_in_the_gold_questions_of_all_prompts_does_not_hold_them_out_together(snapshot_of):
    votes = [(pair, "ada", "x", {"gold": "x"} if pair % 2 else {}) for pair in range(6)]
    groups = prompt_groups(load_snapshot(recorded(snapshot_of(votes, n_pairs=6), [1, 3, 5], artist="bo"), BASE))
    assert groups == {"p0": "p0", "p1": "p1", "p2": "p2"}


def test_pairs_of_recordings_are_counted_where_they_are_refused(snapshot_of):
    folder = recorded(snapshot_of([(0, "a", "x", {}), (0, "b", "y", {}), (1, "a", "x", {}), (2, "a", "x", {})]), [0, 1])
    with pytest.raises(UserError, match="with 2 of 3 pairs on clips that no base has made"):
        load_snapshot(folder, BASE)


def test_codes_of_another_codec_are_refused(snapshot_of):
    snapshot = load_snapshot(snapshot_of([(0, "a", "x", {})]))
    assert training_pairs(snapshot, n_q=2, card=32)
    with pytest.raises(UserError, match="2 codebooks"):
        training_pairs(snapshot, n_q=4, card=32)
    with pytest.raises(UserError, match="values"):
        training_pairs(snapshot, n_q=2, card=4)


def test_a_vote_on_an_unknown_clip_is_refused(snapshot_of):
    with pytest.raises(UserError, match=r"not in clips\.jsonl"):
        load_snapshot(snapshot_of([(0, "a", "x", {"clip_x": "f" * 64})]))


def test_pickled_codes_are_refused(snapshot_of):
    folder = snapshot_of([(0, "a", "x", {})])
    np.save(folder / "codes" / "0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="pickle"):
        training_pairs(load_snapshot(folder))


def test_missing_codes_name_the_clip(snapshot_of):
    folder = snapshot_of([(0, "a", "x", {})])
    (folder / "codes" / "1.npy").unlink()
    with pytest.raises(UserError, match="no codes at"):
        training_pairs(load_snapshot(folder))


def with_hashes_of_codes(folder):
    """The snapshot as it is exported now."""
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    for row in rows:
        row["codes_sha256"] = hashlib.sha256((folder / row["codes_uri"]).read_bytes()).hexdigest()
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "snapshot.json").write_text(json.dumps({"name": "test", "sha256": content_sha256(folder)}))
    return folder


def test_codes_that_were_changed_after_the_export_are_refused(snapshot_of):
    folder = with_hashes_of_codes(snapshot_of([(0, "a", "x", {})]))
    assert training_pairs(load_snapshot(folder))
    np.save(folder / "codes" / "1.npy", np.zeros((2, 5), dtype=np.int16))
    with pytest.raises(UserError, match=r"1\.npy of sha256 .* restore the codes that were rated"):
        training_pairs(load_snapshot(folder))


def test_snapshots_from_before_hashes_of_codes_still_load(snapshot_of):
    snapshot = load_snapshot(snapshot_of([(0, "a", "x", {})]))
    assert {clip.codes_sha256 for clip in snapshot.clips.values()} == {None}
    assert training_pairs(snapshot)


@pytest.mark.parametrize(
    "broken",
    [
        {"aspects": {"musicality": 3}},
        {"aspects": ["musicality"]},
        {"marks": [{"side": "a", "t0_ms": 0, "t1_ms": 9}]},
        {"marks": [{"side": "x", "t0_ms": 9, "t1_ms": 9}]},
        {"marks": [{"side": "x"}]},
    ],
)
def test_aspects_and_marks_that_mean_nothing_are_refused(snapshot_of, broken):
    with pytest.raises(UserError, match="in vote 0"):
        load_snapshot(snapshot_of([(0, "a", "x", broken)]))


def test_snapshots_from_before_aspects_and_marks_still_load(snapshot_of):
    (pair,) = training_pairs(load_snapshot(snapshot_of([(0, "a", "x", {})])))
    assert (pair.aspects, pair.chosen_marks, pair.rejected_marks) == ({}, (), ())


def test_what_the_app_exports_is_read_with_its_aspects_and_marks_the_right_way_round():
    """db.export turns sides back; a vote shown swapped must reach the trainer as one that was not."""
    from types import SimpleNamespace

    from db.export import _vote as exported
    from rlhf.snapshot import _vote as read

    row = dict.fromkeys(("id", "pair_id", "key", "text", "split", "handle", "status", "listen_a_ms", "listen_b_ms", "coverage_a"))
    row |= dict.fromkeys(("coverage_b", "confidence", "comment", "gold", "kind", "policy", "propensity", "source", "ui_version"))
    now = SimpleNamespace(isoformat=lambda timespec: "now")
    row |= {
        "rater_id": 1,
        "x": "clip-x",
        "y": "clip-y",
        "system_x": "base",
        "system_y": "dpo",
        "rep": 0,
        "created_at": now,
        "issued_at": now,
        "events": [],
    }
    said = {}
    for swapped in (False, True):
        better, worse = ("b", "a") if swapped else ("a", "b")  # x is better, and y is marked, wherever they stood
        aspect = SimpleNamespace(aspect="musicality", score=-2 if better == "a" else 2)
        mark = SimpleNamespace(side=worse, t0_ms=1, t1_ms=2, tag="bad")
        made = exported(SimpleNamespace(**row, swapped=swapped, choice=better), None, "salt", [aspect], [mark])
        said[swapped] = read(made)
    for swapped, vote in said.items():
        assert (vote.choice, vote.aspects, vote.marks) == ("x", {"musicality": 2}, (Mark("clip-y", 1, 2, "bad"),))
        assert vote.shown_first == ("y" if swapped else "x")
