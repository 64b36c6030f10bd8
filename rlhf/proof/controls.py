"""What each control must show, and whether it has: training that has nothing to learn must teach nothing.

    shuffled   half of each prompt's pairs turned round: no taste is left, so over draws nothing is won
    listeners  the same without checks of the prompt: nothing at all is left to train on
    reversed   all votes turned round: it must lose
    constant   a reward that hears nothing: no drift
    gold       the taste itself as the reward: no worse than what votes reach

One shuffle is one direction at random, and training follows it: single draws win or lose, by prompt significantly. Only several draws
say that nothing is won on average, so what is judged there is the mean over draws with Student's t over draws; an interval by prompt
does not cover the draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import numpy as np
from scipy import stats

from rlhf.metrics import mean_ci, paired_outcomes
from rlhf.proof.figures import Row, Told, grouped, together

DRIFT = 5.0
"""Nats a clip that a constant reward may leave; training on votes moves the adapter by 40 to 100."""
MUST = {
    "shuffled": "interval over draws holds .5",
    "listeners": "interval over draws holds .5",
    "reversed": "interval below .5",
    "constant": f"interval holds .5, KL below {DRIFT:.0f}",
    "gold": "no worse than votes",
}


def over_draws(rates: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of independent draws; None for a single one, which says nothing of the others."""
    if len(rates) < 2:
        return None
    half = float(stats.t.ppf((1 + level) / 2, len(rates) - 1) * np.std(rates, ddof=1) / sqrt(len(rates)))
    middle = float(np.mean(rates))
    return middle - half, middle + half


def base_row(name: str, members: Sequence[Told]) -> Row:
    """What all controls tell. `prompt_ci` resamples prompts; `ci` is the interval that is judged."""
    row = together(members)
    kept = {key: row[key] for key in ("taste", "method", "win_rate", "kl", "lowest", "highest", "diversity_ratio", "decided")}
    return {
        "control": name,
        **kept,
        "runs": len(members),
        "prompt_ci": row["ci"],
        "ci": row["ci"],
        "judged_by": "prompt",
        "must": MUST[name],
    }


def holds(ci: Sequence[float], value: float = 0.5) -> bool:
    return ci[0] <= value <= ci[1]


def shuffled(name: str, members: Sequence[Told]) -> Row:
    """All draws of one method, of whatever taste and seed: each is a direction of its own. The mean is over draws too."""
    rates = [told.row["win_rate"] for told in members]
    ci = over_draws(rates)
    row = {**base_row(name, members), "win_rate": float(np.mean(rates)), "ci": ci and list(ci), "judged_by": "draw"}
    return {**row, "held": None if ci is None else holds(ci), "why": "one draw says nothing" if ci is None else ""}


def reversed_votes(members: Sequence[Told]) -> Row:
    row = base_row("reversed", members)
    return {**row, "held": row["ci"][1] < 0.5, "why": ""}


def constant(members: Sequence[Told]) -> Row:
    row = base_row("constant", members)
    short = [] if holds(row["ci"]) else ["win rate"]
    short += [] if row["kl"] is not None and row["kl"] < DRIFT else ["KL"]
    return {**row, "held": not short, "why": ", ".join(short)}


def gold(members: Sequence[Told], by_votes: Sequence[Told]) -> Row:
    """Beside the same method on votes, paired by clip: not worse where the difference's interval reaches 0. Of several runs of a method
    the last of `by_votes` counts."""
    row = base_row("gold", members)
    beside = {(told.row["taste"], told.row["seed"], told.row["method"]): told for told in by_votes}
    pairs = [(told, beside.get((told.row["taste"], told.row["seed"], told.row["method"]))) for told in members]
    differences, prompts = [], []
    for told, votes in pairs:
        if votes is not None:
            differences.append(wins(told) - wins(votes))
            prompts += [f"{told.row['taste']}|{told.row['seed']}|{prompt}" for prompt in told.pairs.prompts]
    if not differences:
        return {**row, "held": None, "why": "no row of votes to compare with"}
    more = mean_ci(np.concatenate(differences), prompts)
    told_more = f"{more.value:+.3f} [{more.ci[0]:+.3f}, {more.ci[1]:+.3f}] to votes"
    return {**row, "more_than_votes": more.value, "more_ci": list(more.ci), "held": more.ci[1] >= 0, "why": told_more}


def wins(told: Told) -> np.ndarray:
    return np.asarray(paired_outcomes(told.pairs.gold, told.pairs.base))


def judge_controls(found: Mapping[str, Sequence[Told]], by_votes: Sequence[Told]) -> list[Row]:
    """A row a control and method (and taste, but for shuffled votes, whose draws are pooled over tastes)."""
    rows = [shuffled(name, members) for name in ("shuffled", "listeners") for members in grouped(found.get(name, []), ("method",))]
    rows += [reversed_votes(members) for members in grouped(found.get("reversed", []), ("taste", "method"))]
    rows += [constant(members) for members in grouped(found.get("constant", []), ("taste", "method"))]
    return rows + [gold(members, by_votes) for members in grouped(found.get("gold", []), ("taste", "method"))]
