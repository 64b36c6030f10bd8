"""A run's trail: each kept checkpoint plays the held-out prompts, and the taste judges all of them: proxy and gold against KL.

    python -m rlhf.proof.trail --kept DIR --taste warm --out DIR -- <arguments of rlhf.proof.play but --system, --adapter and --out>

DIR/step_XXXXXXXX/ and DIR/final/ are what `play` writes, DIR/gold.json what the judge says of all and of the base."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from base_models.errors import ended
from rlhf.proof import play
from rlhf.proof.keep import FINAL

TOP = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="the cell in which the base played the same prompts")
    parser.add_argument("--taste", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv[:cut])
    adapters = [*sorted(args.kept.glob("step_*")), args.kept / FINAL]
    manifests = [args.base / "samples" / "manifest.jsonl"]
    for adapter in adapters:
        here = args.out / adapter.name
        if not (here / "figures.json").is_file():
            named = ["--system", adapter.name, "--adapter", str(adapter), "--out", str(here), "--beside", str(args.base)]
            play.main([*named, *argv[cut + 1 :]])
        manifests.append(here / "samples" / "manifest.jsonl")
    judge = [sys.executable, "-m", "rlhf.simulation.judge", *(part for path in manifests for part in ("--manifest", str(path)))]
    subprocess.run([*judge, "--taste", args.taste, "--out", str(args.out / "gold.json")], cwd=TOP, check=True)
    print(json.dumps({"adapters": len(adapters)}))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
