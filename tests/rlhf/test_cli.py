"""`encore generate`, `sample`, `evaluate` and `app`: what they are asked is what they do, or it is refused."""

from __future__ import annotations

import pytest
import torch
from sqlalchemy import func, select

from adapters.library import Manifest, save_adapter, save_mix
from adapters.lora import attach_lora
from base_models.checkpoint import read_json, read_jsonl
from base_models.pipeline import MusicPipeline
from base_models.policy import load_policy
from db.schema import Pair
from db.store import open_store
from rlhf import cli, commands


@pytest.fixture(scope="module")
def adapter(policy_dir, tmp_path_factory):
    """An adapter that changes what is played."""
    policy, folder = load_policy(policy_dir), tmp_path_factory.mktemp("adapter") / "moved"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        attach_lora(policy.lm, 2, 4.0)
        for name, parameter in policy.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(folder, policy.lm, Manifest(name="moved", base_sha256=policy.sha256, method="dpo"))
    return folder


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("sad piano\ncalm folk\n")
    return file


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--weight", "0.5"], "got --weight 0.5 without --adapter"),
        (["--adapter", "a", "--weight", "1", "--weight", "2"], "got --weight 1 --weight 2 for 1 adapters"),
        (["--adapter", "a", "--adapter", "b", "--weight", "1"], "got --weight 1 for 2 adapters"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "sad piano"], ["sample", "--prompts", "p.txt"], ["evaluate", "--prompts", "p.txt"]])
def test_a_weight_that_belongs_to_no_adapter_is_refused(command, more, match, tmp_path, capsys):
    assert cli.main([*command, *more, "--out", str(tmp_path / "out.wav")]) == 2
    told = capsys.readouterr().err
    assert match in told
    assert "one --weight for each --adapter" in told
    assert not (tmp_path / "out.wav").exists()


def test_evaluate_plays_adapters_at_the_strength_that_is_given(policy_dir, adapter, prompts, tmp_path, capsys):
    call = ["evaluate", "--policy", str(policy_dir), "--adapter", str(adapter), "--prompts", str(prompts), "--duration", "0.6"]
    moved = {}
    for weight in ("0", "1"):
        assert cli.main([*call, "--weight", weight, "--out", str(tmp_path / weight)]) == 0
        moved[weight] = read_json(tmp_path / weight / "evaluation.json")["moved"]
    capsys.readouterr()
    assert moved["0"]["kl"] == pytest.approx(0, abs=1e-3)
    assert moved["0"]["diversity_ratio"] == pytest.approx(1)
    assert abs(moved["1"]["kl"]) > 0.01  # of four clips of a second: an estimate, which may fall below 0
    assert [row["gen"].get("adapter_weights") for row in read_jsonl(tmp_path / "0" / "moved" / "manifest.jsonl")] == [[0.0]] * 4


def test_an_adapter_is_not_measured_in_the_place_of_the_base_or_of_the_best_of_n(policy_dir, adapter, prompts, tmp_path, capsys):
    for name, more, match in (
        ("base", [], "called 'base'"),
        ("best-of-2", ["--best-of", "2", "--score-command", "true"], "beside --best-of"),
    ):
        save_mix(tmp_path / "adapter", [adapter], name=name)
        call = ["evaluate", "--policy", str(policy_dir), "--adapter", str(tmp_path / "adapter"), "--prompts", str(prompts), *more]
        assert cli.main([*call, "--out", str(tmp_path / "out")]) == 2
        assert match in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_file_name_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path, capsys):
    assert cli.main(["generate", "sad piano", "--policy", "nowhere", "--out", str(tmp_path / "track")]) == 2
    assert "got the file name track; expected one of .wav" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "pairs"), [([], 2), (["--all-pairs"], 6)])
