"""Near copies of clips that an adapter has seen, beside near copies of as many that it has not: copying, or a style?

    python -m rlhf.proof.unseen --played M --base M --own M --unseen M [M ...] --out DIR
    python -m rlhf.proof.unseen --played M --base M --tokens DIR --out DIR

    clips of an adapter and of the base, same prompts -> per clip: is a clip of a set nearer than HALF? -> clips.json, figures.json
        rated_seen      the rated clips of the adapter's own replication       rated_unseen      as many base clips of another one
        training_seen   clips of the corpus that the base was trained on       training_unseen   as many that no training had

An adapter whose clips are more alike, such as one of sustained sounds, comes nearer to any clip of the base. So more near copies than the
base has are no sign of copying by themselves: what was copied comes nearer to the clips that were seen, and not to the others
(rlhf.proof.figures.beyond). Nearest of more clips is nearer: the sets that are compared have equal numbers, and the larger is cut by a
seeded draw. Columns of several sets of one kind are means over them.

Unseen clips of the corpus are those of val and test_piece; those of val are other renderings of pieces that training had. test_combo is
left out: its clips have the combinations of genre and mood that held-out prompts ask for, and what follows the prompt is near them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base_models.checkpoint import read_jsonl, write_json
from base_models.corpus.tokens import load_tokens
from base_models.errors import UserError, ended
from base_models.evaluate_base import nearest_training_clip
from rlhf.evaluate_models import read_codes
from rlhf.proof.figures import HALF

BLOCKS = 5
"""Disjoint draws of training clips, each of as many as there are unseen ones, at most."""
UNSEEN_SPLITS = ("val", "test_piece")
Sets = list[torch.Tensor]
Rows = list[dict[str, Any]]


def drawn(codes: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """n of the clips [N, K, T] in random order; all of them, as they are, where n is N."""
    return codes if n == len(codes) else codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))[:n]]


def near_copies(codes: torch.Tensor, sets: Sets) -> np.ndarray:
    """For each clip of codes [G, K, T] the share of the sets (codes [N, K, T] each) that hold a clip nearer than HALF, [G]."""
    return np.mean([(nearest_training_clip(codes, known) > HALF).numpy() for known in sets], axis=0)


def rated_sets(own: Path, unseen: Sequence[Path], seed: int) -> tuple[Sets, Sets]:
    """(seen, unseen), pair by pair of equal number. Raises UserError where a clip that should be unseen is one of `own`."""
    own_rows = read_jsonl(own)
    own_codes = read_codes(own, own_rows)
    hashes = {row["sha256"] for row in own_rows}
    seen, others = [], []
    for manifest in unseen:
        rows = read_jsonl(manifest)
        if common := sum(row["sha256"] in hashes for row in rows):
            raise UserError(f"{manifest} with {common} clips of {own}", "clips that were not rated there", "name another seed's manifest")
        n = min(len(own_rows), len(rows))
        seen.append(drawn(own_codes, n, seed))
        others.append(drawn(read_codes(manifest, rows), n, seed))
    return seen, others


def corpus_sets(tokens: Path, seed: int) -> tuple[Sets, Sets]:
    """(blocks of training clips, the unseen clips as one set), all of one number. Raises UserError where a corpus lacks one of the two."""
    corpus = load_tokens(tokens)
    codes = torch.as_tensor(corpus.codes)
    train, unseen = codes[corpus.split("train")], codes[np.concatenate([corpus.split(name) for name in UNSEEN_SPLITS])]
    n = min(len(train), len(unseen))
    if not n:
        got = f"{tokens} with {len(train)} clips of train and {len(unseen)} of {' and '.join(UNSEEN_SPLITS)}"
        raise UserError(got, "both", "tokenise the base's corpus with all its splits")
    return list(drawn(train, n * min(BLOCKS, len(train) // n), seed).split(n)), [drawn(unseen, n, seed)]


def same_prompts(played: Path, base: Path) -> tuple[Rows, Rows]:
    """The rows of two manifests. Raises UserError unless clip by clip they have one name and one prompt."""
    own, other = read_jsonl(played), read_jsonl(base)
    clips, beside = ([(row["file"], row["prompt_id"]) for row in rows] for rows in (own, other))
    if clips != beside:
        at = next((f"{a} and {b}" for a, b in zip(clips, beside) if a != b), f"{len(clips)} and {len(beside)} clips")
        raise UserError(f"{played} and {base}, which differ: {at}", "the same clips of the same prompts", "let both play one prompts file")
    return own, other


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Writes clips.json and figures.json; returns the latter."""
    if bool(args.own) != bool(args.unseen) or not (args.unseen or args.tokens):
        raise UserError("not both of --own and --unseen, or nothing to compare", "--own with --unseen, --tokens, or all", "name them")
    rows, beside = same_prompts(args.played, args.base)
    sets: dict[str, Sets] = {}
    if args.unseen:
        sets["rated_seen"], sets["rated_unseen"] = rated_sets(args.own, args.unseen, args.seed)
    if args.tokens:
        sets["training_seen"], sets["training_unseen"] = corpus_sets(args.tokens, args.seed)
    played, base = read_codes(args.played, rows), read_codes(args.base, beside)
    columns: dict[str, np.ndarray] = {}
    for name, known in sets.items():
        columns[name], columns[f"{name}_base"] = near_copies(played, known), near_copies(base, known)
    figures: dict[str, Any] = {"clips": len(rows), "prompts": len({row["prompt_id"] for row in rows}), "seed": args.seed}
    figures["sets"] = {name: [len(known) for known in members] for name, members in sets.items()}
    figures |= {name: float(values.mean()) for name, values in columns.items()}
    told = {name: [round(float(value), 5) for value in values] for name, values in columns.items()}
    write_json(args.out / "clips.json", {"file": [row["file"] for row in rows], "prompt_id": [row["prompt_id"] for row in rows], **told})
    write_json(args.out / "figures.json", figures)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--played", type=Path, required=True, help="the manifest of the adapter's clips")
    parser.add_argument("--base", type=Path, required=True, help="the manifest of the base's clips of the same prompts")
    parser.add_argument("--own", type=Path, help="the manifest of the clips that were rated for the adapter")
    parser.add_argument("--unseen", type=Path, nargs="+", help="manifests of base clips that were rated for others, and not for it")
    parser.add_argument("--tokens", type=Path, help="the base's corpus, tokenised")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the draws that make numbers equal; default %(default)s")
    print(json.dumps(measure(parser.parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
