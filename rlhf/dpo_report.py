"""What one of TRL's trainers tells while it runs: its figures in the journal, a bar, the clock, and the check of the first step."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from rlhf.journal import Examples, Journal, Settings, Sound, speeds

FIRST_LOSS = ("dpo/loss_hard_labels", "kto/loss_unweighted")
"""log 2 and 1/2 as long as policy and reference are one."""
FIRST = {"dpo/kl_reference_to_policy": (0.0, 0.5), "kto/loss_unweighted": (0.5, 0.01)}
"""What these are then, and how far rounding may take them: bfloat16 moves a clip's log-prob by up to a twentieth of a nat."""
SHOWN = {
    "loss": "loss",
    "dpo/accuracy_decided": "accuracy",
    "rewards/margins": "margin",
    "reward": "reward",
    "held_out/score": "held_out",
    "held_out/kl": "kl",
    "kl_nats_per_clip": "kl",
}
"""What the bar shows of the figures, and how it calls them."""


class NothingLeftError(Exception):
    """There is nothing left to train: the steps were done, or the KL budget spent, before the run was interrupted."""


class TimedSettings(Settings, Protocol):
    @property
    def max_minutes(self) -> float: ...


class Recorder(TrainerCallback):
    """The journal of a trainer, a bar, the check of the first step, and the clock of --max-minutes."""

    def __init__(self, cfg: TimedSettings, name: str, first_step: int, main: bool, sound: Sound | None = None) -> None:
        self.journal = Journal(cfg, name, first_step, main)
        self.max_minutes, self.sound = cfg.max_minutes, sound
        self.began = time.monotonic()
        self.whole = 1
        """Steps after a multiple of which the clock may end a run: those of a round, for within one its clips are gone on resumption."""
        self.by_step = True
        """Whether seconds are told step by step, or are left to who counts rounds."""
        self.seconds: dict[str, float] = {}
        """By phase, since they were told."""
        self.step_began = 0.0
        self.tokens = 0.0
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:  # the trainer takes a step before it asks
            raise NothingLeftError
        self.bar = self.journal.bar(state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds["learn"] = self.seconds.get("learn", 0.0) + time.perf_counter() - self.step_began
        self.bar.update(state.global_step - self.bar.n)
        late = bool(self.max_minutes) and time.monotonic() - self.began > 60 * self.max_minutes
        if self.max_minutes and args.world_size > 1:
            flag = torch.tensor(float(late), device=args.device)
            torch.distributed.all_reduce(flag)
            late = bool(flag > 0)
        if late and state.global_step % self.whole == 0:
            control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        row = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "train_runtime" in row:  # TRL's last word, of this process alone; the manifest has ours
            return
        for name, (at_first, rounding) in FIRST.items():
            if name in row and state.global_step == 1 and abs(row[name] - at_first) > rounding:
                raise RuntimeError(f"the first {name} is {row[name]}, not {at_first:g}: policy and reference differ")
        tokens = row.pop("num_tokens", self.tokens)  # of this process, not of the run
        row.pop("eval_num_tokens", None)
        if self.by_step and "loss" in row:
            row |= speeds(self.seconds, tokens - self.tokens)
            self.seconds.clear()
        self.tokens = tokens
        self.tell(state.global_step, row)

    def tell(self, step: int, row: dict[str, float]) -> None:
        """One row of figures, of which the bar shows a few."""
        self.journal.tell(step, row)
        self.shown |= {short: f"{row[name]:.3f}" for name, short in SHOWN.items() if name in row}
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def play(self, step: int, examples: Examples) -> None:
        """Clips to hear."""
        self.journal.play(step, examples, self.sound)

    def summary(self) -> dict[str, float]:
        """First and last of what tells a healthy run from a collapsing one; of the whole run, where it was interrupted too."""
        names = {
            "logps_chosen": "logps/chosen",
            "logps_rejected": "logps/rejected",
            "train_accuracy": "dpo/accuracy_decided",
            "margin": "rewards/margins",
        }
        rows = [row for row in self.journal.rows if any(name in row for name in FIRST_LOSS)]
        if not rows:
            return {}
        first = {"first_loss": next(rows[0][name] for name in FIRST_LOSS if name in rows[0])}
        ends = (("first", rows[0]), ("last", rows[-1]))
        told = {f"{name}_{when}": row[key] for name, key in names.items() for when, row in ends if row.get(key) is not None}
        return first | {name: round(value, 4) for name, value in told.items()}

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.journal.close()
