import json
from collections import Counter

import pytest

from base_models.errors import UserError
from rlhf.preferences import content_sha256, load_snapshot
from rlhf.proof import snapshots


def write(folder, n_prompts=6, pairs=3, votes=2, prefix=""):
    """A snapshot of votes that all say x."""
    clips, rows = [], []
    for prompt in range(n_prompts):
        clips += [
            {
                "sha256": f"{prefix}{prompt}-{k}",
                "codes_uri": f"codes/{prompt}-{k}.npy",
                "codes_sha256": "c" * 64,
                "prompt_id": f"p{prompt}",
                "prompt": "x",
                "policy_sha256": "b",
            }
            for k in range(2 * pairs)
        ]
        for pair in range(pairs):
            for vote in range(votes):
                rows.append({
                    "vote_id": len(rows), "pair_id": f"{prompt}.{pair}", "prompt_id": f"p{prompt}", "prompt": "x", "rater": f"r{vote}",
                    "choice": "x", "clip_x": f"{prefix}{prompt}-{2 * pair}",
                    "clip_y": f"{prefix}{prompt}-{2 * pair + 1}", "aspects": {"musicality": -2},
                    "marks": [{"side": "y", "t0_ms": 0, "t1_ms": 500, "tag": "bad"}], "excluded_reason": "spam" if len(rows) == 0 else None,
                })  # fmt: skip
    folder.mkdir()
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clips))
    (folder / "snapshot.json").write_text(json.dumps({"name": "whole", "sha256": content_sha256(folder), "n_votes": len(rows)}))
    return folder


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole")


def test_a_subset_is_a_snapshot_of_its_own_that_names_its_parent(whole, tmp_path):
    told = snapshots.derive(whole, tmp_path / "few", n=10)
    few = load_snapshot(tmp_path / "few")
    assert len(few.votes) == told["n_votes"] == 10
    assert told["parent_sha256"] == load_snapshot(whole).sha256 != few.sha256
    assert {clip.codes_sha256 for clip in few.clips.values()} == {"c" * 64}
    assert all(clip.codes_uri == str(whole / "codes" / f"{sha}.npy") for sha, clip in few.clips.items())


def test_smaller_subsets_lie_within_larger_ones_and_excluded_votes_in_none(whole, tmp_path):
    kept = []
    for n in (5, 12, 30):
        snapshots.derive(whole, tmp_path / str(n), n=n)
        kept.append({vote.vote_id for vote in load_snapshot(tmp_path / str(n)).votes})
    assert kept[0] < kept[1] < kept[2]
    assert "0" not in kept[2]
    snapshots.derive(whole, tmp_path / "other", n=12, seed=1)
    assert {vote.vote_id for vote in load_snapshot(tmp_path / "other").votes} != kept[1]


def test_turned_votes_say_the_opposite_in_everything(whole, tmp_path):
    snapshots.derive(whole, tmp_path / "turned", turn="all")
    for vote in load_snapshot(tmp_path / "turned").votes:
        assert vote.choice == "y"
        assert vote.aspects == {"musicality": -2}  # read turned: -2 in the file was +2 for x
        assert vote.marks[0].clip == vote.clip_x


def test_half_turned_votes_agree_within_a_pair_and_balance_within_a_prompt(whole, tmp_path):
    snapshots.derive(whole, tmp_path / "half", turn="half", seed=3)
    votes = load_snapshot(tmp_path / "half").votes
    by_pair = {}
    for vote in votes:
        by_pair.setdefault(vote.pair_id, set()).add(vote.choice)
    assert all(len(choices) == 1 for choices in by_pair.values())
    assert Counter(next(iter(choices)) for choices in by_pair.values()) == {"x": 9, "y": 9}
    by_prompt = Counter(pair.split(".")[0] for pair, choices in by_pair.items() if choices == {"y"})
    assert set(by_prompt.values()) <= {1, 2}


def test_more_votes_than_there_are_is_refused(whole, tmp_path):
    with pytest.raises(UserError, match="35 usable votes"):
        snapshots.derive(whole, tmp_path / "more", n=36)
    assert not (tmp_path / "more").exists()


def test_the_command_line_makes_the_same(whole, tmp_path, capsys):
    assert snapshots.main(["--snapshot", str(whole), "--out", str(tmp_path / "a"), "--votes", "9", "--turn", "all"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == snapshots.derive(whole, tmp_path / "b", 9, "all")["sha256"]


def test_two_campaigns_are_joined_with_every_vote_clip_and_pair_of_either(whole, tmp_path):
    """Databases number votes and pairs from 1 each, so that their numbers meet."""
    second = write(tmp_path / "second", n_prompts=4, prefix="later-")
    told = snapshots.joined(whole, second, tmp_path / "both")
    one, two, both = load_snapshot(whole), load_snapshot(second), load_snapshot(tmp_path / "both")
    assert both.sha256 == told["sha256"]
    assert told["parent_sha256"] == [one.sha256, two.sha256]
    assert told["n_votes"] == len(both.votes) == len(one.votes) + len(two.votes)
    assert len({vote.vote_id for vote in both.votes}) == len(both.votes)
    assert both.clips.keys() == one.clips.keys() | two.clips.keys()
    assert all(clip.codes_uri.startswith(str(tmp_path)) for clip in both.clips.values())
    pairs = len({vote.pair_id for vote in one.votes}) + len({vote.pair_id for vote in two.votes})
    assert len(training_pairs_of(both)) == pairs
    assert {vote.rater for vote in both.votes} == {vote.rater for vote in one.votes}


def training_pairs_of(snapshot):
    return {(vote.pair_id, *sorted((vote.clip_x, vote.clip_y))) for vote in snapshot.votes}


def test_joined_votes_are_told_by_the_program_and_are_not_cut_or_turned(whole, tmp_path, capsys):
    second = write(tmp_path / "second", prefix="later-")
    call = ["--snapshot", str(whole), "--also", str(second), "--out", str(tmp_path / "both")]
    with pytest.raises(UserError, match="--also with --votes or --turn"):
        snapshots.main([*call, "--votes", "5"])
    assert not (tmp_path / "both").exists()
    assert snapshots.main(call) == 0
    assert json.loads(capsys.readouterr().out)["n_votes"] == len(load_snapshot(tmp_path / "both").votes)
