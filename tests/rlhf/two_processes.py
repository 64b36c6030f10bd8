"""A training script as its users launch it: from another folder, on two gloo processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """`rlhf/<script>` with the flags, by torchrun in `folder`; the launcher and its workers are gone afterwards."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "rlhf" / script), "--processes", "2", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=alone(), start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            stdout, stderr = process.communicate(timeout=280)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def alone() -> dict[str, str]:
    """The environment of a run launched by hand: nothing of another launcher's, no card, as many threads as here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))}
    return {**kept, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
