"""Tiny random parts that the tests of the generator stack share."""

from __future__ import annotations

import pytest
import torch

from base_models.conditions import Conditions
from base_models.lm import MusicLM, MusicLMConfig


@pytest.fixture
def tiny_lm() -> MusicLM:
    torch.manual_seed(0)
    config = MusicLMConfig(n_q=4, card=32, d_model=32, n_layers=2, n_heads=2, d_ff=64, text_dim=16, beat_clock=True)
    return MusicLM(config).eval()


@pytest.fixture
def tiny_conditions() -> Conditions:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn((3, 5, 16), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    return Conditions(text * mask[..., None], mask, torch.tensor([120.0, float("nan"), 90.0]))
