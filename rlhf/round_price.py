"""What a nat of drift costs from round to round, so that runs with rewards of different strength drift alike.

KL on held-out prompts after a round, the price of the round before -> price of the next one
"""

from __future__ import annotations

from pathlib import Path

from base_models.checkpoint import read_json, write_json
from base_models.errors import UserError

MOST = 2.0
"""By what factor the price moves in a round, at most."""


def next_price(price: float, kl: float, target_kl: float, least: float) -> float:
    """price * kl / target, at most doubled or halved, and never below `least`: what a run begins with is what drift costs at least.

    An adaptive price of KL (Ziegler et al. 2019, arXiv:1909.08593, section 2.2), in steps as large as rounds are; KL [nats a clip] is
    measured over the whole vocabulary on many clips here, and needs no smoothing.
    """
    return max(least, price * min(max(kl / target_kl, 1 / MOST), MOST))


class Price:
    """The price of every round, remembered and in a file: a resumed run takes up that of the round before, whatever it had done since."""

    def __init__(self, start: float, target_kl: float | None, path: Path, writes: bool) -> None:
        """target_kl: nats a clip; None keeps the price as it is. writes: whether this process keeps the file."""
        self.start, self.target_kl, self.path, self.writes = start, target_kl, path, writes
        self.known: dict[str, float] = {}

    def of(self, number: int, kl: float) -> float:
        """The price of round `number`, before which a KL of `kl` nats a clip was measured. UserError where a resumed run had none."""
        if self.target_kl is None:
            return self.start
        if number and str(number - 1) not in self.known and self.path.is_file():
            self.known = read_json(self.path)
        if number and str(number - 1) not in self.known:
            got = f"--target-kl {self.target_kl:g} in round {number} of a run whose price did not move before"
            raise UserError(got, f"the price of round {number - 1} in {self.path}", "resume it without --target-kl")
        before = {str(n): self.known[str(n)] for n in range(number)}
        price = next_price(before[str(number - 1)], kl, self.target_kl, self.start) if number else self.start
        self.known = {**before, str(number): price}
        if self.writes:
            write_json(self.path, self.known)
        return price
