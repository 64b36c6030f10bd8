"""Winners: what they weigh, and which are held out."""

from __future__ import annotations

import json

import pytest

from rlhf.sft_task import split, toy_task, voted
from rlhf.train_sft import Config


def test_winners_weigh_what_their_votes_say_and_ties_nothing(snapshot_dir, policy_dir):
    task = voted(Config(policy=policy_dir), snapshot_dir)
    assert len(task.winners) == 5
    assert sum(winner.weight for winner in task.winners) == pytest.approx(5)
    assert task.snapshot_sha256 == json.loads((snapshot_dir / "snapshot.json").read_text())["sha256"]


def test_held_out_winners_share_no_prompt_with_trained_ones():
    task = toy_task(0)
    train, held_out = split(task.winners, 0.2, {})
    assert not {w.prompt_id for w in train} & {w.prompt_id for w in held_out}
    assert len(train) + len(held_out) == len(task.winners)
