"""A reward that reads codec tokens: the base's own language model, with a LoRA that votes have trained and a pooled head.

    codes [B, K, T] + prompts -> first layers of the LM + LoRA -> states of a middle and of the last of them [B, S, d]
                              -> mean and spread over time [B, 4 d] -> standardised -> score [B]

A language model that predicts music has heard more of it than votes could tell of, and starts a reward that no statistics of the
sound limit (Ziegler et al. 2019, arXiv:1909.08593, start theirs from the policy, too). Each member of the ensemble is an adapter and
a head on one copy of the base's first layers, so that a policy that learns does not move what it is judged by. How it learns is
rlhf.token_fit; whether it is used at all is decided by held-out votes (`train_reward.py --trunk`).

It has no slope along the codec's latents: it knows codes by their number, not by their sound.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters.lora import activate, adapter_names, adapter_tensors, attach_lora, merged, remove_adapter, set_adapter_tensors
from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.lm import MusicLM

BATCH = 32
"""Clips that are scored together."""


class Speaker(Protocol):
    """What of a policy is read here (base_models.policy.Policy has it)."""

    @property
    def lm(self) -> MusicLM: ...
    def conditions(self, prompts: list[str], tempo_bpm: list[float | None] | None = None) -> Conditions: ...


@dataclass(frozen=True)
class TrunkShape:
    """How much of the language model is read, and how much of it votes may change."""

    layers: int = 3
    """The LM's first layers: what comes early is how a clip sounds, what comes late is which code is next."""
    r: int = 8
    """Rank of the adapter."""
    alpha: float = 16.0
    """The adapter's update is scaled by alpha / r."""


class TokenTrunk:
    """An ensemble of adapters and heads on one copy of a base's first layers."""

    def __init__(self, base: Speaker, shape: TrunkShape, n_members: int, seed: int) -> None:
        """Fresh members: adapters that change nothing yet, heads of zeros, so that every clip scores 0."""
        self.base, self.shape = base, shape
        self.lm = first_layers(base.lm, shape.layers)
        self.names = [f"taste{index}" for index in range(n_members)]
        with torch.random.fork_rng(devices=[]):
            for index, name in enumerate(self.names):
                torch.manual_seed(seed * 1000 + index)
                attach_lora(self.lm, shape.r, shape.alpha, name=name)
        self.lm.to(self.device).eval()
        width = 4 * self.lm.config.d_model
        self.mean, self.spread = torch.zeros(width, device=self.device), torch.ones(width, device=self.device)
        """[4 d]: standardise the pooled states."""
        self.weights = torch.zeros(n_members, width, device=self.device)
        """[E, 4 d]: the heads."""
        self.offsets = torch.zeros(n_members, device=self.device)
        """[E]: each member's mean over the clips it was fitted on."""
        self._said: dict[str, Conditions] = {}

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Prompts -> conditions on the trunk's device; each text is encoded once."""
        new = sorted(set(prompts) - set(self._said))
        if new:
            with torch.no_grad():
                made = self.base.conditions(new).to(self.device)
            self._said |= {prompt: made.index([row]) for row, prompt in enumerate(new)}
        return Conditions.cat([self._said[prompt] for prompt in prompts])

    def pooled(self, codes: Tensor, cond: Conditions) -> Tensor:
        """codes [B, K, T] -> standardised statistics of the states [B, 4 d], with the active adapter; gradients pass through."""
        heard = state_statistics(*trunk_states(self.lm, codes, cond)).float()
        return (heard - self.mean) / self.spread * self.mean.numel() ** -0.5

    @torch.no_grad()
    def member_scores(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """codes [B, K, T], prompts [B] -> [E, B]."""
        if len(prompts) != len(codes):
            raise ValueError(f"{len(codes)} clips and {len(prompts)} prompts")
        rows = torch.arange(len(codes)).split(BATCH)
        found = []
        for index, name in enumerate(self.names):
            activate(self.lm, name)
            with merged(self.lm), evaluating(self.lm):
                made = [self.pooled(codes[part].to(self.device), self.conditions([prompts[row] for row in part])) for part in rows]
            found.append(torch.cat(made) @ self.weights[index] - self.offsets[index])
        return torch.stack(found).to(codes.device)

    def tensors(self) -> dict[str, Tensor]:
        """All that votes have made, for a file."""
        own = {"mean": self.mean, "spread": self.spread, "weights": self.weights, "offsets": self.offsets}
        adapters = {f"{name}.{key}": tensor for name in self.names for key, tensor in adapter_tensors(self.lm, name).items()}
        return {key: tensor.detach().cpu().clone() for key, tensor in {**own, **adapters}.items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, on a fresh trunk of the same shape."""
        for key in ("mean", "spread", "weights", "offsets"):
            setattr(self, key, tensors[key].to(self.device))
        for name in self.names:
            there = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
            set_adapter_tensors(self.lm, there, name)


def first_layers(lm: MusicLM, n: int) -> MusicLM:
    """A copy of the language model up to its n-th layer, without adapters and without the heads that name the next code.

    Raises: UserError when it has not so many.
    """
    decoder: Any = lm.decoder.model.decoder
    if not 1 <= n <= len(decoder.layers):
        raise UserError(f"--trunk-layers {n}", f"1 to {len(decoder.layers)}, the layers of this base", "ask for fewer layers")
    beyond, heads = list(decoder.layers[n:]), lm.decoder.lm_heads
    made = copy.deepcopy(lm, {id(module): nn.Identity() for module in (*beyond, heads)})
    copied: Any = made.decoder.model.decoder
    copied.layers = copied.layers[:n]
    for name in adapter_names(made):
        remove_adapter(made, name)
    return made.requires_grad_(False)


def trunk_states(lm: MusicLM, codes: Tensor, cond: Conditions) -> tuple[Tensor, Tensor]:
    """codes [B, K, T] -> states of the middle and of the last layer [B, S - 1, d], the one before any code was heard left out.

    One forward pass under teacher forcing, with whatever adapter is active; gradients pass through.
    """
    decoder: Any = lm.decoder.model.decoder
    kept: list[Tensor] = []

    def keep(module: object, arguments: object, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    hook = decoder.layers[(len(decoder.layers) - 1) // 2].register_forward_hook(keep)
    try:
        last = lm.hidden(codes, cond)
    finally:
        hook.remove()
    return kept[0][:, 1:], last[:, 1:]


def state_statistics(*layers: Tensor) -> Tensor:
    """States of layers, [B, S, d] each -> [B, 2 d for each]: mean and spread over time."""
    return torch.cat([part for layer in layers for part in (layer.mean(1), (layer.var(1, correction=0) + 1e-6).sqrt())], dim=1)


@contextlib.contextmanager
def evaluating(lm: nn.Module) -> Iterator[None]:
    """Inside, without dropout; afterwards each module is in the mode it was in."""
    training = [module for module in lm.modules() if module.training]
    lm.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
