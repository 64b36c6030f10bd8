"""What the tests of PPO share: the toy's settings, a tiny language model, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.library import read_adapter
from adapters.lora import attach_lora
from base_models.conditions import Conditions
from base_models.lm import MusicLM, MusicLMConfig
from rlhf import dpo_task, train_dpo
from rlhf.judges import Score, Slope
from rlhf.ppo_task import Prompts, Task, share_of_code_3, share_of_code_5, toy_task
from rlhf.rewards import HUMAN, Mixed, parse_weights, weighted
from rlhf.rollout import Critic, Rollout, play
from rlhf.train_ppo import TOY, Config

CODES: dict[str, Any] = {"credit": "codes", "lr": 1e-2, "kl_coef": 0.002}
"""The toy by code-by-code credit."""
T = 7
"""Frames that `played` plays."""


def config(out: Path, **changes: Any) -> Config:
    return Config(**{**TOY, "out": out, "steps": 3, "batch_size": 32, **changes})


def collapsing(out: Path, **changes: Any) -> Config:
    """The toy's best clip is one code throughout: as it learns, clips of one prompt become alike."""
    return config(out, **{"steps": 30, "look_every": 2, "heldout_clips": 8, "min_diversity": 0.8, "patience": 1, **changes})


def judged_by(score: Score, heldout: Prompts | None = None, slope: Slope | None = None) -> Task:
    """The toy with another judge, of whose slope nothing is known unless it is given; without held-out prompts it is called once a round
    (by code-by-code credit the slope alone is)."""
    return dataclasses.replace(toy_task(0), score=score, slopes={} if slope is None else {HUMAN: slope}, heldout=heldout)


def two_slopes() -> Task:
    """The toy whose check of code 5 has a slope as well: latents [B, 2, T] that count code 3 and code 5."""
    toy = toy_task(0)
    counts = F.one_hot(torch.tensor([3, 5]), toy.lm.card).float().T.expand(toy.lm.n_q, -1, -1)

    def along(axis: int, score: Score) -> Slope:
        def slope(codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
            told = score(codes, prompts)  # NaN where code 5 is not asked for
            unit = F.one_hot(torch.tensor(axis), 2).float()[None, :, None].expand(len(codes), -1, codes.shape[2])
            return unit / codes[0].numel() * (1 + 0 * told)[:, None, None], told

        return slope

    slopes = {HUMAN: along(0, share_of_code_3), "code_5": along(1, share_of_code_5)}
    return dataclasses.replace(toy, slopes=slopes, codebooks=counts)


def even_too(cfg: train_dpo.Config) -> dpo_task.Task:
    """DPO's toy of own clips with a second part of the reward, `even`: the share of even codes, which has a slope as well."""
    toy = dpo_task.toy_task(cfg)
    assert toy.own is not None
    assert isinstance(toy.own.score, Mixed)
    low = toy.own.score

    def even(codes: Tensor, prompts: list[str]) -> Tensor:
        return (codes % 2 == 0).float().mean((1, 2))

    def along_low(codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        slope, score = low.slopes[HUMAN](codes, prompts)
        return torch.cat([slope, torch.zeros_like(slope)], 1), score

    def along_even(codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        slope = torch.full((len(codes), 1, codes.shape[2]), 1 / codes[0].numel())
        return torch.cat([torch.zeros_like(slope), slope], 1), even(codes, prompts)

    parts = weighted(parse_weights(cfg.weights), low.reward.parts[HUMAN].score, {"even": even})
    evens = (torch.arange(toy.lm.card) % 2 == 0).float()[None, :, None].expand(toy.lm.n_q, -1, -1)
    judge = Mixed(parts, {HUMAN: along_low, "even": along_even}, torch.cat([low.codebooks, evens], -1))
    return dataclasses.replace(toy, own=dataclasses.replace(toy.own, score=judge))


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(("seconds", "tokens_per_second"))}


def weights(out: Path) -> dict[str, Tensor]:
    return read_adapter(out / "adapter").lora.tensors


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def alone() -> dict[str, str]:
    """The environment of a run launched by hand: nothing of a launcher's, as many threads as here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))}
    return {**kept, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def tiny_lm(n_q: int = 3, card: int = 8, init_b: bool = True) -> MusicLM:
    """A random model with decided heads; `init_b` gives its adapter something to say."""
    torch.manual_seed(0)
    shape = MusicLMConfig(n_q=n_q, card=card, d_model=32, n_layers=2, n_heads=2, d_ff=64, text_dim=8, dropout=0.1)
    lm = MusicLM(shape).eval()
    for head in lm.decoder.lm_heads:
        torch.nn.init.normal_(head.weight, std=0.3)
    attach_lora(lm, r=4, alpha=8.0, init_b=init_b)
    return lm


def conditions(B: int) -> Conditions:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(B, 5, 8, generator=generator)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (B, 1), generator=generator)
    return Conditions(text * mask[..., None], mask, torch.tensor([90.0, float("nan")]).repeat(B)[:B])


def played(lm: MusicLM, B: int = 6, **settings: float) -> tuple[Rollout, Critic, Conditions]:
    critic, cond = Critic(32), conditions(B)
    torch.nn.init.normal_(critic.head.weight)
    return play(lm, critic, cond, range(B), range(B), T, **settings), critic, cond


def rollout_of(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Rollout:
    B = len(logps)
    nothing = torch.zeros_like(logps)
    codes = torch.zeros(B, 1, logps.shape[1], dtype=torch.int64)
    none = torch.zeros(B, 0)
    score = torch.full((B,), float("nan"))
    return Rollout(
        codes,
        torch.arange(B),
        mask,
        logps,
        ref_logps,
        nothing,
        none,
        none,
        none[:, :, None],
        nothing,
        score,
        nothing,
        *2 * [none[..., None, None]],
    )


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def ragged(B: int = 8, S: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """Random x [B, S] with a right-padded mask of ragged lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, S + 1, (B, 1), generator=generator)
    return torch.randn(B, S, generator=generator), torch.arange(S)[None] < lengths, generator
