"""What has been found so far, whichever call found it: a call adds its finished results, and the report shows those of all calls.

    OUT/ledger.json {outcomes, trails, rewards: [{taste, seed, ..., settings, names of cells}]}, oldest first

A result that is found again takes the place of the old one. Results of one method in one experiment are shown together only where they
have one setting, the one that was reported last: a table whose rows were trained differently would compare nothing."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from base_models.checkpoint import read_json, write_json
from rlhf.proof.cells import Earlier, Kept
from rlhf.proof.plan import Outcome, Plan, RewardRow, Trail

KINDS: dict[str, Any] = {"outcomes": Outcome, "trails": Trail, "rewards": RewardRow}
JUDGED = {"outcomes": "gold", "trails": "cell", "rewards": "cell"}
"""Which cell is the last of a result."""
CELLS = ("play", "base", "gold", "cell")
MEASURED = "unseen"
"""Cells beside these: a result is told without them, and has more of them the more seeds a call names."""
Entry = dict[str, Any]


def entry_of(item: Outcome | Trail | RewardRow) -> Entry:
    """A result as JSON: its cells by their names."""
    values = {field.name: getattr(item, field.name) for field in fields(item)}
    return {name: value.name if isinstance(value, Kept) else named(value) for name, value in values.items()}


def named(value: Any) -> Any:
    """Cells of a tuple by their names; anything else as it is."""
    return [cell.name for cell in value] if isinstance(value, tuple) else value


def identity(entry: Entry) -> tuple[str, ...]:
    """What makes two entries answers to one question: all but the cells, and but what is not said."""
    told = {name: value for name, value in entry.items() if name not in (*CELLS, MEASURED) and value is not None}
    return tuple(f"{name}={value}" for name, value in sorted(told.items()))


def table_of(entry: Entry) -> tuple[str, ...]:
    """The experiment and method, or the arm, whose results stand under each other."""
    return tuple(str(entry.get(name)) for name in ("experiment", "method", "arm"))


def merged(old: Sequence[Entry], new: Sequence[Entry]) -> list[Entry]:
    """The old ones, and the new ones last, each once. What an earlier call has measured on the same clips stays: a call that names fewer
    seeds takes nothing away."""
    found = {identity(entry): entry for entry in old}
    for entry in new:
        before = found.pop(identity(entry), {})
        found[identity(entry)] = with_earlier(entry, before)
    return list(found.values())


def with_earlier(entry: Entry, before: Entry) -> Entry:
    """The entry, with the measures of `before` that it lacks, if the two are of the same clips."""
    if MEASURED not in entry or any(before.get(name) != entry[name] for name in ("play", "base")):
        return entry
    names = (*before.get(MEASURED, ()), *entry[MEASURED])
    return {**entry, MEASURED: list({name.rpartition("-")[0]: name for name in names}.values())}  # one a label, the newest


def read_back(name: str, value: Any) -> Any:
    """A field of an entry as a result has it."""
    if name == MEASURED:
        return tuple(Earlier(cell) for cell in value)
    return Earlier(value) if name in CELLS else value


def of_one_setting(entries: Sequence[Entry]) -> list[Entry]:
    """Those that share their table's newest settings."""
    newest = {table_of(entry): entry["settings"] for entry in entries}
    return [entry for entry in entries if newest[table_of(entry)] == entry["settings"]]


@dataclass(frozen=True)
class Found:
    """All results that can be told together."""

    plan: Plan
    left_out: int
    """Results of settings that were replaced since."""


def remember(plan: Plan, root: Path, out: Path) -> Found:
    """Add what is finished of `plan` to OUT/ledger.json; returns the results of all calls whose cells are still there."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "ledger.json"
    with open(out / "ledger.lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = read_json(path) if path.is_file() else {}
        ledger = {}
        for kind, judged in JUDGED.items():
            finished = [entry_of(item) for item in getattr(plan, kind) if getattr(item, judged).is_done(root)]
            ledger[kind] = merged(before.get(kind, []), finished)
        write_json(path, ledger)
    found, left_out = Plan(), 0
    for kind, made in KINDS.items():
        shown = [entry for entry in ledger[kind] if Earlier(entry[JUDGED[kind]]).is_done(root)]
        kept = sorted(of_one_setting(shown), key=lambda entry: (entry["taste"], entry["seed"], entry["votes"] or 0))
        left_out += len(shown) - len(kept)
        getattr(found, kind).extend(made(**{name: read_back(name, value) for name, value in entry.items()}) for entry in kept)
    return Found(found, left_out)
