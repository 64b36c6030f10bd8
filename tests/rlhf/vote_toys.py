"""Snapshots of a few votes, written as `encore ratings export` writes them, and a policy that could have played their clips."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from base_models.conditions import Conditions
from base_models.lm import MusicLM
from db.export import snapshot_sha256
from rlhf.snapshot import content_sha256

BASE = "b" * 64
TEMPO_BPM = 120.0


def cut_off_by_an_older_version(database: Path, snapshot: Path) -> None:
    """As if a version that wrote no systems with the votes had been killed between the snapshot's folder and its record."""
    rows = [json.loads(line) for line in (snapshot / "votes.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if not key.startswith("system_")} for row in rows]
    (snapshot / "votes.jsonl").write_text("".join(json.dumps(row, sort_keys=True, separators=(",", ":")) + "\n" for row in kept))
    about = json.loads((snapshot / "snapshot.json").read_text())
    (snapshot / "snapshot.json").write_text(json.dumps(about | {"sha256": snapshot_sha256(snapshot), "schema": 4}))
    with sqlite3.connect(database) as connection:
        connection.execute("delete from snapshot_rater")
        connection.execute("delete from snapshot")
    connection.close()


def write_snapshot(
    folder: Path, votes: Sequence[tuple[int, str, str, dict[str, Any]]], n_pairs: int = 4, base: str = BASE, card: int = 32, n_q: int = 2
) -> Path:
    """A folder from (pair, rater, choice, extra) rows; pair p compares clips 2p and 2p + 1 of prompt p // 2."""
    (folder / "codes").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    clips = []
    for number in range(2 * n_pairs):
        codes = rng.integers(0, card, (n_q, 5)).astype(np.int16)
        np.save(folder / "codes" / f"{number}.npy", codes)
        clips.append(
            {
                "sha256": clip(number),
                "codes_uri": f"codes/{number}.npy",
                "prompt_id": f"p{number // 4}",
                "prompt": f"prompt {number // 4}",
                "policy_sha256": base,
                "tempo_bpm": TEMPO_BPM,
            }
        )
    rows = [
        {
            "vote_id": i,
            "pair_id": pair,
            "prompt_id": f"p{pair // 2}",
            "prompt": f"prompt {pair // 2}",
            "split": "train",
            "rater": rater,
            "choice": choice,
            "clip_x": clip(2 * pair),
            "clip_y": clip(2 * pair + 1),
            "excluded_reason": None,
            **extra,
        }
        for i, (pair, rater, choice, extra) in enumerate(votes)
    ]
    for name, lines in (("votes.jsonl", rows), ("clips.jsonl", clips)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "snapshot.json").write_text(json.dumps({"name": "test", "sha256": content_sha256(folder)}))
    return folder


def clip(number: int) -> str:
    """A clip's hash."""
    return hashlib.sha256(str(number).encode()).hexdigest()


@dataclass
class ToyPolicy:
    """What the training scripts ask of the policy whose clips were rated."""

    lm: MusicLM
    sha256: str = BASE
    codec: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(frame_rate=25.0))

    def conditions(self, prompts: list[str], tempo_bpm: list[float | None]) -> Conditions:
        assert tempo_bpm == [TEMPO_BPM] * len(prompts)
        text = torch.randn(len(prompts), 4, self.lm.config.text_dim, generator=torch.Generator().manual_seed(0))
        return Conditions(text, torch.ones(text.shape[:2], dtype=torch.bool), torch.full((len(prompts),), TEMPO_BPM))
