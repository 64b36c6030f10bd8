"""What a nat of drift costs from round to round, so that runs with rewards of different strength drift alike.

KL on held-out prompts after a round, the price of the round before -> price of the next one
"""

from __future__ import annotations

import math
from pathlib import Path

from rlhf.by_round import ByRound

MOST = 2.0
"""By what factor the price moves in a round, at most."""


def next_price(price: float, kl: float, target_kl: float, least: float) -> float:
    """price * sqrt(kl / target), at most doubled or halved, and never below `least`: what a run begins with is what drift costs at least.

    An adaptive price of KL (Ziegler et al. 2019, arXiv:1909.08593, section 2.2), in steps as large as rounds are; KL [nats a clip] is
    that of the codes that were played on many clips, and needs no smoothing. The root, because a reward that grows with the step from
    the base, against a KL that grows with its square, comes to rest where KL goes by the inverse square of the price: a price that moved
    by the ratio itself would answer each miss by as large a one to the other side.
    """
    return max(least, price * min(max(math.sqrt(max(kl, 0.0) / target_kl), 1 / MOST), MOST))


class Price:
    """The price of every round."""

    def __init__(self, start: float, target_kl: float | None, path: Path, writes: bool, ramp: int = 1) -> None:
        """target_kl: nats a clip; None keeps the price as it is. ramp: the round that first has the whole target, counted from 1. path,
        writes: as of rlhf.by_round.ByRound."""
        self.start, self.target_kl, self.ramp = start, target_kl, ramp
        self.known = ByRound[float](path, writes)

    def target(self, number: int) -> float | None:
        """What round `number` is steered to, nats a clip: the first `ramp` rounds rise to the target in equal steps."""
        return None if self.target_kl is None else self.target_kl * min(1.0, (number + 1) / self.ramp)

    def of(self, number: int, kl: float) -> float:
        """The price of round `number`, before which a KL of `kl` nats a clip was measured."""
        price, target = self.start, self.target(number)
        if number and target is not None:
            price = next_price(self.known.before(number), kl, target, self.start)
        self.known.put(number, price)
        return price
