"""Fine-tuning on winners: it learns them, says how far it moved, and is resumed where it was killed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.library import read_adapter
from base_models.checkpoint import read_jsonl
from base_models.errors import UserError
from base_models.policy import load_policy
from rlhf.evaluate_models import evaluate
from rlhf.sample_pairs import Settings, read_prompts
from rlhf.sft_run import Learner
from rlhf.sft_task import toy_task
from rlhf.train_sft import PRESETS, Config, main
from tests.rlhf.two_processes import launch

KINDS = {".json", ".jsonl", ".safetensors", ".md", ".wav", ".png"}


class KilledError(Exception):
    """Stands in for a kill between two steps."""


def config(out: Path, **changes: Any) -> Config:
    return dataclasses.replace(Config(**PRESETS["smoke"]), out=out, **changes)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_adapter(out / "adapter").lora.tensors


def steps(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(out / "metrics.jsonl") if "nats_a_code" in row]


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("sft") / "run"
    return out, main(config(out, save_every=10, look_every=20))


def test_winners_become_likelier_on_prompts_that_were_not_trained(learned):
    _, figures = learned
    assert figures["winners_held_out"] >= 4
    assert figures["held_out_nats_a_code"] < figures["held_out_nats_a_code_base"] - 0.3  # half the codes are never played: ln 2 at best
    assert figures["kl_ci"][0] > 0


def test_the_adapter_names_its_base_and_its_figures(learned):
    out, figures = learned
    manifest = read_adapter(out / "adapter").manifest
    assert manifest.method == "sft"
    assert manifest.base_sha256 == toy_task(0).base_sha256
    assert manifest.figures == figures
    assert {p.suffix for p in out.rglob("*") if p.is_file() and "tfevents" not in p.name} == KINDS


def test_looks_tell_kl_by_codebook_held_out_nats_speed_and_clips(learned):
    out, figures = learned
    looks = [row for row in read_jsonl(out / "metrics.jsonl") if "kl" in row]
    assert [row["step"] for row in looks] == [20, 40, figures["steps"]]
    for row in looks:
        assert row["kl"] == pytest.approx(sum(row[f"kl_book_{k}"] for k in range(4)), abs=1e-5)
        assert len(list((out / "clips" / f"step_{row['step']:08d}").glob("*.png"))) == 2
    assert looks[-1]["kl"] == pytest.approx(figures["kl_nats_per_clip"], abs=1e-4)
    assert looks[-1]["held_out_nats_a_code"] < looks[0]["held_out_nats_a_code"]
    first = steps(out)[0]
    assert first["tokens_per_second"] * first["seconds_learn"] == pytest.approx(16 * 4 * 12, rel=1e-6)


def test_a_resumed_run_ends_bitwise_where_the_unbroken_one_does(learned, tmp_path):
    out, _ = learned
    n = len(steps(out))

    real = Learner.learn

    def dies(self):
        if self.step == 25:
            raise KilledError
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "learn", dies)
        with pytest.raises(KilledError):
            main(config(tmp_path / "run", save_every=10, look_every=20))
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as rows:
        rows.write('{"step": 26, "nats')  # as a kill leaves it
    main(config(tmp_path / "run", save_every=10, look_every=20, resume=True))
    assert [row["step"] for row in steps(tmp_path / "run")] == list(range(1, n + 1))
    one, two = weights(out), weights(tmp_path / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_microbatches_and_two_processes_change_nothing(tmp_path):
    few = {"steps": 6, "kl_clips": 0}
    main(config(tmp_path / "one", **few))
    main(config(tmp_path / "small", microbatch=3, **few))
    done = launch(tmp_path, "train_sft.py", "--preset", "smoke", "--steps", "6", "--kl-clips", "0", "--out", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    told = {}
    for name in ("one", "small", "two"):
        told[name] = [row["nats_a_code"] for row in steps(tmp_path / name)]
    assert len(told["one"]) == 6
    assert told["small"] == pytest.approx(told["one"], abs=1e-4)
    assert told["two"] == pytest.approx(told["one"], abs=1e-4)


def test_sft_on_votes_and_on_the_best_of_n_runs_in_the_harness_of_ppo_and_dpo(snapshot_dir, reward_dir, policy_dir, tmp_path):
    (tmp_path / "p.txt").write_text("sad piano\ncalm folk\ndark rock\n")
    common = {"policy": policy_dir, "steps": 4, "r": 4, "lr": 5e-2, "kl_clips": 2}
    main(Config(out=tmp_path / "voted", snapshot=snapshot_dir, **common))
    own = {"reward": reward_dir, "prompts": tmp_path / "p.txt", "best_of": 2, "duration_s": 0.6}
    main(Config(out=tmp_path / "picked", **own, **common))
    assert read_adapter(tmp_path / "picked" / "adapter").manifest.reward_sha256
    assert len(read_jsonl(tmp_path / "picked" / "winners" / "manifest.jsonl")) == 3
    systems = {name: tmp_path / name / "adapter" for name in ("voted", "picked")}
    settings = Settings(n=2, duration_s=0.6)
    figures = evaluate(load_policy(policy_dir), systems, read_prompts(tmp_path / "p.txt"), tmp_path / "e", settings)
    assert figures.keys() == {"base", "voted", "picked"}
    assert all(figures[name]["kl"] != 0 for name in systems)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "either --snapshot"),
        ({"snapshot": Path("a"), "reward": Path("b")}, "either --snapshot"),
        ({"reward": Path("b")}, "expected both"),
        ({"toy": True, "batch_size": 0}, "size below 1"),
        ({"snapshot": "{snapshot}", "policy": "{other}"}, "clips of base"),
        ({"reward": "{reward}", "prompts": "{prompts}", "policy": "{other}"}, "reward model of base"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, match, tmp_path, snapshot_dir, reward_dir, other_policy_dir):
    (tmp_path / "p.txt").write_text("sad piano\n")
    known = {"{snapshot}": snapshot_dir, "{reward}": reward_dir, "{other}": other_policy_dir, "{prompts}": tmp_path / "p.txt"}
    with pytest.raises(UserError, match=match):
        main(Config(out=tmp_path / "run", **{k: known.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}))


def test_a_run_that_is_given_more_steps_falls_to_a_tenth_by_the_new_end(tmp_path):
    main(config(tmp_path / "whole", steps=12, kl_clips=0))
    main(config(tmp_path / "more", steps=4, kl_clips=0))
    main(config(tmp_path / "more", steps=12, kl_clips=0, resume=True))
    whole, more = ([row["lr"] for row in read_jsonl(tmp_path / name / "metrics.jsonl") if "lr" in row] for name in ("whole", "more"))
    assert more[4:] == pytest.approx(whole[4:])


def test_another_run_is_not_overwritten_and_not_resumed_with_other_winners(learned, tmp_path):
    out, _ = learned
    with pytest.raises(UserError, match="another run"):
        main(config(out))
    with pytest.raises(UserError, match="winners_sha256"):
        main(config(out, resume=True), task=dataclasses.replace(toy_task(0), winners=toy_task(0).winners[::-1]))
    with pytest.raises(UserError, match="winners_sha256"):  # else it would be measured on what it has learnt
        main(config(out, resume=True, held_out=0.5))
    with pytest.raises(UserError, match="of batch_size 16, now 8"):
        main(config(out, resume=True, batch_size=8))
