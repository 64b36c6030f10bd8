"""A base small enough for any test of a reward, and the toy's votes laid out for heads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from base_models.codec import CodecConfig, MagnitudeCodec
from base_models.conditions import Conditions
from base_models.lm import MusicLM, MusicLMConfig
from rlhf.preferences import Snapshot, load_snapshot
from rlhf.reward_folds import Clips, Folds
from rlhf.reward_heads import Head
from rlhf.reward_toy import write_toy_snapshot

PLAIN, BLIND = Head("linear", ("all",), 3.0), Head("linear", ("nothing",), 3.0)


class Tower(nn.Module):
    """Stands in for the audio-text space."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))

    def features_of_latents(self, latents):
        return torch.stack([latents.mean((1, 2)), latents.std((1, 2)), latents[:, 0].mean(1)], 1)

    def sha256(self):
        return "tower"

    def embed_latents(self, latents):
        return nn.functional.normalize(self.features_of_latents(latents) @ self.weight, dim=-1)

    def embed_text(self, prompts):
        return nn.functional.normalize(torch.tensor([[len(p), 1.0, 2.0, 3.0] for p in prompts]), dim=-1)


def small_base() -> SimpleNamespace:
    """A random codec of 2 books of 16, beside a tower."""
    torch.manual_seed(0)
    codec = MagnitudeCodec(CodecConfig(width=24, latent_dim=8, encoder_blocks=1, decoder_blocks=1, n_q=2, card=16)).eval()
    for layer in codec.rvq.layers:
        layer._codebook.embed.copy_(torch.randn(layer._codebook.embed.shape))
    return SimpleNamespace(codec=codec, contrastive=Tower(), sha256="a" * 64)


def speaking(base: SimpleNamespace, n_q: int, card: int, n_layers: int = 2, dropout: float = 0.0) -> SimpleNamespace:
    """The base with a tiny language model, whose prompts are told apart by their length."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = MusicLMConfig(n_q=n_q, card=card, d_model=32, n_layers=n_layers, n_heads=2, d_ff=48, text_dim=4, dropout=dropout)
        lm = MusicLM(shape).eval()

    def conditions(prompts: list[str], tempo_bpm: object = None) -> Conditions:
        text = torch.tensor([[[float(len(prompt)), 1.0, -1.0, 0.5]] for prompt in prompts])
        return Conditions(text, torch.ones(len(prompts), 1, dtype=torch.bool), torch.full((len(prompts),), float("nan")))

    return SimpleNamespace(**vars(base), lm=lm, conditions=conditions)


def codes_of(n: int, seed: int = 0, frames: int = 10) -> torch.Tensor:
    """Random codes [n, 2, frames] of it."""
    return torch.randint(0, 16, (n, 2, frames), generator=torch.Generator().manual_seed(seed))


def toy_votes(folder: Path) -> tuple[Snapshot, Clips, Folds]:
    """The toy's votes, and heads over what the toy's raters hear (PLAIN) or over noise (BLIND)."""
    write_toy_snapshot(folder, "b" * 64, seed=0)
    snapshot = load_snapshot(folder)
    clips = Clips(snapshot, 2, 32)
    heard = torch.stack([codes[0].float().mean(1) / 4 for codes in clips.codes])
    noise = torch.randn(heard.shape, generator=torch.Generator().manual_seed(0))
    return snapshot, clips, Folds({BLIND: noise, PLAIN: heard}, clips.fold_of_prompt(5, 0), 5)
