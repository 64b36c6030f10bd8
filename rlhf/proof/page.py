"""The proof's page: tables as text, plots as PNG, report.md that shows both. `tables` is what the benchmark prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from base_models.atomic import atomic_file
from base_models.checkpoint import write_json
from rlhf.proof.controls import MUST
from rlhf.proof.figures import COPIES, FIT
from rlhf.proof.plots import NAMES, TARGET, plot_controls, plot_curve, plot_main, plot_rewards, plot_trails

Row = dict[str, Any]
DIVERSE, LOWEST = 0.9, 0.75
"""What was to be reached beside TARGET: diversity as a share of the base's, and the lower end of the win rate's interval."""
FIT_NAMES = {"genre_real": "genre by real music"}
"""The other judge of genre is fitted on the base's clips."""
COPIED = {"nearest_rated": "copies rated", "nearest_training": "copies training"}
COPY_COLUMNS = ("copies rated", "rated beyond unseen", "copies training", "training beyond unseen")
"""Of each of COPIES the change against the base, and the change beyond that of unseen clips."""


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
    base's, or copies that are more than the base's, by more than the interval. Copies count where, if it is measured, they are more than
    those of unseen clips, too: an adapter whose clips are more alike comes nearer to any clip."""
    short = [] if row["win_rate"] >= TARGET else ["win rate"]
    short += [] if row["ci"][0] > LOWEST else ["interval"]
    short += ["diversity"] if (row["diversity_ratio"] or 0) < DIVERSE else []
    short += [FIT_NAMES.get(name, name) for name in FIT if row.get(f"{name}_change", 0) + row.get(f"{name}_half_ci", 0) < 0]
    return ", ".join(short + [COPIED[name] for name in COPIES if rises(row, name) and rises(row, f"{name}_beyond", unmeasured=True)])


def rises(row: Row, name: str, unmeasured: bool = False) -> bool:
    """Whether a change is above 0 by more than its interval; `unmeasured` where there is none."""
    return bool(row[f"{name}_change"] - row[f"{name}_half_ci"] > 0) if f"{name}_change" in row else unmeasured


def main_table(rows: Sequence[Row]) -> str:
    head = ("taste", "method", "seeds", "votes", "win rate", "95 % by prompt", "seeds from-to", "decided", "KL", "diversity",
            *(FIT_NAMES.get(name, name) for name in FIT), *COPY_COLUMNS, "missed")  # fmt: skip
    body = []
    for row in rows:
        body.append((
            row["taste"], NAMES[row["method"]], str(row["seeds"]), str(row["votes"]), number(row["win_rate"]),
            interval(row["ci"]), f"{row['lowest']:.3f}-{row['highest']:.3f}", str(row["decided"]), number(row["kl"], ".1f"),
            number(row["diversity_ratio"], ".2f"), *(change(row, name) for name in FIT),
            *(change(row, column) for name in COPIES for column in (name, f"{name}_beyond")), missed(row) or "nothing",
        ))  # fmt: skip
    return table(head, body)


def curve_table(rows: Sequence[Row]) -> str:
    head = ("taste", "method", "votes", "seeds", "win rate", "95 % by prompt", "seeds from-to", "decided", "gold gain", "KL", "diversity")
    return table(head, [
        (row["taste"], NAMES[row["method"]], str(row["votes"]), str(row["seeds"]), number(row["win_rate"]), interval(row["ci"]),
         f"{row['lowest']:.3f}-{row['highest']:.3f}", str(row["decided"]), number(row["gold_gain"], "+.2f"), number(row["kl"], ".1f"),
         number(row["diversity_ratio"], ".2f"))
        for row in rows
    ])  # fmt: skip


def control_table(rows: Sequence[Row]) -> str:
    head = ("control", "taste", "method", "runs", "must show", "win rate", "95 % judged", "by", "95 % by prompt", "runs from-to", "KL",
            "held", "note")  # fmt: skip
    verdict = {True: "yes", False: "NO", None: "not judged"}
    return table(head, [
        (row["control"], row["taste"], NAMES[row["method"]], str(row["runs"]), row["must"], number(row["win_rate"]), interval(row["ci"]),
         row["judged_by"], interval(row["prompt_ci"]), f"{row['lowest']:.3f}-{row['highest']:.3f}", number(row["kl"], ".1f"),
         verdict[row["held"]], row["why"] or "-")
        for row in rows
    ])  # fmt: skip


def beside(row: Row, name: str) -> tuple[str, str]:
    """A replication's copies beside the base's, and their gain beside that of copies of unseen clips."""
    base, unseen = row["copies"].get(name), row["beyond"].get(name)
    return (
        "-" if base is None else f"{base['value']:.3f} - {base['base']:.3f} = {base['change']:+.3f} {interval(base['ci'])}",
        "-" if unseen is None else f"{unseen['seen']:+.3f} - {unseen['unseen']:+.3f} = {unseen['change']:+.3f} {interval(unseen['ci'])}",
    )


def copies_more(row: Row, name: str) -> bool:
    """Whether a replication's copies are more than the base's and, where it is measured, more than those of unseen clips."""
    measured = [row[kind][name] for kind in ("copies", "beyond") if name in row[kind]]
    return name in row["copies"] and all(part["ci"][0] > 0 for part in measured)


def guard_table(rows: Sequence[Row]) -> str:
    """Diversity and memorisation of each replication beside the base's: what a high win rate must not be bought with."""
    head = ("experiment", "taste", "method", "seed", "votes", "diversity", *COPY_COLUMNS, "worse than the base")
    body = []
    for row in rows:
        worse = ["diversity"] if (row["diversity_ratio"] or 0) < DIVERSE else []
        worse += [COPIED[name] for name in COPIES if copies_more(row, name)]
        body.append((
            row["experiment"], row["taste"], NAMES[row["method"]], str(row["seed"]), str(row["votes"] or "-"),
            number(row["diversity_ratio"], ".2f"), *(cell for name in COPIES for cell in beside(row, name)),
            ", ".join(worse) or "nothing",
        ))  # fmt: skip
    return table(head, body)


