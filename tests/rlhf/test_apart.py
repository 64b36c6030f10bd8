"""Pairs whose clips sound least alike, from distances to the campaign that asks about them."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from sqlalchemy import select

from base_models.checkpoint import read_jsonl
from base_models.errors import UserError
from base_models.policy import load_policy
from db.schema import Clip, Pair
from db.store import open_store
from rlhf import cli
from rlhf.apart import furthest, heard_apart, write_furthest
from rlhf.collecting import Collecting
from rlhf.evaluate_models import read_codes
from rlhf.loop import Loop, settings
from rlhf.sample_pairs import Prompt, Settings, sample, write_prompts

LINE = torch.tensor([[0.0], [5.0], [1.0], [0.0], [2.0], [4.0]])


def test_the_furthest_pairs_of_each_prompt_come_first():
    assert furthest(LINE, list("abaabb"), 1) == [(0, 2), (1, 4)]
    assert furthest(LINE, list("abaabb"), 2) == [(0, 2), (2, 3), (1, 4), (4, 5)]
    assert furthest(LINE, list("aaaaaa"), 3) == [(0, 1), (1, 3), (0, 5)]


def test_a_prompt_with_fewer_pairs_gives_all_it_has():
    assert furthest(LINE, list("ababac"), 9) == [(0, 4), (0, 2), (2, 4), (1, 3)]


@pytest.fixture(scope="module")
def four(policy_dir, tmp_path_factory):
    """The manifest of four clips of a second for each of three prompts."""
    prompts = [Prompt(text, f"p{i}") for i, text in enumerate(("sad piano", "calm folk", "dark rock"))]
    return sample(load_policy(policy_dir), prompts, tmp_path_factory.mktemp("four"), Settings(n=4, duration_s=1.0), "base")


def test_clips_are_as_far_apart_as_they_sound(policy_dir, four):
    """The same clip lies nowhere, one with a stretch of its own nearer than another clip; batches do not matter."""
    policy, rows = load_policy(policy_dir), read_jsonl(four)
    codes = read_codes(four, rows)
    touched = codes[0].clone()
    touched[:, -3:] = codes[1][:, -3:]
    clips = torch.cat([codes, codes[:1], touched[None]])
    texts, prompt = [row["prompt"] for row in [*rows, *rows[:1] * 2]], [row["prompt_id"] for row in [*rows, *rows[:1] * 2]]
    points = heard_apart(policy, clips, texts, prompt)
    same, near, far = ((points[0] - points[other]).norm() for other in (12, 13, 1))
    assert same < 1e-5
    assert 0.05 < near < 0.8 * far
    assert torch.allclose(heard_apart(policy, clips, texts, prompt, batch_size=5), points, atol=1e-4)


def test_what_is_sampled_for_a_campaign_meets_by_how_unlike_it_sounds(policy_dir, four, tmp_path):
    (tmp_path / "prompts.txt").write_text("sad piano\ncalm folk\ndark rock\n")
    given = ["sample", "--policy", str(policy_dir), "--prompts", str(tmp_path / "prompts.txt"), "-n", "4", "--duration", "1"]
    database, out = f"sqlite:///{tmp_path / 'e.db'}", tmp_path / "clips"
    asked = [*given, "--out", str(out), "--campaign", "apart", "--db", database, "--pairs-per-prompt", "2"]
    assert cli.main(asked) == 0
    assert cli.main(asked) == 0  # again adds nothing
    assert meeting(database) == {frozenset((row["a"], row["b"])) for row in read_jsonl(out / "pairs.jsonl")}
    prompt = {row["sha256"]: row["prompt"] for row in read_jsonl(out / "manifest.jsonl")}
    assert Counter(prompt[row["a"]] for row in read_jsonl(out / "pairs.jsonl")) == {"sad piano": 2, "calm folk": 2, "dark rock": 2}


def meeting(database: str) -> set[frozenset[str]]:
    """The pairs of a database, by the clips' SHA-256."""
    with open_store(database) as store, store.read() as session:
        sha = dict(session.execute(select(Clip.id, Clip.sha256)).all())
        return {frozenset((sha[pair.clip_x_id], sha[pair.clip_y_id])) for pair in session.scalars(select(Pair))}


def test_a_round_of_the_loop_asks_about_them(policy_dir, tmp_path):
    (tmp_path / "train.txt").write_text("sad piano\ncalm folk\n")
    (tmp_path / "heldout.txt").write_text("slow ambient\nfast house\n")
    files = {"prompts": tmp_path / "train.txt", "heldout": tmp_path / "heldout.txt"}
    given = {**files, "policy": policy_dir, "out": tmp_path / "run", "method": "dpo"}
    cfg = settings({**given, "min_decided": 2, "min_prompts": 2, "duration_s": 0.6, "clips_per_prompt": 3, "pairs_per_prompt": 2})
    loop = Loop(cfg, Collecting())
    loop.run(0)
    loop.round(1).samples()
    rows = read_jsonl(loop.round(1).folder / "pairs.jsonl")
    assert len(rows) == 4
    assert meeting(loop.db) == {frozenset((row["a"], row["b"])) for row in rows}
    with pytest.raises(UserError, match="0 pairs a prompt"):
        settings({**given, "out": tmp_path / "other", "pairs_per_prompt": 0})


def test_where_there_is_nothing_to_choose_it_says_so(policy_dir, four, tmp_path, capsys):
    policy = load_policy(policy_dir)
    with pytest.raises(UserError, match="0 pairs a prompt"):
        write_furthest(policy, four, tmp_path / "pairs.jsonl", 0)
    lone = tmp_path / "lone"
    shutil.copytree(four.parent, lone)
    firsts = {row["prompt_id"]: row for row in read_jsonl(four)}
    write_prompts(lone / "manifest.jsonl", list(firsts.values()))
    with pytest.raises(UserError, match="one clip a prompt"):
        write_furthest(policy, lone / "manifest.jsonl", tmp_path / "pairs.jsonl", 2)
    assert not (tmp_path / "pairs.jsonl").exists()
    assert cli.main(["sample", "--prompts", "p.txt", "--out", str(tmp_path / "out"), "--pairs-per-prompt", "2"]) == 2
    assert "without --campaign" in capsys.readouterr().err
