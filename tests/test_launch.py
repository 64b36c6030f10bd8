"""`accelerate launch` with the configurations of configs/accelerate: each script works under one, or says which to take."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base_models.checkpoint import load_tensors
from base_models.errors import UserError
from base_models.launch import asked_sharding, check_processes
from base_models.lm import MusicLM, MusicLMConfig
from base_models.sharding import gathered, local, share_held, whole, whole_copy

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "accelerate"
TINY = {
    "train_lm": ["--preset", "smoke", "--cache", "cache", "--no-tensorboard", "--steps", "4", "--save-every", "2", "--eval-every", "4"],
    "train_ppo": ["--preset", "smoke", "--steps", "1", "--batch-size", "4", "--microbatch", "4", "--listen", "0"],
}
"""Flags that make a script short."""


def launch(folder: Path, how: list[str], script: str, *more: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch HOW SCRIPT FLAGS` in a folder, on CPUs, with nothing of a launcher that may stand around these tests."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, str(ROOT / script), *TINY[Path(script).stem], *more]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            stdout, stderr = process.communicate(timeout=280)
        finally:
            with contextlib.suppress(ProcessLookupError):  # the launcher and its workers, should any be left
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def config(name: str) -> list[str]:
    return ["--config_file", str(CONFIGS / f"{name}.yaml")]


TWO = ["--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def two_whole(tmp_path_factory) -> Path:
    """train_lm.py under ddp.yaml, which without a GPU is two gloo processes."""
    folder = tmp_path_factory.mktemp("launched")
    done = launch(folder, [*config("ddp"), *TWO], "base_models/train_lm.py", "--processes", "2", "--out", "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_ddp_makes_one_world_of_two_processes(two_whole):
    told = json.loads((two_whole / "whole" / "config.json").read_text())
    assert told["world_size"] == 2
    assert told["share_held"] == 1


def test_fsdp2_holds_half_and_goes_on_from_a_whole_checkpoint_to_the_same_weights(two_whole):
    """Also moments: they are cut up for the shards, and the checkpoint at the end holds them whole again."""
    shutil.copytree(two_whole / "whole", two_whole / "sharded")
    shutil.rmtree(two_whole / "sharded" / "checkpoints" / "step_00000004")
    shutil.rmtree(two_whole / "sharded" / "lm")
    flags = ["--processes", "2", "--out", "sharded", "--resume"]
    done = launch(two_whole, [*config("fsdp2"), *TWO], "base_models/train_lm.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((two_whole / "sharded" / "config.json").read_text())
    assert told["world_size"] == 2
    assert 0.5 <= told["share_held"] < 0.55
    start = load_tensors(two_whole / "whole" / "checkpoints" / "step_00000002" / "lm.safetensors")
    for file in ("lm/model", "checkpoints/step_00000004/lm", "checkpoints/step_00000004/averaged", "checkpoints/step_00000004/states"):
        one, two = (load_tensors(two_whole / name / f"{file}.safetensors") for name in ("whole", "sharded"))
        assert one.keys() == two.keys()
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6, file
    end = load_tensors(two_whole / "sharded" / "checkpoints" / "step_00000004" / "lm.safetensors")
    assert max(float((end[name] - start[name]).abs().max()) for name in start) > 1e-4


def test_cpu_is_one_process_that_learns(tmp_path):
    done = launch(tmp_path, config("cpu"), "rlhf/train_ppo.py", "--processes", "1", "--out", "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "adapter" / "manifest.json").is_file()


def test_the_form_that_silently_runs_one_process_is_caught(tmp_path):
    done = launch(tmp_path, ["--cpu", "--num_processes", "2"], "rlhf/train_ppo.py", "--processes", "2", "--out", "run")
    assert done.returncode != 0
    assert "got 1 process(es); expected 2" in done.stderr
    assert "torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


ONLY_WHOLE = {
    "rlhf.train_ears": {},
    "rlhf.train_reward": {"toy": True},
    "rlhf.train_sft": {"toy": True},
    "rlhf.train_dpo": {"toy": True},
    "rlhf.train_grpo": {"toy": True},
    "base_models.train_codec": {},
    "base_models.train_contrastive": {},
}
BOTH = {"rlhf.train_ppo": {"toy": True}, "base_models.train_lm": {}}


@pytest.mark.parametrize(
    ("script", "variable"),
    [(script, "ACCELERATE_USE_FSDP") for script in ONLY_WHOLE] + [(script, "ACCELERATE_USE_DEEPSPEED") for script in (*ONLY_WHOLE, *BOTH)],
)
def test_a_script_that_cannot_shard_says_so_and_names_what_it_takes(script, variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    module = importlib.import_module(script)
    cfg = module.Config(out=tmp_path / "run", **{**ONLY_WHOLE, **BOTH}[script])
    with pytest.raises(UserError, match=r"expected configs/accelerate/cpu\.yaml or ddp\.yaml") as refused:
        module.main(cfg)
    assert ("fsdp2.yaml;" in str(refused.value)) == (script in BOTH)
    assert not (tmp_path / "run").exists()


def test_every_training_script_is_among_those():
    scripts = {f"{path.parent.name}.{path.stem}" for folder in ("rlhf", "base_models") for path in (ROOT / folder).glob("train_*.py")}
    assert scripts == ONLY_WHOLE.keys() | BOTH.keys()


def test_what_the_launcher_asks_for_stands_in_its_variables():
    assert asked_sharding({}) == "no"
    assert asked_sharding({"ACCELERATE_USE_FSDP": "false"}) == "no"
    assert asked_sharding({"ACCELERATE_USE_FSDP": "true"}) == "fsdp"
    assert asked_sharding({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true"}) == "deepspeed"
    check_processes(3, 0)
    with pytest.raises(UserError, match="expected 2"):
        check_processes(3, 2)


def test_a_whole_model_is_its_own_shard():
    lm = MusicLM(MusicLMConfig(n_q=2, card=8, d_model=16, n_layers=1, n_heads=2, d_ff=32, text_dim=8))
    assert share_held(lm) == 1
    weight = lm.text_projection.weight
    assert local(weight) is weight
    with gathered(lm):
        pass
    nested = whole({"a": [weight, (1, None)], "b": "x"})
    assert nested["a"][0] is weight
    assert nested["a"][1] == (1, None)
    assert whole_copy(lm).sha256() == lm.sha256()
    assert torch.equal(whole_copy(lm).text_projection.weight, weight)
