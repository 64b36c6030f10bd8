"""Twelve simulated listeners: one taste, human noise.

    gold(left), gold(right) -> bad? -> P(left) = sigmoid((left - right + side bias) / temperature) -> tie? -> a | b |
    tie | both_bad

Ten listen, some closely (low temperature) and some half; a preference that is hardly there becomes a tie. They share a
level below which a clip is plainly bad; two bad ones are "both bad". One is careless and presses keys. What a listener
answers is a function of the seed, of the listener and of the two clips, not of the order in which the answers are asked
for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

CHOICES = ("a", "b", "tie", "both_bad")


@dataclass(frozen=True)
class Listener:
    """One rater's habits; all in units of the gold score."""

    temperature: float
    """Bradley-Terry noise: the difference that is heard right 73 times in 100."""
    side_bias: float = 0.0
    """Added to the left clip."""
    tie_width: float = 0.2
    """Differences smaller than this are hardly heard."""
    bad_below: float = -2.5
    """Both clips under this level: both bad."""
    careless: bool = False
    """Answers at random, whatever is played."""


def crew(n: int = 12) -> list[Listener]:
    """`n` listeners; every second one is half attentive, biases lean both ways, the last of a crew of more than one is
    careless."""
    rng = np.random.default_rng(12)
    listeners = [
        Listener(
            temperature=0.35 if index % 2 == 0 else 0.7,
            side_bias=float(rng.normal(0, 0.08)),
            tie_width=float(rng.uniform(0.1, 0.3)),
            bad_below=float(rng.normal(-2.5, 0.2)),
        )
        for index in range(n)
    ]
    if n > 1:
        listeners[-1] = Listener(temperature=1.0, careless=True)
    return listeners


def stream(*parts: object) -> np.random.Generator:
    """Random numbers that belong to these words."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def choose(listener: Listener, gold_a: float, gold_b: float, rng: np.random.Generator) -> str:
    """The answer to a pair: a | b | tie | both_bad. a is the left clip."""
    if listener.careless:
        return str(rng.choice(CHOICES, p=[0.45, 0.4, 0.1, 0.05]))
    if max(gold_a, gold_b) < listener.bad_below:
        return "both_bad"
    # The noise of Bradley-Terry is logistic: a wins when the difference that is heard is positive.
    heard = gold_a - gold_b + listener.side_bias + rng.logistic(0.0, listener.temperature)
    if abs(heard) < listener.tie_width:
        return "tie"
    return "a" if heard > 0 else "b"
