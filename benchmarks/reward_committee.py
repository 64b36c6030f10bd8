"""Heads of the reward model one by one, and asked together: held-out loss on the votes of frozen snapshots.

    python benchmarks/reward_committee.py --snapshot runs/a/snapshot runs/b/snapshot

    votes -> folds of prompts -> each head, the head that the other folds like best, each committee, the committee that they like best

Every margin comes from a fit that has not seen the pair's prompt, and is divided by a temperature of the other folds. Loss in nats a vote,
.6931 for ignorance. The rival of a committee is `one head, chosen`, which is what a reward model was before it asked several.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from base_models.checkpoint import write_json
from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from base_models.settings import run
from rlhf.preferences import load_snapshot
from rlhf.reward_committee import Committee, committees
from rlhf.reward_features import Base, blocks_of
from rlhf.reward_folds import Clips, Folds, choose_committee, cross_calibrated, unseen_scores
from rlhf.reward_heads import alone, candidates, expand, log_loss, make_lens
from rlhf.reward_report import name
from rlhf.snapshot import Snapshot
from rlhf.trusted import trusted


@dataclass(frozen=True)
class Config:
    """What is compared on what."""

    snapshot: tuple[Path, ...] = ()
    """Folders of frozen snapshots, each judged by itself."""
    policy: Path = PRETRAINED
    """The base whose clips were voted on."""
    folds: int = 5
    """Folds of prompts."""
    out: Path | None = None
    """Where the figures go, as JSON; nowhere by default."""


ONE, SEVERAL = "one head, chosen", "committee, chosen"


def title(committee: Committee) -> str:
    """Heads of a kind differ in their prior, and in how far they think scores alike."""
    (head, *others) = committee.heads
    return name(committee) if others else f"{name(committee)}, prior {head.prior:g}, length {head.length:g}"


def compare(base: Base, snapshot: Snapshot, n_folds: int = 5, seed: int = 0, blocks: Sequence[str] | None = None) -> dict[str, float]:
    """What was asked -> held-out loss, nats a vote. blocks: of features; by default all that the base gives."""
    blocks = blocks or blocks_of(base)
    clips = Clips(snapshot, base.codec.n_q, base.codec.card)
    pairs = clips.pairs(trusted(snapshot, "agreement", base.codec.n_q, base.codec.card).pairs)
    heads = candidates(blocks)
    table = clips.table(base, sorted({block for head in heads for block in head.blocks}), alone, progress=sys.stderr.isatty())
    inputs = {head: expand(make_lens(head, table, clips.prompt), head, table) for head in heads}
    folds = Folds(inputs, clips.fold_of_prompt(n_folds, seed), n_folds)

    alone_in = {head: unseen_scores(folds, pairs, [Committee((head,))] * n_folds, 1, seed) for head in heads}  # each fitted once

    def loss(chosen: Sequence[Committee]) -> float:
        scores = torch.stack([torch.stack([alone_in[head][f] for head in committee.heads]).mean(0) for f, committee in enumerate(chosen)])
        return log_loss(cross_calibrated(folds.margins(scores, pairs), pairs, folds), pairs)

    singles, several = [Committee((head,)) for head in heads], committees(blocks)
    told = {title(committee): loss([committee] * n_folds) for committee in (*singles, *several)}
    return told | {which: loss(choose_committee(folds, pairs, among).chosen) for which, among in ((ONE, singles), (SEVERAL, several))}


def main(cfg: Config) -> dict[str, Any]:
    """Compares on each snapshot by itself; returns loss by snapshot and the mean over them."""
    if not cfg.snapshot:
        raise UserError("no --snapshot", "the folders of one or more frozen snapshots", "export one with `encore ratings export`")
    policy = load_policy(cfg.policy)
    found = [compare(policy, load_snapshot(path, policy.sha256), cfg.folds) for path in cfg.snapshot]
    mean = {asked: float(np.mean([told[asked] for told in found])) for asked in found[0]}
    figures = {"snapshots": [str(path) for path in cfg.snapshot], "loss": found, "mean": mean}
    if cfg.out:
        write_json(cfg.out, figures)
    return figures


def table(figures: dict[str, Any]) -> str:
    """What the script prints: the mean, each snapshot, what was asked."""
    found = figures["loss"]
    lines = [f"{value:.4f}  {' '.join(f'{told[asked]:.4f}' for told in found)}  {asked}" for asked, value in figures["mean"].items()]
    gains = [told[ONE] - told[SEVERAL] for told in found]
    better = sum(gain > 0 for gain in gains)
    return "\n".join([*lines, f"{np.mean(gains):+.4f} nats a vote by asking several, for the better in {better} of {len(gains)} snapshots"])


if __name__ == "__main__":
    run(main, Config, show=table)
