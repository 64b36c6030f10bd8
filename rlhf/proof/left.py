"""How long the cells that are left will take: by what finished cells of their kind took, or by their weights where none has finished.

finished cells under ROOT -> median seconds of each kind -> seconds of each cell that is left -> minutes, an estimate"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from base_models.checkpoint import read_json

if TYPE_CHECKING:  # run_all, beside Cell, asks here
    from rlhf.proof.cells import Cell

NAMED_BY_TWO = ("play", "base", "gold", "judged", "prompts")
"""Steps whose cost hangs on what they are done for."""

TRUST = 300.0
"""Seconds of work by which weights are believed: a few short cells on a busy machine say little of long ones."""


def kind_of(label: str) -> str:
    """What cells of one cost have in common: ppo/warm/s3/n2000 -> ppo, play/best_of_n/warm/s3 -> play/best_of_n,
    unseen/ppo/warm/s3/n2000/by-s4 -> unseen/by."""
    parts = label.split("/")
    if parts[0] == "unseen":  # by what it compares with, whose clips these are costs nothing
        return f"unseen/{parts[-1].partition('-')[0]}"
    return "/".join(parts[: 2 if parts[0] in NAMED_BY_TWO else 1])


def finished(root: Path) -> Iterator[tuple[str, float]]:
    """(label, seconds) of every finished cell under ROOT, whoever asked for it."""
    for folder, inner, files in os.walk(root):
        if "cell.json" in files:
            inner.clear()  # what a program has made is not looked through
            if "done.json" in files:
                yield read_json(Path(folder) / "cell.json")["label"], read_json(Path(folder) / "done.json")["seconds"]


def expected(cells: Sequence[Cell], root: Path) -> dict[str, float]:
    """Name -> seconds that each cell will take. Weights of kinds that nobody has measured are scaled as those that were."""
    times = defaultdict(list)
    for label, seconds in finished(root):
        times[kind_of(label)].append(seconds)
    measured = {kind: median(values) for kind, values in times.items()}
    known = [cell for cell in cells if kind_of(cell.label) in measured]
    taken = sum(measured[kind_of(cell.label)] for cell in known)
    scale = (taken + TRUST) / (sum(cell.weight for cell in known) + TRUST)
    return {cell.name: measured.get(kind_of(cell.label), cell.weight * scale) for cell in cells}


def seconds_left(left: Sequence[Cell], seconds: Mapping[str, float], jobs: int) -> float:
    """No less than all work shared by the jobs, and no less than the longest chain of cells that wait for each other.

    Args: left: cells that are not done, needed ones first."""
    until: dict[str, float] = {}
    for cell in left:
        until[cell.name] = seconds[cell.name] + max((until.get(need.name, 0.0) for need in cell.needs), default=0.0)
    return max(sum(seconds[cell.name] for cell in left) / jobs, max(until.values(), default=0.0))
