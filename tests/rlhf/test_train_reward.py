import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base_models.checkpoint import read_json
from base_models.errors import UserError
from rlhf import train_reward
from rlhf.reward_model import load_reward

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "rlhf" / "train_reward.py"


def settings(out, **changes):
    return train_reward.Config(toy=True, out=out, **changes)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("reward")
    return out, train_reward.main(settings(out))


def test_smoke_run_predicts_votes_on_unseen_prompts(smoke):
    _, figures = smoke
    assert figures["ci"][0] > 0.5
    assert figures["accuracy"] <= figures["ceiling_ci"][1] + 0.05
    assert figures["accuracy"] > figures["baseline"]["value"]
    assert figures["n"] == 240
    assert figures["n_prompts"] == 20


def test_run_folder_holds_the_model_its_settings_and_its_figures(smoke):
    out, figures = smoke
    assert {"config.json", "figures.json", "manifest.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    assert read_json(out / "figures.json") == json.loads(json.dumps(figures))
    base = train_reward.toy_task(settings(out), _alone())[0]
    model = load_reward(out, base)
    assert model.sha256 == figures["reward_sha256"]
    assert model.snapshot_sha256 == figures["snapshot_sha256"]
    draw = torch.distributions.Binomial(31, torch.tensor([0.4, 0.6])[:, None, None, None].expand(2, 30, 2, 12))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        liked, disliked = draw.sample().long()
    assert model.score(liked, ["toy"] * 30).mean() > model.score(disliked, ["toy"] * 30).mean() + 0.3


def _alone():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def test_shuffled_labels_stay_at_chance_on_unseen_prompts(tmp_path):
    cheap = {"members": 1, "folds": 3, "shuffle_labels": True}
    reached = [train_reward.main(settings(tmp_path / str(seed), seed=seed, **cheap))["accuracy"] for seed in range(2)]
    assert 0.38 < sum(reached) / 2 < 0.62


def test_the_careless_rater_is_named_in_the_report(smoke):
    figures = smoke[1]
    weights = {rater: quality["weight"] for rater, quality in figures["raters"].items()}
    assert min(weights, key=weights.get) == "r4"
    printed = train_reward.report(figures)
    assert "ceiling" in printed
    assert "baseline" in printed
    assert f"{figures['accuracy']:.3f}" in printed


@pytest.mark.parametrize("wrong", [{"folds": 2}, {"members": 0}, {"lam": -1.0}, {"processes": 3}])
def test_impossible_settings_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(UserError):
        train_reward.main(settings(tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_snapshot_says_how_to_get_one():
    with pytest.raises(UserError, match="ratings export"):
        train_reward.main(train_reward.Config())


def launch(arguments, cwd, *launcher):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def test_two_processes_make_the_model_of_one(smoke, tmp_path):
    out = tmp_path / "two"
    done = launch(
        ["--preset", "smoke", "--out", str(out), "--processes", "2"],
        tmp_path,
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = read_json(out / "figures.json")
    assert figures["processes"] == 2
    assert figures["reward_sha256"] == smoke[1]["reward_sha256"]
    assert figures["accuracy"] == smoke[1]["accuracy"]
    assert done.stdout.count("accuracy ") == 1


def test_launched_as_a_file_from_elsewhere_bad_input_exits_with_two(tmp_path):
    done = launch(["--snapshot", str(tmp_path / "nowhere"), "--policy", str(tmp_path)], tmp_path)
    assert done.returncode == 2
    assert "remedy" in done.stderr
