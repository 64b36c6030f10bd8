"""An adapter remembers what it was trained for, and the best of its clips is chosen by that."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from adapters.library import load_adapter, read_adapter, save_lora
from base_models.checkpoint import read_jsonl
from base_models.errors import UserError
from base_models.policy import load_policy
from base_models.sampling import generate
from rlhf import cli
from rlhf.best_of_n import asked, candidate_seed
from rlhf.consistency import checks
from rlhf.objective import objective_of
from rlhf.reward_model import load_reward
from rlhf.train_dpo import Config as DPOConfig
from rlhf.train_dpo import main as train_dpo
from rlhf.train_ppo import Config as PPOConfig
from rlhf.train_ppo import main as train_ppo

PROMPT = "sad piano, 90 BPM"
WEIGHTS = "human=1,similarity=0.5,tempo=0,diversity=0.3"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("sad piano, 90 BPM\nfast techno, 130 BPM\ncalm folk\ndark rock\n")
    return file


@pytest.fixture(scope="module")
def adapter(policy_dir, reward_dir, prompts, tmp_path_factory):
    """What a round of PPO made, with a held part."""
    out = tmp_path_factory.mktemp("ppo") / "run"
    given = {"policy": policy_dir, "reward": reward_dir, "prompts": prompts, "heldout_prompts": prompts, "out": out}
    small = {"n_frames": 15, "steps": 2, "batch_size": 8, "samples_per_prompt": 2, "heldout_clips": 2, "look_every": 1, "precision": "fp32"}
    train_ppo(PPOConfig(**given, **small, weights=WEIGHTS, hold="similarity,diversity", lr=0.02, listen=0, brake="off"))  # type: ignore[arg-type]
    return out / "adapter"


def drawn(policy, n):
    """The candidates' codes for seed 5."""
    cond = policy.conditions([PROMPT] * n, [None] * n)
    return generate(policy.lm, cond, 25, seeds=[candidate_seed(5, number) for number in range(n)]).codes


def test_the_manifest_keeps_weights_as_the_run_ended_and_the_scales_of_every_part_that_was_measured(adapter):
    objective = read_adapter(adapter).manifest.objective
    assert objective["weights"] == {"human": 1.0, "similarity": 0.5, "diversity": 0.3}
    assert objective["now"].keys() == objective["weights"].keys()
    looks = [row for row in read_jsonl(adapter.parent / "metrics.jsonl") if "heldout_reward_similarity" in row]
    moved = {name: looks[-1].get(f"heldout_reward_{name}_weight", weight) for name, weight in objective["weights"].items()}
    assert objective["now"] == pytest.approx(moved)  # which are rounded
    assert objective["now"] != objective["weights"]
    assert {"human", "similarity", "tempo", "genre", "diversity"} <= objective["scales"].keys()


def test_the_best_of_an_adapters_clips_is_the_best_by_all_that_it_was_trained_for(policy_dir, reward_dir, adapter):
    policy = load_policy(policy_dir)
    manifests = load_adapter(policy, adapter)
    best = asked(6, reward_dir, policy, manifests=manifests)
    assert best is not None
    objective = manifests[0].objective
    codes, words = drawn(policy, 6), [PROMPT] * 6
    human, similarity = load_reward(reward_dir, policy).score(codes, words), checks(policy)["similarity"](codes, words)
    z = {
        name: (marks - objective["scales"][name][0]) / objective["scales"][name][1]
        for name, marks in (("human", human), ("similarity", similarity))
    }
    by_hand = z["human"] + 0.5 * z["similarity"]
    assert torch.allclose(best.score(codes, words), by_hand.float(), atol=1e-4)
    assert best.chooser["weights"] == {"human": 1.0, "similarity": 0.5}  # diversity needs company


def test_generate_chooses_by_the_adapters_objective_or_by_weights_that_are_given(policy_dir, reward_dir, adapter, tmp_path, capsys):
    call = ["generate", PROMPT, "--policy", str(policy_dir), "--duration", "1", "--sample-rate", "16000", "--mono", "--seed", "5"]
    call += ["--out", str(tmp_path / "a.wav"), "--adapter", str(adapter), "--best-of", "6", "--reward", str(reward_dir)]
    policy = load_policy(policy_dir)
    manifests = load_adapter(policy, adapter)
    codes, words = drawn(policy, 6), [PROMPT] * 6
    winners = {}
    for more, weights in (
        ([], None),
        (["--choose-by", "human=1"], "human=1"),
        (["--choose-by", "human=0,tempo=1,diversity=0"], "human=0,tempo=1"),
    ):
        assert cli.main([*call, *more]) == 0
        told = re.search(r"seed (\d+), the best of 6 with a score of \S+ by (.*)\n", capsys.readouterr().out)
        assert told is not None
        best = asked(6, reward_dir, policy, None, manifests, weights)
        assert best is not None
        assert int(told[1]) == candidate_seed(5, int(best.score(codes, words).argmax()))
        assert told[2] == best.by
        winners[told[2]] = told[1]
    assert list(winners)[1:] == ["human 1", "tempo 1"]


