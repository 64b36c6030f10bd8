"""What a reward learns from pairs at random, and from those whose clips sound least alike (rlhf.apart), at the same number of votes.

    encore sample --prompts some.jsonl   -n 8 --out runs/asked          # asked about; several manifests of the same prompts are pooled
    encore sample --prompts others.jsonl -n 4 --out runs/judged         # other prompts and another seed
    python benchmarks/pairs_apart.py --asked runs/asked/manifest.jsonl --judged runs/judged/manifest.jsonl --taste space

    clips -> pairs (a draw) -> votes of raters who listen -> the heads that hear details -> scores of the judged clips
    -> r with the taste's own score, among clips of one prompt

The rival is `random, all pairs`: the same clips, as many votes, pairs at random. The taste answers in a process of its own, and no
figure of it reaches what is fitted but through votes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base_models.checkpoint import read_jsonl, write_json
from base_models.errors import UserError
from base_models.policy import PRETRAINED, Policy, load_policy
from base_models.settings import run
from rlhf.apart import NAMED as BLOCKS
from rlhf.apart import furthest, in_spreads
from rlhf.apart import hear as hear_features
from rlhf.evaluate_models import read_codes
from rlhf.losses import from_group_means
from rlhf.reward_committee import committees
from rlhf.reward_features import DETAILS
from rlhf.reward_heads import Pairs, expand, fit, make_lens

NOISE, TIE = (0.35, 0.7), 0.2
"""Of a rater who listens, in units of gold: the logistic noise of each second one, and the difference that goes for a tie."""


@dataclass(frozen=True)
class Config:
    """What is compared on what."""

    asked: tuple[Path, ...] = ()
    """Manifests of the clips that votes are about, several of each prompt."""
    judged: Path | None = None
    """Manifest of clips of other prompts, by which the reward is judged; those of prompts that are asked about are left out."""
    taste: str = "space"
    policy: Path = PRETRAINED
    votes: int = 2000
    """One a pair until every pair has one."""
    pairs_per_prompt: int = 8
    """Of the pairs that lie furthest apart."""
    draws: int = 6
    """Of pairs and of votes; the same for both ways of asking."""
    out: Path | None = None
    """Where the figures go, as JSON; nowhere by default."""


@dataclass(frozen=True)
class Clips:
    """All clips, those that are asked about first."""

    table: dict[str, Tensor]
    prompt: Tensor
    gold: np.ndarray
    asked: int
    judged: Tensor
    """Rows of those by which the reward is judged: none of a prompt that votes are about."""
    points: Tensor
    """Of the asked ones."""


def hear(cfg: Config, policy: Policy) -> Clips:
    """Features of all clips and, from another process, what the taste says of them."""
    assert cfg.judged is not None
    manifests = [*cfg.asked, cfg.judged]
    rows = [read_jsonl(manifest) for manifest in manifests]
    codes = torch.cat([read_codes(manifest, part) for manifest, part in zip(manifests, rows, strict=True)])
    n = len(codes) - len(rows[-1])
    texts = [row["prompt"] for part in rows for row in part]
    names = [row["prompt_id"] for part in rows[:-1] for row in part] + [f"judged {row['prompt_id']}" for row in rows[-1]]
    voted_on = set(texts[:n])
    judged = [row for row in range(n, len(texts)) if texts[row] not in voted_on]
    if not judged:
        raise UserError("no prompt in --judged that is not in --asked", "other prompts", "sample some")
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    table = hear_features(policy, codes, texts, BLOCKS)
    with tempfile.TemporaryDirectory() as folder:
        named = [part for manifest in manifests for part in ("--manifest", str(manifest.resolve()))]
        argv = [sys.executable, "-m", "rlhf.simulation.judge", *named, "--taste", cfg.taste, "--out", f"{folder}/gold.json"]
        subprocess.run(argv, check=True, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.DEVNULL)
        gold = np.array([row["gold"] for row in json.loads(Path(folder, "gold.json").read_text())["clips"]])
    points = in_spreads({block: heard[:n] for block, heard in table.items()}, names[:n])
    return Clips(table, torch.tensor([number[name] for name in names]), gold, n, torch.tensor(judged), points)


def voted(clips: Clips, pairs: list[tuple[int, int]], cfg: Config, rng: np.random.Generator) -> Pairs:
    """One vote on each of `votes` pairs, drawn without return until all have been: the difference in gold under logistic noise."""
    order = np.concatenate([rng.permutation(len(pairs)) for _ in range(-(-cfg.votes // len(pairs)))])[: cfg.votes]
    left, right = np.array(pairs)[order].T
    heard = clips.gold[left] - clips.gold[right] + rng.logistic(0.0, rng.choice(NOISE, len(order)))
    p = torch.from_numpy(np.where(np.abs(heard) < TIE, 0.5, heard > 0)).float()
    first = torch.from_numpy(left)
    return Pairs(first, torch.from_numpy(right), p, torch.ones(len(p)), clips.prompt[first])


def agreement(clips: Clips, pairs: Pairs) -> float:
    """r of the heads' mean score with gold, both from the means of their prompts, on the judged clips."""
    score = torch.zeros(len(clips.gold))
    own = {block: rows[: clips.asked] for block, rows in clips.table.items()}
    (several,) = [found for found in committees(BLOCKS) if all(DETAILS in head.blocks for head in found.heads)]
    for head in several.heads:
        inputs = expand(make_lens(head, own, clips.prompt[: clips.asked]), head, clips.table)
        score += inputs @ fit(head, inputs, pairs)
    both = torch.stack([score.double(), torch.from_numpy(clips.gold)], dim=1)[clips.judged]
    return float(torch.corrcoef(from_group_means(both, clips.prompt[clips.judged]).T)[0, 1])


def main(cfg: Config) -> dict[str, Any]:
    """r by way of asking and draw."""
    if not cfg.asked or cfg.judged is None:
        raise UserError(f"--asked {len(cfg.asked)} manifests, --judged {cfg.judged}", "both", "sample clips for each; see --help")
    clips = hear(cfg, load_policy(cfg.policy))
    prompts = clips.prompt[: clips.asked].tolist()
    rows = {number: [row for row, other in enumerate(prompts) if other == number] for number in set(prompts)}
    ways = {
        "random, all pairs": [pair for of_prompt in rows.values() for pair in combinations(of_prompt, 2)],
        f"the {cfg.pairs_per_prompt} furthest apart of a prompt": furthest(clips.points, list(map(str, prompts)), cfg.pairs_per_prompt),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for draw in tqdm(range(cfg.draws), "draws", disable=None):
        for way, pairs in ways.items():
            found[way].append(agreement(clips, voted(clips, pairs, cfg, np.random.default_rng(100 + draw))))
    figures = {
        "taste": cfg.taste,
        "votes": cfg.votes,
        "clips": clips.asked,
        "judged": len(clips.judged),
        "r": {way: {"mean": float(np.mean(r)), "draws": r, "pairs": len(ways[way])} for way, r in found.items()},
    }
    if cfg.out:
        write_json(cfg.out, figures)
    return figures


if __name__ == "__main__":
    run(main, Config, show=lambda figures: json.dumps(figures, indent=2))
