"""Whether a challenger replaces the champion: a stated rule on blind votes.

    snapshot of a campaign of two systems -> outcomes from the challenger's side -> win rate, interval by prompt and rater

Promoted when the lower end of the 95 % interval lies above one half, on at least so many decided votes. In every other case, and where
nobody knows, the champion stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base_models.checkpoint import read_jsonl
from base_models.errors import UserError
from rlhf.metrics import crossed_bootstrap


@dataclass(frozen=True)
class Outcome:
    """One blind vote, from the challenger's side: 1 won, 0 lost, .5 tie."""

    won: float
    prompt: str
    rater: str


def read_outcomes(snapshot: Path, challenger: str) -> list[Outcome]:
    """The usable votes of a campaign of two systems; "both bad" prefers neither and counts as a tie."""
    systems = {row["sha256"]: row.get("system") for row in read_jsonl(snapshot / "clips.jsonl")}
    found = []
    for row in read_jsonl(snapshot / "votes.jsonl"):
        if row.get("excluded_reason") or row.get("gold") or row.get("repeat"):
            continue
        for side in (row["clip_x"], row["clip_y"]):
            if side not in systems:
                raise UserError(
                    f"vote {row['vote_id']} on clip {side[:12]}, which is not in clips.jsonl", "every clip", "restore {snapshot}"
                )
        ours = "x" if systems[row["clip_x"]] == challenger else "y"
        won = 1.0 if row["choice"] == ours else 0.0 if row["choice"] in ("x", "y") else 0.5
        found.append(Outcome(won, str(row["prompt_id"]), str(row["rater"])))
    return found


def decide(outcomes: Sequence[Outcome], min_decided: int, seed: int = 0) -> tuple[bool, dict[str, Any]]:
    """(promoted?, figures): the lower end of the 95 % interval of the win rate, by prompt and rater, has to lie above one half."""
    decided = [o for o in outcomes if o.won != 0.5]
    figures: dict[str, Any] = {"win_rate": None, "ci": None, "decided": len(decided), "ties": len(outcomes) - len(decided)}
    if len(decided) < max(1, min_decided):
        return False, figures | {"why": f"{len(decided)} decided votes, fewer than {min_decided}"}
    won, prompts, raters = zip(*((o.won, o.prompt, o.rater) for o in decided))
    rate = crossed_bootstrap(won, prompts, raters, seed=seed)
    low, high = rate.ci
    promoted = low > 0.5
    told = f"wins {rate.value:.3f} [{low:.3f}, {high:.3f}] of {len(decided)} decided votes"
    why = f"{told}, the interval {'lies above' if promoted else 'does not lie above'} .5"
    return promoted, figures | {"win_rate": rate.value, "ci": list(rate.ci), "why": why}
