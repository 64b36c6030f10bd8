"""A language model spread over processes.

    each decoder layer's weights [out, in] -> 1 / N of the rows on each of N processes, gathered while the layer computes

The sharding is PyTorch's own `fully_shard` (FSDP2), called here rather than by accelerate, whose FSDP configuration silently
becomes DDP on CPUs: so that what a GPU runs is what the tests run. Gathering parameters for the forward pass and again for the
backward pass is ZeRO-3; keeping them in between is ZeRO-2's memory (`fsdp_reshard_after_forward: false`).

PPO spreads the frozen base (`shard_frozen`) while it learns; an adapter's gradients and moments are some hundred thousand numbers
and stay whole, and the sampler needs all weights on every process anyway.

Papers: Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO). Zhao et al. 2023, arXiv:2304.11277 (FSDP).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.models.musicgen.modeling_musicgen import MusicgenDecoderLayer

from base_models.lm import MusicLM


def shard(lm: MusicLM) -> MusicLM:
    """Spread all weights of `lm` over all processes, in place. They move to this process's device, a layer at a time.

    `lm` must be used as a function from here on: `lm(codes, cond)` gathers what stands outside of layers, its methods do not.
    """
    for module in [*layers(lm), lm]:
        fully_shard(module, reshard_after_forward=_after_forward())
    return lm


def shard_frozen(lm: MusicLM) -> MusicLM:
    """Spread the frozen weights of the decoder layers, in place; what is trained (an adapter) and what stands outside of layers stay
    whole on every process, so gradients, optimiser and checkpoints know nothing of it.

    All processes must call the layers equally often. The sampler reads weights by itself: `with gathered(lm): generate(lm, ...)`.
    """
    for layer in layers(lm):
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, reshard_after_forward=_after_forward(), ignored_params=trained)
    return lm


def _after_forward() -> bool:
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "0")


@contextlib.contextmanager
def gathered(lm: nn.Module) -> Iterator[None]:
    """Inside, the weights of a sharded model are whole on every process. All processes must call it together."""
    for layer in _sharded(lm):
        layer.unshard()
    try:
        yield
    finally:
        free(lm)


def free(lm: nn.Module) -> None:
    """Give back what a forward pass without a backward pass has left gathered: from here on parameters are shards again."""
    for module in _sharded(lm):
        module.reshard()


def _sharded(lm: nn.Module) -> list[FSDPModule]:
    return [module for module in lm.modules() if isinstance(module, FSDPModule)]


def layers(lm: nn.Module) -> list[Any]:
    """The decoder layers, which are what is gathered and freed at a time."""
    return [module for module in lm.modules() if isinstance(module, MusicgenDecoderLayer)]


def share_held(lm: nn.Module) -> float:
    """The share of the parameters that this process holds: 1 for a whole model, about 1 / N in shards."""
    held = sum(local(p).numel() for p in lm.parameters())
    return held / sum(p.numel() for p in lm.parameters())


def local(tensor: Tensor) -> Tensor:
    """This process's part, or the tensor itself where it is whole. A view: what is written there is written in the shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: Any) -> Any:
    """A state dict, of a model or an optimiser, with every sharded tensor gathered on the CPU. All processes must call it together."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value) for value in state)
    return state


def spread_moments(optimizer: torch.optim.Optimizer) -> None:
    """Cut an optimiser's whole moments, as a checkpoint holds them, like the sharded parameters that they belong to; in place."""
    for parameter, moments in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and not isinstance(value, DTensor):
                    moments[name] = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def whole_copy(lm: MusicLM) -> MusicLM:
    """A whole language model on the CPU with the weights of one that may be sharded, in eval mode. All processes must call it together."""
    state = whole(lm.state_dict())
    copy = MusicLM(lm.config)
    copy.load_state_dict(state)
    return copy.eval()
