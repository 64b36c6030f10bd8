"""The settings of a DPO run in TRL's words."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig

from base_models.launch import bf16_is_faster

if TYPE_CHECKING:
    from rlhf.train_dpo import Config


def steps_of_round(cfg: Config, n_rows: int) -> int:
    """Optimiser steps of a round of `n_rows` rows."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return cfg.round_epochs * math.ceil(math.ceil(n_rows / (cfg.batch_size * world)) / cfg.accumulation)


def training_arguments(cfg: Config, n_rows: int) -> DPOConfig:
    """TRL's settings. Never truncate (its default cuts at 1,024 ids silently), never phone, never pickle.

    Rounds are saved whole: within one, the policy that played its clips is gone."""
    in_rounds = cfg.reward is not None or (cfg.toy and cfg.toy_reward)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = not torch.cuda.is_available()
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and bf16_is_faster())
    pair_loss = "ipo" if cfg.loss == "ipo" else "sigmoid"
    return DPOConfig(
        output_dir=str(cfg.out),
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and world > 1 else None,
        ddp_find_unused_parameters=False,
        bf16=bf16,
        activation_checkpointing=False,
        max_length=None,
        remove_unused_columns=False,
        precompute_ref_log_probs=True,
        beta=cfg.beta,
        loss_type=[pair_loss],
        learning_rate=cfg.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": cfg.lr_end},
        warmup_steps=cfg.warmup_steps,
        max_grad_norm=1.0,
        per_device_train_batch_size=cfg.batch_size,
        per_device_eval_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.accumulation,
        num_train_epochs=cfg.rounds * cfg.round_epochs if in_rounds else cfg.epochs,
        max_steps=cfg.steps or -1,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=steps_of_round(cfg, n_rows) if in_rounds else cfg.save_every,
        report_to=[],
        dataloader_pin_memory=not cpu,
        seed=cfg.seed,
        data_seed=cfg.seed,
    )


def kto_arguments(cfg: Config, args: DPOConfig) -> KTOConfig:
    """The same settings for TRL's KTOTrainer, which goes through its rows in a fixed order."""
    own: dict[str, Any] = {"loss_type": "kto", "train_sampling_strategy": "sequential", "desirable_weight": 1.0, "undesirable_weight": 1.0}
    shared: tuple[str, ...] = (
        "output_dir",
        "use_cpu",
        "ddp_backend",
        "ddp_find_unused_parameters",
        "bf16",
        "activation_checkpointing",
        "max_length",
    )
    shared += ("remove_unused_columns", "precompute_ref_log_probs", "beta", "learning_rate", "lr_scheduler_type", "warmup_steps")
    shared += ("lr_scheduler_kwargs",)
    shared += ("max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
    shared += ("max_steps", "logging_steps", "logging_first_step", "save_strategy", "save_steps", "report_to", "dataloader_pin_memory")
    shared += ("seed", "data_seed")
    return KTOConfig(**{name: getattr(args, name) for name in shared} | own)
