"""Interleaving patterns: codes [B, K, T] <-> pattern steps [B, K, S].

The delay pattern (Copet et al. 2023, "Simple and Controllable Music Generation", arXiv:2306.05284, section 2.2) shifts codebook k
by k steps, so that one decoder step predicts one code of every book, each knowing the coarser codes of its own frame:

    step        0    1    2    3         S = T + K - 1
    book 0    c00  c01  c02    .
    book 1      .  c10  c11  c12         "." is the special token, id = card
"""

from __future__ import annotations

import torch
from torch import Tensor


def n_steps(n_q: int, n_frames: int) -> int:
    """S, the number of pattern steps of T frames."""
    return n_frames + n_q - 1


def delay_mask(n_q: int, n_frames: int, device: torch.device | str | None = None) -> Tensor:
    """[K, S] bool, True where a real code stands (0 <= s - k < T)."""
    step = torch.arange(n_steps(n_q, n_frames), device=device)
    frame = step[None, :] - torch.arange(n_q, device=device)[:, None]
    return (frame >= 0) & (frame < n_frames)


def delay(codes: Tensor, special: int) -> Tensor:
    """codes [B, K, T] -> steps [B, K, S], book k shifted right by k, the gaps filled with `special`."""
    B, K, T = codes.shape
    steps = codes.new_full((B, K, n_steps(K, T)), special)
    for k in range(K):
        steps[:, k, k : k + T] = codes[:, k]
    return steps


def undelay(steps: Tensor) -> Tensor:
    """steps [B, K, S] -> codes [B, K, T]; also for any per-code value laid out by step, [B, K, S, ...] -> [B, K, T, ...]."""
    K, S = steps.shape[1], steps.shape[2]
    T = S - K + 1
    if T < 1:
        raise ValueError(f"{S} steps are too few for {K} codebooks; at least {K} are needed")
    return torch.stack([steps[:, k, k : k + T] for k in range(K)], dim=1)
