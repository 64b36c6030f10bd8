"""FoldedLinear is PEFT's LoRA layer up to rounding, gradients included, and leaves all that is not plain to PEFT."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from adapters.folded import FoldedLinear
from adapters.lora import activate, attach_lora, lora_config, lora_layers
from tests.adapters.conftest import Tiny

ROWS, IN, OUT = 96, 24, 40


def layer(kind: type[Linear], bias: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    made = kind(nn.Linear(IN, OUT, bias=bias).requires_grad_(False), "default", lora_config(4, 8.0, "x"), r=4, lora_alpha=8)
    nn.init.normal_(made.lora_B["default"].weight, std=0.2)
    return made.to(dtype)


def passed(made: Any, x: Tensor) -> list[Tensor]:
    """What a layer makes of x, and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    y = made(x)
    torch.manual_seed(1)
    y.float().backward(torch.randn(y.shape))
    grads = [made.lora_A["default"].weight.grad, made.lora_B["default"].weight.grad]
    assert all(grad is not None for grad in grads)
    assert made.get_base_layer().weight.grad is None
    assert x.grad is not None
    return [y.detach(), x.grad, *grads]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, IN), (4, ROWS // 4, IN)])
def test_output_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    folded, plain = layer(FoldedLinear, bias), layer(Linear, bias)
    assert folded._foldable(x) == "default"
    for got, want in zip(passed(folded, x), passed(plain, x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_its_derivatives_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(FoldedLinear, dtype=torch.float64)
    monkeypatch.setattr(FoldedLinear, "_foldable", lambda self, x: "default")
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: made(x), (x, made.lora_A["default"].weight, made.lora_B["default"].weight))


def test_an_adapter_that_says_nothing_is_exactly_the_base() -> None:
    made, x = layer(FoldedLinear), torch.randn(ROWS, IN)
    nn.init.zeros_(made.lora_B["default"].weight)
    assert torch.equal(made(x), made.get_base_layer()(x))


@pytest.mark.parametrize("why", ["bf16", "autocast", "off", "merged", "few rows", "a base that learns", "dropout"])
def test_what_is_not_plain_goes_pefts_way_bit_by_bit(why: str) -> None:
    dtype = torch.bfloat16 if why == "bf16" else torch.float32
    folded, plain = layer(FoldedLinear, dtype=dtype), layer(Linear, dtype=dtype)
    x = torch.randn(8 if why == "few rows" else ROWS, IN, dtype=dtype)
    for made in (folded, plain):
        if why == "off":
            made.enable_adapters(False)
        if why == "merged":
            made.merge()
        if why == "a base that learns":
            made.get_base_layer().bias.requires_grad_()
        if why == "dropout":
            made.lora_dropout["default"] = nn.Dropout(0.0)
    with torch.autocast("cpu", torch.bfloat16) if why == "autocast" else contextlib.nullcontext():
        assert folded._foldable(x) is None
        assert torch.equal(folded(x), plain(x))


def test_adapters_side_by_side_go_pefts_way(tiny: Tiny) -> None:
    attach_lora(tiny.lm, r=4, init_b=True)
    attach_lora(tiny.lm, r=4, name="other", init_b=True)
    made: Any = next(found for name, found in lora_layers(tiny.lm).items() if name.endswith("fc1"))
    assert isinstance(made, FoldedLinear)
    x = torch.randn(ROWS, made.in_features)
    assert made._foldable(x) == "other"
    alone = made(x)
    activate(tiny.lm, "default")
    assert made._foldable(x) == "default"
    made.set_adapter(["default", "other"])
    assert made._foldable(x) is None
    assert not torch.allclose(made(x), alone, atol=1e-3)