def row_table(rows: Sequence[Row]) -> str:
    head = ("taste", "method", "seed", "votes", "win rate", "95 % by prompt", "decided", "gold gain", "foretold", "proxy gain", "KL",
            "diversity")  # fmt: skip
    body = [
        (
            row["taste"], NAMES[row["method"]], str(row["seed"]), "-" if row["votes"] is None else str(row["votes"]),
            number(row["win_rate"]), interval(row["ci"]), str(row["decided"]), number(row["gold_gain"], "+.2f"),
            number(row.get("gold_foretold"), "+.2f"), number(row.get("proxy_gain"), "+.2f"),
            number(row["kl"], ".1f"), number(row["diversity_ratio"], ".2f"),
        )
        for row in rows
    ]  # fmt: skip
    return table(head, body)


def reward_table(rows: Sequence[Row]) -> str:
    head = ("taste", "seed", "votes", "in rounds", "accuracy", "95 % by prompt", "ceiling", "(acc-.5)/(ceil-.5)", "ECE")
    ordered = sorted(rows, key=lambda row: (row["taste"], row["seed"], row["votes"], row["rounds"]))
    return table(head, [
        (row["taste"], str(row["seed"]), str(row["votes"]), str(row["rounds"]), number(row["accuracy"]), interval(row["ci"]),
         number(row["ceiling"]), number(row["of_ceiling"], ".2f"), number(row["ece"]))
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


# ---- page ------------------------------------------------------------------------------------------------------------

MAIN, CURVE, REWARDS, CONTROLS, OVER = "The main table", "How many votes", "The reward against its ceiling", "Controls", "Over-optimisation"
FAMILIAR = "The same adapters where genre and mood have met before"


def sections(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(title, what it says, table) of each part that has rows."""
    outcomes = [
        *figures["main_by_seed"],
        *figures["familiar_by_seed"],
        *figures["curve_by_seed"],
        *(row for rows in figures["controls_by_seed"].values() for row in rows),
    ]
    changes = "Changes are against the base, with half their interval."
    unseen = (
        "Beyond unseen: the same change, less that for as many clips which the adapter has not seen (rated clips of other seeds, clips of "
        "the corpus that no training had). Music that is more alike comes nearer to any clip, so copies are named only if this, where it "
        "is measured, exceeds its interval too."
    )
    judged = (
        "Whether each control shows what it must. One shuffle is one direction at random, which training follows: shuffled votes are "
        "judged by Student's t over draws, since an interval by prompt does not cover the draw."
    )
    foretold = (
        "Foretold: what the proxy's gain would be worth in gold, by how the two go together on the base's clips of one prompt. Gold that "
        "gains less was over-optimised."
    )
    copied = (
        "Diversity as a share of the base's; copies are clips that share more than half of their coarse codes with one rated or one "
        f"training clip, the base's taken off, with the interval by prompt. {unseen}"
    )
    found: list[tuple[str, str, Callable[..., str], Any]] = [
        (MAIN, f"All seeds' pairs together. {changes} {unseen}", main_table, figures["main"]),
        ("Seed by seed", foretold, row_table, figures["main_by_seed"]),
        (FAMILIAR, f"New prompts of pairs that training had too. {changes} {unseen}", main_table, figures["familiar"]),
        (f"{FAMILIAR}, seed by seed", "", row_table, figures["familiar_by_seed"]),
        (CURVE, "Subsets of one snapshot, the smaller within the larger; all seeds' pairs together.", curve_table, figures["curve"]),
        (CONTROLS, judged, control_table, figures["controls"]),
        *((f"Control by run: {name}", "", row_table, figures["controls_by_seed"].get(name)) for name in MUST),
        (REWARDS, "", reward_table, figures["rewards"]),
        *((f"{OVER}: {at}", "Gains are over the base, in units of each score.", over_table, arms)
          for at, arms in figures["over_optimisation"].items()),
        ("Diversity and memorisation", copied, guard_table, outcomes),
    ]  # fmt: skip
    return [(title, text, draw(rows)) for title, text, draw, rows in found if rows]


def write_page(out: Path, figures: dict[str, Any]) -> Path:
    """proof.json, plots and report.md. Returns the page's path."""
    write_json(out / "proof.json", figures)
    pictures = {}
    for title, rows, name, draw in (
        (MAIN, figures["main"], "main.png", plot_main),
        (CURVE, figures["curve"], "curve.png", plot_curve),
        (CONTROLS, figures["controls"], "controls.png", plot_controls),
        (REWARDS, figures["rewards"], "rewards.png", plot_rewards),
    ):
        if rows:
            pictures[title] = draw(rows, out / name)
    for at, arms in figures["trails"].items():
        name = "-".join(["trails", *at.replace(",", "").split()])
        pictures[f"{OVER}: {at}"] = plot_trails(arms, out / f"{name}.png")
    parts = ["# From votes to better music: the proof", ""]
    parts.append(
        f"{figures['results']} results are in; the last call asked for {figures['asked']}, of which {figures['missing']} are missing."
    )
    if figures["left_out"]:
        parts.append(f"Left out, since settings have changed: {figures['left_out']}.")
    parts.append("Listeners are simulated: hidden tastes over the sound, in a process that no trainer can read. They stand in for ears and")
    parts.append("say nothing of human taste. Figures: proof.json.")
    for title, text, body in sections(figures):
        parts += ["", f"## {title}", "", *([text, ""] if text else []), body]
        if title in pictures:
            parts += ["", f"![{title}]({pictures[title].name})"]
    with atomic_file(out / "report.md") as temporary:
        temporary.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return out / "report.md"
