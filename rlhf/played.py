"""What the policy plays now, and how far that has drifted from its base: KL in nats a clip, whole and by codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.lora import adapter_disabled
from base_models.conditions import Conditions
from base_models.lm import MusicLM
from base_models.sampling import generate
from rlhf.losses import kl_k1


@dataclass(frozen=True)
class Played:
    """codes [B, K, T]; rows [B], of the prompt table; book_kl [B, K], each codebook's share of the clip's log-ratio, nats."""

    codes: Tensor
    rows: list[int]
    book_kl: Tensor


@torch.no_grad()
def play_now(
    lm: MusicLM, table: Conditions, n_clips: int, n_frames: int, seed: int, temperature: float = 1.0, batch_size: int = 64
) -> Played:
    """Clips of the table's prompts in turn, by the policy as it is; their log-ratios to the policy without its adapter are samples of
    KL(policy || base) (k1, unbiased). The same seeds each time, and no random state is touched."""
    rows, device = [i % len(table) for i in range(n_clips)], next(lm.parameters()).device
    codes, book_kl = [], []
    for start in range(0, n_clips, batch_size):
        part = rows[start : start + batch_size]
        cond = table.index(part).to(device)
        seeds = [seed * 1_000_003 + start + i for i in range(len(part))]
        made = generate(lm, cond, n_frames, seeds=seeds, temperature=temperature)
        codes.append(made.codes.cpu())
        book_kl.append(kl_by_book(lm, made.codes, cond, made.code_logps, temperature).cpu())
    return Played(torch.cat(codes), rows, torch.cat(book_kl))


@torch.no_grad()
def kl_by_book(lm: MusicLM, codes: Tensor, cond: Conditions, code_logps: Tensor, temperature: float) -> Tensor:
    """codes [B, K, T] and the sampler's log-probs of them [B, K, T] -> their log-ratio to the base, summed over time [B, K]."""
    with adapter_disabled(lm):
        base, _ = lm.code_logps(codes, cond, temperature)
    return kl_k1(code_logps, base).sum(-1)


def kl_figures(book_kl: Sequence[float] | Tensor) -> dict[str, float]:
    """Nats a clip by codebook [K], means over clips -> `kl` and `kl_book_k`."""
    books = [float(value) for value in book_kl]
    return {"kl": sum(books), **{f"kl_book_{k}": value for k, value in enumerate(books)}}
