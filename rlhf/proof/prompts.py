"""Prompts of a seed range of their own: python -m rlhf.proof.prompts --n 240 --split train --seed 100 --name train --out FILE

    --avoid 8000 8001    leave out what the same split says under these seeds, so that prompts on which choices were made are none of these
    --unlike FILE FILE   leave out what these files say, so that no prompt that was trained on is one of these

No held-out prompt is a training prompt: the held-out split asks for genre and mood pairs that no training prompt has."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from base_models.checkpoint import read_jsonl
from base_models.corpus.captions import demo_prompts
from base_models.errors import UserError, ended
from rlhf.sample_pairs import write_prompts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--split", choices=("train", "heldout"), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--avoid", type=int, nargs="*", default=[])
    parser.add_argument("--unlike", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    taken = {row["prompt"] for seed in args.avoid for row in demo_prompts(args.n, args.split, seed=seed)}
    taken |= {row["prompt"] for file in args.unlike for row in read_jsonl(file)}
    fresh = [row for row in demo_prompts(2 * args.n if taken else args.n, args.split, seed=args.seed) if row["prompt"] not in taken]
    if len(fresh) < args.n:
        raise UserError(f"{len(fresh)} prompts that --avoid and --unlike leave over", f"{args.n}", "ask for fewer")
    rows = [{**row, "prompt_id": f"{args.name}-{i:04d}"} for i, row in enumerate(fresh[: args.n])]
    write_prompts(args.out, rows)
    print(f"{len(rows)} prompts in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
