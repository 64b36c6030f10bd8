"""Best of n: the best is the best, the bound is the bound, and the baseline stands in the same harness as what is trained."""

from __future__ import annotations

import json
import math
import re
import sys

import numpy as np
import pytest
import torch

from base_models.checkpoint import read_json, read_jsonl
from base_models.errors import UserError
from base_models.policy import load_policy
from base_models.sampling import generate
from rlhf import cli
from rlhf.best_of_n import BestOf, candidate_seed, kl_bound, play_best
from rlhf.outside_judge import OutsideJudge
from rlhf.ppo_task import share_of_code_3, toy_task
from rlhf.reward_model import load_reward
from rlhf.sample_pairs import Settings, read_prompts, sample


def test_the_best_of_n_is_the_best_of_its_candidates():
    task, seeds = toy_task(0), [11, 22, 33]
    cond = task.table.index([0, 1, 2])
    best = play_best(task.lm, cond, 8, seeds, task.prompts[:3], BestOf(5, share_of_code_3, "r"))
    for row, seed in enumerate(seeds):
        drawn = [candidate_seed(seed, k) for k in range(5)]
        codes = generate(task.lm, cond.index([row] * 5), 8, seeds=drawn).codes
        scores = share_of_code_3(codes, [])
        assert best.score[row] == scores.max()
        assert best.candidate[row] == int(scores.argmax())
        assert best.seeds[row] == drawn[int(scores.argmax())]
        assert torch.equal(best.codes[row], codes[int(scores.argmax())])


def test_the_bound_holds_and_is_reached_where_no_two_clips_are_alike():
    """The best of n among N equally likely clips with distinct scores: its distribution is known, so its KL is too."""
    for n in (1, 2, 4, 16):
        size = 4000
        rank = np.arange(1, size + 1) / size
        share = rank**n - (rank - 1 / size) ** n
        kl = float((share * np.log(share * size)).sum())
        assert kl <= kl_bound(n) + 1e-9
        assert kl == pytest.approx(kl_bound(n), abs=2e-3)


def test_more_candidates_score_higher_and_none_is_the_plain_clip():
    task = toy_task(0)
    cond = task.table.index([0] * 64)
    means = [float(play_best(task.lm, cond, 8, range(64), ["x"] * 64, BestOf(n, share_of_code_3, "r")).score.mean()) for n in (1, 4, 16)]
    assert means[0] < means[1] < means[2]
    assert len({candidate_seed(s, k) for s in range(50) for k in range(20)} | set(range(50))) == 1050


def test_a_candidate_without_a_finite_score_never_wins_and_none_at_all_is_an_error():
    task = toy_task(0)

    def half_blind(codes, prompts):
        score = share_of_code_3(codes, prompts)
        return torch.where(score > score.median(), torch.nan, score)

    best = play_best(task.lm, task.table.index([0] * 16), 8, range(16), ["x"] * 16, BestOf(6, half_blind, "r"))
    assert bool(torch.isfinite(best.score).all())
    blind = BestOf(2, lambda codes, prompts: torch.full((len(codes),), math.nan), "r")
    with pytest.raises(UserError, match="no finite score for any of 2 clips of 'x'"):
        play_best(task.lm, task.table.index([0]), 8, [0], ["x"], blind)


def test_the_rows_of_a_best_of_n_lead_back_to_their_codes(policy_dir, tmp_path):
    (tmp_path / "p.txt").write_text("sad piano\nfast techno, 130 BPM\n")
    policy = load_policy(policy_dir)
    best = BestOf(3, lambda codes, prompts: codes.float().mean((1, 2)), "a" * 64)
    settings = Settings(n=2, duration_s=0.6)
    manifest = sample(policy, read_prompts(tmp_path / "p.txt"), tmp_path / "best", settings, "best", best=best)
    plain = sample(policy, read_prompts(tmp_path / "p.txt"), tmp_path / "plain", settings, "base")
    for row, base in zip(read_jsonl(manifest), read_jsonl(plain)):
        assert (row["prompt_id"], row["seed"]) == (base["prompt_id"], base["seed"])  # clip k of one meets clip k of the other
        assert row["sha256"] != base["sha256"]
        again = generate(policy.lm, policy.conditions([row["prompt"]], [row["tempo_bpm"]]), 15, seeds=[row["gen"]["sampled_seed"]])
        assert np.array_equal(again.codes[0], np.load(manifest.parent / row["codes_file"], allow_pickle=False))
    with pytest.raises(UserError, match="other samples"):
        sample(policy, read_prompts(tmp_path / "p.txt"), tmp_path / "best", settings, "best", best=BestOf(4, best.score, "a" * 64))


