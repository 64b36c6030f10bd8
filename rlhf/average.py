"""The mean of a run's adapters, round by round: what is heard at looks and kept at the end, in place of the last round's.

    mean <- d * mean + (1 - d) * adapter, d = min(decay, (n - 1) / n) after n rounds: the plain mean at first

What rounds have in common stays, what each was pushed by its own clips goes: as much reward for less drift (measured:
docs/experiments.md). Polyak and Juditsky 1992, SIAM J. Control Optim. 30(4); of policies trained on a reward: Rame et al. 2024, "WARP",
arXiv:2406.16768, section 3.1.
Both factors of a LoRA are averaged by themselves, as they stay close to each other from round to round; their product's mean would have a
rank of its own for every round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from adapters.lora import adapter_tensors, set_adapter_tensors
from base_models.errors import UserError


def check_decay(decay: float) -> None:
    """Refuse an --average that keeps all of a mean, or less than nothing."""
    if not 0 <= decay < 1:
        raise UserError(f"--average {decay:g}", "0 to below 1", "take .9, or 0 for the last round's adapter")


class Average:
    """Of one adapter of `lm`. decay: what is kept of the mean a round, 0 to below 1; 0 switches averaging off."""

    def __init__(self, lm: nn.Module, decay: float) -> None:
        self.lm, self.decay, self.rounds = lm, decay, 0
        self.tensors: dict[str, Tensor] = {}
        """Name -> factor of the LoRA, shaped as in the adapter; empty before the first round, and where nothing is averaged."""

    def update(self) -> None:
        """Take in the adapter as a round has left it."""
        if not self.decay:
            return
        self.rounds += 1
        kept, now = min(self.decay, 1 - 1 / self.rounds), adapter_tensors(self.lm)
        self.tensors = {name: now[name].lerp(self.tensors[name].to(now[name]), kept) for name in now} if self.tensors else now

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The mean stands in the model, and the adapter comes back afterwards."""
        now = adapter_tensors(self.lm)
        self.keep()
        try:
            yield
        finally:
            set_adapter_tensors(self.lm, now)

    def keep(self) -> None:
        """The mean takes the adapter's place for good, where there is one."""
        if self.tensors:
            set_adapter_tensors(self.lm, self.tensors)

    def load(self, tensors: dict[str, Tensor], rounds: int) -> None:
        """Go on from a checkpoint's mean of so many rounds; nothing where averaging is off."""
        self.tensors, self.rounds = (tensors, rounds) if self.decay else ({}, 0)
