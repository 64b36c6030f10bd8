"""The figures of the proof, from what the cells hold: win rates with intervals, proxy against gold, accuracy against the ceiling.

    gold.json, clips.json of the finished cells -> rows of tables -> proof.json

A pair is clip k of a prompt by the system against clip k of the same prompt by the base. Intervals resample prompts; rows over several
seeds pool their pairs (prompts of two seeds are never one cluster) and name the lowest and the highest seed beside."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from base_models.checkpoint import read_json
from rlhf.metrics import mean_ci, paired_outcomes, win_rate
from rlhf.proof.cells import Cell, result
from rlhf.proof.keep import FINAL
from rlhf.proof.plan import Outcome, Plan, RewardRow, Trail

FIT = ("similarity", "tempo", "genre")
Row = dict[str, Any]


@dataclass(frozen=True)
class Pairs:
    """A system's clips beside the base's, in one order: gold [N] each, prompt [N]."""

    gold: np.ndarray
    base: np.ndarray
    prompts: list[str]


def read_pairs(gold_file: Path, system: str) -> Pairs:
    """The pairs of one system, joined by file name: clip k of prompt i is 00000i_k.wav in every manifest of one prompts file."""
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    prompts = {}
    for clip in read_json(gold_file)["clips"]:
        scores[clip["system"]][clip["file"]] = clip["gold"]
        prompts[clip["file"]] = str(clip["prompt_id"])
    files = sorted(scores["base"])
    if sorted(scores[system]) != files:
        raise ValueError(f"{gold_file}: {system} and base on different prompts")
    return Pairs(np.array([scores[system][f] for f in files]), np.array([scores["base"][f] for f in files]), [prompts[f] for f in files])


def won(pairs: Pairs) -> Row:
    """Win rate of decided pairs with its interval by prompt; one half where the system plays just what the base plays."""
    outcomes = paired_outcomes(pairs.gold, pairs.base)
    gain = mean_ci(pairs.gold - pairs.base, pairs.prompts)
    told: Row = {"pairs": len(outcomes), "ties": int((outcomes == 0.5).sum()), "gold_gain": gain.value, "gold_gain_ci": list(gain.ci)}
    if (outcomes == 0.5).all():
        return {**told, "win_rate": 0.5, "ci": [0.5, 0.5], "decided": 0}
    rate = win_rate(outcomes, pairs.prompts)
    return {**told, "win_rate": rate.decided.value, "ci": list(rate.decided.ci), "decided": rate.decided.n}


def pooled(parts: Sequence[Pairs]) -> Pairs:
    """Pairs of several replications; their prompts are kept apart."""
    names = [f"{index}|{prompt}" for index, part in enumerate(parts) for prompt in part.prompts]
    return Pairs(np.concatenate([p.gold for p in parts]), np.concatenate([p.base for p in parts]), names)


def numbers(column: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in column], dtype=float)


def fit(cell: Path, base: Path) -> Row:
    """Prompt fit beside the base's, with the interval of the difference: not worse where it reaches 0."""
    own, other = read_json(cell / "clips.json"), read_json(base / "clips.json")
    told: Row = {}
    for name in FIT:
        if name in own and name in other:
            difference = numbers(own[name]) - numbers(other[name])
            there = np.isfinite(difference)
            if there.any():
                clusters = [prompt for prompt, use in zip(own["prompt_id"], there) if use]
                change = mean_ci(difference[there], clusters)
                value, before = float(numbers(own[name])[there].mean()), float(numbers(other[name])[there].mean())
                told[name] = {"value": value, "base": before, "change": change.value, "ci": list(change.ci), "n": len(clusters)}
    return told


def row_of(outcome: Outcome, root: Path) -> Row:
    """A row of a table, of one replication."""
    pairs = read_pairs(outcome.gold.folder(root) / "gold.json", outcome.method)
    played, base = result(outcome.play, root), result(outcome.base, root)
    told: Row = {"experiment": outcome.experiment, "method": outcome.method, "taste": outcome.taste, "seed": outcome.seed}
    told |= {"votes": outcome.votes, **won(pairs), "kl": played.get("kl"), "cell": outcome.play.name}
    told["diversity_ratio"] = played["diversity"] / base["diversity"] if "diversity" in played else None
    told["fit"] = fit(outcome.play.folder(root), outcome.base.folder(root))
    for name in ("nearest_rated_copied", "nearest_training_copied"):
        if name in played:
            told[name], told[f"{name}_base"] = played[name], base.get(name)
    if "proxy" in played:
        clips = read_json(outcome.play.folder(root) / "clips.json")
        proxy, beside = numbers(clips["proxy"]), numbers(clips["proxy_base"])
        told["proxy_gain"] = float(np.nanmean(proxy - beside))
        told["proxy_sees_gold"] = float(stats.spearmanr(proxy - beside, pairs.gold - pairs.base)[0]) if np.ptp(proxy - beside) else None
    return told


def tables(plan: Plan, root: Path) -> dict[str, list[Row]]:
    """experiment -> rows, of the outcomes that are finished."""
    found: dict[str, list[Row]] = defaultdict(list)
    for outcome in plan.outcomes:
        if outcome.gold.is_done(root):
            found[outcome.experiment].append(row_of(outcome, root))
    return dict(found)