def test_evaluate_sets_the_best_of_n_beside_the_base_with_its_bound(policy_dir, reward_dir, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("sad piano\ncalm folk\n")
    where = ["--policy", str(policy_dir), "--prompts", str(tmp_path / "p.txt"), "--duration", "0.6"]
    assert cli.main(["evaluate", *where, "--best-of", "4", "--reward", str(reward_dir), "--out", str(tmp_path / "e")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == {"base", "best-of-4"}
    assert figures["best-of-4"]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert figures["best-of-4"]["diversity_ratio"] > 0
    assert read_json(tmp_path / "e" / "evaluation.json") == figures
    assert cli.main(["sample", *where, "-n", "1", "--best-of", "2", "--reward", str(reward_dir), "--out", str(tmp_path / "s")]) == 0
    rows = read_jsonl(tmp_path / "s" / "manifest.jsonl")
    assert {row["system"] for row in rows} == {"base-best-of-2"}


LOUDEST = """
import json, sys, soundfile
for line in sys.stdin:
    waves = [soundfile.read(name)[0] for name in json.loads(line)["files"]]
    print(json.dumps({"scores": [float((wave ** 2).mean()) for wave in waves]}), flush=True)
"""


def test_a_program_may_choose_the_best(policy_dir, tmp_path):
    (tmp_path / "p.txt").write_text("sad piano\n")
    (tmp_path / "loudest.py").write_text(LOUDEST)
    command = f"{sys.executable} {tmp_path / 'loudest.py'}"
    where = ["--policy", str(policy_dir), "--prompts", str(tmp_path / "p.txt"), "--duration", "0.6", "--out", str(tmp_path / "s")]
    assert cli.main(["sample", *where, "-n", "1", "--best-of", "4", "--score-command", command]) == 0
    (row,) = read_jsonl(tmp_path / "s" / "manifest.jsonl")
    assert row["gen"]["score_command"] == command
    assert "reward_sha256" not in row["gen"]
    policy, judge = load_policy(policy_dir), OutsideJudge([sys.executable, str(tmp_path / "loudest.py")], load_policy(policy_dir))
    drawn = [candidate_seed(row["seed"], number) for number in range(4)]
    cond = policy.conditions(["sad piano"] * 4, [None] * 4)
    scores = judge(generate(policy.lm, cond, 15, seeds=drawn).codes, ["sad piano"] * 4)
    assert row["gen"]["sampled_seed"] == drawn[int(scores.argmax())]
    assert row["gen"]["score"] == pytest.approx(float(scores.max()), rel=1e-3)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--best-of", "4"], "without --reward or --score-command"),
        (["--best-of", "4", "--reward", "{reward}", "--score-command", "true"], "--reward and --score-command"),
        (["--best-of", "0", "--reward", "{reward}"], "1 to 1024 candidates"),
        (["--best-of", "4", "--reward", "{reward}", "--policy", "{other}"], "reward model of base"),
    ],
)
def test_a_best_of_n_that_cannot_be_is_refused(more, match, policy_dir, other_policy_dir, reward_dir, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("sad piano\n")
    filled = [part.format(reward=reward_dir, other=other_policy_dir) for part in more]
    where = ["--policy", str(policy_dir), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "s")]
    assert cli.main(["sample", *where, *filled]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_generate_plays_the_best_of_n_and_names_the_seed_that_plays_it_again(policy_dir, reward_dir, tmp_path, capsys):
    call = ["generate", "sad piano", "--policy", str(policy_dir), "--duration", "1", "--sample-rate", "16000", "--mono"]
    assert cli.main([*call, "--best-of", "3", "--reward", str(reward_dir), "--seed", "5", "--out", str(tmp_path / "best.wav")]) == 0
    told = re.search(r"seed (\d+), the best of 3 with a score of (\S+)", capsys.readouterr().out)
    assert told is not None
    policy = load_policy(policy_dir)
    drawn = [candidate_seed(5, number) for number in range(3)]
    codes = generate(policy.lm, policy.conditions(["sad piano"] * 3, [None] * 3), 25, seeds=drawn).codes
    scores = load_reward(reward_dir, policy).score(codes, ["sad piano"] * 3)
    assert int(told[1]) == drawn[int(scores.argmax())]
    assert float(told[2]) == pytest.approx(float(scores.max()), abs=0.01)
    assert cli.main([*call, "--seed", told[1], "--out", str(tmp_path / "again.wav")]) == 0
    assert (tmp_path / "again.wav").read_bytes() == (tmp_path / "best.wav").read_bytes()
    for wrong, match in ((["--duration", "99"], "a duration of 99"), (["--best-of", "0"], "1 to 1024 candidates")):
        assert cli.main([*call, "--best-of", "3", "--reward", str(reward_dir), *wrong, "--out", str(tmp_path / "none.wav")]) == 2
        assert match in capsys.readouterr().err
    assert not (tmp_path / "none.wav").exists()
