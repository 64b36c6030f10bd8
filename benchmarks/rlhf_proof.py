"""Do votes make the model better, for listeners who like different things? The long proof, cell by cell.

    python benchmarks/rlhf_proof.py --jobs 2                                # main table: 3 tastes x 3 seeds x {PPO, DPO}
    python benchmarks/rlhf_proof.py --jobs 2 --methods ppo,ppo_best         # PPO, and the best of four clips of its adapter
    python benchmarks/rlhf_proof.py --jobs 2 --methods ppo_strong           # its adapter at weight 1.2
    python benchmarks/rlhf_proof.py --jobs 2 --methods ppo_rounds,dpo_rounds    # half of the votes on clips of an adapter of the first half
    python benchmarks/rlhf_proof.py --jobs 2 --methods dpo_rated,ppo_score  # DPO on the rated pairs; PPO by a score a clip, with a critic
    python benchmarks/rlhf_proof.py --jobs 2 --experiments familiar         # the main table's adapters on pairs that training had
    python benchmarks/rlhf_proof.py --jobs 2 --tastes drive --seeds 0 --methods ppo
    python benchmarks/rlhf_proof.py --jobs 2 --experiments curve --votes 50,200,500,1000,2000,3000 --methods ppo,dpo,best_of_n,sft
    python benchmarks/rlhf_proof.py --jobs 2 --experiments over_optimisation,controls
    python benchmarks/rlhf_proof.py --tuning --tastes warm --seeds 0 --methods ppo      # choose settings here, and nowhere else
    python benchmarks/rlhf_proof.py --small --out runs/proof-small          # the whole graph in minutes; its figures mean nothing

    prompts -> clips of the base -> votes through the rating app's HTTP -> snapshot -> reward -> PPO | DPO | best of n | SFT
    -> held-out prompts -> the taste judges, in a process of its own -> OUT/final/report.md, plots, proof.json

Experiments, tastes and seeds may be asked for in one call or in many: what is finished is written down in OUT/final/ledger.json, and the
report shows all that stands there (results of settings that were changed since are left out, and counted). It may be killed at any
moment and called again: finished cells are kept, a begun training run goes on from its checkpoint. Settings are part of a cell's name:
change a constant below and only what hangs on it is done again. The code and where it lies are not: after a change of a training script
take another --out.
--report-only tells what is there, --list what is left and an estimate of its minutes. Every program has one thread; --jobs runs so many
side by side."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
from itertools import product

from base_models.errors import ended
from base_models.policy import PRETRAINED
from rlhf.proof.builder import Builder
from rlhf.proof.cells import Cell, closure, run_all
from rlhf.proof.ledger import remember
from rlhf.proof.left import expected, seconds_left
from rlhf.proof.page import sections, write_page
from rlhf.proof.plan import CONTROLLED, METHODS, SMALL, Arguments, Plan, Sizes
from rlhf.proof.tables import collect_figures

TASTES = ("warm", "drive", "space")
SEEDS = (43, 44, 45)
"""Of the main table. Settings were compared on the votes and training prompts of 0 to 8, on 10, and, for drift and the unit of weights, on
12, 13, 15 and 16; 9, 11, 14 and 17 to 27 were looked at before the last of them, 28 to 42 have been since, and settings of now were
compared on 34 and 35. A table of other settings takes other seeds."""
EXPERIMENTS = ("main", "familiar", "curve", "over_optimisation", "controls")

# ---- what each training script is given: tuned with --tuning, on prompts that the figures do not use ----------------------
REWARD: tuple[str, ...] = ()


def flags(**settings: str | float) -> tuple[str, ...]:
    """kl_budget=150 -> --kl-budget 150"""
    return tuple(part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value)))


PPO = (
    *flags(steps=40, samples_per_prompt=2, lr=1.5e-3, kl_coef=0.005, kl_coef_least=0.0025, target_kl=65, kl_horizon=120),
    *flags(kl_power=1, average=0.9, look_every=5, heldout_clips=2),
    *flags(kl_budget=150, weights="human=1,similarity=0.4,tempo=0.15,genre=0.8,diversity=0.3", base_looks=4),
    *flags(hold="similarity,tempo,genre,diversity", hold_rate=0.5, hold_slack=1),
)
# The last word counts. A number a clip says less than a slope: larger rounds at half the rate, and what a prompt's other clips scored taken
# off, since 480 prompts are met two or three times each. The controller counts clips: four times as many move the price as far a round.
PPO_SCORE = (*PPO, *flags(credit="score", batch_size=128, lr=7e-4, samples_per_prompt=4, baseline="loo", kl_horizon=480))
DPO = (
    *flags(pairing="expected", edit_price=0.2, rated_share=0, beta=0.03, kl_weight=3e-4, target_kl=65, kl_ramp=6, kl_power=2, lr=1e-3),
    *flags(rounds=10, round_prompts=100, round_clips=2, round_epochs=2, batch_size=40, held_out_clips=96, base_looks=4),
    *flags(kl_budget=150, weights="human=1,similarity=0.3,tempo=0.15,genre=0.6,diversity=0.4"),
    *flags(hold="similarity,tempo,genre,diversity", hold_rate=0.5, hold_slack=1),
)
DPO_RATED = flags(beta=0.1, sft_weight=0, kl_weight=0, lr=2e-4, batch_size=8, epochs=3)  # what train_dpo.py --snapshot does by itself
SFT: tuple[str, ...] = ()
TRAINED_ON = {"ppo": "reward", "ppo_score": "reward", "dpo": "reward", "dpo_rated": "votes", "sft": "votes"}
CREW = ("--crew", "crowd", "--careless", "0.15", "--adversaries", "1")
# A weak reward (few votes, one member, no caution), followed far; and the same votes with caution, a price and a brake.
WEAK_REWARD = ("--members", "1", "--lam", "0")
FREE = ("--steps", "60", "--lr", "1.5e-3", "--kl-coef", "0", "--brake", "off", "--save-every", "10")
BRAKED = ("--steps", "60", "--lr", "1.5e-3", "--kl-coef", "0.005", "--brake", "rewind", "--save-every", "10")
STOPPED = ("--steps", "60", "--lr", "1.5e-3", "--kl-coef", "0", "--brake", "rewind", "--look-every", "2", "--save-every", "2")
VOTES = (50, 200, 500, 1000, 2000, 3000)
# ---- the same for --small --------------------------------------------------------------------------------------------------
SMALL_ARGUMENTS = Arguments(
    ppo=flags(steps=2, batch_size=8, lr=1e-2, weights="human=1,similarity=0.2", hold="similarity"),
    ppo_score=flags(steps=2, batch_size=8, lr=1e-2, credit="score", samples_per_prompt=4, baseline="loo"),
    dpo=("--rounds", "2", "--round-prompts", "4", "--round-clips", "2", "--held-out-clips", "4", "--lr", "1e-2"),
    dpo_rated=flags(steps=4, lr=1e-2, kl_clips=4),
    sft=("--steps", "4", "--lr", "1e-2", "--kl-clips", "4"),
    weak_reward=WEAK_REWARD,
    free=("--steps", "4", "--batch-size", "8", "--lr", "1e-2", "--kl-coef", "0", "--brake", "off", "--save-every", "2"),
    braked=("--steps", "4", "--batch-size", "8", "--lr", "1e-2", "--save-every", "2"),
    stopped=("--steps", "4", "--batch-size", "8", "--lr", "1e-2", "--kl-coef", "0", "--look-every", "1", "--save-every", "2"),
    crew=CREW,
    trained_on=TRAINED_ON,
)
FULL_ARGUMENTS = Arguments(REWARD, WEAK_REWARD, PPO, PPO_SCORE, DPO, DPO_RATED, SFT, FREE, BRAKED, STOPPED, CREW, TRAINED_ON)


def build(args: argparse.Namespace) -> Plan:
    """The graph that the flags ask for."""
    sizes, arguments = (SMALL, SMALL_ARGUMENTS) if args.small else (Sizes(), FULL_ARGUMENTS)
    if args.votes_main:
        sizes = dataclasses.replace(sizes, votes=args.votes_main)
    if args.shuffles:
        sizes = dataclasses.replace(sizes, shuffles=args.shuffles)
    builder = Builder(sizes, arguments, args.policy, args.tuning, args.tokens)
    plan = Plan()
    tastes, seeds = args.tastes or [TASTES[0]], args.seeds or [SEEDS[0]]  # of all but the main table and familiar
    for experiment in args.experiments:
        if experiment == "main":
            builder.main_table(plan, args.tastes or TASTES, args.seeds or SEEDS, args.methods)
        elif experiment == "familiar":
            builder.familiar(plan, args.tastes or TASTES, args.seeds or SEEDS, args.methods)
        elif experiment == "curve":
            votes = (20, 40, 60) if args.small else args.votes
            for taste, seed in product(tastes, seeds):
                builder.curve(plan, taste, seed, args.methods, votes)
        elif experiment == "over_optimisation":
            for taste, seed in product(tastes, seeds):
                builder.over_optimisation(plan, taste, seed)
        else:
            for taste, seed in product(tastes, seeds):
                builder.controls(plan, args.controls, taste, seed, args.methods)
    return plan


def list_cells(cells: list[Cell], root: Path, jobs: int) -> None:
    """What is done, and what each of the others will take: an estimate, by finished cells of its kind or else by its weight."""
    seconds = expected(cells, root)
    left = [cell for cell in cells if not cell.is_done(root)]
    for cell in cells:
        print(f"{'done      ' if cell.is_done(root) else f'{seconds[cell.name] / 60:5.1f} min '} {cell.name}")
    work = sum(seconds[cell.name] for cell in left) / 60
    wall = seconds_left(left, seconds, jobs) / 60
    print(f"{len(cells) - len(left)} of {len(cells)} done; left: an estimated {work:.0f} min of work, {wall:.0f} min with --jobs {jobs}")


def words(allowed: tuple[str, ...]):  # type: ignore[no-untyped-def]
    def read(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; known are {', '.join(allowed)}")
        return chosen

    return read


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--policy", type=Path, default=PRETRAINED)
    parser.add_argument("--experiments", type=words(EXPERIMENTS), default=["main"], help=",".join(EXPERIMENTS))
    parser.add_argument("--tastes", type=words(TASTES), help="main table and familiar: all; other experiments: warm")
    parser.add_argument("--seeds", type=integers, help=f"main table and familiar: {','.join(map(str, SEEDS))}; others: {SEEDS[0]}")
    parser.add_argument("--methods", type=words(METHODS), default=["ppo", "dpo"])
    parser.add_argument("--votes", type=integers, default=list(VOTES), help="points of the curve")
    parser.add_argument("--votes-main", type=int, help="votes of the main table and of the controls (default 2000)")
    parser.add_argument("--controls", type=words(tuple(CONTROLLED)), default=list(CONTROLLED))
    parser.add_argument("--shuffles", type=int, help="draws of shuffled votes a taste and seed (default 3)")
    parser.add_argument("--tuning", action="store_true", help="prompts and seeds that exist for choosing settings")
    parser.add_argument("--tokens", type=Path, help="the base's corpus, tokenised: measures the nearest training clip too")
    parser.add_argument("--jobs", type=int, default=1, help="programs side by side")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--list", action="store_true", help="say what would be done")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    out = args.out / ("tuning" if args.tuning else "final")
    root = args.out / "cells"
    plan = build(args)
    if args.list:
        list_cells(closure(plan.cells()), root, args.jobs)
        return 0
    failed = {} if args.report_only else run_all(plan.cells(), root, args.jobs)
    found = remember(plan, root, out)
    results = len(found.plan.outcomes) + len(found.plan.trails) + len(found.plan.rewards)
    asked = plan.results()
    counts = {"results": results, "asked": len(asked), "missing": sum(not cell.is_done(root) for cell in asked)}
    figures = {**collect_figures(found.plan, root), **counts, "left_out": found.left_out, "failed": failed}
    page = write_page(out, figures)
    for title, text, body in sections(figures):
        print(f"\n{title}. {text}\n{body}")
    print(f"\nreport: {page}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason[:200]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(ended(main))
