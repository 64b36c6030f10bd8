"""Which clips of a prompt should meet: those that sound least alike. A vote on two clips that hardly differ teaches a reward little.

    manifest.jsonl -> codes [N, K, T] -> what a reward hears [N, F] -> the pairs of each prompt that lie furthest apart -> pairs.jsonl

Distances are of features in their spreads among clips of one prompt (rlhf.reward_heads.Lens), each feature alike. No vote is used, so
that the choice leans to no listener. What it brings: docs/reward-model.md, "Would other pairs teach more?"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from base_models.checkpoint import read_jsonl
from base_models.errors import UserError
from base_models.policy import Policy
from rlhf.evaluate_models import read_codes
from rlhf.reward_features import DESCRIPTORS, DETAILS, FIT, Table, blocks_of, features
from rlhf.reward_heads import Head, joined, make_lens
from rlhf.sample_pairs import write_prompts

NAMED = (DESCRIPTORS, DETAILS, FIT)
"""Blocks by which clips are told apart, of those that the base gives; all that it gives where it gives none of the first two."""


def furthest(points: Tensor, prompt: Sequence[str], a_prompt: int) -> list[tuple[int, int]]:
    """points [N, F], prompt [N] -> rows of the `a_prompt` pairs of each prompt that lie furthest apart, the furthest first; all pairs
    of a prompt that has no more. Prompts in the order in which they are met first."""
    of_prompt: dict[str, list[int]] = {}
    for row, name in enumerate(prompt):
        of_prompt.setdefault(name, []).append(row)
    chosen: list[tuple[int, int]] = []
    for rows in of_prompt.values():
        apart = torch.cdist(points[rows], points[rows])
        pairs = sorted(combinations(range(len(rows)), 2), key=lambda pair: -float(apart[pair]))
        chosen += [(rows[i], rows[j]) for i, j in pairs[:a_prompt]]
    return chosen


def heard_apart(policy: Policy, codes: Tensor, texts: Sequence[str], prompt: Sequence[str], batch_size: int = 32) -> Tensor:
    """codes [N, K, T] of clips that answer `texts`, grouped by `prompt` -> points [N, F] whose distances tell how unlike they sound."""
    known = blocks_of(policy)
    blocks = tuple(block for block in NAMED if block in known) if DESCRIPTORS in known else known
    return in_spreads(hear(policy, codes, texts, blocks, batch_size), prompt)


def hear(policy: Policy, codes: Tensor, texts: Sequence[str], blocks: Sequence[str], batch_size: int = 32) -> dict[str, Tensor]:
    """codes [N, K, T] of clips that answer `texts` -> blocks of features [N, F], a batch at a time."""
    starts = range(0, len(codes), batch_size)
    parts = [features(policy, codes[at : at + batch_size], texts[at : at + batch_size], blocks) for at in starts]
    return {block: torch.cat([part[block] for part in parts]) for block in blocks}


def in_spreads(table: Table, prompt: Sequence[str]) -> Tensor:
    """Blocks of features [N, F] -> points [N, F]: each feature in its spread among clips of one prompt, all alike."""
    blocks = tuple(table)
    number = {name: index for index, name in enumerate(dict.fromkeys(prompt))}
    lens = make_lens(Head("linear", blocks, 1.0), table, torch.tensor([number[name] for name in prompt]))
    return replace(lens, share=torch.full_like(lens.share, len(lens.share) ** -0.5)).standard(joined(table, blocks))


def write_furthest(policy: Policy, manifest: Path, out: Path, a_prompt: int) -> int:
    """Write the pairs of a manifest's clips that a campaign is to ask about: JSON lines {"a", "b"} of SHA-256, as
    `python -m feedback_app.campaigns --pairs` reads them. Returns: how many. Raises: UserError where there is nothing to choose."""
    if a_prompt < 1:
        raise UserError(f"{a_prompt} pairs a prompt", "1 or more", "raise it, or leave it out for all pairs")
    rows = read_jsonl(manifest)
    prompt = [str(row["prompt_id"]) for row in rows]
    if len(set(prompt)) == len(prompt):
        raise UserError(f"{manifest}: one clip a prompt", "two or more, which can meet", "sample with -n 2 or more")
    points = heard_apart(policy, read_codes(manifest, rows), [str(row["prompt"]) for row in rows], prompt)
    chosen = [(rows[i]["sha256"], rows[j]["sha256"]) for i, j in furthest(points, prompt, a_prompt)]
    pairs = [{"a": a, "b": b} for a, b in chosen if a != b]  # clips that are the very same have nothing to be asked about
    write_prompts(out, pairs)
    return len(pairs)
