"""Gold scores of sampled clips, for the report: the one place where the hidden taste is asked directly.

    python -m rlhf.simulation.judge --manifest base/manifest.jsonl --manifest ppo/manifest.jsonl --out gold.json [--taste drive]

Reads each clip's file beside its manifest and writes {"clips": [{system, prompt_id, prompt, split, seed, sha256, file,
gold}], "summary": {system: {n, mean, spread_within_prompt}}}. Nothing that trains reads this file."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.simulation import taste

KEPT = ("system", "prompt_id", "prompt", "split", "seed", "sha256", "file", "policy_sha256", "adapters")


def judge(manifests: list[Path], name: str = taste.DEFAULT) -> list[dict[str, Any]]:
    """One row a clip, in the order of the manifests, with its gold score by the named taste."""
    rows = []
    for manifest in manifests:
        for line in io.StringIO(manifest.read_text(encoding="utf-8")):
            if not line.strip():
                continue
            clip = json.loads(line)
            gold = taste.score_file(manifest.parent / clip["file"], name)
            rows.append({key: clip[key] for key in KEPT if key in clip} | {"gold": gold})
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per system: clips, mean gold score, and the root mean square of the spread among clips of one prompt."""
    systems: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        systems[str(row.get("system", "?"))][str(row.get("prompt_id"))].append(row["gold"])
    summary = {}
    for system, prompts in systems.items():
        several = [np.var(scores, ddof=1) for scores in prompts.values() if len(scores) > 1]
        everything = np.concatenate([np.asarray(scores) for scores in prompts.values()])
        summary[system] = {
            "n": len(everything),
            "mean": float(everything.mean()),
            "spread_within_prompt": float(np.sqrt(np.mean(several))) if several else 0.0,
        }
    return summary


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", required=True, action="append", type=Path, help="a samples' manifest.jsonl; repeatable")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--taste", choices=sorted(taste.TASTES), default=taste.DEFAULT, help="whose ears")
    args = parser.parse_args(argv)
    try:
        rows = judge(args.manifest, args.taste)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        print(f"got {error!r}; expected manifests beside their clips; remedy: check the paths", file=sys.stderr)
        return 2
    summary = summarise(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"clips": rows, "summary": summary}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, args.out)
    for system, figures in summary.items():
        print(f"{system}: {figures['n']} clips, gold {figures['mean']:+.2f}, spread in a prompt {figures['spread_within_prompt']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
