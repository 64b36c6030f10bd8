"""How a run was launched: by how many processes, on what."""

from __future__ import annotations

import torch

from base_models.errors import UserError


def check_processes(found: int, wanted: int) -> None:
    """UserError where `--processes` asks for another number than the launcher made; 0 does not ask."""
    if wanted and found != wanted:
        raise UserError(
            f"{found} process(es)",
            f"{wanted}, as --processes asks",
            "launch with torchrun --nproc-per-node N, or `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu` on a CPU",
        )


def bf16_is_faster(device: torch.device | None = None) -> bool:
    """Whether this processor (not given: a GPU where there is one) multiplies bfloat16 in hardware."""
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
