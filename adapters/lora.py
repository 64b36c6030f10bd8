"""Low-rank adapters inside the token LM: W x + (alpha / r) B A x.   Hu et al. 2021, arXiv:2106.09685.

PEFT injects its layers into the `MusicLM` itself (`inject_adapter_in_model`); nothing is wrapped around it. So `attach_lora`
returns the very object it was given: `lm.logps`, `lm.hidden`, `lm.heads`, `lm.memory` and `isinstance(lm, MusicLM)` hold as
before, with the adapter in every forward pass. A trainer that wraps the LM (TRL's PeftModel, DDP) injects into the same
object, so that these functions serve there too: call them on the LM itself.

    attach_lora(lm, r=16, alpha=32)            # only A and B of "default" have gradients from here on
    with adapter_disabled(lm): ...             # the reference: the policy without its adapter
    with merged(lm): generate(lm, ...)         # W + (alpha / r) B A in the weights: sampling pays nothing for the adapter
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import set_adapter
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from adapters.folded import FoldedLinear
from base_models.errors import UserError
from base_models.lm import LORA_TARGETS

Model = TypeVar("Model", bound=nn.Module)


def lora_config(r: int, alpha: float, targets: str = LORA_TARGETS) -> LoraConfig:
    """PEFT's configuration of a plain LoRA without dropout (dropout would make the policy differ from itself)."""
    scale: Any = alpha  # PEFT's annotation says int; it divides
    config = LoraConfig(r=r, lora_alpha=scale, lora_dropout=0.0, target_modules=targets, bias="none")
    config._register_custom_module({nn.Linear: FoldedLinear})  # experimental in PEFT, hence its pin
    return config


def attach_lora(
    lm: Model, r: int = 16, alpha: float = 32.0, targets: str = LORA_TARGETS, name: str = "default", init_b: bool = False
) -> Model:
    """Put a new trainable adapter into `lm`, freeze everything else, and return `lm` itself.

    Args: r: rank. alpha: the update is scaled by alpha / r. targets: regular expression over module names (full match).
    name: several adapters may live side by side; the new one becomes the only active one. init_b: draw B at random instead of
    0, which makes the adapter differ from the base at once (for tests; a real adapter starts as the identity).
    """
    if name in adapter_names(lm):
        raise UserError(f"a second adapter called '{name}'", "a new name", "choose another name or remove_adapter first")
    known: dict[str, LoraConfig] = lm.__dict__.pop("peft_config", {})  # PEFT warns of a second one; here several are meant
    inject_adapter_in_model(lora_config(r, alpha, targets), lm, adapter_name=name)
    lm.__dict__["peft_config"] = known | lm.__dict__["peft_config"]
    activate(lm, name, trainable=True)
    if init_b:
        for layer in lora_layers(lm).values():
            nn.init.normal_(_factors(layer, name)[1], std=0.02)
    return lm


# ---- finding ---------------------------------------------------------------------------------------------------------


def lora_layers(lm: nn.Module) -> dict[str, LoraLayer]:
    """Module name -> LoRA layer. Pass the LM itself: the names are the keys of the adapter's file."""
    return {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}


