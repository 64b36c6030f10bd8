"""What a generation is conditioned on, as tensors: text states and a tempo. Chords, melody and lyrics will join here.

`null()` is the unconditional version that classifier-free guidance needs (Ho and Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base_models.text_encoder import TextEncoder

TEMPO_RANGE_BPM = (30.0, 300.0)
_TEMPO = re.compile(r"(?<![\d.])(\d{2,3}(?:\.\d+)?)\s*bpm\b", re.IGNORECASE)


@dataclass(frozen=True)
class Conditions:
    """A batch of conditions: text [B, M, D], mask [B, M] (True where valid), tempo_bpm [B] (NaN where not given)."""

    text: Tensor
    mask: Tensor
    tempo_bpm: Tensor

    def __post_init__(self) -> None:
        if self.text.dim() != 3 or self.mask.shape != self.text.shape[:2] or self.tempo_bpm.shape != self.text.shape[:1]:
            shapes = [tuple(t.shape) for t in (self.text, self.mask, self.tempo_bpm)]
            raise ValueError(f"conditions need text [B, M, D], mask [B, M], tempo_bpm [B]; got {shapes}")

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: torch.device | str) -> Conditions:
        return Conditions(self.text.to(device), self.mask.to(device), self.tempo_bpm.to(device))

    def index(self, rows: Tensor | Sequence[int] | slice) -> Conditions:
        """The rows named; trailing padding that none of them needs is cut off."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.text.device)
        text, mask = self.text[rows], self.mask[rows]
        longest = max(int(mask.sum(1).max()) if len(mask) else 1, 1)
        return Conditions(text[:, :longest], mask[:, :longest], self.tempo_bpm[rows])

    def repeat(self, n: int) -> Conditions:
        """Each row n times in a row: [a, b] -> [a, a, b, b] for n = 2."""
        return Conditions(*(t.repeat_interleave(n, 0) for t in (self.text, self.mask, self.tempo_bpm)))

    def null(self) -> Conditions:
        """The same batch with nothing said: no valid text, no tempo."""
        return self.drop(torch.ones(len(self), dtype=torch.bool, device=self.text.device))

    def drop(self, rows: Tensor) -> Conditions:
        """Nothing said in the rows where `rows` [B] is True (dropout of conditions for classifier-free guidance)."""
        keep = ~rows[:, None]
        tempo = torch.where(rows, torch.full_like(self.tempo_bpm, float("nan")), self.tempo_bpm)
        return Conditions(self.text * keep[..., None], self.mask & keep, tempo)

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """Batches one after another, padded to the longest text."""
        longest = max(part.text.shape[1] for part in parts)

        def pad(tensor: Tensor) -> Tensor:
            extra = tensor.new_zeros((tensor.shape[0], longest - tensor.shape[1], *tensor.shape[2:]))
            return torch.cat([tensor, extra], 1)

        return Conditions(
            torch.cat([pad(part.text) for part in parts]),
            torch.cat([pad(part.mask) for part in parts]),
            torch.cat([part.tempo_bpm for part in parts]),
        )


def parse_tempo(prompt: str) -> float | None:
    """The tempo that a prompt states ("120 BPM"), in beats a minute, or None; values outside 30..300 are not tempi."""
    found = _TEMPO.search(prompt)
    if found is None:
        return None
    tempo = float(found.group(1))
    return tempo if TEMPO_RANGE_BPM[0] <= tempo <= TEMPO_RANGE_BPM[1] else None


def encode_prompts(prompts: Sequence[str], text_encoder: TextEncoder, tempo_bpm: Sequence[float | None] | None = None) -> Conditions:
    """Text states by the encoder; the tempo as given, else as the prompt states it, else NaN."""
    given = list(tempo_bpm) if tempo_bpm is not None else [None] * len(prompts)
    if len(given) != len(prompts):
        raise ValueError(f"{len(given)} tempi for {len(prompts)} prompts")
    text, mask = text_encoder.encode(list(prompts))
    tempi = [parse_tempo(p) if t is None else t for p, t in zip(prompts, given)]
    values = torch.tensor([float("nan") if t is None else float(t) for t in tempi], device=text.device)
    return Conditions(text, mask, values)
