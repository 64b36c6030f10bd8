"""How a run was launched: by how many processes, on what, and which of `configs/accelerate/` its script takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import distributed

from base_models.errors import UserError
from base_models.settings import keep_until_the_end

Sharding = Literal["no", "fsdp", "deepspeed"]
WHOLE = "configs/accelerate/cpu.yaml or ddp.yaml"


def check_processes(found: int, wanted: int) -> None:
    """UserError where `--processes` asks for another number than the launcher made; 0 does not ask."""
    if wanted and found != wanted:
        raise UserError(
            f"{found} process(es)",
            f"{wanted}, as --processes asks",
            "launch with torchrun --nproc-per-node N, or `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu` on a CPU",
        )


def end_in_good_order() -> None:
    """To be called once a script has joined its process group, where there is one: it then outlives `main`."""
    if distributed.is_available() and distributed.is_initialized():
        keep_until_the_end(distributed.group.WORLD)


def asked_sharding(environment: Mapping[str, str] | None = None) -> Sharding:
    """What the launcher asks for; it tells its script by variables."""
    told = os.environ if environment is None else environment
    asked: tuple[tuple[str, Sharding], ...] = (("ACCELERATE_USE_DEEPSPEED", "deepspeed"), ("ACCELERATE_USE_FSDP", "fsdp"))
    return next((kind for name, kind in asked if told.get(name, "").lower() in ("true", "1")), "no")


def check_sharding(can: tuple[Sharding, ...] = ()) -> Sharding:
    """What the launcher asks for, if the script can do it. Raises: UserError that names the configurations that it takes."""
    asked = asked_sharding()
    if asked != "no" and asked not in can:
        takes = f"{WHOLE}, or fsdp2.yaml" if can else f"{WHOLE}: here every process holds the model whole"
        raise UserError(
            f"a launch configuration of {asked}", takes, "launch with one of these; train_lm.py and train_ppo.py take fsdp2.yaml"
        )
    return asked


def open_accelerator(processes: int = 0, can: tuple[Sharding, ...] = (), mps: bool = False, **settings: Any) -> Accelerator:
    """The accelerator of a script that was launched as it can be.

    Where there is no GPU it is told so: asked for nothing, accelerate lets two processes run there as two worlds of one.

    Args: processes: as --processes asks. can: what the script can spread. mps: whether it runs on Apple's GPU, where it is alone.
    """
    check_sharding(can)
    apple = mps and torch.backends.mps.is_available() and os.environ.get("WORLD_SIZE", "1") == "1"
    accelerator = Accelerator(cpu=not (torch.cuda.is_available() or apple), **settings)
    end_in_good_order()
    check_processes(accelerator.num_processes, processes)
    return accelerator


def agreed(seconds: float, accelerator: Accelerator) -> float:
    """The first process's clock: what follows from it (a learning rate, an end) is then the same in all, or their weights part."""
    if accelerator.num_processes == 1:
        return seconds
    return float(broadcast(torch.tensor(seconds, device=accelerator.device)))


def bf16_is_faster(device: torch.device | None = None) -> bool:
    """Whether this processor (not given: a GPU where there is one) multiplies bfloat16 in hardware."""
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
