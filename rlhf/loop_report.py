"""What a loop has done, readable by a person: who was champion when, by which votes, how far it has moved, and what it waits for.

encore loop status --out runs/loop        # the same is in report.md once a call has ended

stamps of the stages + champion.json -> one line a round -> lines of Markdown
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base_models.atomic import atomic_file
from base_models.errors import UserError
from base_models.settings import from_mapping
from rlhf.collecting import Collecting, counted
from rlhf.loop import CHALLENGER, Loop, LoopConfig, Round, why_refused
from rlhf.loop_places import kept_settings
from rlhf.stages import stamp, stamp_path
from rlhf.verdict import rule

HEADS = ("round", "champion before", "votes", "reward", "gates", "KL", "diversity", "A/B votes", "win rate", "as A / as B", "verdict")
NOTES = (
    "- votes: those that the challenger was trained on. reward: agreement with unseen votes, 95 % interval, and the best that can be had.",
    "- KL: nats a clip from the base. diversity: where the base's is 1; below .9 it repeats itself. Both on held-out clips.",
    "- A/B votes: decided + ties, by so many raters. win rate: of the decided, 95 % interval by prompt and rater; then as side A and as B.",
)


def write_report(out: Path) -> list[str]:
    """Write report.md beside the rounds; returns its lines."""
    lines = status(out)
    with atomic_file(out / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def status(out: Path) -> list[str]:
    """What the loop has done and waits for, in lines. UserError for a folder without a loop, or where the votes' database is not there."""
    if not (out / "loop.json").is_file():
        raise UserError(f"{out} without loop.json", "the folder of a loop", "check --out")
    cfg = from_mapping(LoopConfig, kept_settings(out))
    loop = Loop(cfg, Collecting())
    rounds = [loop.round(int(folder.name)) for folder in sorted((out / "rounds").glob("[0-9][0-9]"))]
    lines = [f"# Loop in {out}", ""]
    lines += [
        f"{cfg.method}, {len(loop.prompts)} prompts to learn from, {len(loop.heldout)} held out. "
        f"A challenger is {rule(cfg.min_decided, cfg.min_prompts)}."
    ]
    if (out / "champion.json").is_file():
        champion = loop.champion()
        since = f"round {champion['round']}, {champion['votes'].get('at', 'undated')}" if champion["votes"] else "the start"
        lines += ["", f"Champion: {loop.adapter_of(champion) or 'the base'}, since {since}."]
    if rounds:
        lines += ["", *table(HEADS, [_cells(made) for made in rounds]), "", *NOTES]
    for made in rounds:
        lines += _now(made)
    return lines


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width, which Markdown reads as a table."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    rule_off = ["-" * width for width in widths]
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in (heads, rule_off, *rows)]


def _cells(made: Round) -> list[str]:
    """One round's line; what is not known yet is a dash."""

    def told(stage: str) -> Mapping[str, Any]:
        return stamp(made.folder, stage) if stamp_path(made.folder, stage).is_file() else {}

    snapshot, verdict, refused = told("snapshot"), told("verdict"), made.refused() or {}
    reward = told("reward") or (refused if "gates" in refused else {})
    moved = told("ab_samples").get(CHALLENGER, {})
    asked = [gate["passed"] for gate in reward.get("gates", ()) if gate["passed"] is not None]
    before = _name(verdict.get("champion_sha256") if verdict else told("samples").get("adapter_sha256"))
    return [
        f"{made.number}",
        before if told("samples") else "-",
        f"{snapshot['n_votes']}" if snapshot else "-",
        f"{reward['accuracy']:.2f} {_interval(reward['ci'])} of {_figure(reward['ceiling'])}" if reward else "-",
        f"{sum(asked)} of {len(asked)}" if reward else "-",
        f"{moved['kl']:.1f} {_interval(moved['kl_ci'], 1)}" if moved else "-",
        f"{moved['diversity_ratio']:.2f}" if moved else "-",
        f"{verdict['decided']}+{verdict['ties']} by {verdict.get('n_raters', 0)}" if verdict else "-",
        f"{verdict['win_rate']:.3f} {_interval(verdict['ci'], 3)}" if verdict and verdict["ci"] else "-",
        f"{_figure(verdict.get('win_rate_first'))} / {_figure(verdict.get('win_rate_second'))}" if verdict else "-",
        ("PROMOTED" if verdict["promoted"] else "champion stays") if verdict else "-",
    ]


def _name(sha256: str | None) -> str:
    return "the base" if sha256 is None else sha256[:8]


def _interval(ci: Sequence[float], digits: int = 2) -> str:
    return f"[{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]"


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def _now(made: Round) -> list[str]:
    """Why a round ended as it did, or where it is and what it waits for."""
    stages = made.stages()
    done = [stage.name for stage in stages if stamp_path(made.folder, stage.name).is_file()]
    if "verdict" in done:
        told = stamp(made.folder, "verdict")
        return ["", f"Round {made.number}: {'promoted' if told['promoted'] else 'the champion stays'}: {told['why']}."]
    now = next(stage for stage in stages if stage.name not in done)
    lines = ["", f"Round {made.number}: {len(done)} of {len(stages)} stages done; now: {now.what}."]
    if (refused := made.refused()) is not None:
        why = why_refused(refused, "its")
        if made.refused_again:
            lines.append(f"{why[0].upper()}{why[1:]}. To go on, {made.after_refusal}.")
        else:
            by = f"--{refused['stage']}-args={shlex.quote(refused['args'])}"
            lines.append(f"Before, by {by} {why}. Giving these again ends the round without a challenger.")
    if now.name in ("votes", "ab_votes"):
        made.loop.check_database()
        votes, wanted = counted(made.loop.db, made.cfg.campaign if now.name == "votes" else made.ab)
        lines.append(f"{votes} of {wanted} votes are there.")
    return lines
