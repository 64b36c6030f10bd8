"""PPO as a whole, on the toy policy: it learns, it stays put when it should, and it can be killed at any time."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from adapters.library import load_adapter, read_adapter
from base_models.checkpoint import latest_training_state, load_tensors, read_json
from base_models.errors import UserError
from rlhf.train_ppo import TOY, Config, Run, Task, check, main, read_prompts, share_of_code_3, toy_task

SCRIPT = Path(__file__).resolve().parents[2] / "rlhf" / "train_ppo.py"
STEPS = 30


def config(out: Path, **changes: Any) -> Config:
    return Config(**{**TOY, "out": out, "steps": 3, "batch_size": 32, **changes})


def judged_by(score: Callable[[Tensor, list[str]], Tensor]) -> Task:
    return dataclasses.replace(toy_task(0), score=score)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, Tensor]:
    return read_adapter(out / "adapter").lora.tensors


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The smoke preset, uninterrupted; with its seconds of computing, which a busy machine does not change."""
    out, began = tmp_path_factory.mktemp("learned"), time.process_time()
    figures = main(config(out, steps=STEPS, batch_size=64))
    return out, {**figures, "cpu_seconds": time.process_time() - began}


# -- it learns, and only where it should


def test_a_token_count_reward_is_solved_within_a_minute(learned: tuple[Path, dict[str, Any]]) -> None:
    _, figures = learned
    assert figures["score_first"] < 0.15
    assert figures["score_last"] > 0.8
    assert figures["cpu_seconds"] < 60


def test_the_first_round_has_ratio_one_no_clipping_and_no_kl(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1, epochs=1, minibatches=1))
    (row,) = metrics(tmp_path)
    assert abs(row["ratio_first"] - 1) < 1e-5
    assert row["clipfrac"] == 0
    assert abs(row["approx_kl"]) < 1e-6
    assert abs(row["kl"]) < 1e-4


def test_dropout_is_off_even_when_the_base_arrives_in_train_mode(tmp_path: Path) -> None:
    task = toy_task(0)
    task.lm.train()
    main(config(tmp_path, steps=1, epochs=1, minibatches=1), task)
    assert abs(metrics(tmp_path)[0]["ratio_first"] - 1) < 1e-5


def test_the_critic_comes_to_explain_the_returns(learned: tuple[Path, dict[str, Any]]) -> None:
    explained = [row["explained_variance"] for row in metrics(learned[0])]
    assert abs(explained[0]) < 0.05
    assert max(explained[-5:]) > 0.3


def test_a_constant_reward_drifts_no_more_than_noise(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=12), judged_by(lambda codes, _: torch.ones(len(codes))))
    assert abs(figures["kl"]) < 0.5  # the reward that can be learnt goes beyond 10 in as many rounds


def test_a_large_price_of_drift_keeps_the_policy_where_it_is(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=12, kl_coef=100.0))
    assert abs(figures["kl"]) < 0.5
    assert figures["score_last"] < 0.15


def test_base_weights_are_untouched_and_only_adapter_and_critic_have_gradients(tmp_path: Path) -> None:
    task = toy_task(0)
    before = {name: tensor.clone() for name, tensor in task.lm.state_dict().items()}
    main(config(tmp_path), task)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in task.lm.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    learning = [name for name, parameter in task.lm.named_parameters() if parameter.requires_grad]
    assert learning
    assert all(".lora_" in name for name in learning)


def test_what_a_prompt_always_scores_does_not_drown_what_the_clip_did(tmp_path: Path) -> None:
    def unfair(codes: Tensor, prompts: list[str]) -> Tensor:
        return share_of_code_3(codes, prompts) + torch.tensor([0.1 * float(prompt[-1]) for prompt in prompts])

    share = {}
    for baseline in (False, True):
        out = tmp_path / str(baseline)
        main(config(out, steps=14, prompt_baseline=baseline), judged_by(unfair))
        share[baseline] = metrics(out)[-1]["score"] - 0.35  # each of the 8 prompts is played four times a round
    assert share[True] > share[False] + 0.1


# -- the same result however it is cut


def ragged(codes: Tensor, prompts: list[str]) -> Tensor:
    """The toy's score, but NaN for every clip that begins with an odd code: microbatches and ranks get unequal counts."""
    score = share_of_code_3(codes, prompts)
    return torch.where(codes[:, 0, 0] % 2 == 1, torch.full_like(score, float("nan")), score)


