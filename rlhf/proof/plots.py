"""The proof's plots: win rates, the curve of votes, over-optimisation, rewards against their ceiling. Each is one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from base_models.atomic import atomic_file
from rlhf.proof.plan import STRENGTH

Row = dict[str, Any]
COLOURS = {
    "ppo": "#d9480f",
    "ppo_strong": "#e8590c",
    "ppo_best": "#f59f00",
    "ppo_rounds": "#9f1239",
    "ppo_score": "#db2777",
    "dpo": "#2563eb",
    "dpo_strong": "#4f46e5",
    "dpo_best": "#0891b2",
    "dpo_rounds": "#1e3a8a",
    "dpo_rated": "#38bdf8",
    "best_of_n": "#15803d",
    "sft": "#7e22ce",
    "free": "#b91c1c",
    "stopped": "#a16207",
    "braked": "#0f766e",
}
NAMES = {
    "ppo": "PPO",
    "ppo_strong": f"PPO, at weight {STRENGTH:g}",
    "ppo_best": "PPO, best of several",
    "ppo_rounds": "PPO, votes in two rounds",
    "ppo_score": "PPO, by score",
    "dpo": "DPO",
    "dpo_strong": f"DPO, at weight {STRENGTH:g}",
    "dpo_best": "DPO, best of several",
    "dpo_rounds": "DPO, votes in two rounds",
    "dpo_rated": "DPO, on rated pairs",
    "best_of_n": "best of n",
    "sft": "SFT on winners",
    "free": "no KL price, no brake",
    "stopped": "the brake alone",
    "braked": "KL price and brake",
}
TARGET = 0.80
"""The win rate that was to be reached."""


def _axes(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (6.4, 3.8)) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    _dress(axes, title, xlabel, ylabel)
    return figure, axes


def _dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
    return path


def _error(row: Row) -> list[list[float]]:
    return [[row["win_rate"] - row["ci"][0]], [row["ci"][1] - row["win_rate"]]]


def _votes_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Votes on a logarithmic axis, with a tick for each number that was asked for and no other."""
    axes.set_xscale("log")
    ticks = sorted({row["votes"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def plot_main(rows: Sequence[Row], path: Path) -> Path:
    """Win rate of each taste and method with its interval; the range over seeds as a thin line."""
    figure, axes = _axes("Gold win rate against the base, held-out prompts", "share of decided pairs won", "", (7, 1.2 + 0.42 * len(rows)))
    for y, row in enumerate(reversed(rows)):
        colour = COLOURS[row["method"]]
        axes.plot([row["lowest"], row["highest"]], [y - 0.22] * 2, color=colour, linewidth=1, alpha=0.6)
        axes.errorbar(row["win_rate"], y, xerr=_error(row), fmt="o", color=colour, capsize=4, linewidth=2)
        axes.annotate(f"{row['win_rate']:.3f}", (row["win_rate"], y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(0.5, color="#334155", linestyle="--", linewidth=1)
    axes.axvline(TARGET, color="#15803d", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['taste']}: {NAMES[row['method']]}" for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    return _save(figure, path)


def plot_curve(rows: Sequence[Row], path: Path) -> Path:
    """Win rate against the number of votes, a line a method and a panel a taste."""
    tastes = sorted({row["taste"] for row in rows})
    methods = [name for name in COLOURS if any(row["method"] == name for row in rows)]
    figure, panels = plt.subplots(1, len(tastes), figsize=(1.6 + 4.8 * len(tastes), 3.8), layout="constrained", sharey=True, squeeze=False)
    for taste, axes in zip(tastes, panels[0]):
        _dress(axes, f"How many votes? ({taste})", "votes (log)", "gold win rate against the base" if taste == tastes[0] else "")
        for index, method in enumerate(methods):
            chosen = (row for row in rows if (row["taste"], row["method"]) == (taste, method))
            own = sorted(chosen, key=lambda row: row["votes"])
            if not own:
                continue
            x = [row["votes"] * 1.03 ** (index - len(methods) / 2) for row in own]  # a little apart, so that intervals can be read
            errors = [[e[0] for e in part] for part in zip(*(_error(row) for row in own))]
            told = {"marker": "o", "capsize": 3, "color": COLOURS[method], "label": NAMES[method]}
            axes.errorbar(x, [row["win_rate"] for row in own], yerr=errors, **told)
        _votes_axis(axes, rows)
        axes.axhline(0.5, color="#334155", linestyle="--", linewidth=1)
        axes.axhline(TARGET, color="#15803d", linestyle=":", linewidth=1)
    panels[0][0].legend(fontsize=8)
    return _save(figure, path)


def plot_controls(rows: Sequence[Row], path: Path) -> Path:
    """Win rate of each control with the interval that is judged; a control that did not hold is drawn open."""
    figure, axes = _axes("Controls", "share of decided pairs won (bar: the interval that is judged)", "", (7, 1.2 + 0.42 * len(rows)))
    for y, row in enumerate(reversed(rows)):
        colour, face = COLOURS[row["method"]], "white" if row["held"] is False else COLOURS[row["method"]]
        axes.plot([row["lowest"], row["highest"]], [y - 0.22] * 2, color=colour, linewidth=1, alpha=0.6)
        if row["ci"]:
            axes.plot(row["ci"], [y, y], color=colour, linewidth=2)
        axes.plot(row["win_rate"], y, "o", color=colour, markerfacecolor=face)
    axes.axvline(0.5, color="#334155", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['control']} ({row['taste']}): {NAMES[row['method']]}" for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    return _save(figure, path)


def plot_trails(trails: dict[str, list[Row]], path: Path) -> Path:
    """Gold (line) and proxy (dashes) gained over the base, against KL, an arm a colour; a star is what the run hands over."""
    figure, axes = _axes("A weak reward, followed far: what it says and what is liked", "KL to the base, nats a clip", "gain over the base")
    for arm, rows in trails.items():
        ordered = rows[:-1]  # the last is what the run hands over: one of the others, or the same as the last
        final = rows[-1]
        axes.plot([final["kl"]], [final["gold_gain"]], marker="*", markersize=13, color=COLOURS[arm])
        x = [row["kl"] for row in ordered]
        gold = [row["gold_gain"] for row in ordered]
        low, high = ([row["gold_gain_ci"][side] for row in ordered] for side in (0, 1))
        axes.plot(x, gold, marker="o", markersize=4, color=COLOURS[arm], label=f"gold: {NAMES[arm]}")
        axes.fill_between(x, low, high, color=COLOURS[arm], alpha=0.12)
        axes.plot(x, [row["proxy_gain"] for row in ordered], linestyle="--", color=COLOURS[arm], label=f"proxy: {NAMES[arm]}")
    axes.axhline(0, color="#334155", linewidth=1)
    axes.legend(fontsize=8)
    return _save(figure, path)


def plot_rewards(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy on unseen prompts against the number of votes, and the ceiling."""
    figure, axes = _axes("Reward model: votes foretold on unseen prompts", "votes (log)", "accuracy")
    colours = plt.get_cmap("tab10")
    seeds = sorted({row["seed"] for row in rows})
    for index, (taste, rounds) in enumerate(sorted({(row["taste"], row["rounds"]) for row in rows})):
        chosen = (row for row in rows if (row["taste"], row["rounds"]) == (taste, rounds) and row["accuracy"] is not None)
        own = sorted(chosen, key=lambda row: row["votes"])
        x = [row["votes"] * 1.02 ** (seeds.index(row["seed"]) - (len(seeds) - 1) / 2) for row in own]  # a little apart, to be read
        marker, name = ("D", f"{taste}, two rounds") if rounds == 2 else ("o", taste)
        axes.plot(x, [row["accuracy"] for row in own], marker, color=colours(index), label=name)
        for at, row in zip(x, own):
            axes.plot([at, at], row["ci"], color=colours(index), linewidth=1)
            if row["ceiling"]:
                axes.plot([at / 1.03, at * 1.03], [row["ceiling"]] * 2, color=colours(index), linewidth=2, alpha=0.5)
    _votes_axis(axes, rows)
    axes.axhline(0.5, color="#334155", linestyle="--", linewidth=1)
    axes.legend(fontsize=8, title="bars: the raters' ceiling")
    return _save(figure, path)
