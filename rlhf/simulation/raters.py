"""Simulated listeners: human noise and human habits around a taste.

    gold(left), gold(right), loudness -> bad? -> heard = left - right + side bias + loudness bias + logistic noise -> tie?
    -> a | b | tie | both_bad, and now and then aspects and a confidence

Two crews. `crew` is the demo's: attentive and half attentive ones, side bias, ties, one careless. `crowd` is what a
campaign in the open gets: two temperatures, ties, side and loudness bias, fatigue, a share of careless ones, an adversary
who answers the other way round, and, where wanted, clusters of taste. What a listener answers is a function of the seed,
of the listener, of the two clips and of how many votes came before in this sitting; never of the other listeners."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

CHOICES = ("a", "b", "tie", "both_bad")


@dataclass(frozen=True)
class Listener:
    """One rater's habits; all in units of the gold score. The defaults are a listener without any."""

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
    loudness_bias: float = 0.0
    """Added to the louder clip, a decibel."""
    adversary: bool = False
    """Says the opposite of what was heard."""
    fatigue: float = 0.0
    """Share by which the temperature has grown after 100 votes of a sitting."""
    sitting: int = 120
    """Votes of a sitting; then the listener comes back rested."""
    talkative: float = 0.0
    """Share of the votes that come with aspects, and half of those with a confidence; and how readily a bad stretch is marked."""
    tastes: Mapping[str, float] = field(default_factory=dict)
    """Taste -> weight of this listener's own mixture; empty: the campaign's taste alone."""


def crew(n: int = 12) -> list[Listener]:
    """The demo's `n` listeners; every second one is half attentive, biases lean both ways, the last of a crew of more than
    one is careless."""
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


def crowd(
    n: int = 16, careless: float = 0.15, adversaries: int = 1, clusters: Sequence[str] = (), own_share: float = 0.75
) -> list[Listener]:
    """`n` listeners as an open campaign gets them.

    Args: careless: share of those who do not listen, rounded to whole people. adversaries: how many answer the other way
        round. clusters: names of tastes; listener i's own is the i-th of them in turn, with `own_share` of the weight, and
        the others share the rest. The order is: listeners, adversaries, careless."""
    n_careless = round(careless * n)
    if n - n_careless - adversaries < 1:
        raise ValueError(f"{n} raters of whom {n_careless} are careless and {adversaries} adversaries: nobody listens")
    rng = np.random.default_rng(16)
    listeners = []
    for index in range(n):
        tastes = {}
        if clusters:
            others = [name for name in clusters if name != clusters[index % len(clusters)]]
            tastes = {clusters[index % len(clusters)]: own_share if others else 1.0}
            tastes |= {name: (1 - own_share) / len(others) for name in others}
        listeners.append(
            Listener(
                temperature=0.35 if index % 2 == 0 else 0.7,
                side_bias=float(rng.normal(0, 0.12)),
                tie_width=float(rng.uniform(0.1, 0.3)),
                bad_below=float(rng.normal(-2.5, 0.2)),
                loudness_bias=float(np.abs(rng.normal(0.06, 0.03))),
                fatigue=float(rng.uniform(0.0, 0.6)),
                sitting=int(rng.integers(60, 180)),
                talkative=float(rng.uniform(0.1, 0.4)),
                tastes=tastes,
                adversary=n - n_careless - adversaries <= index < n - n_careless,
                careless=index >= n - n_careless,
            )
        )
    return listeners


def stream(*parts: object) -> np.random.Generator:
    """Random numbers that belong to these words."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def temperature_after(listener: Listener, given: int) -> float:
    """The noise after `given` votes of the campaign: it grows within a sitting, and starts again with the next."""
    return listener.temperature * (1 + listener.fatigue * (given % listener.sitting) / 100)


def choose(listener: Listener, gold_a: float, gold_b: float, rng: np.random.Generator, louder_db: float = 0.0, given: int = 0) -> str:
    """The answer to a pair: a | b | tie | both_bad. a is the left clip.

    Args: louder_db: how much louder a is played than b. given: votes of this listener before this one."""
    if listener.careless:
        return str(rng.choice(CHOICES, p=[0.45, 0.4, 0.1, 0.05]))
    if max(gold_a, gold_b) < listener.bad_below:
        return "both_bad"
    # The noise of Bradley-Terry is logistic: a wins when the difference that is heard is positive.
    bias = listener.side_bias + listener.loudness_bias * louder_db
    heard = gold_a - gold_b + bias + rng.logistic(0.0, temperature_after(listener, given))
    if abs(heard) < listener.tie_width:
        return "tie"
    return "a" if (heard > 0) != listener.adversary else "b"


HALO = {"musicality": 0.9, "sound_quality": 0.5, "prompt_fit": 0.25}
"""How much of the difference that is liked colours each aspect; the rest is the aspect's own, which is noise here."""


def aspects(listener: Listener, gold_a: float, gold_b: float, asked: Sequence[str], rng: np.random.Generator) -> dict[str, int]:
    """What a talkative listener says of each aspect: -2 (a is much better) to 2 (b is much better); mostly nothing."""
    if rng.random() >= listener.talkative:
        return {}
    told = {}
    for name in asked:
        meant = 0.0 if listener.careless else HALO.get(name, 0.3) * (gold_b - gold_a) * (-1 if listener.adversary else 1)
        told[name] = int(np.clip(round(meant + rng.logistic(0, 0.35)), -2, 2))
    return told


def confidence(listener: Listener, gold_a: float, gold_b: float, rng: np.random.Generator) -> int | None:
    """1 guess, 2 fairly sure, 3 sure: by how clear the difference is; mostly not told."""
    if rng.random() >= listener.talkative / 2:
        return None
    clear = abs(gold_a - gold_b) + rng.normal(0, 0.3)
    return int(np.clip(1 + (clear > 0.6) + (clear > 1.5), 1, 3))


def marks_it(listener: Listener, gold: float, rng: np.random.Generator) -> bool:
    """Whether a listener takes the trouble to mark what is wrong in a clip: the likelier, the worse the clip is."""
    return not listener.careless and bool(rng.random() < listener.talkative * np.clip((-gold - 0.5) / 2, 0, 1))
