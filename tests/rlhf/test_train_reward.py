import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from base_models.checkpoint import read_json
from base_models.errors import UserError
from rlhf import train_reward
from rlhf.preferences import content_sha256
from rlhf.reward_gates import GateError
from rlhf.reward_model import load_reward
from rlhf.reward_toy import toy_base, write_toy_snapshot

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
    assert figures["n"] + figures["n_both_bad"] == figures["n_votes"] == 240
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


def test_shuffled_labels_stay_at_chance_on_unseen_prompts_and_strict_says_so(tmp_path, capsys):
    cheap = {"members": 1, "folds": 3, "shuffle_labels": True, "strict": True}
    reached = []
    for seed in range(2):
        with pytest.raises(GateError, match="lower end") as failed:
            train_reward.script(settings(tmp_path / str(seed), seed=seed, **cheap))
        assert failed.value.exit_code == 1
        assert "FAIL  accuracy" in capsys.readouterr().out
        reached.append(read_json(tmp_path / str(seed) / "figures.json")["accuracy"])  # written all the same
        assert (tmp_path / str(seed) / "manifest.json").is_file()
    assert 0.38 < sum(reached) / 2 < 0.62


def test_strangers_votes_are_foretold_too(smoke):
    told = smoke[1]["accuracy_unseen_raters"]
    assert told["ci"][0] > 0.5
    assert told["n"] == smoke[1]["n"]


def test_aspects_both_bad_and_marks_are_told_and_kept(smoke):
    out, figures = smoke
    assert figures["extras"]["musicality"]["ci"][0] > 0.5
    assert 0 < figures["extras"]["acceptable"]["n"] == figures["n_both_bad"]
    assert figures["frames"]["n"] > 20
    base = train_reward.toy_task(settings(out), _alone())[0]
    model = load_reward(out, base)
    codes = torch.randint(0, 32, (3, 2, 12))
    assert set(model.extra_scores(codes, ["toy"] * 3)) >= {"musicality"}
    assert model.per_frame(codes, ["toy"] * 3).shape == (3, 12)


def test_the_report_shows_each_gate_with_its_verdict(smoke):
    figures = smoke[1]
    lines = [line for line in train_reward.report(figures).splitlines() if line.startswith("gate ")]
    assert len(lines) == len(figures["gates"]) == 5
    assert all(any(verdict in line for verdict in ("PASS", "FAIL", "n/a")) for line in lines)


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


def rewritten(folder, **changes):
    """The toy's snapshot with its votes changed: column -> function of the vote."""
    write_toy_snapshot(folder, toy_base(0).sha256, seed=0)
    rows = [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {column: change(row) for column, change in changes.items()}
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "snapshot.json").write_text(json.dumps({"name": "toy", "sha256": content_sha256(folder)}))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"choice": lambda row: "tie"}, "all of them ties"),
        ({"choice": lambda row: "both_bad"}, "no pair that is ordered"),
        ({"excluded_reason": lambda row: "rater_blocked"}, "240 rater_blocked"),
        ({"rater": lambda row: "me"}, "one rater alone"),
        ({"clip_x": lambda row: "f" * 64}, r"not in clips\.jsonl"),
        ({"prompt_id": lambda row: "p0"}, "folds|prompts"),
    ],
)
def test_votes_that_cannot_teach_are_refused_and_nothing_is_written(tmp_path, monkeypatch, changes, said):
    folder = rewritten(tmp_path / "snapshot", **changes)
    monkeypatch.setattr(train_reward, "load_policy", lambda path: toy_base(0))
    with pytest.raises(UserError, match=said):
        train_reward.main(train_reward.Config(snapshot=folder, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_clips_of_another_codec_and_of_another_base_are_refused(tmp_path, monkeypatch):
    folder = rewritten(tmp_path / "snapshot")
    base = toy_base(0)
    monkeypatch.setattr(train_reward, "load_policy", lambda path: replace(base, sha256="c" * 64))
    with pytest.raises(UserError, match=f"clips of base {base.sha256[:12]}"):
        train_reward.main(train_reward.Config(snapshot=folder, out=tmp_path / "out"))
    other = replace(toy_base(0, n_q=3), sha256=base.sha256)
    monkeypatch.setattr(train_reward, "load_policy", lambda path: other)
    with pytest.raises(UserError, match="2 codebooks"):
        train_reward.main(train_reward.Config(snapshot=folder, out=tmp_path / "out"))


def test_one_persons_taste_can_be_learnt_on_request(tmp_path, monkeypatch):
    folder = rewritten(tmp_path / "snapshot", rater=lambda row: "me")
    monkeypatch.setattr(train_reward, "load_policy", lambda path: toy_base(0))
    cheap = {"members": 1, "folds": 3}
    figures = train_reward.main(train_reward.Config(snapshot=folder, out=tmp_path / "out", one_rater=True, **cheap))
    assert figures["ci"][0] > 0.5
    assert figures["ceiling"] is None
    assert figures["accuracy_unseen_raters"] is None
    assert "unknown" in train_reward.report(figures)


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
    assert done.stdout.count("baseline ") == 1


def test_launched_as_a_file_from_elsewhere_bad_input_exits_with_two(tmp_path):
    done = launch(["--snapshot", str(tmp_path / "nowhere"), "--policy", str(tmp_path)], tmp_path)
    assert done.returncode == 2
    assert "remedy" in done.stderr
