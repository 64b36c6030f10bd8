"""A disk that takes no more, under every script that trains: one line of advice, and nothing half-written."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors

from base_models.checkpoint import load_tensors

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 48 * 1024
SCRIPTS = (
    "base_models/train_codec.py",
    "base_models/train_contrastive.py",
    "base_models/train_lm.py",
    "rlhf/train_reward.py",
    "rlhf/train_dpo.py",
    "rlhf/train_ppo.py",
    "rlhf/train_grpo.py",
    "rlhf/train_sft.py",
)


def no_large_files() -> None:
    """Writing beyond LIMIT fails with an OSError, as it does on a full disk, also for root."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_without_room_is_told_in_words(script: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / script), "--preset", "smoke", "--out", str(out)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=no_large_files, timeout=280)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr, ended.stderr[-2000:]
    told = [line for line in ended.stderr.replace("\r", "\n").splitlines() if line.startswith(f"{Path(script).name}: got ")]
    assert len(told) == 1, ended.stderr[-2000:]
    assert all(part in told[0] for part in ("File too large", "expected", "remedy"))
    for file in out.rglob("*.safetensors"):
        load_tensors(file)  # whole, or not there
    assert not list(out.rglob(".tmp-*"))
    assert not list(out.rglob("adapter_config.json"))


def test_a_damaged_file_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(tmp_path / "a.safetensors", "pt")
