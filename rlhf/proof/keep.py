"""Train, and keep the adapter of every checkpoint: a training script deletes all but its newest ones.

    python -m rlhf.proof.keep --run DIR --kept DIR -- rlhf/train_ppo.py --out DIR --save-every 10 ...

    DIR/checkpoints/step_00000010/adapter.safetensors -> KEPT/step_00000010/ (an adapter's folder, as any other); DIR/adapter -> KEPT/final

It looks at the run's folder twice a second while the script runs. A checkpoint appears whole, and stays until two newer ones are there."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from adapters.compose import LoraTensors
from adapters.library import read_adapter, save_lora
from base_models.atomic import atomic_folder
from base_models.checkpoint import read_json
from base_models.errors import UserError, ended

FINAL = "final"
"""What the run itself hands over: its last adapter, or the one that a brake went back to."""


def keep_new(run: Path, kept: Path) -> list[Path]:
    """Turn the checkpoints of `run` that are not in `kept` yet into adapters' folders there; returns them."""
    made = []
    for checkpoint in sorted((run / "checkpoints").glob("step_*")):
        if (kept / checkpoint.name).is_dir():
            continue
        try:
            tensors = load_file(checkpoint / "adapter.safetensors")
        except FileNotFoundError:  # it was deleted between the two looks: newer ones are there
            continue
        config = read_json(run / "config.json")
        manifest = {
            "name": checkpoint.name,
            "base_sha256": read_json(checkpoint / "state.json")["extra"]["base_sha256"],
            "method": "ppo",
            "config": config,
        }
        save_lora(kept / checkpoint.name, LoraTensors(tensors, int(config["r"]), float(config["alpha"])), manifest)
        made.append(kept / checkpoint.name)
    return made


def train_and_keep(run: Path, kept: Path, command: list[str]) -> list[Path]:
    """Run the training and keep what appears. Raises UserError when it fails; returns the kept adapters, in order."""
    with subprocess.Popen([sys.executable, *command]) as program:
        while program.poll() is None:
            keep_new(run, kept)
            time.sleep(0.5)
    keep_new(run, kept)
    if program.returncode:
        raise UserError(f"exit code {program.returncode} of {command[0]}", "0", "see its error above")
    found = sorted(kept.glob("step_*"))
    if not found:
        raise UserError(f"{run} without a checkpoint", "one or more", "lower --save-every")
    with atomic_folder(kept / FINAL) as temporary:
        shutil.copytree(run / "adapter", temporary, dirs_exist_ok=True)
    found.append(kept / FINAL)
    for folder in found:
        read_adapter(folder)
    return found


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--kept", type=Path, required=True)
    args = parser.parse_args(argv[:cut])
    for folder in train_and_keep(args.run, args.kept, argv[cut + 1 :]):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
