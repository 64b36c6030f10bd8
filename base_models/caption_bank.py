"""Text states of a whole corpus' captions, encoded once, kept on disk under a content hash, read by row while training."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from base_models.checkpoint import load_tensors, save_tensors
from base_models.text_encoder import TextEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionBank:
    """states [N_tokens, D] float16 of all captions end to end; caption i owns states[starts[i] : starts[i + 1]]."""

    states: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows -> states [B, M, D] float32 (zero where padded) and mask [B, M]."""
        parts = [self.states[self.starts[i] : self.starts[i + 1]].float() for i in rows]
        states = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) for part in parts])
        return states, torch.arange(states.shape[1])[None] < lengths[:, None]


def build_caption_bank(captions: Sequence[str], encoder: TextEncoder, cache_dir: Path) -> CaptionBank:
    """Encode distinct captions (about 400 a second on one core) or read them from `cache_dir`."""
    digest = hashlib.sha256("\n".join([encoder.name, str(encoder.max_tokens), *captions]).encode()).hexdigest()[:24]
    path = cache_dir / f"captions-{digest}.safetensors"
    if path.is_file():
        tensors = load_tensors(path)
        return CaptionBank(tensors["states"], tensors["starts"])
    parts: list[Tensor] = []
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    encoded: list[Tensor | None] = [None] * len(captions)
    for start in tqdm(range(0, len(order), 256), desc="encoding captions", unit="batch"):
        rows = order[start : start + 256]
        states, mask = encoder.encode([captions[i] for i in rows])
        for i, state, valid in zip(rows, states, mask):
            encoded[i] = state[valid].half().cpu()
    parts = [part for part in encoded if part is not None]
    starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    bank = CaptionBank(torch.cat(parts), starts)
    save_tensors(path, {"states": bank.states, "starts": bank.starts})
    logger.info("cached %d captions at %s", len(captions), path)
    return bank
