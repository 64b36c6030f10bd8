"""What a checkpoint of a PPO run holds, and how a resumed run takes it up again."""

from __future__ import annotations

import hashlib
from typing import Any

from adapters.lora import adapter_tensors, set_adapter_tensors
from base_models.checkpoint import latest_training_state, load_training_state, save_training_state
from rlhf.linear_rate import restore_linear
from rlhf.ppo_run import Run
from rlhf.ppo_task import tempi_sha256

SETTLED = (
    *("weights", "hold", "hold_rate", "hold_slack", "base_looks", "frame_weight", "n_frames", "heldout_clips", "temperature", "cfg_coef"),
    *("r", "alpha", "average", "score_command", "look_every", "max_disagreement", "min_diversity", "patience"),
    *("batch_size", "samples_per_prompt", "baseline", "epochs", "minibatches", "lr", "critic_lr", "lr_end", "max_grad_norm", "ent_coef"),
    *("cliprange", "cliprange_value", "vf_coef", "gamma", "lam", "kl_coef", "target_kl", "kl_horizon", "kl_coef_least", "kl_power"),
)
"""Settings that a run keeps: with another value the rest of it would be another run, or the checkpoint's states would overrule it."""


def save(run: Run) -> None:
    """A whole checkpoint or none. Seeds and minibatches follow from (seed, clips, step): there is no sampler to save."""
    if run.accelerator.is_main_process:
        save_training_state(
            run.cfg.out,
            run.step,
            {"adapter": adapter_tensors(run.lm), "critic": run.critic.state_dict()}
            | ({"best": run.best} if run.best else {})
            | ({"average": run.average.tensors} if run.average.tensors else {}),
            {
                "optimizer": run.optimizer.state_dict(),
                "scheduler": run.scheduler.state_dict(),
                "controller": run.controller.state_dict(),
                "baseline": run.baseline.state_dict(),
                "normalizer": run.normalizer.state_dict(),
                "reward": run.reward.state_dict(),
                "brake": run.brake.state_dict(),
            },
            {**parents_of(run), "clips": run.clips, "blind_rounds": run.blind_rounds, "braked": run.braked, "over_budget": run.over_budget},
        )
    run.accelerator.wait_for_everyone()


def restore(run: Run) -> None:
    """Back to the newest checkpoint, if there is one. Raises UserError where base, reward or prompts are not those that it knew."""
    newest = latest_training_state(run.cfg.out, parents_of(run))
    if newest is None:
        return
    step, tensors, states, extra = load_training_state(newest)
    set_adapter_tensors(run.lm, tensors["adapter"])
    run.critic.load_state_dict(tensors["critic"])
    run.optimizer.load_state_dict(states["optimizer"])
    restore_linear(run.scheduler, states["scheduler"], step)
    run.controller.load_state_dict(states["controller"])
    run.baseline.load_state_dict(states["baseline"])
    run.normalizer.load_state_dict(states["normalizer"])
    run.reward.load_state_dict(states["reward"])
    run.brake.load_state_dict(states["brake"])
    run.best = tensors.get("best", {})
    run.average.load(tensors.get("average", {}), step)
    over = extra.get("over_budget")
    run.over_budget = over if over is not None and over > run.cfg.kl_budget and run.cfg.brake != "off" else None
    forgiven = over is not None and run.over_budget is None
    run.braked = None if forgiven or run.cfg.brake == "off" else extra["braked"]
    run.step, run.clips, run.blind_rounds = step, extra["clips"], extra["blind_rounds"]


def parents_of(run: Run) -> dict[str, Any]:
    """What a resumed run has to find again: the base, the reward, the ears of its checks, the prompts and their tempi, the seed, how credit
    is given, and SETTLED."""
    heldout = run.task.heldout
    return {
        "base_sha256": run.task.base_sha256,
        "reward_sha256": run.task.reward_sha256,
        "ears_sha256": run.task.ears_sha256,
        "prompts_sha256": hashlib.sha256("\n".join(run.task.prompts).encode()).hexdigest(),
        "heldout_sha256": heldout and hashlib.sha256("\n".join(heldout.texts).encode()).hexdigest(),
        "tempi_sha256": tempi_sha256(run.task.table, *([heldout.table] if heldout else [])),
        "seed": run.cfg.seed,
        "credit": run.credit,
        **{name: getattr(run.cfg, name) for name in SETTLED},
    }
