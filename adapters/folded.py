"""LoRA's linear map with the adapter folded into the weight for the pass: a matrix product less, and no pass over all activations more.

PEFT computes W x, then B A x, multiplies the latter and adds it: for a narrow decoder on a CPU the scaling and the sum alone take as long
as W x. Here y = (W + s B A) x is one product. Neither W nor the sum has a gradient, so that none of its size is made:

    dL/dx = (W + s B A)^T g        dL/dA = (s B^T g) x^T        dL/dB = s g (A x)^T

The same numbers up to rounding (Hu et al. 2021, arXiv:2106.09685, section 4.1, folds likewise at inference). Only in float32: a sum
rounded to bfloat16 would lose small updates, so under autocast, and wherever else a plain adapter is not alone, PEFT's own way is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class FoldedLinear(Linear):
    """PEFT's LoRA layer of an nn.Linear; all but the forward pass is PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]."""
        name = self._foldable(x) if not args and not kwargs else None
        if name is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base: Any = self.get_base_layer()
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        y: Tensor = _Folded.apply(x.flatten(0, -2), base.weight, base.bias, down, up, self.scaling[name])  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])

    def _foldable(self, x: Tensor) -> str | None:
        """The one adapter that takes part, where folding it is exact and pays: with few rows the sum would cost more than it saves."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        (name,) = active
        base: Any = self.get_base_layer()
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        plain = (
            type(base) is nn.Linear
            and name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
            and up.bias is None
            and not any(parameter.requires_grad for parameter in base.parameters())
            and {x.dtype, base.weight.dtype, down.weight.dtype, up.weight.dtype} == {torch.float32}
            and not torch.is_autocast_enabled(x.device.type)
        )
        pays = x.numel() // x.shape[-1] * (base.in_features + base.out_features) > base.in_features * base.out_features
        return name if plain and pays else None


def _sum(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """W + s B A."""
    return torch.addmm(weight, up, down, alpha=scale)


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        return F.linear(x, _sum(weight, up, down, scale), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, down, up = ctx.saved_tensors
        inner = (g @ up).mul_(ctx.scale)
        by_x = g @ _sum(weight, up, down, ctx.scale) if ctx.needs_input_grad[0] else None  # kept, it would be the model once more
        return by_x, None, None, inner.T @ x, (g.T @ (x @ down.T)).mul_(ctx.scale), None
