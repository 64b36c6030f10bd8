"""A toy of listening, for runs that need no base: a small random codec, and raters who like clips of low codes.

codes [2, 12] at random -> liked: low ones -> votes of five raters -> a snapshot on disk, as `encore ratings export` writes it
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base_models.checkpoint import write_json
from base_models.codec import CodecConfig, MagnitudeCodec
from rlhf.snapshot import BOTH_BAD, X, Y, content_sha256


@dataclass(frozen=True)
class ToyBase:
    """A codec alone, for runs that need no base."""

    codec: MagnitudeCodec
    contrastive: None
    sha256: str


def toy_base(seed: int, n_q: int = 2) -> ToyBase:
    """A small codec with random weights and codebooks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = MagnitudeCodec(CodecConfig(width=32, latent_dim=16, encoder_blocks=1, decoder_blocks=1, n_q=n_q, card=32)).eval()
        for k, layer in enumerate(codec.rvq.layers):
            layer._codebook.embed.copy_(torch.randn(layer._codebook.embed.shape) / (k + 1))
    return ToyBase(codec, None, codec.sha256())


def write_toy_snapshot(folder: Path, base_sha256: str, seed: int, n_prompts: int = 20, n_pairs: int = 120) -> None:
    """Clips of 2 codebooks of 32 by 12 frames, five raters of whom one is careless, two votes a pair.

    The careful ones call two clips of high codes both bad, judge an aspect that follows the codes of the first book, and mark the
    half of a clip that is worse.
    """
    rng = np.random.default_rng(seed)
    (folder / "codes").mkdir(parents=True, exist_ok=True)
    clips: list[dict[str, Any]] = []
    votes: list[dict[str, Any]] = []
    liked: dict[str, float] = {}
    first: dict[str, float] = {}
    worse: dict[str, int] = {}
    for number in range(2 * n_pairs):
        prompt = number // 2 % n_prompts
        codes = rng.binomial(31, rng.uniform(0.3, 0.7), (2, 12)).astype(np.int16)
        sha256 = hashlib.sha256(f"{number}".encode() + codes.tobytes()).hexdigest()
        np.save(folder / "codes" / f"{number}.npy", codes)
        liked[sha256] = -codes.mean() / 4
        first[sha256] = codes[0].mean() / 4  # as the app counts: above 0 where y is better
        worse[sha256] = int(codes[:, 6:].mean() > codes[:, :6].mean())  # which half
        row: dict[str, Any] = {
            "sha256": sha256,
            "codes_uri": f"codes/{number}.npy",
            "prompt_id": f"p{prompt}",
            "prompt": f"toy prompt {prompt}",
        }
        clips.append({**row, "policy_sha256": base_sha256})
    for pair in range(n_pairs):
        x, y = clips[2 * pair], clips[2 * pair + 1]
        for rater in rng.choice(5, 2, replace=False):
            careless = rater == 4
            wish = 0.0 if careless else liked[x["sha256"]] - liked[y["sha256"]]
            choice = X if rng.logistic(0, 0.3) < wish else Y
            aspect = 0 if careless else int(np.clip(np.round(first[x["sha256"]] - first[y["sha256"]]), -2, 2))
            if not careless and max(liked[x["sha256"]], liked[y["sha256"]]) < -4.5:
                choice = BOTH_BAD
            mark = {"side": "y", "t0_ms": 240 * worse[y["sha256"]], "t1_ms": 240 * worse[y["sha256"]] + 240, "tag": "bad"}
            row = {
                "vote_id": len(votes),
                "pair_id": pair,
                "prompt_id": x["prompt_id"],
                "prompt": x["prompt"],
                "split": "train",
                "shown_first": str(rng.choice([X, Y])),
                "aspects": {"musicality": aspect},
                "marks": [] if careless else [mark],
            }
            votes.append({**row, "rater": f"r{rater}", "choice": choice, "clip_x": x["sha256"], "clip_y": y["sha256"]})
    for file, rows in (("votes.jsonl", votes), ("clips.jsonl", clips)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(folder / "snapshot.json", {"name": "toy", "sha256": content_sha256(folder), "n_votes": len(votes)})
