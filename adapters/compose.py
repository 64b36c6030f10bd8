"""Several adapters as one, exactly: sum_i w_i (alpha_i / r_i) B_i A_i.

Stacking does it: A = [A_1; A_2; ...] and B = [w_1 s_1 B_1, w_2 s_2 B_2, ...] give B A = sum_i w_i s_i B_i A_i, the ranks add and
any weights will do, negative ones too. Averaging the factors ("linear") does not: (B_1 + B_2)(A_1 + A_2) has cross terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base_models.errors import UserError


@dataclass(frozen=True)
class LoraTensors:
    """One adapter's tensors: `<module>.lora_A.weight` [r, in], `<module>.lora_B.weight` [out, r]; it adds (alpha / r) B A."""

    tensors: Mapping[str, Tensor]
    r: int
    alpha: float

    @property
    def modules(self) -> list[str]:
        """The linear maps that it changes, sorted."""
        return sorted(key.removesuffix(".lora_A.weight") for key in self.tensors if key.endswith(".lora_A.weight"))

    def delta(self, module: str) -> Tensor:
        """What it adds to one linear map's weight: [out, in]; zeros are not stored, so the module must be one of `modules`."""
        down, up = self.tensors[f"{module}.lora_A.weight"], self.tensors[f"{module}.lora_B.weight"]
        return (self.alpha / self.r) * (up @ down)


def mix(parts: Sequence[LoraTensors], weights: Sequence[float]) -> LoraTensors:
    """The adapter whose delta is sum_i weights_i * delta_i, exactly; its rank is the sum of the ranks and alpha = r.

    A module that a part does not change is changed by the others alone. Raises UserError when the counts differ.
    """
    if not parts or len(parts) != len(weights):
        raise UserError(f"{len(weights)} weights for {len(parts)} adapters", "one weight an adapter", "name both alike often")
    rank = sum(part.r for part in parts)
    tensors: dict[str, Tensor] = {}
    for module in sorted({module for part in parts for module in part.modules}):
        down_key, up_key = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        owners = [part for part in parts if down_key in part.tensors]
        n_in, n_out = owners[0].tensors[down_key].shape[1], owners[0].tensors[up_key].shape[0]
        if any((part.tensors[down_key].shape[1], part.tensors[up_key].shape[0]) != (n_in, n_out) for part in owners):
            raise UserError(f"adapters of different widths at {module}", "adapters of one base", "mix adapters of one base")
        downs, ups = [], []
        for part, weight in zip(parts, weights):
            down = part.tensors.get(down_key, torch.zeros(part.r, n_in))
            up = part.tensors.get(up_key, torch.zeros(n_out, part.r))
            downs.append(down.float())
            ups.append(up.float() * (weight * part.alpha / part.r))
        tensors[down_key] = torch.cat(downs, 0)
        tensors[up_key] = torch.cat(ups, 1)
    return LoraTensors(tensors, rank, float(rank))


def compress(adapter: LoraTensors, r: int) -> tuple[LoraTensors, float]:
    """The best adapter of rank r in the least-squares sense (truncated SVD of each delta), and its error.

    Returns: the adapter, and |delta - compressed| / |delta| (Frobenius, over all modules): a mix that was made smaller is no
    longer exact, and this says by how much.
    """
    tensors: dict[str, Tensor] = {}
    lost = total = 0.0
    for module in adapter.modules:
        left, left_r = torch.linalg.qr(adapter.tensors[f"{module}.lora_B.weight"].double() * (adapter.alpha / adapter.r))
        right, right_r = torch.linalg.qr(adapter.tensors[f"{module}.lora_A.weight"].double().T)
        u, scale, v = torch.linalg.svd(left_r @ right_r.T)
        kept = min(r, len(scale))
        down, up = torch.zeros(r, len(right)), torch.zeros(len(left), r)
        down[:kept] = ((right @ v[:kept].T) * scale[:kept].sqrt()).T.float()
        up[:, :kept] = ((left @ u[:, :kept]) * scale[:kept].sqrt()).float()
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down, up
        lost += float(scale[kept:].square().sum())
        total += float(scale.square().sum())
    return LoraTensors(tensors, r, float(r)), (lost / total) ** 0.5 if total else 0.0
