"""Winners: what they weigh, and which are held out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rlhf.preferences import codes_sha256
from rlhf.sft_task import Winner, split, toy_task, voted, winners_sha256
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


def test_codes_that_are_learnt_are_known_by_content_shape_order_and_what_is_said_of_them():
    """Checkpoints of DPO and of fine-tuning name these very hashes: with others, runs that were begun before would be refused."""
    first, second = np.arange(6).reshape(2, 3), np.arange(4).reshape(2, 2)
    winners = [Winner(torch.from_numpy(first), 0, "p", 1.0), Winner(torch.from_numpy(second), 1, "q", 0.5)]
    known = codes_sha256([("", first), ("", second)])
    assert known == "662a1dc17df94ecd3c78aa3882498ea416b0369850ba8aef7a5eafe1dc68aa39"
    assert winners_sha256(winners) == "015125c6c2f6705110eb8b8f904589331701e0ad4e22f70e67f6737595b6bcf8"
    others = [
        [("", second), ("", first)],
        [("", first.reshape(3, 2)), ("", second)],
        [("", first), ("", second + 1)],
        [("said", first), ("", second)],
    ]
    assert len({known, *map(codes_sha256, others)}) == 5
