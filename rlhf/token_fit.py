"""Votes -> a reward that reads codec tokens (rlhf.token_reward), and whether it foretells votes better than frozen features do.

    pairs of clips -> windows of their codes -> Bradley-Terry with soft labels -> LoRA and head, member by member
    an eighth of the prompts -> when to stop
    outer folds -> scores by trunks that have not met the fold -> right or wrong, vote by vote, beside the frozen features

Bradley and Terry 1952; LoRA: Hu et al. 2021, arXiv:2106.09685. Early stopping has its own prompts, taken from those that a fold may
learn from: the votes that judge a trunk choose nothing in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.lora import activate, adapter_tensors, set_adapter_tensors, trainable_parameters
from rlhf.losses import bradley_terry_loss
from rlhf.reward_heads import Pairs, log_loss
from rlhf.token_reward import BATCH, TokenTrunk

Tell = Callable[[], None]
"""Called after each step, for a progress bar."""


@dataclass(frozen=True)
class Recipe:
    """How a member learns."""

    epochs: int = 4
    """Passes over the pairs; kept is the one after which the inner prompts were foretold best."""
    batch: int = 24
    """Pairs a step."""
    window: int = 64
    """Frames of a clip that a step hears, from a place drawn at random; whole clips are scored."""
    lr: float = 1e-3
    head_lr: float = 1e-2
    weight_decay: float = 0.1
    """Of the head; the adapter is held by its rank and by early stopping."""


def standardise(trunk: TokenTrunk, clips: Sequence[Tensor], prompts: Sequence[str], most: int = 256) -> None:
    """Let the heads see statistics of mean 0 and spread 1 over (at most so many) clips, as the base hears them. No vote is used."""
    step = max(1, len(clips) // most)
    rows = range(0, len(clips), step)
    with torch.no_grad():
        activate(trunk.lm, trunk.names[0])
        heard = torch.cat([trunk.pooled(clips[row].to(trunk.device), trunk.conditions([prompts[row]])) for row in rows])
    heard *= heard.shape[1] ** 0.5
    trunk.mean, trunk.spread = heard.mean(0), heard.std(0, correction=0) + 1e-3


def fit_member(
    trunk: TokenTrunk,
    index: int,
    clips: Sequence[Tensor],
    prompts: Sequence[str],
    learn: Pairs,
    inner: Pairs,
    recipe: Recipe,
    seed: int,
    tell: Tell = lambda: None,
) -> list[float]:
    """Train member `index` in place on pairs, and keep it as it was when the inner pairs were foretold best.

    Args: clips: codes [1, K, T] by row. prompts: by row.
    Returns: the inner loss before and after each pass; nats, log 2 for ignorance.
    """
    name, generator = trunk.names[index], torch.Generator().manual_seed(seed)
    activate(trunk.lm, name, trainable=True)
    head = nn.Parameter(trunk.weights[index].clone())
    adapter = trainable_parameters(trunk.lm)
    groups = [
        {"params": adapter, "lr": recipe.lr, "weight_decay": 0.0},
        {"params": [head], "lr": recipe.head_lr, "weight_decay": recipe.weight_decay},
    ]
    solver = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    learn = learn.index(learn.weight > 0)
    learn = learn.reweighted(learn.weight / learn.weight.mean())
    steps = math.ceil(len(learn) / recipe.batch)
    plan = torch.optim.lr_scheduler.LambdaLR(
        solver, lambda step: min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (recipe.epochs * steps))))
    )

    def inner_loss() -> float:
        used, where = torch.unique(torch.cat([inner.chosen, inner.rejected]), return_inverse=True)
        with torch.no_grad():
            score = torch.cat([trunk.pooled(c, trunk.conditions(p)) @ head for c, p in batches(clips, prompts, used, trunk.device)])
        return log_loss((score[where[: len(inner)]] - score[where[len(inner) :]]).cpu(), inner)

    losses = [inner_loss()]
    best = (losses[0], head.detach().clone(), adapter_tensors(trunk.lm, name))
    trunk.lm.fast_training()
    for _ in range(recipe.epochs):
        for part in by_prompt(learn.prompt, generator).split(recipe.batch):
            rows, where = torch.unique(torch.cat([learn.chosen[part], learn.rejected[part]]), return_inverse=True)
            codes = windows([clips[row] for row in rows.tolist()], recipe.window, generator).to(trunk.device)
            score = (trunk.pooled(codes, trunk.conditions([prompts[row] for row in rows.tolist()])) @ head).cpu()[where]
            loss = (learn.weight[part] * bradley_terry_loss(score[: len(part)], score[len(part) :], learn.p[part])).mean()
            solver.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*adapter, head], 1.0)
            solver.step()
            plan.step()
            tell()
        losses.append(inner_loss())
        if losses[-1] < best[0]:
            best = (losses[-1], head.detach().clone(), adapter_tensors(trunk.lm, name))
    trunk.weights[index] = best[1]
    set_adapter_tensors(trunk.lm, best[2], name)
    return losses


def by_prompt(prompt: Tensor, generator: torch.Generator) -> Tensor:
    """Rows in random order, those of one prompt together: its pairs share clips, and a clip is heard once a step. prompt [N] long."""
    place = torch.randperm(int(prompt.max()) + 1, generator=generator)
    mixed = torch.randperm(len(prompt), generator=generator)
    return mixed[torch.argsort(place[prompt[mixed]], stable=True)]


def windows(clips: Sequence[Tensor], frames: int, generator: torch.Generator) -> Tensor:
    """Codes [1, K, T] each -> [B, K, W] from places drawn at random; W is `frames`, or less where a clip is shorter."""
    width = min(frames, *(clip.shape[-1] for clip in clips))
    starts = [int(torch.randint(clip.shape[-1] - width + 1, (1,), generator=generator)) for clip in clips]
    return torch.cat([clip[..., start : start + width] for clip, start in zip(clips, starts)])


def batches(clips: Sequence[Tensor], prompts: Sequence[str], rows: Tensor, device: torch.device) -> list[tuple[Tensor, list[str]]]:
    """Whole clips in batches of one length, in the order of `rows`."""
    made: list[list[int]] = []
    for row in rows.tolist():
        if made and len(made[-1]) < BATCH and clips[made[-1][0]].shape == clips[row].shape:
            made[-1].append(row)
        else:
            made.append([row])
    return [(torch.cat([clips[row] for row in part]).to(device), [prompts[row] for row in part]) for part in made]