def over_seeds(plan: Plan, root: Path, experiment: str) -> list[Row]:
    """One row a taste and method: all seeds' pairs together, and the range over seeds."""
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in plan.outcomes:
        if outcome.experiment == experiment and outcome.gold.is_done(root):
            groups[outcome.taste, outcome.method].append(outcome)
    rows = []
    for (taste, method), members in groups.items():
        each = [row_of(outcome, root) for outcome in members]
        pairs = pooled([read_pairs(outcome.gold.folder(root) / "gold.json", method) for outcome in members])
        rates = [row["win_rate"] for row in each]
        row: Row = {"taste": taste, "method": method, "seeds": len(members), "votes": members[0].votes, **won(pairs)}
        row |= {"lowest": min(rates), "highest": max(rates), "seed_sd": float(np.std(rates, ddof=1)) if len(rates) > 1 else None}
        for name in ("kl", "diversity_ratio", "proxy_gain", "nearest_rated_copied", "nearest_training_copied"):
            values = [r[name] for r in each if r.get(name) is not None]
            row[name] = float(np.mean(values)) if values else None
        for name in FIT:
            changes = [r["fit"][name] for r in each if name in r["fit"]]
            if changes:
                row[f"{name}_change"] = float(np.mean([c["change"] for c in changes]))
                half = [(c["ci"][1] - c["ci"][0]) / 2 for c in changes]
                row[f"{name}_half_ci"] = float(np.sqrt(np.sum(np.square(half))) / len(half))
        rows.append(row)
    return rows


def reward_row(entry: RewardRow, root: Path) -> Row:
    """What a reward model says of itself, beside the ceiling that its raters' disagreement sets."""
    told = read_json(entry.cell.folder(root) / "reward" / "figures.json")
    accuracy, ceiling = told.get("accuracy"), told.get("ceiling")
    row: Row = {
        "taste": entry.taste,
        "seed": entry.seed,
        "votes": entry.votes,
        "accuracy": accuracy,
        "ci": told.get("ci"),
        "ceiling": ceiling,
    }
    row |= {"ece": told.get("ece"), "baseline": told.get("baseline")}
    row["of_ceiling"] = (accuracy - 0.5) / (ceiling - 0.5) if accuracy and ceiling and ceiling > 0.5 else None
    return row


def trail_rows(trail: Trail, root: Path) -> list[Row]:
    """Checkpoint by checkpoint, then what the run hands over: KL, what the proxy gained, what gold gained, and how often it wins."""
    folder = trail.cell.folder(root)
    rows = []
    for step in (*sorted(folder.glob("step_*")), folder / FINAL):
        figures, clips = read_json(step / "figures.json"), read_json(step / "clips.json")
        gain = numbers(clips["proxy"]) - numbers(clips["proxy_base"])
        row: Row = {
            "arm": trail.arm,
            "taste": trail.taste,
            "seed": trail.seed,
            "votes": trail.votes,
            "step": step.name.removeprefix("step_").lstrip("0"),
        }
        rows.append(row | {"kl": figures["kl"], "proxy_gain": float(np.nanmean(gain)), **won(read_pairs(folder / "gold.json", step.name))})
    return rows


def lost_after_the_best(rows: Sequence[Row]) -> Row:
    """Over-optimisation of one arm: its best checkpoint by gold, what it hands over, and what was lost between while the proxy rose.

    The best of several noisy checkpoints is too good by luck; told beside is the loss from the middle of the run, which is not chosen."""
    gold, proxy = [row["gold_gain"] for row in rows], [row["proxy_gain"] for row in rows]
    best, middle = int(np.argmax(gold)), len(rows) // 2
    return {
        "best_step": rows[best]["step"],
        "best_gold": gold[best],
        "last_gold": gold[-1],
        "lost": gold[best] - gold[-1],
        "lost_since_the_middle": gold[middle] - gold[-1],
        "proxy_rose": proxy[-1] - proxy[best],
        "last_kl": rows[-1]["kl"],
        "last_win_rate": rows[-1]["win_rate"],
    }


def collect_figures(plan: Plan, root: Path) -> dict[str, Any]:
    """All of proof.json."""
    found = tables(plan, root)
    rewards = {entry.cell.name: entry for entry in plan.rewards if entry.cell.is_done(root)}
    trails = {trail.arm: trail_rows(trail, root) for trail in plan.trails if trail.cell.is_done(root)}
    cells: list[Cell] = plan.cells()
    return {
        "cells": len(cells),
        "cells_done": sum(cell.is_done(root) for cell in cells),
        "main": over_seeds(plan, root, "main"),
        "main_by_seed": found.get("main", []),
        "curve": found.get("curve", []),
        "controls": {name: found[name] for name in ("shuffled", "reversed", "constant", "gold") if name in found},
        "shuffled_together": over_seeds(plan, root, "shuffled"),
        "rewards": [reward_row(entry, root) for entry in rewards.values()],
        "trails": trails,
        "over_optimisation": {arm: lost_after_the_best(rows) for arm, rows in trails.items() if rows},
    }
