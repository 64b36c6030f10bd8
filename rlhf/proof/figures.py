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
from rlhf.proof.cells import result
from rlhf.proof.keep import FINAL
from rlhf.proof.plan import METHODS, ROUNDS, Outcome, RewardRow, Trail

FIT = ("similarity", "tempo", "genre", "genre_real")
COPIES = ("nearest_rated", "nearest_training")
HALF = 0.5
"""A clip that has more than this share of its coarse codes in common with one known clip counts as a copy."""
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


def against_base(own: np.ndarray, base: np.ndarray, prompts: Sequence[str]) -> Row | None:
    """A measure of clips beside the base's clips of the same prompts, with the interval of the difference by prompt; None where no clip
    has one."""
    difference = own - base
    there = np.isfinite(difference)
    if not there.any():
        return None
    change = mean_ci(difference[there], [prompt for prompt, use in zip(prompts, there) if use])
    means = {"value": float(own[there].mean()), "base": float(base[there].mean())}
    return {**means, "change": change.value, "ci": list(change.ci), "n": change.n}


def fit(cell: Path, base: Path) -> dict[str, Row]:
    """Prompt fit, by what is not trained on: not worse than the base's where the interval reaches 0."""
    own, other = read_json(cell / "clips.json"), read_json(base / "clips.json")
    both = [name for name in FIT if name in own and name in other]
    told = {name: against_base(numbers(own[name]), numbers(other[name]), own["prompt_id"]) for name in both}
    return {name: row for name, row in told.items() if row}


def copies(cell: Path, base: Path) -> dict[str, Row]:
    """The share of clips that have more than half of their coarse codes in common with one known clip, beside the base's."""
    own, other = read_json(cell / "clips.json"), read_json(base / "clips.json")
    both = [name for name in COPIES if name in own and name in other]
    told = {name: against_base(1.0 * (numbers(own[name]) > HALF), 1.0 * (numbers(other[name]) > HALF), own["prompt_id"]) for name in both}
    return {name: row for name, row in told.items() if row}


def beyond(cells: Sequence[Path]) -> dict[str, Row]:
    """What near copies of seen clips gain over the base, less what those of as many unseen clips gain (rlhf.proof.unseen): copying, where
    the other may be a style. cells: of one adapter's clips; several sets of unseen clips are averaged. The interval is by prompt."""
    read = [read_json(cell / "clips.json") for cell in cells]
    told: dict[str, Row] = {}
    for name in COPIES:
        kind = name.removeprefix("nearest_")
        sets = [clips for clips in read if f"{kind}_seen" in clips]
        if not sets:
            continue
        gains = [
            np.mean([numbers(clips[f"{kind}_{side}"]) - numbers(clips[f"{kind}_{side}_base"]) for clips in sets], axis=0)
            for side in ("seen", "unseen")
        ]
        more = mean_ci(gains[0] - gains[1], sets[0]["prompt_id"])
        means = {"seen": float(gains[0].mean()), "unseen": float(gains[1].mean())}
        told[name] = {**means, "change": more.value, "ci": list(more.ci), "n": more.n, "sets": len(sets)}
    return told


def slope_within(gold: np.ndarray, proxy: np.ndarray, prompts: Sequence[str]) -> float | None:
    """Gold that a unit of the proxy is worth among clips of one prompt (least squares around each prompt's means); None where the proxy
    never differs there. On the base's clips it tells what a gain of the proxy should bring, as long as nothing is over-optimised."""
    _, group = np.unique(np.asarray(prompts), return_inverse=True)
    there = np.isfinite(gold) & np.isfinite(proxy)
    gold, proxy, group = gold[there], proxy[there], group[there]
    count = np.maximum(np.bincount(group), 1)
    varied = 1e-12 * float(proxy @ proxy)
    gold, proxy = (x - (np.bincount(group, x) / count)[group] for x in (gold, proxy))
    return float(gold @ proxy / (proxy @ proxy)) if proxy @ proxy > varied else None


@dataclass(frozen=True)
class Told:
    """One replication: its row of a table, and the pairs behind it."""

    row: Row
    pairs: Pairs


