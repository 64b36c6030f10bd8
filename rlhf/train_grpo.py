"""GRPO and RLOO: the reward model's opinion into a LoRA adapter without a critic, by TRL's own trainers.

    accelerate launch rlhf/train_grpo.py --policy base_models/pretrained --reward runs/reward --prompts examples/train.txt --out runs/grpo
    accelerate launch rlhf/train_grpo.py --method rloo --reward runs/reward --prompts examples/train.txt --out runs/rloo
    python rlhf/train_grpo.py --preset smoke                      # a toy policy and a toy reward, under a minute on a CPU

    prompts -> n clips each, codes [B, K, T] -> marks [B, P] -> score [B] -> score against the prompt's other clips -> clipped updates
    -> LoRA -> adapter folder

What a clip is worth is what it scores above the others of its prompt, the same for each of its codes: no critic has to learn it
(see train_ppo.py for one that does). The trainer is TRL's over the flat view of the LM (`rlhf.flat_grpo`); the sampler is ours, and
what it says is checked against the trainer's scorer. The reference is the policy without its adapter, and --kl-budget ends the run.
With --weights a score adds what listeners like and what a prompt asks for, each in spreads of the base's clips of the first round.

With --method rloo keep --epochs 1 and --minibatches 1: its ratio is that of a whole clip, of hundreds of codes, and almost all of
them leave the clip range at the second update.

Papers: Shao et al. 2024, arXiv:2402.03300 (GRPO). Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every run to its makers otherwise

import torch
from transformers import ProgressCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.rloo_config import RLOOConfig

from adapters.library import Manifest, save_adapter
from base_models.checkpoint import latest_training_state, read_json, refuse_another_run
from base_models.errors import UserError
from base_models.launch import bf16_is_faster, check_processes, check_sharding, end_in_good_order
from base_models.policy import PRETRAINED
from base_models.settings import run, to_mapping
from rlhf.dpo_report import NothingLeftError, Recorder
from rlhf.flat_grpo import FlatGRPOTrainer, FlatRLOOTrainer, Judge
from rlhf.flat_policy import FlatCausalLM
from rlhf.journal import speeds
from rlhf.ppo_task import Task, load_task, movement, share_of_code_5, tempi_sha256
from rlhf.reward_gates import doubt
from rlhf.rewards import HUMAN, check_groups, parse_weights, weighted
from rlhf.rollout import prompt_of
from rlhf.tracking import Kind


@dataclass(frozen=True)
class Config:
    """Settings of a GRPO or RLOO run."""

    out: Path = Path("runs/grpo")
    """Folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, adapter/."""
    method: Literal["grpo", "rloo"] = "grpo"
    """grpo clips ratios code by code and divides by the spread within a prompt; rloo takes a clip as one action."""
    policy: Path = PRETRAINED
    """The base to start from; it is also the reference."""
    reward: Path | None = None
    """Folder of a trained reward model (train_reward.py). Not needed where --weights gives `human` none: then checks are all."""
    prompts: Path | None = None
    """Prompts to play: .jsonl with `prompt` and, where wanted, `tempo_bpm`, or text, one a line."""
    weights: str = f"{HUMAN}=1"
    """Weight of each part of the reward, which is measured in standard deviations of the base's clips of one prompt, those of the first
    round: human=1,similarity=0.3. All parts are plotted every round; those without a weight are not trained on."""
    toy: bool = False
    """A tiny random policy and a toy reward instead of --policy, --reward and --prompts (what --preset smoke does)."""
    n_frames: int = 100
    """Codec frames T a clip; 100 = 4 s with the shipped base. Use the length that was rated."""
    steps: int = 60
    """Rounds of playing and learning."""
    max_minutes: float = 0.0
    """Stop at the end of the round after this time, with a checkpoint; 0 sets no limit."""
    batch_size: int = 32
    """Clips a round, over all processes."""
    samples_per_prompt: int = 4
    """Clips of one prompt, which are each other's baseline."""
    epochs: int = 1
    """Passes over a round's clips."""
    minibatches: int = 1
    """Optimiser steps a pass."""
    microbatch: int = 16
    """Clips a forward pass and process."""
    sample_batch: int = 64
    """Clips that are played at once."""
    temperature: float = 1.0
    """At which clips are played and scored; use the one that listeners will hear."""
    lr: float = 1.5e-3
    """Learning rate of the adapter (AdamW, linear to 0)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    cliprange: float = 0.2
    """How far a ratio may leave 1 and still be paid for: of a code (grpo), or of a clip (rloo)."""
    kl_coef: float = 0.03
    """Price of a nat of KL: in spreads of the score within a prompt (grpo), in units of the score (rloo)."""
    kl_budget: float = 60.0
    """Stop when the policy's KL exceeds this many nats a clip; what is beyond fools the reward more than it pleases listeners."""
    r: int = 16
    """Rank of the adapter."""
    alpha: float = 32.0
    """Scale of the adapter: alpha / r."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs matrix products in bfloat16 (the sampler stays float32); auto: where the processor is faster for it."""
    save_every: int = 10
    """Rounds between checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (from the start, if there is none yet)."""
    tracker: Kind = "tensorboard"
    """Where figures and clips can be watched; wandb and trackio have to be installed."""
    listen: int = 2
    """Clips, with their mel pictures, that are kept for listening every --look-every rounds; 0 keeps none."""
    look_every: int = 10
    """Rounds between clips to listen to."""
    licence: str = "unspecified"
    """Licence of the adapter, for its card."""
    processes: int = 0
    """Refuse to run with any other number of processes; 0 does not ask. `accelerate launch --cpu --num_processes 2` runs one."""
    seed: int = 0
    """Seed of the adapter's start, the prompts' order and the clips."""


