"""Which clips meet: the pairs of each prompt that sound least alike, as `encore sample --pairs-per-prompt` chooses them.

python -m rlhf.proof.pairs --policy DIR --manifest samples/manifest.jsonl --pairs-per-prompt 8 --out pairs.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from base_models.errors import ended
from base_models.policy import load_policy
from rlhf.apart import write_furthest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--pairs-per-prompt", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    print(f"{write_furthest(load_policy(args.policy), args.manifest, args.out, args.pairs_per_prompt)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