def test_three_clips_of_two_prompts_make_a_pair_each_or_all_three(more, pairs, policy_dir, prompts, tmp_path):
    database = f"sqlite:///{tmp_path / 'e.db'}"
    call = ["sample", "--policy", str(policy_dir), "--prompts", str(prompts), "-n", "3", "--duration", "1", "--out", str(tmp_path / "s")]
    assert cli.main([*call, "--campaign", "c", "--db", database, *more]) == 0
    with open_store(database) as store, store.read() as session:
        assert session.scalar(select(func.count()).select_from(Pair)) == pairs


def test_all_pairs_without_a_campaign_are_refused(tmp_path, capsys):
    assert cli.main(["sample", "--prompts", "p.txt", "--out", str(tmp_path / "out"), "--all-pairs"]) == 2
    assert "--all-pairs without --campaign" in capsys.readouterr().err


@pytest.fixture
def generating(policy_dir, tmp_path):
    return ["generate", "sad piano", "--policy", str(policy_dir), "--duration", "1", "--out", str(tmp_path / "t.wav")]


def test_generate_writes_n_tracks_of_seeds_in_a_row_and_names_what_it_replaces(generating, tmp_path, capsys):
    assert cli.main([*generating, "-n", "2", "--seed", "5"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert [line.rpartition("seed ")[2] for line in first] == ["5", "6"]
    assert not any("replaces" in line for line in first)
    assert sorted(file.name for file in tmp_path.glob("*.wav")) == ["t-0.wav", "t-1.wav"]
    for _ in range(2):
        assert cli.main([*generating, "--seed", "6"]) == 0
    alone, again = capsys.readouterr().out.splitlines()
    assert "replaces" not in alone
    assert again.startswith(f"{tmp_path / 't.wav'} (replaces the file of that name): ")
    assert (tmp_path / "t.wav").read_bytes() == (tmp_path / "t-1.wav").read_bytes()


@pytest.mark.parametrize("best", [False, True])
def test_generate_samples_as_it_is_told(best, generating, policy_dir, reward_dir, tmp_path, capsys):
    how = {"temperature": 0.7, "top_k": 3, "cfg_coef": 2.0}
    call = [*generating, *[part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", str(value))]]
    assert cli.main([*call, *(["--best-of", "2", "--reward", str(reward_dir)] if best else [])]) == 0
    seed = int(capsys.readouterr().out.partition("seed ")[2].partition(",")[0])
    MusicPipeline(load_policy(policy_dir)).generate("sad piano", 1.0, seed, **how).save(tmp_path / "same.wav")
    assert (tmp_path / "t.wav").read_bytes() == (tmp_path / "same.wav").read_bytes()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--temperature", "0"], "a temperature of 0.0"),
        (["--top-k", "-1"], "a top-k of -1"),
        (["--cfg-coef", "nan"], "guidance of nan"),
        (["-n", "0"], "-n 0"),
        (["-n", "2", "--seed", str(2**63 - 1)], "the seed 9223372036854775808"),
    ],
)
@pytest.mark.parametrize("best", [False, True])
def test_generate_refuses_what_nobody_can_sample(best, more, match, generating, reward_dir, tmp_path, capsys):
    assert cli.main([*generating, *more, *(["--best-of", "2", "--reward", str(reward_dir)] if best else [])]) == 2
    assert match in capsys.readouterr().err
    assert list(tmp_path.glob("*.wav")) == []


def test_a_device_is_the_one_that_was_asked_for_or_the_best_there_is(monkeypatch, generating, capsys):
    for there, best in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert (commands._device(None), commands._device("cpu")) == (best, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([*generating, "--device", "cuda"]) == 2
    assert "--device cuda without a CUDA device" in capsys.readouterr().err


def test_the_app_is_told_every_rater(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(commands, "_app_module", lambda name, *wanted: told.extend(wanted) or 0)
    assert cli.main(["app", "--rater", "ada", "--rater=-bo"]) == 0
    assert [word for word in told if word.startswith("--rater")] == ["--rater=ada", "--rater=-bo"]