TOY: dict[str, Any] = {"toy": True, "n_frames": 12, "steps": 30, "batch_size": 32, "r": 4, "alpha": 8.0, "lr": 1e-2, "kl_coef": 0.01}
PRESETS: dict[str, dict[str, Any]] = {"smoke": {**TOY, "out": Path("runs/grpo-smoke"), "precision": "fp32"}}


def main(cfg: Config, task: Task | None = None) -> dict[str, Any]:
    """Run it; returns the figures of the adapter's manifest. `task` replaces what --policy, --reward and --prompts name."""
    began = time.monotonic()
    # 1. Who plays, who judges.
    check(cfg, int(os.environ.get("WORLD_SIZE", "1")))
    if task is None:
        listeners = bool(parse_weights(cfg.weights).get(HUMAN))
        task = toy_task(cfg.seed) if cfg.toy else load_task(cfg.policy, cfg.reward, cfg.prompts, listeners=listeners)
    reward = weighted(parse_weights(cfg.weights), task.score, task.checks, task.least, voted=task.voted)
    args = training_arguments(cfg, task.lm.n_q)
    end_in_good_order()
    doubted = doubt(cfg.reward)
    if doubted and args.should_save:
        print(f"{doubted}; scores are compared within a group, and any spread is a full one here", flush=True)
    parents = parents_of(cfg, task) | {"weights": reward.state_dict()["weights"]}
    newest = latest_training_state(cfg.out, parents) if cfg.resume else None

    # 2. The flat view, and the order in which the prompts are played.
    task.lm.to(args.device).fast_training()
    flat = FlatCausalLM(task.lm, task.table, cfg.temperature).eval()
    groups = cfg.steps * cfg.batch_size // cfg.samples_per_prompt
    rows = prompt_of(range(groups), len(task.prompts), 1, cfg.seed)
    judge = Judge(reward, task.prompts, task.lm.n_q, task.lm.card)

    # 3. Play, judge, learn.
    recorder = Reporter(cfg, task, 0 if newest is None else read_json(newest / "state.json")["step"], args.should_save)
    kind = FlatGRPOTrainer if cfg.method == "grpo" else FlatRLOOTrainer
    trainer = kind(flat, args, rows, judge, cfg.r, cfg.alpha, cfg.seed, cfg.sample_batch, [recorder])
    recorder.trainer = trainer
    trainer.pop_callback(ProgressCallback)  # ours begins where a resumed run does
    trainer.parents = parents
    with contextlib.suppress(NothingLeftError):
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))

    # 4. Tell.
    figures: dict[str, Any] = {"steps": trainer.state.global_step, "stopped": recorder.stopped, **recorder.summary()}
    figures["seconds"] = round(time.monotonic() - began, 1)
    if args.should_save:
        manifest = Manifest(
            name=cfg.method,
            base_sha256=task.base_sha256,
            method=cfg.method,
            snapshot_sha256=task.snapshot_sha256,
            reward_sha256=task.reward_sha256,
            licence=cfg.licence,
            config=to_mapping(cfg),
            figures=figures | ({"ears_sha256": task.ears_sha256} if task.ears_sha256 else {}),
            objective=reward.state_dict(),
        )
        save_adapter(cfg.out / "adapter", task.lm, manifest)
        recorder.close()
        print(f"{cfg.out / 'adapter'}: " + ", ".join(f"{k} {v}" for k, v in figures.items()))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return figures