def test_dpo_keeps_its_objective_too(policy_dir, reward_dir, prompts, tmp_path):
    given = {"policy": policy_dir, "reward": reward_dir, "prompts": prompts, "out": tmp_path / "run"}
    small = {
        "n_frames": 15,
        "rounds": 1,
        "round_prompts": 2,
        "round_clips": 2,
        "batch_size": 2,
        "held_out": 0.5,
        "held_out_clips": 4,
        "precision": "fp32",
    }
    train_dpo(DPOConfig(**given, **small, weights="human=1,similarity=0.5", pairing="best_worst"))  # type: ignore[arg-type]
    manifest = read_adapter(tmp_path / "run" / "adapter").manifest
    assert manifest.objective["weights"] == {"human": 1.0, "similarity": 0.5}
    policy = load_policy(policy_dir)
    found = objective_of(policy, load_reward(reward_dir, policy), [manifest])
    assert found is not None
    assert bool(torch.isfinite(found(drawn(policy, 2), [PROMPT] * 2)).all())


def test_without_an_objective_the_reward_chooses_alone_and_says_so(policy_dir, reward_dir, adapter, tmp_path):
    policy = load_policy(policy_dir)
    reward, known = load_reward(reward_dir, policy), read_adapter(adapter)
    bare = save_lora(tmp_path / "bare", known.lora, dataclasses.replace(known.manifest, objective={}))
    other = dataclasses.replace(known.manifest, reward_sha256="0" * 64)
    for manifests in ([], [bare], [other], [known.manifest, known.manifest]):
        assert objective_of(policy, reward, manifests) is None
        with pytest.raises(UserError, match="leave out --choose-by"):
            objective_of(policy, reward, manifests, {"human": 1.0})
        best = asked(2, reward_dir, policy, manifests=manifests)
        assert best is not None
        assert best.by == "the reward alone"


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--choose-by", "human=1,colour=1"], "weights of colour"),
        (["--choose-by", "diversity=1"], "which judge a clip by itself"),
        (["--choose-by", "human=1,diversity=0.3"], "which judge a clip by itself"),
        (["--choose-by", "human"], "name=number"),
        (["--choose-by", "human=1", "--score-command", "true"], "--choose-by with --score-command"),
    ],
)
def test_weights_that_cannot_choose_are_refused(more, match, policy_dir, reward_dir, adapter, tmp_path, capsys):
    call = ["generate", PROMPT, "--policy", str(policy_dir), "--adapter", str(adapter), "--best-of", "2", "--reward", str(reward_dir)]
    assert cli.main([*call, *more, "--out", str(tmp_path / "none.wav")]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "none.wav").exists()


def test_other_ears_than_those_of_the_run_are_refused_where_a_part_asks_them(policy_dir, reward_dir, adapter):
    policy, manifest = load_policy(policy_dir), read_adapter(adapter).manifest
    reward = load_reward(reward_dir, policy)
    heard = dataclasses.replace(manifest, figures=manifest.figures | {"ears_sha256": "1" * 64})
    with pytest.raises(UserError, match="trained by ears 111111111111"):
        objective_of(policy, reward, [heard], {"human": 1.0, "genre": 0.5})
    assert objective_of(policy, reward, [heard]) is not None  # human and similarity ask none


def test_parts_of_which_the_run_met_no_clip_are_left_out_and_prompts_that_ask_nothing_are_judged(policy_dir, reward_dir, adapter):
    policy, manifest = load_policy(policy_dir), read_adapter(adapter).manifest
    reward = load_reward(reward_dir, policy)
    scales = {name: scale for name, scale in manifest.objective["scales"].items() if name != "tempo"}
    told = {"weights": {"human": 1.0, "tempo": 0.5, "diversity": 0.3}, "scales": scales}
    found = objective_of(policy, reward, [dataclasses.replace(manifest, objective=told)])
    assert found is not None
    assert found.weights == {"human": 1.0}
    lonely = told | {"weights": {"diversity": 1.0}}
    assert objective_of(policy, reward, [dataclasses.replace(manifest, objective=lonely)]) is None
    tempo = objective_of(policy, reward, [manifest], {"tempo": 1.0})
    assert tempo is not None
    codes = drawn(policy, 2)
    assert tempo(codes, ["music", "music"]).tolist() == [0, 0]
    assert bool(tempo(codes, [PROMPT] * 2).all())