def test_microbatches_change_nothing_on_ragged_batches(tmp_path: Path) -> None:
    for size in (2, 16):
        main(config(tmp_path / str(size), microbatch=size), judged_by(ragged))
    assert 0 < metrics(tmp_path / "2")[0]["scores_not_finite"] < 32
    assert largest_difference(weights(tmp_path / "2"), weights(tmp_path / "16")) < 1e-6


def test_two_gloo_processes_equal_one_when_launched_as_a_file_from_another_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    flags = ["--preset", "smoke", "--steps", "3", "--batch-size", "32", "--processes", "2", "--out", "two"]
    done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=alone(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    main(config(tmp_path / "one"))
    assert largest_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-6
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("score", "kl", "policy_loss", "value_loss", "clipfrac", "grad_norm"):
            assert two[name] == pytest.approx(one[name], abs=1e-5), name


def alone() -> dict[str, str]:
    """The environment of a run launched by hand: nothing of a launcher's, as many threads as here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))}
    return {**kept, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_a_wrong_number_of_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchrun"):
        check(config(tmp_path, processes=2), world=1)
    with pytest.raises(UserError, match="multiple of 4"):
        check(config(tmp_path, batch_size=6), world=2)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(config(tmp_path / name, seed=seed, steps=2), toy_task(0))
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "b")) == 0
    assert metrics(tmp_path / "a")[0]["entropy"] != metrics(tmp_path / "c")[0]["entropy"]


# -- interruptions


class CrashError(Exception):
    pass


def crash_in_round(number: int) -> Callable[[Tensor, list[str]], Tensor]:
    calls = iter(range(1, 1000))

    def score(codes: Tensor, prompts: list[str]) -> Tensor:
        if next(calls) == number:
            raise CrashError
        return share_of_code_3(codes, prompts)

    return score


def test_a_resumed_run_ends_in_bitwise_the_same_state(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 5, "save_every": 2, "target_kl": 0.1, "kl_horizon": 50}
    main(config(tmp_path / "whole", **changes))
    with pytest.raises(CrashError):
        main(config(tmp_path / "cut", **changes), judged_by(crash_in_round(4)))
    for junk in (".step_00000004.half", "step_00000004"):  # what a kill in the middle of a save may leave
        (tmp_path / "cut" / "checkpoints" / junk).mkdir()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as half_written:
        half_written.write('{"step": 4, "sco')
    main(config(tmp_path / "cut", **changes, resume=True))
    folders = [tmp_path / name / "checkpoints" / "step_00000005" for name in ("whole", "cut")]
    files = sorted(path.name for path in folders[0].iterdir())
    assert {"adapter.safetensors", "critic.safetensors", "states.safetensors", "rng.safetensors", "state.json"} == set(files)
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    assert read_json(folders[0] / "state.json")["states"]["controller"] != {"__dict__": [["kl_coef", TOY["kl_coef"]]]}
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in metrics(tmp_path / name)] for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


def test_killed_at_any_time_it_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    flags = ["--preset", "smoke", "--steps", str(STEPS), "--save-every", "1", "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags], cwd=tmp_path, env=alone(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 200
        while latest_training_state(tmp_path / "run") is None:
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    newest = latest_training_state(tmp_path / "run")
    assert newest is not None
    assert all(bool(torch.isfinite(t).all()) for t in load_tensors(newest / "adapter.safetensors").values())
    assert not (tmp_path / "run" / "adapter").exists()
    figures = main(config(tmp_path / "run", steps=STEPS, batch_size=64, save_every=100, resume=True))
    assert figures["steps"] == STEPS
    assert figures["score_last"] > 0.8
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_resuming_with_another_base_is_refused(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1))
    with pytest.raises(UserError, match="base_sha256"):
        main(config(tmp_path, resume=True), toy_task(1))


def test_a_used_folder_is_refused_without_resume(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1))
    with pytest.raises(UserError, match="--resume"):
        main(config(tmp_path, steps=2))


# -- brakes


def test_the_kl_budget_stops_the_run_with_its_reason_and_keeps_the_adapter(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=STEPS, kl_budget=1.0))
    assert "exceeds the budget of 1" in figures["stopped"]
    assert figures["kl"] > 1.0
    assert figures["steps"] < STEPS
    assert read_adapter(tmp_path / "adapter").manifest.figures["stopped"] == figures["stopped"]


def test_time_stops_the_run_after_a_whole_round(tmp_path: Path) -> None:
    figures = main(config(tmp_path, max_minutes=1e-6))
    assert figures["steps"] == 1
    assert "minutes are over" in figures["stopped"]


def test_nan_scores_are_skipped_and_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rounds = iter(range(1000))

    def sometimes(codes: Tensor, prompts: list[str]) -> Tensor:
        score, number = share_of_code_3(codes, prompts), next(rounds)
        score[0] = float("inf")
        return torch.full_like(score, float("nan")) if number == 1 else score

    main(config(tmp_path), judged_by(sometimes))
    assert [row["scores_not_finite"] for row in metrics(tmp_path)] == [1, 32, 1]
    assert metrics(tmp_path)[1]["score"] is None
    assert "32 clips left out" in "".join(capfd.readouterr())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(tmp_path).values())


def test_a_round_without_a_finite_score_changes_no_weight_and_too_many_stop_the_run(tmp_path: Path) -> None:
    figures = main(config(tmp_path, steps=STEPS), judged_by(lambda codes, _: torch.full((len(codes),), float("nan"))))
    assert "no finite score" in figures["stopped"]
    assert figures["steps"] == 5
    assert all(float(tensor.abs().max()) == 0 for name, tensor in weights(tmp_path).items() if "lora_B" in name)


def test_an_update_with_a_broken_gradient_is_skipped_and_counted(tmp_path: Path) -> None:
    run = Run(config(tmp_path), toy_task(0), Accelerator(cpu=True))
    rollout, _ = run.judge(run.play())
    before = [parameter.detach().clone() for parameter in run.parameters()]
    rollout.logps[0, 0] = -float("inf")
    figures = run.learn(rollout)
    assert figures["updates_skipped"] > 0
    assert all(bool(torch.isfinite(parameter).all()) for parameter in run.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, run.parameters()))


# -- what it leaves behind


def test_the_adapter_names_its_parents_and_fits_its_base(learned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, figures = learned
    adapter = read_adapter(out / "adapter")
    assert adapter.manifest.method == "ppo"
    assert adapter.manifest.base_sha256 == toy_task(0).base_sha256
    assert adapter.manifest.figures["score_last"] == figures["score_last"]
    assert adapter.manifest.config["kl_coef"] == TOY["kl_coef"]
    parents = dataclasses.replace(toy_task(0), reward_sha256="a" * 64, snapshot_sha256="b" * 64)
    main(config(tmp_path, steps=1), parents)
    manifest = read_adapter(tmp_path / "adapter").manifest
    assert (manifest.reward_sha256, manifest.snapshot_sha256) == ("a" * 64, "b" * 64)
    fresh = SimpleNamespace(lm=toy_task(0).lm, sha256=toy_task(0).base_sha256)
    assert load_adapter(fresh, out / "adapter") == [adapter.manifest]
    with pytest.raises(UserError, match="this base"):
        load_adapter(SimpleNamespace(lm=toy_task(1).lm, sha256=toy_task(1).base_sha256), out / "adapter")


def test_every_round_is_told_with_its_seconds_by_phase(learned: tuple[Path, dict[str, Any]]) -> None:
    out, figures = learned
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row[f"seconds_{phase}"] > 0 for row in rows for phase in ("play", "judge", "learn"))
    assert figures["seconds_learn"] > 0
    assert list((out / "tensorboard").glob("events.*"))
    assert read_json(out / "config.json")["steps"] == STEPS


def test_prompts_are_read_from_text_and_jsonl(tmp_path: Path) -> None:
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("calm piano\n\n fast rock, 150 BPM \n")
    rows.write_text('{"prompt": "calm piano", "tempo_bpm": 90, "genre": "x"}\n{"prompt": "rock"}\n')
    assert read_prompts(text) == (["calm piano", "fast rock, 150 BPM"], [None, None])
    assert read_prompts(rows) == (["calm piano", "rock"], [90.0, None])


@pytest.mark.parametrize("line", ["not json", '{"text": "calm"}', '["calm"]', '{"prompt": "x", "tempo_bpm": "fast"}'])
def test_a_broken_prompt_row_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "calm piano"}}\n{line}\n')
    with pytest.raises(UserError, match="line 2"):
        read_prompts(path)


def test_missing_or_empty_prompts_and_missing_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for path in (tmp_path / "none.txt", tmp_path / "empty.txt"):
        with pytest.raises(UserError, match="prompt"):
            read_prompts(path)
    with pytest.raises(UserError, match="--reward"):
        main(dataclasses.replace(config(tmp_path / "run"), toy=False))
