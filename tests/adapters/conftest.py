"""A tiny LM with codes and conditions, for everything about adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from base_models.conditions import Conditions
from base_models.lm import MusicLM, MusicLMConfig


@dataclass
class Tiny:
    """What adapters need of a policy, and something to score."""

    lm: MusicLM
    sha256: str
    codes: Tensor
    cond: Conditions

    def logps(self) -> Tensor:
        with torch.no_grad():
            return self.lm.logps(self.codes, self.cond)


@pytest.fixture
def make_tiny() -> Callable[[int], Tiny]:
    def make(seed: int = 0) -> Tiny:
        torch.manual_seed(seed)
        lm = MusicLM(MusicLMConfig(n_q=2, card=8, d_model=32, n_layers=2, n_heads=2, d_ff=48, text_dim=12)).eval()
        cond = Conditions(torch.randn(2, 3, 12), torch.ones(2, 3, dtype=torch.bool), torch.tensor([120.0, float("nan")]))
        return Tiny(lm, lm.sha256(), torch.randint(0, 8, (2, 2, 5)), cond)

    return make


@pytest.fixture
def tiny(make_tiny: Callable[[int], Tiny]) -> Tiny:
    return make_tiny(0)