def tell(outcome: Outcome, root: Path) -> Told:
    pairs = read_pairs(outcome.gold.folder(root) / "gold.json", outcome.method)
    played, base = result(outcome.play, root), result(outcome.base, root)
    row: Row = {name: getattr(outcome, name) for name in ("experiment", "method", "taste", "seed", "votes", "draw", "settings")}
    row |= {**won(pairs), "kl": played.get("kl"), "cell": outcome.play.name}
    row["diversity_ratio"] = played["diversity"] / base["diversity"] if "diversity" in played else None
    folders = outcome.play.folder(root), outcome.base.folder(root)
    row |= {"fit": fit(*folders), "copies": copies(*folders)}
    row["beyond"] = beyond([cell.folder(root) for cell in outcome.unseen if cell.is_done(root)])
    if "proxy" in played:
        clips = read_json(outcome.play.folder(root) / "clips.json")
        proxy, beside = numbers(clips["proxy"]), numbers(clips["proxy_base"])
        row["proxy_gain"] = float(np.nanmean(proxy - beside))
        slope = slope_within(pairs.base, beside, pairs.prompts)
        row["gold_foretold"] = None if slope is None else slope * row["proxy_gain"]
        row["proxy_sees_gold"] = float(stats.spearmanr(proxy - beside, pairs.gold - pairs.base)[0]) if np.ptp(proxy - beside) else None
    return Told(row, pairs)


def grouped(found: Sequence[Told], names: Sequence[str]) -> list[list[Told]]:
    """Those that agree in `names`, together; groups in the order of tastes, methods as METHODS has them, votes."""
    groups: dict[tuple[Any, ...], list[Told]] = defaultdict(list)
    for told in found:
        groups[tuple(told.row[name] for name in names)].append(told)

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(METHODS.index(k) if name == "method" else k or 0 for name, k in zip(names, key))

    return [groups[key] for key in sorted(groups, key=place)]


def over_seeds(found: Sequence[Told], names: Sequence[str] = ("taste", "method", "votes")) -> list[Row]:
    """One row a taste, method and number of votes: all seeds' (and draws') pairs together, and the range over them."""
    return [together(members) for members in grouped(found, names)]


def together(members: Sequence[Told]) -> Row:
    """Several replications as one row. Its interval resamples prompts; it does not cover what differs from one replication to another."""
    each = [told.row for told in members]
    rates = [row["win_rate"] for row in each]
    row: Row = {"taste": ", ".join(dict.fromkeys(r["taste"] for r in each)), "method": each[0]["method"], "votes": each[0]["votes"]}
    row |= {"seeds": len(members), **won(pooled([told.pairs for told in members])), "lowest": min(rates), "highest": max(rates)}
    row["seed_sd"] = float(np.std(rates, ddof=1)) if len(rates) > 1 else None
    for name in ("kl", "diversity_ratio", "proxy_gain", "gold_foretold"):
        values = [r[name] for r in each if r.get(name) is not None]
        row[name] = float(np.mean(values)) if values else None
    for kind, name in [("fit", name) for name in FIT] + [("copies", name) for name in COPIES]:
        changes = [r[kind][name] for r in each if name in r[kind]]
        if changes:
            row |= {f"{name}{end}": float(np.mean([c[key] for c in changes])) for end, key in (("", "value"), ("_base", "base"))}
            row |= mean_change(name, changes)
    for name in COPIES:
        changes = [r["beyond"][name] for r in each if name in r["beyond"]]
        if len(changes) == len(each):  # a few of the replications do not speak for the others
            row |= mean_change(f"{name}_beyond", changes)
            row |= {f"{name}_beyond_{side}": float(np.mean([c[side] for c in changes])) for side in ("seen", "unseen")}
    return row


def mean_change(name: str, changes: Sequence[Row]) -> Row:
    """The mean of several replications' changes, with half its interval."""
    half = [(c["ci"][1] - c["ci"][0]) / 2 for c in changes]
    mean = float(np.mean([c["change"] for c in changes]))
    return {f"{name}_change": mean, f"{name}_half_ci": float(np.sqrt(np.sum(np.square(half))) / len(half))}


def reward_row(entry: RewardRow, root: Path) -> Row:
    """What a reward model says of itself, beside the ceiling that its raters' disagreement sets."""
    told = read_json(entry.cell.folder(root) / "reward" / "figures.json")
    accuracy, ceiling = told.get("accuracy"), told.get("ceiling")
    row: Row = {
        "taste": entry.taste,
        "seed": entry.seed,
        "votes": entry.votes,
        "rounds": 2 if entry.method == ROUNDS else 1,
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
