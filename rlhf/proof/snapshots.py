"""Other snapshots made of one: the first N of its votes, all votes turned round, or half of each prompt's pairs turned round; or one made
of two, with the votes of both.

    python -m rlhf.proof.snapshots --snapshot DIR --out DIR [--votes 500] [--turn all|half] [--seed 0]
    python -m rlhf.proof.snapshots --snapshot DIR --also DIR --out DIR

The subset is drawn by a hash of the seed and the vote, so that smaller ones lie within larger ones. The result is a snapshot like any
other, with a content hash of its own and its parent's; trainers see no difference between it and one that the app exported."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from base_models.atomic import atomic_folder
from base_models.checkpoint import read_json, read_jsonl, write_json
from base_models.errors import UserError, ended
from rlhf.preferences import content_sha256, load_snapshot

OTHER = {"x": "y", "y": "x"}


def subset(votes: list[dict[str, Any]], n: int, seed: int) -> list[dict[str, Any]]:
    """`n` of the usable votes, in their old order. Raises UserError when there are fewer."""
    usable = [vote for vote in votes if not vote.get("excluded_reason")]
    if n > len(usable):
        raise UserError(f"{len(usable)} usable votes", f"{n}", "collect more, or ask for fewer")
    rank = sorted(usable, key=lambda vote: hashlib.sha256(f"{seed}|{vote['vote_id']}".encode()).hexdigest())
    kept = {vote["vote_id"] for vote in rank[:n]}
    return [vote for vote in usable if vote["vote_id"] in kept]


def turned(vote: dict[str, Any]) -> dict[str, Any]:
    """The vote of somebody who likes the opposite: choice, aspects and marks change sides."""
    return {
        **vote,
        "choice": OTHER.get(vote["choice"], vote["choice"]),
        "aspects": {name: -score for name, score in (vote.get("aspects") or {}).items()},
        "marks": [{**mark, "side": OTHER[mark["side"]]} for mark in vote.get("marks") or []],
    }


def half_turned(votes: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """All votes on half of each prompt's pairs (give or take one) turned round: whatever is learnt from these is no taste."""
    rng = np.random.default_rng(seed)
    by_prompt: dict[str, list[str]] = {}
    for vote in votes:
        pairs = by_prompt.setdefault(str(vote["prompt_id"]), [])
        if str(vote["pair_id"]) not in pairs:
            pairs.append(str(vote["pair_id"]))
    turn = set()
    for place, prompt in enumerate(sorted(by_prompt)):
        pairs = [by_prompt[prompt][index] for index in rng.permutation(len(by_prompt[prompt]))]
        turn |= set(pairs[: (len(pairs) + place % 2) // 2])  # odd ones are rounded up and down in turn
    return [turned(vote) if str(vote["pair_id"]) in turn else vote for vote in votes]


def derive(parent: Path, out: Path, n: int | None = None, turn: str = "none", seed: int = 0) -> dict[str, Any]:
    """Write the derived snapshot as a folder, whole or not at all, and check it as a trainer would."""
    load_snapshot(parent)
    votes = read_jsonl(parent / "votes.jsonl")
    kept = [vote for vote in votes if not vote.get("excluded_reason")] if n is None else subset(votes, n, seed)
    if turn == "all":
        kept = [turned(vote) for vote in kept]
    elif turn == "half":
        kept = half_turned(kept, seed)
    used = {vote[side] for vote in kept for side in ("clip_x", "clip_y")}
    clips = [clip for clip in clips_of(parent) if clip["sha256"] in used]
    about = read_json(parent / "snapshot.json")
    told = {"parent_sha256": about["sha256"], "derived": {"votes": n, "turn": turn, "seed": seed}}
    return write(out, kept, clips, {**about, "name": f"{about['name']}-{turn}-{len(kept)}", **told})


def joined(first: Path, second: Path, out: Path) -> dict[str, Any]:
    """Write the votes of two campaigns as one snapshot. Raters of one name are one person; votes and pairs of the second are numbered in
    the second's own database, and get names of their own."""
    votes: list[dict[str, Any]] = []
    clips: dict[str, dict[str, Any]] = {}
    parents = []
    for part, before in ((first, ""), (second, "second.")):
        load_snapshot(part)
        told = [vote for vote in read_jsonl(part / "votes.jsonl") if not vote.get("excluded_reason")]
        votes += [{**vote, **{name: f"{before}{vote[name]}" for name in ("vote_id", "pair_id")}} for vote in told]
        clips |= {clip["sha256"]: clip for clip in clips_of(part)}
        parents.append(read_json(part / "snapshot.json"))
    named = {"name": "-".join(parent["name"] for parent in parents), "parent_sha256": [parent["sha256"] for parent in parents]}
    return write(out, votes, list(clips.values()), {**parents[0], **named, "derived": {"joined": len(parents)}})


def clips_of(parent: Path) -> list[dict[str, Any]]:
    """Its clips, whose codes can be found from anywhere."""
    clips = read_jsonl(parent / "clips.jsonl")
    for clip in clips:
        if "://" not in clip["codes_uri"]:
            clip["codes_uri"] = str((parent / clip["codes_uri"]).resolve())
    return clips


def write(out: Path, votes: list[dict[str, Any]], clips: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Votes and clips as a snapshot's folder, whole or not at all, checked as a trainer would; returns its snapshot.json."""
    with atomic_folder(out) as temporary:
        for name, rows in (("votes.jsonl", votes), ("clips.jsonl", clips)):
            lines = (json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows)
            (temporary / name).write_text("".join(lines), encoding="utf-8")
        raters = {vote["rater"] for vote in votes}
        counted = {"sha256": content_sha256(temporary), "n_votes": len(votes), "n_excluded": {}, "n_raters": len(raters)}
        write_json(temporary / "snapshot.json", {**about, **counted})
    load_snapshot(out)
    return {**about, **counted}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", type=Path, required=True)
    parser.add_argument("--also", type=Path, help="another snapshot: the votes of both, as they are")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--votes", type=int)
    parser.add_argument("--turn", choices=("none", "all", "half"), default="none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.also:
        if args.votes is not None or args.turn != "none":
            raise UserError("--also with --votes or --turn", "the votes of both snapshots as they are", "derive from each of them first")
        told = joined(args.snapshot, args.also, args.out)
    else:
        told = derive(args.snapshot, args.out, args.votes, args.turn, args.seed)
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
