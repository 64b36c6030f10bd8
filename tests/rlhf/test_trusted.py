"""Votes as DPO and fine-tuning take them: careless raters and adversaries count for little, and votes that cannot teach are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.library import read_adapter
from base_models.errors import UserError
from base_models.lm import MusicLM, MusicLMConfig
from rlhf import dpo_task, sft_task, train_dpo, train_sft
from rlhf.flat_kto import bad_clips
from rlhf.preferences import load_snapshot, pairs_sha256, split_by_prompt, training_pairs
from rlhf.snapshot import content_sha256
from rlhf.trusted import trusted
from tests.rlhf.vote_toys import ToyPolicy, clip, write_snapshot

N_PAIRS = 24
Row = tuple[int, str, str, dict[str, Any]]


def crew(seed: int = 0) -> list[Row]:
    """Every pair's x is better. Three raters are right nine times in ten, one tosses a coin, one says the opposite."""
    rng = np.random.default_rng(seed)
    right = {"ada": 0.9, "bo": 0.9, "cy": 0.9, "coin": 0.5, "foe": 0.1}
    return [(pair, name, "x" if rng.random() < p else "y", {}) for pair in range(N_PAIRS) for name, p in right.items()]


def labels(pairs) -> dict[str, float]:
    """pair -> how probably x, the clip with an even number, is preferred."""
    return {p.pair_id: p.p if p.chosen_sha256 == clip(2 * int(p.pair_id)) else 1 - p.p for p in pairs}


def test_an_adversary_is_silent_and_labels_come_nearer_to_the_truth(tmp_path):
    snapshot = load_snapshot(write_snapshot(tmp_path, crew(), N_PAIRS))
    voted, alike = trusted(snapshot, "agreement", 2, 32), trusted(snapshot, "nothing", 2, 32)
    assert voted.weights is not None
    assert voted.weights["foe"] == 0
    assert voted.weights["coin"] < 0.6 * min(voted.weights[name] for name in ("ada", "bo", "cy"))
    mean = {name: np.mean(list(labels(told.pairs).values())) for name, told in (("weighed", voted), ("alike", alike))}
    assert mean["alike"] < 0.75  # (3 * .9 + .5 + .1) / 5 = .66
    assert mean["weighed"] > mean["alike"] + 0.08
    assert alike.weights is None
    assert pairs_sha256(alike.pairs) == pairs_sha256(training_pairs(snapshot))
    assert voted.figures["raters"] == 5
    assert voted.figures["raters_silent"] == 1
    assert "foe" in voted.notes[-1]
    assert "foe" not in json.dumps(voted.figures)
    assert alike.notes == ()


def test_where_nobody_shares_a_pair_all_weigh_alike(tmp_path):
    votes = [(pair, f"r{pair % 3}", "x", {}) for pair in range(12)]
    snapshot = load_snapshot(write_snapshot(tmp_path, votes, 12))
    assert pairs_sha256(trusted(snapshot, "agreement", 2, 32).pairs) == pairs_sha256(training_pairs(snapshot))


def test_both_bad_of_an_adversary_says_nothing(tmp_path):
    votes = [*crew(), (0, "foe", "both_bad", {}), (1, "ada", "both_bad", {}), (1, "bo", "both_bad", {})]
    snapshot = load_snapshot(write_snapshot(tmp_path, votes, N_PAIRS))
    voted = trusted(snapshot, "agreement", 2, 32)
    assert voted.weights is not None
    bad = bad_clips(snapshot, voted.weights)
    assert [c.weight for c in bad] == pytest.approx([voted.weights["ada"] + voted.weights["bo"]] * 2)
    assert sorted(c.weight for c in bad_clips(snapshot)) == [1, 1, 2, 2]


def test_prompts_of_one_artist_are_held_out_together(tmp_path):
    folder = rewritten(write_snapshot(tmp_path, crew(), N_PAIRS), "clips", artist=lambda row: f"artist {int(row['prompt_id'][1:]) // 4}")
    voted = trusted(load_snapshot(folder), "agreement", 2, 32)
    assert len(set(voted.groups.values())) == 3  # of 12 prompts
    for seed in range(5):
        train, held_out = split_by_prompt(voted.pairs, 0.1, seed, voted.groups)
        assert held_out
        assert not {voted.groups[p.prompt_id] for p in train} & {voted.groups[p.prompt_id] for p in held_out}
    winners = [sft_task.Winner(torch.from_numpy(p.chosen_codes), 0, p.prompt_id, 1.0) for p in voted.pairs]
    one, two = sft_task.split(winners, 0.1, voted.groups)
    assert not {voted.groups[w.prompt_id] for w in one} & {voted.groups[w.prompt_id] for w in two}
    with pytest.raises(UserError, match="--held-out 0"):
        split_by_prompt(voted.pairs, 0.1, 0, dict.fromkeys(voted.groups, "one"))


# ---- the trainers ----------------------------------------------------------------------------------------------------


def rewritten(folder: Path, file: str, **changes: Any) -> Path:
    """A snapshot with columns of one file changed: column -> function of the row."""
    rows = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {column: change(row) for column, change in changes.items()}
    (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "snapshot.json").write_text(json.dumps({"name": "test", "sha256": content_sha256(folder)}))
    return folder


