"""Stretches that raters marked as bad -> a reward for every codec frame.

    latents [B, D, T] -> mean, spread and movement in a window around each frame [B, T, 3 D] -> linear head -> [B, T], 0 on average

A mark says *where* a clip is bad, and only in comparison with the rest of that clip: another clip may be bad all over and have no
mark. So the head learns from couples of frames of one clip, one marked and one not (Bradley and Terry 1952, as for pairs of clips),
every clip counting alike; and what it says of a clip is shifted to 0 on average. The sum over frames is therefore 0: it tells PPO
where a clip deserves its score, and adds nothing to how much. (Wu et al. 2023, arXiv:2306.01693, learn from marked spans likewise.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from base_models.codec import Codec
from rlhf.reward_heads import REACH, Head, Pairs, fit
from rlhf.snapshot import Spans

WINDOW_S = 0.4
"""Width of the window around a frame."""
COUPLES = 32
"""Couples of frames drawn from a marked clip."""
HEAD = Head("linear", ("frames",), 0.7)
"""A clip's couples say much the same, and together count as a few votes: a prior of 2 nats, had each clip 4 couples and not 32."""


@dataclass(frozen=True)
class FrameHead:
    """What turns a clip's frames into how good each is: mean, spread, weights [3 D]."""

    mean: Tensor
    spread: Tensor
    weights: Tensor

    def __call__(self, table: Tensor) -> Tensor:
        """[B, T, 3 D] -> [B, T] in nats, 0 on average over each clip; higher is better."""
        score = standard(self.mean, self.spread, table) @ self.weights
        return score - score.mean(1, keepdim=True)

    def slope(self, codec: Codec, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes [B, K, T] -> where each frame should have moved for frames near it to sound better, [B, D, T], and frames [B, T].

        It is d sum_t s_t / d latents of the scores before each clip's mean is taken away: a frame is compared with the rest of its
        clip as the rest stands. (Centred, they sum to 0 whatever is played.)
        """
        latents = codec.latents(codes).float().detach().requires_grad_(True)
        with torch.enable_grad():
            table = frame_features_of(latents, codec.frame_rate).to(self.mean.device)
            (slope,) = torch.autograd.grad((standard(self.mean, self.spread, table) @ self.weights).sum(), latents)
        return slope, self(table.detach()).to(codes.device)


def frame_features(codec: Codec, codes: Tensor) -> Tensor:
    """codes [B, K, T] -> [B, T, 3 D]: mean, spread and mean absolute step of the latents in a window around each frame."""
    return frame_features_of(codec.latents(codes).float(), codec.frame_rate)


def frame_features_of(latents: Tensor, frame_rate: float) -> Tensor:
    """The same of latents [B, D, T]. A spread below 1e-4 counts as that: at 0 it has no slope."""
    half = max(1, round(WINDOW_S * frame_rate / 2))

    def local(series: Tensor) -> Tensor:
        return F.avg_pool1d(series, 2 * half + 1, stride=1, padding=half, count_include_pad=False)

    mean = local(latents)
    spread = (local(latents.square()) - mean.square()).clamp_min(1e-8).sqrt()
    step = F.pad((latents[..., 1:] - latents[..., :-1]).abs(), (1, 0))
    return torch.cat([mean, spread, local(step)], dim=1).transpose(1, 2)


def marked_frames(spans: Spans, n_frames: int, frame_rate: float) -> Tensor:
    """Spans in ms -> [T] bool: the frames that a mark touches for half of their length or more."""
    edges = torch.arange(n_frames + 1) * 1000 / frame_rate
    covered = torch.zeros(n_frames)
    for t0_ms, t1_ms in spans:
        overlap = torch.minimum(edges[1:], torch.tensor(float(t1_ms))) - torch.maximum(edges[:-1], torch.tensor(float(t0_ms)))
        covered = torch.maximum(covered, overlap.clamp_min(0))
    return covered * frame_rate / 1000 >= 0.5


def standard(mean: Tensor, spread: Tensor, table: Tensor) -> Tensor:
    """All features together about 1 wide, none beyond REACH."""
    return ((table - mean) / spread).clamp(-REACH, REACH) * len(mean) ** -0.5


def fit_frames(tables: Sequence[Tensor], marked: Sequence[Tensor], seed: int = 0) -> FrameHead:
    """A head from clips with marks. tables: [T, 3 D] each; marked: [T] bool each, neither all nor none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat(list(tables))
    centre = torch.cat([table - table.mean(0) for table in tables])
    mean, spread = rows.mean(0), centre.std(0, correction=0) + 1e-3 * rows.std(0, correction=0) + 1e-6
    good: list[Tensor] = []
    bad: list[Tensor] = []
    offset = 0
    for is_marked in marked:
        for kept, wanted in ((bad, is_marked), (good, ~is_marked)):
            there = wanted.nonzero()[:, 0]
            kept.append(offset + there[torch.randint(len(there), (COUPLES,), generator=generator)])
        offset += len(is_marked)
    chosen, rejected = torch.cat(good), torch.cat(bad)
    clip = torch.arange(len(marked)).repeat_interleave(COUPLES)
    couples = Pairs(chosen, rejected, torch.ones(len(chosen)), torch.ones(len(chosen)), clip)
    return FrameHead(mean, spread, fit(HEAD, standard(mean, spread, rows), couples))


def within_clip_auc(head: FrameHead, table: Tensor, marked: Tensor) -> float:
    """How often a frame that is not marked scores above a marked one of the same clip; ties count half. table [T, 3 D]."""
    score = head(table[None])[0]
    gap = score[~marked][:, None] - score[marked][None]
    return float(((gap > 0).float() + 0.5 * (gap == 0)).mean())


@dataclass(frozen=True)
class Marked:
    """Clips with marks that leave something unmarked: their frames' features, marks and folds."""

    tables: list[Tensor]
    marked: list[Tensor]
    prompt_ids: list[str]


def marked_clips(codec: Codec, codes: Mapping[str, np.ndarray], marks: Mapping[str, Spans], prompt_of: Mapping[str, str]) -> Marked:
    """codes: clip -> [K, T]. Clips that are marked all over, or not at all, say nothing about where."""
    found = Marked([], [], [])
    with torch.no_grad():
        for clip, spans in marks.items():
            if clip not in codes:
                continue
            is_marked = marked_frames(spans, codes[clip].shape[1], codec.frame_rate)
            if bool(is_marked.any()) and not bool(is_marked.all()):
                found.tables.append(frame_features(codec, torch.from_numpy(codes[clip])[None])[0].cpu())
                found.marked.append(is_marked)
                found.prompt_ids.append(prompt_of[clip])
    return found


def held_out_auc(clips: Marked, fold: Mapping[str, int], seed: int = 0) -> list[float]:
    """Within-clip AUC of each marked clip [clips], by heads that have not met its prompt. fold: prompt -> fold."""
    fold_of = [fold[name] for name in clips.prompt_ids]
    found = [0.5] * len(fold_of)
    for f in sorted(set(fold_of)):
        seen = [i for i, g in enumerate(fold_of) if g != f]
        if not seen:
            continue
        head = fit_frames([clips.tables[i] for i in seen], [clips.marked[i] for i in seen], seed)
        for i in (i for i, g in enumerate(fold_of) if g == f):
            found[i] = within_clip_auc(head, clips.tables[i], clips.marked[i])
    return found


def frame_tensors(head: FrameHead | None) -> dict[str, Tensor]:
    """For a file."""
    return {} if head is None else {"frames.mean": head.mean, "frames.spread": head.spread, "frames.weights": head.weights}


def read_frame_head(state: Mapping[str, Tensor]) -> FrameHead | None:
    """The inverse of `frame_tensors`."""
    if "frames.weights" not in state:
        return None
    return FrameHead(state["frames.mean"], state["frames.spread"], state["frames.weights"])