def _factors(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of one adapter at one linear map."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    assert isinstance(down, nn.Linear)
    assert isinstance(up, nn.Linear)
    return down.weight, up.weight


def adapter_names(lm: nn.Module) -> list[str]:
    """Names of the adapters that stand in `lm`, sorted."""
    return sorted({name for layer in lora_layers(lm).values() for name in layer.lora_A})


def active_adapters(lm: nn.Module) -> list[str]:
    """Names of the adapters that take part in a forward pass."""
    return sorted({name for layer in lora_layers(lm).values() for name in layer.active_adapters if name in layer.lora_A})


def trainable_parameters(lm: nn.Module) -> list[nn.Parameter]:
    """What an optimiser gets."""
    return [parameter for parameter in lm.parameters() if parameter.requires_grad]


# ---- switching -------------------------------------------------------------------------------------------------------


def activate(lm: nn.Module, names: str | Sequence[str], trainable: bool = False) -> None:
    """Make exactly these adapters active; their sum is applied. Base weights are frozen, adapters too unless `trainable`."""
    wanted = [names] if isinstance(names, str) else list(names)
    missing = sorted(set(wanted) - set(adapter_names(lm)))
    if missing:
        raise UserError(f"no adapter {missing}", f"some of {adapter_names(lm)}", "load or attach it first")
    for parameter in lm.parameters():
        parameter.requires_grad_(False)
    set_adapter(lm, wanted, inference_mode=not trainable)


def remove_adapter(lm: nn.Module, name: str) -> None:
    """Take an adapter out of `lm`; which of the others are active does not change."""
    flags = [(parameter, parameter.requires_grad) for parameter in lm.parameters()]
    for layer in lora_layers(lm).values():
        if name in layer.lora_A:
            layer.set_adapter([other for other in layer.active_adapters if other != name])
            layer.delete_adapter(name)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    lm.__dict__.get("peft_config", {}).pop(name, None)


@contextlib.contextmanager
def adapter_disabled(lm: nn.Module) -> Iterator[None]:
    """Inside, `lm` is its own base: bitwise what it was before any adapter. Which parameters have gradients is restored."""
    layers = [layer for layer in lora_layers(lm).values() if not layer.disable_adapters]
    flags = [(parameter, parameter.requires_grad) for parameter in lm.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def merged(lm: nn.Module) -> Iterator[None]:
    """Inside, the active adapters stand in the weights themselves; afterwards the very same base tensors are back.

    PEFT's unmerge subtracts what it added and leaves rounding errors in the base; here the old tensors are kept aside.
    """
    layers = [layer for layer in lora_layers(lm).values() if not layer.disable_adapters]
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for layer in layers:
            linear = layer.get_base_layer()
            assert isinstance(linear, nn.Linear)
            weight = linear.weight
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            deltas = [layer.scaling[name] * (up @ down) for name in names for down, up in [_factors(layer, name)]]
            kept.append((weight, weight.data))
            if deltas:
                weight.data = weight.data + torch.stack(deltas).sum(0).to(weight.dtype)
    try:
        with adapter_disabled(lm):
            yield
    finally:
        for weight, data in kept:
            weight.data = data


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _places(lm: nn.Module, name: str) -> dict[str, Tensor]:
    """Key of an adapter's file -> the factor itself as it stands in `lm`; nothing for an adapter that is not there."""
    layers = ((module, layer) for module, layer in lora_layers(lm).items() if name in layer.lora_A)
    return {f"{module}.lora_{side}.weight": factor for module, layer in layers for side, factor in zip("AB", _factors(layer, name))}


def adapter_tensors(lm: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """`<module>.lora_A.weight` [r, in] and `<module>.lora_B.weight` [out, r] of one adapter, detached copies."""
    tensors = {key: place.detach().clone() for key, place in _places(lm, name).items()}
    if not tensors:
        raise UserError(f"no adapter '{name}'", f"one of {adapter_names(lm)}", "name an adapter that is attached")
    return tensors


def adapter_shape(lm: nn.Module, name: str = "default") -> tuple[int, float]:
    """(r, alpha) of one adapter."""
    for layer in lora_layers(lm).values():
        if name in layer.lora_A:
            return int(layer.r[name]), float(layer.lora_alpha[name])
    raise UserError(f"no adapter '{name}'", f"one of {adapter_names(lm)}", "name an adapter that is attached")


def scale_adapter(lm: nn.Module, factor: float, name: str = "default") -> None:
    """Make an attached adapter's update `factor` times what it is, in place: 0 is the base. UserError for an unknown name."""
    tensors = adapter_tensors(lm, name)
    set_adapter_tensors(lm, {key: tensor * factor if ".lora_B." in key else tensor for key, tensor in tensors.items()}, name)


def set_adapter_tensors(lm: nn.Module, tensors: Mapping[str, Tensor], name: str = "default") -> None:
    """Fill an attached adapter. Every tensor must find its place and every place its tensor, else UserError."""
    places = _places(lm, name)
    wrong = sorted(set(places) ^ set(tensors))
    wrong += sorted(k for k in set(places) & set(tensors) if places[k].shape != tensors[k].shape)
    if wrong:
        raise UserError(
            f"adapter tensors that do not fit this model: {wrong[:3]}{' ...' if len(wrong) > 3 else ''}",
            f"{len(places)} tensors of this model's targets and rank",
            "use the base model this adapter was trained on",
        )
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(tensors[key])
