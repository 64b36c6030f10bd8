"""The benchmark of pairs that lie apart: what is voted, and that r is of the taste, within prompts, on clips that no vote is about."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from base_models.errors import UserError
from base_models.policy import load_policy
from benchmarks.pairs_apart import BLOCKS, Clips, Config, agreement, main, voted
from rlhf.sample_pairs import Prompt, Settings, sample

N, ASKED = 160, 120


@pytest.fixture(scope="module")
def clips() -> Clips:
    """Four clips a prompt, whose taste is one feature and something of the prompt."""
    table = {block: torch.randn(N, 4, generator=torch.Generator().manual_seed(i)) for i, block in enumerate(BLOCKS)}
    prompt = torch.arange(N) // 4
    gold = 2 * table[BLOCKS[0]][:, 1].numpy().astype(np.float64) + 5 * np.sin(prompt.numpy())
    return Clips(table, prompt, gold, ASKED, torch.arange(ASKED, N), torch.zeros(ASKED, 1))


PAIRS = [(row, row + step) for row in range(0, ASKED, 4) for step in (1, 2, 3)]


def test_every_pair_has_a_vote_before_one_has_two_and_votes_follow_the_taste(clips):
    found = voted(clips, PAIRS, Config(votes=len(PAIRS) + 10), np.random.default_rng(0))
    asked = [tuple(sorted(pair)) for pair in zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)]
    assert set(asked[: len(PAIRS)]) == set(PAIRS)
    assert len(asked) == len(PAIRS) + 10
    right = [(clips.gold[a] > clips.gold[b]) == (p > 0.5) for a, b, p in zip(found.chosen, found.rejected, found.p, strict=True)]
    assert np.mean(right) > 0.75


def test_r_is_high_where_votes_tell_the_taste_and_none_where_they_tell_of_another(clips):
    found = voted(clips, PAIRS, Config(votes=400), np.random.default_rng(0))
    assert agreement(clips, found) > 0.8
    coins = torch.randint(2, found.p.shape, generator=torch.Generator().manual_seed(0)).float()
    assert abs(agreement(clips, dataclasses.replace(found, p=coins))) < 0.5
    assert agreement(clips, dataclasses.replace(found, p=1 - found.p)) < -0.8


def test_both_ways_of_asking_are_told(policy_dir, tmp_path):
    policy = load_policy(policy_dir)
    prompts = [Prompt(text, f"p{i}") for i, text in enumerate(("sad piano", "calm folk", "dark rock", "fast house"))]
    asked = sample(policy, prompts[:3], tmp_path / "asked", Settings(n=4, duration_s=1.0), "base")
    judged = sample(policy, prompts[2:], tmp_path / "judged", Settings(n=3, seed=1, duration_s=1.0), "base")
    cfg = Config((asked,), judged, policy=policy_dir, votes=60, pairs_per_prompt=2, draws=2)
    figures = main(cfg)
    assert {way: (told["pairs"], len(told["draws"])) for way, told in figures["r"].items()} == {
        "random, all pairs": (18, 2),
        "the 2 furthest apart of a prompt": (6, 2),
    }
    assert figures["clips"] == 12
    assert figures["judged"] == 3
    with pytest.raises(UserError, match="no prompt in --judged"):
        main(dataclasses.replace(cfg, judged=asked))
    with pytest.raises(UserError, match="--asked 0 manifests"):
        main(Config())
