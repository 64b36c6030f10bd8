"""Whether a challenger replaces the champion: a stated rule on blind votes.

    clips of both on held-out prompts -> comparisons -> snapshot of their campaign -> outcomes from the challenger's side
                                      -> win rate, interval by prompt and rater -> promoted, or the champion stays

Promoted when the lower end of the 95 % interval lies above one half, on at least so many decided votes and prompts. In every other
case, and where nobody knows, the champion stays. How many votes are asked for is settled before the first is given, so that nobody
stops when the sum is pleasant. Raters see neither names nor which side is whose: the side is drawn anew for each rater and pair
(`db.choice`), and what a favourite side does to the figure can be seen from the win rates in both orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import norm
from scipy.stats import t as student_t

from base_models.checkpoint import read_jsonl
from base_models.errors import UserError
from rlhf.metrics import Estimate, crossed_bootstrap, decimals

MIN_PROMPTS = 6
"""Of two rivals that are alike, one wins every one of six prompts in 1 of 64 cases, of five in 1 of 32, which is more than .025."""


@dataclass(frozen=True)
class Outcome:
    """One blind vote, from the challenger's side: 1 won, 0 lost, .5 tie; first: whether it was side A."""

    won: float
    prompt: str
    rater: str
    first: bool = True


def rule(min_decided: int, min_prompts: int) -> str:
    """The rule in words, told before anybody votes."""
    return (
        "promoted when the lower end of the 95 % interval of its win rate over the champion, by prompt and rater, lies above .5, "
        f"on {min_decided} decided votes of {min_prompts} prompts or more; otherwise the champion stays"
    )


def comparisons(champion: Sequence[Mapping[str, Any]], challenger: Sequence[Mapping[str, Any]], n: int) -> list[dict[str, str]]:
    """Rows of two manifests -> the pairs {"a", "b"} (sha256) that are put to ears: the first `n` clips of each prompt, those of one seed.

    Where both play the very same there is nothing to hear, and no telling afterwards whose clip it was: such pairs are left out, so that
    of each pair `a` is a clip of the champion alone, and `b` of the challenger, among all clips of their prompt.
    """
    pairs = []
    for prompt in dict.fromkeys(row["prompt_id"] for row in champion):
        theirs, ours = ([row["sha256"] for row in rows if row["prompt_id"] == prompt] for rows in (champion, challenger))
        pairs += [{"a": a, "b": b} for a, b in zip(theirs[:n], ours[:n], strict=True) if a not in ours and b not in theirs]
    return pairs


def read_outcomes(snapshot: Path, challenger: str, clips: Set[tuple[str, str]] | None = None) -> list[Outcome]:
    """The usable votes of a campaign of two systems; "both bad" prefers neither and counts as a tie.

    Args: challenger: its name. clips: (prompt_id, sha256) of all that it played; without them sides are told by the systems' names, and a
        snapshot may call both by one: of a clip that was registered before, an older database kept the first name alone.
    Raises: UserError for a vote on a clip that the snapshot does not describe, or not of one clip of each system.
    """
    systems = {(row["prompt_id"], row["sha256"]): row.get("system") for row in read_jsonl(snapshot / "clips.jsonl")}
    found = []
    for row in read_jsonl(snapshot / "votes.jsonl"):
        if row.get("excluded_reason") or row.get("gold") or row.get("repeat"):
            continue
        of, ours = {}, []
        for side in ("x", "y"):
            clip = (row["prompt_id"], row[f"clip_{side}"])
            if clip not in systems:
                got = f"vote {row['vote_id']} on clip {clip[1][:12]}, which is not in clips.jsonl"
                raise UserError(got, "every clip", f"restore {snapshot}")
            of[side] = row.get(f"system_{side}", systems[clip])  # before schema 5 a snapshot named the systems of clips alone
            if of[side] == challenger if clips is None else clip in clips:
                ours.append(side)
        if len(ours) != 1:
            got = f"vote {row['vote_id']} on clips of {of['x']!r} and {of['y']!r}"
            if clips is not None:
                got = f"vote {row['vote_id']} on clips {row['clip_x'][:12]} and {row['clip_y'][:12]}"
            raise UserError(got, f"one of them of {challenger!r}", "compare clips of two systems")
        won = 1.0 if row["choice"] == ours[0] else 0.0 if row["choice"] in ("x", "y") else 0.5
        found.append(Outcome(won, str(row["prompt_id"]), str(row["rater"]), row["shown_first"] == ours[0]))
    return found


def decide(outcomes: Sequence[Outcome], min_decided: int, seed: int = 0, min_prompts: int = MIN_PROMPTS) -> tuple[bool, dict[str, Any]]:
    """(promoted?, figures): the lower end of the 95 % interval of the win rate, by prompt and rater, has to lie above one half.

    A bootstrap of few prompts is too narrow, and of a single one it has no width at all: the interval is widened as Student's t is
    against the normal distribution (Cameron and Miller 2015, "A practitioner's guide to cluster-robust inference", section VI), and
    decides nothing on fewer than `min_prompts`.

    Figures: win_rate, ci, decided, ties, why; first: in how many of the decided votes the challenger was side A; win_rate_first and
    win_rate_second: in each order, None where there was none.
    """
    decided = [o for o in outcomes if o.won != 0.5]
    figures: dict[str, Any] = {"win_rate": None, "ci": None, "decided": len(decided), "ties": len(outcomes) - len(decided)}
    for name, first in (("first", True), ("second", False)):
        shown = [o.won for o in decided if o.first is first]
        figures |= {name: len(shown), f"win_rate_{name}": sum(shown) / len(shown) if shown else None}
    if len(decided) < max(1, min_decided):
        return False, figures | {"why": f"{len(decided)} decided votes, fewer than {min_decided}"}
    won, prompts, raters = zip(*((o.won, o.prompt, o.rater) for o in decided))
    rate = crossed_bootstrap(won, prompts, raters, seed=seed)
    if rate.n_clusters < min_prompts:
        why = f"decided votes on {rate.n_clusters} prompt(s), fewer than {min_prompts}: others might be judged otherwise"
        return False, figures | {"win_rate": rate.value, "why": why}
    low, high = widened(rate)
    promoted = low > 0.5
    told = f"wins {rate.value:.3f} [{low:.{decimals(low, 0.5)}f}, {high:.3f}] of {len(decided)} decided votes"
    why = f"{told}, the interval {'lies above' if promoted else 'does not lie above'} .5"
    return promoted, figures | {"win_rate": rate.value, "ci": [low, high], "why": why}


def widened(rate: Estimate) -> tuple[float, float]:
    """The interval of a share for as few prompts as it rests on: its distances from the mean times t(n - 1) / t(infinity) and
    sqrt(n / (n - 1)), within 0 and 1."""
    n = rate.n_clusters
    factor = float(student_t.ppf(0.975, n - 1) / norm.ppf(0.975)) * math.sqrt(n / (n - 1))
    low, high = (rate.value + factor * (end - rate.value) for end in rate.ci)
    return max(0.0, low), min(1.0, high)
