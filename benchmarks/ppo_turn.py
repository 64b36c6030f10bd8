"""How a side of benchmarks/ppo_step.py does a step at a word and tells of it; and what all sides are given and held to."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time

import torch
from torch import Tensor, nn

from base_models.conditions import Conditions
from base_models.policy import Policy


class Turn:
    """Called after each step: writes its figures as a line of JSON and waits for the next word; ends the process without one."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed must not stand between the lines of JSON
        self.began: tuple[float, float] | None = None

    def __call__(self, **figures: float) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime
        if self.began:
            figures |= {"seconds": time.perf_counter() - self.began[0], "cpu_seconds": cpu - self.began[1]}
        self.out.write(json.dumps({**figures, "peak_mb": usage.ru_maxrss / 1e3}) + "\n")
        self.out.flush()
        if not sys.stdin.readline():
            sys.exit()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.began = (time.perf_counter(), usage.ru_utime + usage.ru_stime)


def held(*models: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Megabytes that a side holds between two steps: weights, gradients and the optimiser's moments, shared ones once."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    tensors += [p.grad for model in models for p in model.parameters() if p.grad is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {"held_mb": sum(storages.values()) / 1e6}


def without_tempo(policy: Policy, prompts: list[str]) -> Conditions:
    """Conditions of the prompts with every tempo unknown: transformers' decoder loop does not know our beat clock."""
    return dataclasses.replace(policy.conditions(prompts), tempo_bpm=torch.full((len(prompts),), float("nan")))
