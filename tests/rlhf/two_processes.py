"""A training script as its users launch it: from another folder, on two gloo processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.rlhf.ppo_toys import alone

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """`rlhf/<script>` with the flags, by torchrun in `folder`; the launcher and its workers are gone afterwards."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "rlhf" / script), "--processes", "2", *flags]
    environment = {**alone(), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            stdout, stderr = process.communicate(timeout=280)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
