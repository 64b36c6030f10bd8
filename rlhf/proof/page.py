"""The proof's page: tables as text, plots as PNG, report.md that shows both. `tables` is what the benchmark prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from base_models.atomic import atomic_file
from base_models.checkpoint import write_json
from rlhf.proof.figures import FIT

Row = dict[str, Any]
COLOURS = {"ppo": "#d9480f", "dpo": "#2563eb", "best_of_n": "#15803d", "sft": "#7e22ce", "free": "#b91c1c", "braked": "#0f766e"}
NAMES = {
    "ppo": "PPO",
    "dpo": "DPO",
    "best_of_n": "best of n",
    "sft": "SFT on winners",
    "free": "no KL price, no brake",
    "braked": "KL price and brake",
}
TARGET, LOWEST, DIVERSE = 0.80, 0.75, 0.9
"""What was to be reached: the win rate, the lower end of its interval, and diversity as a share of the base's."""


def number(value: Any, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def interval(ci: Sequence[float] | None) -> str:
    return "-" if ci is None else f"[{ci[0]:.3f}, {ci[1]:.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand under each other."""
    columns = [list(column) for column in zip(head, *rows)]
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in (head, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def change(row: Row, name: str) -> str:
    if f"{name}_change" not in row:
        return "-"
    return f"{row[f'{name}_change']:+.3f} +-{row[f'{name}_half_ci']:.3f}"


def missed(row: Row) -> str:
    """What a row of the main table falls short in, or "": win rate, interval, diversity, or a kind of prompt fit that is worse than the
    base's by more than its interval."""
    short = [] if row["win_rate"] >= TARGET else ["win rate"]
    short += [] if row["ci"][0] > LOWEST else ["interval"]
    short += ["diversity"] if (row["diversity_ratio"] or 0) < DIVERSE else []
    return ", ".join(short + [name for name in FIT if row.get(f"{name}_change", 0) + row.get(f"{name}_half_ci", 0) < 0])


def main_table(rows: Sequence[Row]) -> str:
    head = ("taste", "method", "seeds", "votes", "win rate", "95 % by prompt", "seeds from-to", "decided", "KL", "diversity", "similarity",
            "tempo", "genre", "copies rated", "copies training", "missed")  # fmt: skip
    body = []
    for row in rows:
        body.append((
            row["taste"], NAMES[row["method"]], str(row["seeds"]), str(row["votes"]), number(row["win_rate"]),
            interval(row["ci"]), f"{row['lowest']:.3f}-{row['highest']:.3f}", str(row["decided"]), number(row["kl"], ".1f"),
            number(row["diversity_ratio"], ".2f"), *(change(row, name) for name in FIT),
            number(row["nearest_rated_copied"]), number(row["nearest_training_copied"]), missed(row) or "nothing",
        ))  # fmt: skip
    return table(head, body)


def row_table(rows: Sequence[Row]) -> str:
    head = ("taste", "method", "seed", "votes", "win rate", "95 % by prompt", "decided", "gold gain", "proxy gain", "KL", "diversity")
    body = [
        (
            row["taste"], NAMES[row["method"]], str(row["seed"]), "-" if row["votes"] is None else str(row["votes"]),
            number(row["win_rate"]), interval(row["ci"]), str(row["decided"]), number(row["gold_gain"], "+.2f"),
            number(row.get("proxy_gain"), "+.2f"),
            number(row["kl"], ".1f"), number(row["diversity_ratio"], ".2f"),
        )
        for row in rows
    ]  # fmt: skip
    return table(head, body)


def reward_table(rows: Sequence[Row]) -> str:
    head = ("taste", "seed", "votes", "accuracy", "95 % by prompt", "ceiling", "(acc-.5)/(ceil-.5)", "ECE")
    ordered = sorted(rows, key=lambda row: (row["taste"], row["seed"], row["votes"]))
    return table(head, [
        (row["taste"], str(row["seed"]), str(row["votes"]), number(row["accuracy"]), interval(row["ci"]), number(row["ceiling"]),
         number(row["of_ceiling"], ".2f"), number(row["ece"]))
        for row in ordered
    ])  # fmt: skip


def over_table(arms: dict[str, Row]) -> str:
    head = (
        "arm",
        "best step",
        "gold there",
        "gold handed over",
        "lost",
        "lost since the middle",
        "proxy rose by",
        "last KL",
        "last win rate",
    )
    return table(head, [
        (NAMES[arm], str(r["best_step"]), number(r["best_gold"], "+.2f"), number(r["last_gold"], "+.2f"), number(r["lost"], ".2f"),
         number(r["lost_since_the_middle"], "+.2f"), number(r["proxy_rose"], "+.2f"), number(r["last_kl"], ".1f"),
         number(r["last_win_rate"]))
        for arm, r in arms.items()
    ])  # fmt: skip


# ---- plots -----------------------------------------------------------------------------------------------------------


def _axes(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (6.4, 3.8)) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
    return path


def _error(row: Row) -> list[list[float]]:
    return [[row["win_rate"] - row["ci"][0]], [row["ci"][1] - row["win_rate"]]]


def plot_main(rows: Sequence[Row], path: Path) -> Path:
    """Win rate of each taste and method with its interval; the range over seeds as a thin line."""
    figure, axes = _axes("Gold win rate against the base, held-out prompts", "share of decided pairs won", "", (7, 1.2 + 0.42 * len(rows)))
    for y, row in enumerate(reversed(rows)):
        colour = COLOURS[row["method"]]
        axes.plot([row["lowest"], row["highest"]], [y - 0.22] * 2, color=colour, linewidth=1, alpha=0.6)
        axes.errorbar(row["win_rate"], y, xerr=_error(row), fmt="o", color=colour, capsize=4, linewidth=2)
        axes.annotate(f"{row['win_rate']:.2f}", (row["win_rate"], y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(0.5, color="#334155", linestyle="--", linewidth=1)
    axes.axvline(TARGET, color="#15803d", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['taste']}: {NAMES[row['method']]}" for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    return _save(figure, path)


def plot_curve(rows: Sequence[Row], path: Path) -> Path:
    """Win rate against the number of votes, a line a method."""
    figure, axes = _axes("How many votes?", "votes (log)", "gold win rate against the base")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for index, method in enumerate(methods):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["votes"])
        x = [row["votes"] * 1.03 ** (index - len(methods) / 2) for row in own]  # a little apart, so that intervals can be read
        errors = [[e[0] for e in part] for part in zip(*(_error(row) for row in own))]
        axes.errorbar(x, [row["win_rate"] for row in own], yerr=errors, marker="o", capsize=3, color=COLOURS[method], label=NAMES[method])
    axes.set_xscale("log")
    ticks = sorted({row["votes"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.axhline(0.5, color="#334155", linestyle="--", linewidth=1)
    axes.legend(fontsize=8)
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
    for index, taste in enumerate(sorted({row["taste"] for row in rows})):
        own = sorted((row for row in rows if row["taste"] == taste and row["accuracy"] is not None), key=lambda row: row["votes"])
        x = [row["votes"] * 1.02 ** row["seed"] for row in own]
        axes.plot(x, [row["accuracy"] for row in own], "o", color=colours(index), label=taste)
        for at, row in zip(x, own):
            axes.plot([at, at], row["ci"], color=colours(index), linewidth=1)
            if row["ceiling"]:
                axes.plot([at / 1.03, at * 1.03], [row["ceiling"]] * 2, color=colours(index), linewidth=2, alpha=0.5)
    axes.set_xscale("log")
    axes.axhline(0.5, color="#334155", linestyle="--", linewidth=1)
    axes.legend(fontsize=8, title="bars: the raters' ceiling")
    return _save(figure, path)


# ---- page ------------------------------------------------------------------------------------------------------------


def sections(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(title, what it says, table) of each part that has rows."""
    found: list[tuple[str, str, str, Callable[..., str]]] = [
        (
            "The main table",
            "All seeds' pairs together; changes of prompt fit are against the base, with half their interval.",
            "main",
            main_table,
        ),
        ("Seed by seed", "", "main_by_seed", row_table),
        ("How many votes", "Subsets of one snapshot, the smaller within the larger.", "curve", row_table),
        ("The reward against its ceiling", "", "rewards", reward_table),
        ("Over-optimisation", "Gains are over the base, in units of each score.", "over_optimisation", over_table),
        ("Control: shuffled, all draws together", "", "shuffled_together", main_table),
    ]
    named = [(title, text, draw(figures[key]) if figures[key] else "") for title, text, key, draw in found]
    named += [(f"Control: {name}", text, row_table(figures["controls"].get(name) or [])) for name, text in CONTROLS.items()]
    return [part for part in named if part[2].count("\n") > 1]


CONTROLS = {
    "shuffled": "Half of each prompt's pairs turned round: the interval over the draws should hold one half.",
    "reversed": "All votes turned round: it must lose.",
    "constant": "A reward that hears nothing: KL near 0, win rate one half.",
    "gold": "The taste itself as reward, asked by a program of its own: the upper bound.",
}


def write_page(out: Path, figures: dict[str, Any]) -> Path:
    """proof.json, plots and report.md. Returns the page's path."""
    write_json(out / "proof.json", figures)
    pictures = {}
    if figures["main"]:
        pictures["The main table"] = plot_main(figures["main"], out / "main.png")
    if figures["curve"]:
        pictures["How many votes"] = plot_curve(figures["curve"], out / "curve.png")
    if figures["rewards"]:
        pictures["The reward against its ceiling"] = plot_rewards(figures["rewards"], out / "rewards.png")
    if any(figures["trails"].values()):
        pictures["Over-optimisation"] = plot_trails(figures["trails"], out / "trails.png")
    parts = ["# From votes to better music: the proof", ""]
    parts.append(
        f"{figures['cells_done']} of {figures['cells']} results are in. Listeners are simulated: hidden tastes over the sound, in a"
    )
    parts.append("process that no trainer can read. They stand in for ears and say nothing of human taste. Figures: proof.json.")
    for title, text, body in sections(figures):
        parts += ["", f"## {title}", "", *([text, ""] if text else []), body]
        if title in pictures:
            parts += ["", f"![{title}]({pictures[title].name})"]
    with atomic_file(out / "report.md") as temporary:
        temporary.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return out / "report.md"