def toy_policy(card: int = 32) -> ToyPolicy:
    """Its codec has 2 books."""
    torch.manual_seed(0)
    lm = MusicLM(MusicLMConfig(n_q=2, card=card, d_model=32, n_layers=1, n_heads=2, d_ff=64, text_dim=16)).eval()
    return ToyPolicy(lm)


def train(script: str, folder: Path, out: Path, monkeypatch, card: int = 32, **changes: Any) -> dict[str, Any]:
    """One step of DPO, KTO or fine-tuning on a snapshot."""
    common = {"out": out, "snapshot": folder, "steps": 1, "r": 2, "kl_clips": 0, **changes}
    if script == "sft":
        monkeypatch.setattr(sft_task, "load_policy", lambda path: toy_policy(card))
        return train_sft.main(train_sft.Config(**common))
    monkeypatch.setattr(dpo_task, "load_policy", lambda path: toy_policy(card))
    return train_dpo.main(train_dpo.Config(loss="kto" if script == "kto" else "sigmoid", precision="fp32", **common))


ALL = pytest.mark.parametrize("script", ["dpo", "kto", "sft"])
TIES = {"choice": lambda row: "tie"}


@ALL
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (TIES, "24 pairs, all of them ties; expected votes for a side; remedy"),
        ({"choice": lambda row: "both_bad"}, "no pair that is ordered"),
        ({"excluded_reason": lambda row: "rater_blocked"}, "120 rater_blocked"),
        ({"clip_x": lambda row: "f" * 64}, r"not in clips\.jsonl"),
        ({"prompt_id": lambda row: "p0"}, "--held-out 0"),
    ],
)
def test_votes_that_cannot_teach_are_refused_and_nothing_is_written(script, changes, said, tmp_path, monkeypatch):
    folder = rewritten(write_snapshot(tmp_path / "votes", crew(), N_PAIRS), "votes", **changes)
    with pytest.raises(UserError, match=said):
        train(script, folder, tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run").exists()


def test_ties_alone_are_refused_also_where_ties_are_dropped(tmp_path, monkeypatch):
    folder = rewritten(write_snapshot(tmp_path / "votes", crew(), N_PAIRS), "votes", **TIES)
    with pytest.raises(UserError, match="all of them ties"):
        train("dpo", folder, tmp_path / "run", monkeypatch, ties="drop")


@ALL
def test_clips_of_another_codec_are_refused(script, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="codes of this codec: 2 codebooks, 0 to 15"):
        train(script, write_snapshot(tmp_path / "votes", crew(), N_PAIRS), tmp_path / "run", monkeypatch, card=16)
    assert not (tmp_path / "run").exists()


def test_clips_of_another_codec_are_refused_where_both_bad_is_all_that_was_said_of_them(tmp_path, monkeypatch):
    folder = write_snapshot(tmp_path / "votes", [*crew(), (N_PAIRS, "ada", "both_bad", {})], N_PAIRS + 1)
    for codes, said in (
        (np.zeros((3, 5), np.int16), "with 3 codebooks, values 0 to 0"),
        (np.full((2, 5), 32, np.int16), "values 32 to 32"),
    ):
        np.save(folder / "codes" / f"{2 * N_PAIRS}.npy", codes)
        with pytest.raises(UserError, match=f"{said}; expected codes of this codec: 2 codebooks, 0 to 31"):
            train("kto", folder, tmp_path / "run", monkeypatch)
        assert not (tmp_path / "run").exists()
    train("dpo", folder, tmp_path / "run", monkeypatch)  # it learns from pairs alone


@ALL
def test_one_rater_alone_is_refused_unless_that_is_meant_and_then_told_of(script, tmp_path, monkeypatch, capsys):
    votes = [*((pair, "me", "x", {}) for pair in range(N_PAIRS)), (0, "you", "both_bad", {}), (1, "you", "y", {"gold": "y"})]
    folder = write_snapshot(tmp_path / "votes", votes, N_PAIRS)
    with pytest.raises(UserError, match=r"one rater alone \(me\); expected at least two raters.*remedy: .*--one-rater"):
        train(script, folder, tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run").exists()
    figures = train(script, folder, tmp_path / "run", monkeypatch, one_rater=True)
    assert figures["raters"] == 1
    told = capsys.readouterr()
    assert "one rater alone (me)" in told.out + told.err
    assert read_adapter(tmp_path / "run" / "adapter").manifest.figures["pairs_sha256"] == pairs_sha256(
        training_pairs(load_snapshot(folder))
    )


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_the_manifest_says_by_what_raters_weighed_and_from_which_pairs_it_was_learnt(script, tmp_path, monkeypatch):
    folder = write_snapshot(tmp_path / "votes", crew(), N_PAIRS)
    hashes = {}
    for weights_by in ("agreement", "nothing"):
        train(script, folder, tmp_path / weights_by, monkeypatch, weights_by=weights_by)
        figures = read_adapter(tmp_path / weights_by / "adapter").manifest.figures
        assert figures["weights_by"] == weights_by
        hashes[weights_by] = figures["pairs_sha256"]
    assert hashes["agreement"] != hashes["nothing"] == pairs_sha256(training_pairs(load_snapshot(folder)))
