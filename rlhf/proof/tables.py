"""All tables of the proof from finished results: what goes to proof.json and on the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.proof.controls import MUST, judge_controls
from rlhf.proof.figures import Row, Told, grouped, lost_after_the_best, over_seeds, reward_row, tell, trail_rows
from rlhf.proof.plan import Plan


def collect_figures(plan: Plan, root: Path) -> dict[str, Any]:
    """All of proof.json but what the benchmark says of its own call. `plan` holds finished results alone, as the ledger gives them."""
    found: dict[str, list[Told]] = defaultdict(list)
    for outcome in plan.outcomes:
        found[outcome.experiment].append(tell(outcome, root))
    main, familiar, curve = (found.pop(experiment, []) for experiment in ("main", "familiar", "curve"))
    rewards = {entry.cell.name: entry for entry in plan.rewards}
    trails: dict[str, dict[str, list[Row]]] = defaultdict(dict)
    for trail in plan.trails:
        trails[f"{trail.taste}, seed {trail.seed}, {trail.votes} votes"][trail.arm] = trail_rows(trail, root)
    return {
        "main": over_seeds(main),
        "main_by_seed": in_order(main),
        "familiar": over_seeds(familiar),
        "familiar_by_seed": in_order(familiar),
        "curve": over_seeds(curve),
        "curve_by_seed": in_order(curve),
        "controls": judge_controls(found, sorted([*curve, *main], key=lambda told: told.row["votes"])),
        "controls_by_seed": {name: in_order(found[name]) for name in MUST if name in found},
        "rewards": [reward_row(entry, root) for entry in rewards.values()],
        "trails": dict(trails),
        "over_optimisation": {at: {arm: lost_after_the_best(rows) for arm, rows in arms.items()} for at, arms in trails.items()},
    }


def in_order(found: Sequence[Told]) -> list[Row]:
    return [told.row for group in grouped(found, ("seed", "taste", "method", "votes", "draw")) for told in group]
