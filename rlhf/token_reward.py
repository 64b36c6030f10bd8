"""What the token LM itself makes of a clip: its hidden states, as frozen features for a reward's heads (`--trunk`).

    codes [B, K, T] + prompts -> LM under teacher forcing -> states of a middle and of the last layer [B, S, d]
                              -> mean and spread over time -> features [B, 4 d]

A language model that predicts music has to hear some of what makes it good; features of frozen audio models are the common
baseline of reward models, and the policy's own trunk costs no second network. The LM is read as it was before any adapter, in
evaluation mode, so that a policy that learns does not move the features it is judged by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adapters.lora import adapter_disabled
from base_models.conditions import Conditions
from base_models.lm import MusicLM


class Speaker(Protocol):
    """What of a policy is read here (base_models.policy.Policy has it)."""

    @property
    def lm(self) -> MusicLM: ...
    def conditions(self, prompts: list[str], tempo_bpm: list[float | None] | None = None) -> Conditions: ...


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
    return torch.cat([part for layer in layers for part in (layer.mean(1), layer.std(1, correction=0))], dim=1)


@torch.no_grad()
def lm_statistics(base: Speaker, codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """codes [B, K, T], prompts [B] -> [B, 4 d]: mean and spread over time of the frozen LM's middle and last layer.

    Costs one forward pass of the LM. Adapters are switched off while it runs, dropout too.
    """
    if len(prompts) != len(codes):
        raise ValueError(f"{len(codes)} clips and {len(prompts)} prompts")
    with adapter_disabled(base.lm), evaluating(base.lm):
        return state_statistics(*trunk_states(base.lm, codes, base.conditions(list(prompts)))).float()


@contextlib.contextmanager
def evaluating(lm: torch.nn.Module) -> Iterator[None]:
    """Inside, without dropout; afterwards each module is in the mode it was in."""
    training = [module for module in lm.modules() if module.training]
    lm.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
