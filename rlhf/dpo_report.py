"""What a DPO run tells while it runs: metrics.jsonl, TensorBoard, the bar, and the check of the first step."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import ProgressCallback, TrainerCallback

from base_models.checkpoint import append_jsonl

FIRST_LOSS = {"dpo/loss_hard_labels": math.log(2), "kto/loss_unweighted": 0.5}
"""What these are as long as policy and reference are one."""


class ProgressBar(ProgressCallback):
    """transformers' bar, with the figures on it instead of a line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        shown = {"loss": "loss", "accuracy": "dpo/accuracy_decided", "margin": "rewards/margins"}
        if self.training_bar is not None and logs:
            self.training_bar.set_postfix({name: f"{float(logs[key]):.3f}" for name, key in shown.items() if key in logs})


class Recorder(TrainerCallback):
    """metrics.jsonl and TensorBoard, the check of the first step, and the clock."""

    def __init__(self, out: Path, max_minutes: float, resume: bool, main: bool) -> None:
        self.out, self.max_minutes, self.main = out, max_minutes, main
        self.began = time.monotonic()
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.board = SummaryWriter(str(out / "tensorboard")) if self.main else None
        if self.main and not resume:
            (out / "metrics.jsonl").unlink(missing_ok=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        row = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        for name, at_first in FIRST_LOSS.items():
            if name in row:
                if not self.first and state.global_step == 1 and abs(row[name] - at_first) > 1e-3:
                    raise RuntimeError(f"the first {name} is {row[name]}, not {at_first:.4f}: policy and reference differ")
                self.first, self.last = self.first or row, row
        self.write(state.global_step, row)

    def write(self, step: int, row: dict[str, float]) -> None:
        """One line of figures and a point in each curve, by the first process; NaN is written as null."""
        if self.main and self.board is not None:
            append_jsonl(self.out / "metrics.jsonl", {"step": step, **{k: v if math.isfinite(v) else None for k, v in row.items()}})
            for name, value in row.items():
                self.board.add_scalar(name, value, step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        late = bool(self.max_minutes) and time.monotonic() - self.began > 60 * self.max_minutes
        if self.max_minutes and args.world_size > 1:
            flag = torch.tensor(float(late), device=args.device)
            torch.distributed.all_reduce(flag)
            late = bool(flag > 0)
        if late:
            control.should_training_stop = True

    def summary(self) -> dict[str, float]:
        """First and last of what tells a healthy run from a collapsing one."""
        names = {
            "logps_chosen": "logps/chosen",
            "logps_rejected": "logps/rejected",
            "train_accuracy": "dpo/accuracy_decided",
            "margin": "rewards/margins",
        }
        told = {f"{name}_{when}": round(row[key], 4) for name, key in names.items() for when, row in self._ends() if key in row}
        return {"first_loss": next(self.first[name] for name in FIRST_LOSS if name in self.first), **told} if self.first else told

    def _ends(self) -> tuple[tuple[str, dict[str, float]], ...]:
        return ("first", self.first), ("last", self.last)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