# ---- the pieces ------------------------------------------------------------------------------------------------------


def check(cfg: Config, world: int) -> None:
    """Refuse what cannot work, before anything is loaded or written."""
    check_sharding()
    check_processes(world, cfg.processes)
    weights = parse_weights(cfg.weights)
    if not cfg.toy and (cfg.prompts is None or (cfg.reward is None and weights.get(HUMAN))):
        wanted = "both" if weights.get(HUMAN) else "prompts to play"
        raise UserError(f"--reward {cfg.reward}, --prompts {cfg.prompts}", wanted, "train one with train_reward.py; or --preset smoke")
    check_groups(weights, cfg.batch_size // world, cfg.samples_per_prompt)
    if cfg.kl_coef <= 0:
        raise UserError(
            f"--kl-coef {cfg.kl_coef:g}", "above 0: TRL asks no reference without a price, and no KL would be known", "set 1e-6"
        )
    refuse_another_run(cfg.out, cfg.resume)


SETTLED = (
    *("method", "n_frames", "temperature", "kl_coef", "cliprange", "r", "alpha", "seed"),
    *("batch_size", "samples_per_prompt", "epochs", "minibatches", "lr", "max_grad_norm"),
)
"""Settings that a run keeps: with another value the rest of it would be another run, or the checkpoint's states would overrule it."""


def parents_of(cfg: Config, task: Task) -> dict[str, Any]:
    """What a resumed run has to find again."""
    return {
        "base_sha256": task.base_sha256,
        "reward_sha256": task.reward_sha256,
        "ears_sha256": task.ears_sha256,
        "prompts_sha256": hashlib.sha256("\n".join(task.prompts).encode()).hexdigest(),
        "tempi_sha256": tempi_sha256(task.table),
        **{name: getattr(cfg, name) for name in SETTLED},
    }


def training_arguments(cfg: Config, n_q: int) -> GRPOConfig | RLOOConfig:
    """TRL's settings: one round is a generation batch, cut into `minibatches` optimiser steps of microbatches, `epochs` times."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    share = cfg.batch_size // (world * cfg.minibatches)
    microbatch = min(cfg.microbatch, max(share, 1))
    if min(cfg.epochs, cfg.minibatches, cfg.steps, cfg.n_frames, cfg.look_every) < 1 or cfg.samples_per_prompt < 2:
        raise UserError("a size too small", "1 or more, and 2 or more --samples-per-prompt", "correct the sizes")
    if cfg.batch_size % (world * cfg.minibatches * microbatch) or cfg.batch_size % cfg.samples_per_prompt:
        raise UserError(
            f"batch_size {cfg.batch_size}",
            f"a multiple of {world} process(es) x {cfg.minibatches} minibatches x {microbatch}, and of {cfg.samples_per_prompt} a prompt",
            "change --batch-size, --minibatches, --microbatch or --samples-per-prompt",
        )
    cpu, updates = not torch.cuda.is_available(), cfg.minibatches * cfg.epochs
    shared: dict[str, Any] = {
        "output_dir": str(cfg.out),
        "use_cpu": cpu,
        "ddp_backend": "gloo" if cpu and world > 1 else None,
        "ddp_find_unused_parameters": False,
        "bf16": cfg.precision == "bf16" or (cfg.precision == "auto" and bf16_is_faster()),
        "activation_checkpointing": False,
        "remove_unused_columns": False,
        "max_completion_length": cfg.n_frames * n_q,
        "num_generations": cfg.samples_per_prompt,
        "per_device_train_batch_size": microbatch,
        "gradient_accumulation_steps": share // microbatch,
        "steps_per_generation": cfg.minibatches * share // microbatch,
        "num_iterations": cfg.epochs,
        "shuffle_dataset": False,
        "temperature": cfg.temperature,
        "beta": cfg.kl_coef,
        "epsilon": cfg.cliprange,
        "learning_rate": cfg.lr,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": cfg.max_grad_norm,
        "max_steps": cfg.steps * updates,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": cfg.save_every * updates,
        "report_to": [],
        "dataloader_pin_memory": not cpu,
        "seed": cfg.seed,
        "data_seed": cfg.seed,
    }
    return GRPOConfig(**shared, loss_type="grpo") if cfg.method == "grpo" else RLOOConfig(**shared)


def toy_task(seed: int) -> Task:
    """The toy of `rlhf.dpo_task`, judged by the share of its codes that lie in the lower half of the codebooks; its checks are those of
    PPO's toy."""
    from rlhf import train_dpo
    from rlhf.dpo_task import toy_task as dpo_toy

    toy = dpo_toy(train_dpo.Config(toy=True, toy_reward=True, seed=seed), n_pairs=1)
    assert toy.own is not None
    checks = {"code_5": share_of_code_5, "movement": movement}
    return Task(toy.lm, toy.own.prompts, toy.table, toy.own.score, toy.base_sha256, checks=checks, sound=toy.sound)


class Reporter(Recorder):
    """The journal of rounds, the clock, and the KL budget."""

    trainer: FlatGRPOTrainer | FlatRLOOTrainer

    def __init__(self, cfg: Config, task: Task, first_step: int, main: bool) -> None:
        super().__init__(cfg, cfg.method, first_step, main, task.sound)
        self.kl_budget, self.stopped, self.by_step = cfg.kl_budget, "steps", False
        self.updates = self.whole = cfg.minibatches * cfg.epochs
        self.look_every = cfg.look_every
        self.codes = cfg.batch_size * cfg.n_frames * task.lm.n_q

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._spent():
            raise NothingLeftError
        super().on_train_begin(args, state, control, **more)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """The last update of a round tells how long its phases took."""
        logs = dict(logs or {})
        if "loss" in logs and state.global_step % self.updates == 0:
            seconds = self.seconds | self.trainer.seconds
            seconds["learn"] -= sum(self.trainer.seconds.values())  # TRL plays and judges within a step
            logs |= speeds(seconds, self.codes)
            self.seconds.clear()
            self.trainer.seconds.clear()
        super().on_log(args, state, control, logs, **more)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_step_end(args, state, control, **more)
        if control.should_training_stop and state.global_step < state.max_steps:
            self.stopped = "time"
        if self._spent():
            control.should_training_stop = True
            control.should_save = state.global_step % self.updates == 0
        if state.global_step % (self.updates * self.look_every) == 0:
            self.play(state.global_step, self.trainer.heard)

    def _spent(self) -> bool:
        """Whether the KL of the newest clips, before a resumption too, exceeds the budget."""
        spent = self.trainer.kl > self.kl_budget
        if spent:
            self.stopped = f"kl {self.trainer.kl:.1f} nats a clip exceeds the budget of {self.kl_budget:g}"
        return spent

    def summary(self) -> dict[str, float]:
        """First and last scores (means over up to five rounds) and the last KL."""
        told = [row for row in self.journal.rows if row.get("reward") is not None]
        scores = [row["reward"] for row in told]
        if not scores:
            return {}
        few = max(1, min(5, len(scores) // 2))
        kl = [row["kl_nats_per_clip"] for row in told if row.get("kl_nats_per_clip") is not None]
        figures = {"score_first": sum(scores[:few]) / few, "score_last": sum(scores[-few:]) / few, "kl": kl[-1] if kl else float("nan")}
        return {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    run(main, Config, PRESETS)
