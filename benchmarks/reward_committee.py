"""Heads of the reward model one by one, and asked together: held-out loss on the votes of frozen snapshots.

    python benchmarks/reward_committee.py --snapshot runs/a/snapshot --snapshot runs/b/snapshot

    votes -> folds of prompts -> each head, the head that the other folds like best, each committee, the committee that they like best

Every margin comes from a fit that has not seen the pair's prompt, and is divided by a temperature of the other folds. Loss in nats a vote,
.6931 for ignorance. The rival of a committee is `one head, chosen`, which is what a reward model was before it asked several.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Sequence

import numpy as np

from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from rlhf.preferences import load_snapshot
from rlhf.reward_committee import Committee, committees
from rlhf.reward_features import Base, blocks_of
from rlhf.reward_folds import Clips, Folds, choose_committee, cross_calibrated, unseen_scores
from rlhf.reward_heads import alone, candidates, expand, log_loss, make_lens
from rlhf.reward_report import name
from rlhf.snapshot import Snapshot
from rlhf.trusted import trusted

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

    def loss(chosen: Sequence[Committee]) -> float:
        return log_loss(cross_calibrated(folds.margins(unseen_scores(folds, pairs, chosen, 1, seed), pairs), pairs, folds), pairs)

    singles, several = [Committee((head,)) for head in heads], committees(blocks)
    told = {title(committee): loss([committee] * n_folds) for committee in (*singles, *several)}
    return told | {which: loss(choose_committee(folds, pairs, among).chosen) for which, among in ((ONE, singles), (SEVERAL, several))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", type=Path, action="append", required=True, help="may be given several times")
    parser.add_argument("--policy", type=Path, default=PRETRAINED)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    args = parser.parse_args(argv)
    policy = load_policy(args.policy)
    found = [compare(policy, load_snapshot(path, policy.sha256), args.folds) for path in args.snapshot]
    mean = {asked: float(np.mean([told[asked] for told in found])) for asked in found[0]}
    for asked, value in mean.items():
        print(f"{value:.4f}  {' '.join(f'{told[asked]:.4f}' for told in found)}  {asked}")
    gains = [told[ONE] - told[SEVERAL] for told in found]
    better = sum(gain > 0 for gain in gains)
    print(f"{np.mean(gains):+.4f} nats a vote by asking several, for the better in {better} of {len(gains)} snapshots")
    if args.out:
        args.out.write_text(json.dumps({"snapshots": [str(path) for path in args.snapshot], "loss": found, "mean": mean}, indent=2))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
