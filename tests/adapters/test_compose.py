"""A mix of adapters is the exact weighted sum of their deltas."""

from __future__ import annotations

import pytest
import torch

from adapters.compose import LoraTensors, compress, mix
from base_models.errors import UserError


def random_lora(r: int, alpha: float, seed: int, modules: tuple[str, ...] = ("x", "y")) -> LoraTensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = torch.randn(r, 12, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(20, r, generator=generator)
    return LoraTensors(tensors, r, alpha)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.7), (2.0, -1.5), (0.0, 1.0)])
def test_mix_is_the_exact_sum_of_the_deltas(weights):
    a, b = random_lora(4, 8, 0), random_lora(3, 5, 1)
    mixed = mix([a, b], weights)
    assert mixed.r == 7
    for module in ("x", "y"):
        exact = weights[0] * a.delta(module) + weights[1] * b.delta(module)
        torch.testing.assert_close(mixed.delta(module), exact, atol=1e-5, rtol=1e-5)


def test_averaged_factors_would_be_far_off():
    a, b = random_lora(4, 4, 0), random_lora(4, 4, 1)
    linear = LoraTensors({k: 0.5 * (a.tensors[k] + b.tensors[k]) for k in a.tensors}, 4, 4)
    exact = 0.5 * a.delta("x") + 0.5 * b.delta("x")
    assert (linear.delta("x") - exact).norm() > 0.3 * exact.norm()


def test_adapters_of_different_modules_mix():
    a, b = random_lora(4, 8, 0, ("x",)), random_lora(2, 8, 1, ("x", "y"))
    mixed = mix([a, b], (1.0, 2.0))
    torch.testing.assert_close(mixed.delta("x"), a.delta("x") + 2 * b.delta("x"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.delta("y"), 2 * b.delta("y"), atol=1e-5, rtol=1e-5)


def test_weights_must_be_as_many_as_adapters():
    with pytest.raises(UserError, match="1 weights for 2 adapters"):
        mix([random_lora(2, 2, 0), random_lora(2, 2, 1)], [1.0])


def test_compression_to_the_full_rank_loses_nothing_and_below_it_reports_its_error():
    mixed = mix([random_lora(4, 8, 0), random_lora(3, 5, 1)], (1.0, -1.0))
    same, error = compress(mixed, 7)
    assert error < 1e-6
    torch.testing.assert_close(same.delta("x"), mixed.delta("x"), atol=1e-4, rtol=1e-4)
    small, error = compress(mixed, 3)
    lost = sum(float((small.delta(m) - mixed.delta(m)).square().sum()) for m in ("x", "y")) ** 0.5
    total = sum(float(mixed.delta(m).square().sum()) for m in ("x", "y")) ** 0.5
    assert error == pytest.approx(lost / total, rel=1e-3)
    assert error > 0.01
