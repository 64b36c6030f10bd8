"""Votes of the proof, from clips to a frozen snapshot, by the real app and simulated listeners."""

from typing import Any

from base_models.checkpoint import read_jsonl
from base_models.policy import load_policy
from rlhf.preferences import load_snapshot
from rlhf.proof import collect, pairs
from rlhf.sample_pairs import Prompt, Settings, sample
from tests.rlhf.vote_toys import cut_off_by_an_older_version


def test_listeners_hear_the_pairs_that_sound_least_alike_and_no_other(policy_dir, tmp_path):
    prompts = [Prompt("sad piano", "p0"), Prompt("dark rock", "p1")]
    manifest = sample(load_policy(policy_dir), prompts, tmp_path / "clips", Settings(n=3, duration_s=1.0), "base")
    chosen = tmp_path / "pairs.jsonl"
    argv = ["--policy", str(policy_dir), "--manifest", str(manifest), "--pairs-per-prompt", "1", "--out", str(chosen)]
    assert pairs.main(argv) == 0

    def collected() -> dict[str, Any]:
        return collect.collect(manifest, chosen, tmp_path / "votes", raters=3, target_votes=2, vote=["--taste", "drive", "--seed", "0"])

    told = collected()
    load_snapshot(tmp_path / "votes" / "snapshot")  # whole, and what a trainer takes
    votes = read_jsonl(tmp_path / "votes" / "snapshot" / "votes.jsonl")
    assert len(votes) == 4
    heard = {frozenset((vote["clip_x"], vote["clip_y"])) for vote in votes}
    assert heard == {frozenset((row["a"], row["b"])) for row in read_jsonl(chosen)}
    cut_off_by_an_older_version(tmp_path / "votes" / "encore.db", tmp_path / "votes" / "snapshot")
    assert collected() == told
