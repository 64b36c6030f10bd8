"""A learning rate that falls linearly, taken up again by a run that may have been given more steps."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LinearLR


def restore_linear(scheduler: LinearLR, state: dict[str, Any], step: int) -> None:
    """The rate goes on where it was at `step`; where the plan's end is another now, it stands where the new plan has it, and falls to that
    end. (LinearLR.load_state_dict alone would bring the old end back.)"""
    total = scheduler.total_iters
    scheduler.load_state_dict(state)
    if scheduler.total_iters == total:
        return
    scheduler.total_iters = total
    share = 1 + (scheduler.end_factor - 1) * min(step, total) / total
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs):
        group["lr"] = rate * share
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
