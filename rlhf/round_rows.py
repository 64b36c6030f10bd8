"""From a round's clips to rows of the DPO trainer: who is played, who beats whom, and what of a pair counts.

rows of the prompt table -> codes [B, K, T], score [B] -> (chosen, rejected) -> label, mask
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base_models.conditions import Conditions
from base_models.lm import MusicLM
from base_models.sampling import generate
from rlhf.flat_policy import flat_order
from rlhf.journal import timed
from rlhf.judges import Score
from rlhf.round_plan import Labels, Pairing

Made = list[tuple[int, dict[str, Any]]]
"""Rows of the trainer, each with its number in the run."""


@dataclass(frozen=True)
class Judged:
    """Clips with a score: codes [B, K, T]; rows [B], of the prompt table; code_logps [B, K, T], nats, the sampler's; score [B]."""

    codes: Tensor
    rows: list[int]
    code_logps: Tensor
    score: Tensor


def play_and_judge(
    lm: MusicLM,
    table: Conditions,
    prompts: Sequence[str],
    rows: Sequence[int],
    seeds: Sequence[int],
    score: Score | None,
    n_frames: int,
    temperature: float,
    batch_size: int,
    seconds: dict[str, float],
) -> Judged:
    """Play one clip for each row of the table, `batch_size` at once, and judge it.

    Args: table, prompts: the same prompts as conditions and as words. rows, seeds [B]: one clip each. score: None leaves the scores
        NaN, where they come with the slopes. seconds: what `play` and `judge` take is added there.
    """
    codes, logps, scores = [], [], []
    cond = table.to(next(lm.parameters()).device)
    for start in range(0, len(rows), batch_size):
        part = list(rows[start : start + batch_size])
        with timed(seconds, "play"):
            made = generate(lm, cond.index(part), n_frames, seeds=seeds[start : start + batch_size], temperature=temperature)
            codes.append(made.codes.cpu())
            logps.append(made.code_logps.cpu())
        with timed(seconds, "judge"):
            judged = score(made.codes, [prompts[row] for row in part]).detach() if score else torch.full((len(part),), math.nan)
            scores.append(judged.float().cpu())
    return Judged(torch.cat(codes), list(rows), torch.cat(logps), torch.cat(scores))


def pair_up(score: Tensor, pairing: Pairing) -> list[tuple[int, int]]:
    """Scores of one prompt's clips [n] -> (chosen, rejected) places; clips whose score is not finite are left out.

    best_worst: one pair, the largest gap. all: every pair, which costs n - 1 times the training and tells more of the middle.
    Equal scores order nothing.
    """
    order = [place for place in torch.argsort(score, descending=True, stable=True).tolist() if math.isfinite(score[place])]
    pairs = [(order[0], order[-1])] if pairing == "best_worst" and order else [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    return [(chosen, rejected) for chosen, rejected in pairs if score[chosen] > score[rejected]]


def edited_codes(better: Tensor, worse: Tensor) -> list[int]:
    """codes [K, T] of a clip's two edits -> 1 where they differ, else 0, in flat order [K * T]; all 1 where they are the same."""
    book, frame = flat_order(*better.shape)
    differ = (better != worse)[book, frame]
    return (differ if differ.any() else torch.ones_like(differ)).int().tolist()


def label(difference: float, labels: Labels) -> float:
    """How probably the better clip is preferred: 1 (hard), or sigmoid(score difference) as the reward model is calibrated (soft)."""
    return 1.0 if labels == "hard" else 1.0 / (1.0 + math.exp(-difference))
