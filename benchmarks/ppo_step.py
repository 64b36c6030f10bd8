"""A step of PPO: ours against TRL 1.12's, the same weights, frames, batch, epochs and minibatches, in one run.

    python benchmarks/ppo_step.py                          # 16 clips of 5 s: ours, TRL over the delay pattern, over a flat Llama, memory
    python benchmarks/ppo_step.py --precision bf16 --no-llama
    python benchmarks/ppo_step.py --growth --frames 125 250 750 --batch 8 16 32      # ours and the wrapper, step against size
    python benchmarks/ppo_step.py --no-trl                 # ours by both kinds of credit, and the policy alone
    python benchmarks/ppo_step.py --quick                  # ours alone, a few frames: does it still run

TRL 1.12 (the last with PPO) is installed into a folder beside the caches, not into this environment. Every side is a process of
its own (ppo_sides.py) and they take turns, step by step, so that a busy neighbour slows all of them; processor seconds are
robust to neighbours. The first step of each warms it up and is not counted; figures are medians of the others.

Peaks of memory are measured apart, each side alone for two steps, with an allocator that gives freed blocks back at once: otherwise what
it keeps for later, which differs from run to run, is as much as a reference and a critic need.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

SIDES = Path(__file__).with_name("ppo_sides.py")
TRL = "trl==1.12.0"
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""To glibc: blocks of 64 KiB and more are mapped one by one, and unmapped when they are freed. Slow."""
Step = dict[str, float]


def install_trl(folder: Path) -> Path:
    """TRL 1.12 alone; what it needs, torch among it, is found in the running environment."""
    if not (folder / "trl").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TRL], check=True)
    return folder


class Process:
    """A side, alive: `step` lets it do one and returns its figures."""

    def __init__(self, side: str, trl: Path | None, more: Mapping[str, str] | None = None, **settings: Any) -> None:
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": str(settings["threads"])} | dict(more or {})
        if side.startswith("trl"):
            environment["PYTHONPATH"] = str(trl)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        command = [sys.executable, str(SIDES), side, *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        self.side = side
        self.read()

    def read(self) -> Step:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.side} ended early:\n{self.log.read()[-3000:]}")
        figures: Step = json.loads(line)
        return figures

    def step(self) -> Step:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def compare(sides: dict[str, int], trl: Path | None, **settings: Any) -> dict[str, Step]:
    """Medians of each side's steps: one to warm up, then in turns, a side as many as `sides` says."""
    alive = {side: Process(side, trl, **settings) for side in sides}
    steps: dict[str, list[Step]] = {side: [] for side in sides}
    try:
        for process in alive.values():
            process.step()
        for number in range(max(sides.values())):
            for side, process in alive.items():
                if number < sides[side]:
                    steps[side].append(process.step())
    finally:
        for process in alive.values():
            process.close()
    return {side: {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]} for side, rows in steps.items()}


def peaks(sides: Iterable[str], trl: Path | None, **settings: Any) -> dict[str, float]:
    """Most megabytes that each side needs in two steps, its interpreter's among them; one side after the other."""
    found = {}
    for side in sides:
        process = Process(side, trl, GIVES_BACK, **settings)
        try:
            process.step()
            found[side] = process.step()["peak_mb"]
        finally:
            process.close()
    return found


def told(figures: dict[str, Step]) -> str:
    """A table with the ratio of each side to ours."""
    ours = figures["encore"]
    lines = [f"{'':14}{'seconds':>10}{'ratio':>8}{'cpu s':>10}{'ratio':>8}{'play s':>9}{'held MB':>9}{'peak MB':>9}"]
    for side, row in figures.items():
        times, cpu = row["seconds"] / ours["seconds"], row["cpu_seconds"] / ours["cpu_seconds"]
        line = f"{side:14}{row['seconds']:10.2f}{times:8.2f}{row['cpu_seconds']:10.2f}{cpu:8.2f}"
        lines.append(line + f"{row['play']:9.2f}{row['held_mb']:9.1f}{row['peak_mb']:9.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[125], help="codec frames of a clip, 25 a second")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="clips a step")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--critic", choices=("trained", "frozen"), default="trained", help="the trunk of TRL's value model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-llama", action="store_true")
    parser.add_argument("--no-trl", action="store_true", help="none of TRL's sides; it is not installed either")
    parser.add_argument("--growth", action="store_true", help="every --frames with every --batch, one counted step")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trl", type=Path, default=Path(tempfile.gettempdir()) / "encore-trl-1.12", help="where TRL 1.12 is or goes")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON, too")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("epochs", "minibatches", "precision", "critic", "threads")}
    if args.quick:
        args.frames, args.batch = [8], [4]
    args.no_trl |= args.quick
    trl = None if args.no_trl else install_trl(args.trl)
    rows = []
    for frames in args.frames:
        for batch in args.batch:
            sides = {"encore": args.rounds, "encore-codes": args.rounds, "policy-only": 1, "trl-delay": args.rounds}
            sides["trl-llama"] = min(args.rounds, 2)
            if args.growth or args.quick:
                sides = dict.fromkeys(sides, 1)
            if args.no_llama or args.growth:
                sides.pop("trl-llama")
            if args.no_trl:
                sides = {side: rounds for side, rounds in sides.items() if not side.startswith("trl")}
            figures = compare(sides, trl, frames=frames, batch=batch, **settings)
            for side, peak in peaks(sides, trl, frames=frames, batch=batch, **settings).items():
                figures[side]["peak_mb"] = peak
            rows.append({"frames": frames, "batch": batch, **settings, "sides": figures})
            print(f"\n{batch} clips of {frames} frames, {args.precision}, {args.threads} thread(s)\n{told(figures)}", flush=True)
            for side in ("encore", "encore-codes"):
                held, peak = (figures[side][name] / figures["policy-only"][name] for name in ("held_mb", "peak_mb"))
                print(f"memory of {side} against the policy alone: {held:.3f} of what is held, {peak:.3f} of the peak")
                rows[-1][f"memory_{side}"] = {"held": held, "peak": peak}
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
