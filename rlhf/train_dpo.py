"""Direct preference optimisation: votes straight into a LoRA adapter, without a reward model.

    accelerate launch rlhf/train_dpo.py --snapshot runs/votes --policy base_models/pretrained --out runs/dpo
    python rlhf/train_dpo.py --preset smoke                       # a toy policy and toy votes, under a minute on a CPU
    torchrun --nproc-per-node 2 rlhf/train_dpo.py ...             # or any accelerate configuration

    snapshot -> pairs (chosen, rejected: codes [K, T]) -> log-probs under policy and reference [B]
             -> -log sigmoid(beta * difference) -> LoRA -> adapter folder

The loss is TRL's DPOTrainer over a flat view of the LM (`rlhf.flat_policy`). The reference is the policy without its adapter, so
the loss begins at log 2 exactly. A pair's label is soft: the weighted share of its raters that preferred `chosen`; a tie is 1/2,
which pulls the two clips together (`--ties drop` leaves such pairs out). "Both bad" orders nothing and never becomes a pair.

It is not on-policy: what it knows is what was rated. See train_ppo.py for the other way.

Papers: Rafailov et al. 2023, arXiv:2305.18290 (DPO). Mitchell 2023, "A note on DPO with noisy preferences" (soft labels). Pang et
al. 2024, arXiv:2404.19733 (the likelihood term that keeps the chosen clips likely).
"""

from __future__ import annotations

import math
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
from torch.utils.tensorboard import SummaryWriter
from transformers import ProgressCallback, TrainerCallback
from trl.trainer.dpo_config import DPOConfig

from adapters.library import Manifest, save_adapter
from adapters.lora import adapter_disabled
from base_models.checkpoint import append_jsonl, latest_training_state, write_json
from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.lm import MusicLM, MusicLMConfig
from base_models.policy import PRETRAINED, load_policy
from base_models.sampling import generate
from base_models.settings import run, to_mapping
from rlhf.flat_dpo import FlatDPOTrainer, PreferenceCollator, preference_rows, reference_logps
from rlhf.flat_policy import PAD, FlatCausalLM
from rlhf.preferences import Preference, decided, load_snapshot, shuffled, split_by_prompt, training_pairs


@dataclass(frozen=True)
class Config:
    """Settings of a DPO run."""

    out: Path = Path("runs/dpo")
    """Folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, adapter/."""
    snapshot: Path | None = None
    """Frozen snapshot of votes, as `encore ratings export` writes it."""
    policy: Path = PRETRAINED
    """The base whose clips were rated."""
    toy: bool = False
    """Take a tiny random policy and toy votes instead of --policy and --snapshot (what --preset smoke does)."""
    shuffle_votes: int | None = None
    """The control: turn half of each prompt's pairs round, drawn with this seed. What is learnt from that must not help."""
    ties: Literal["soft", "drop"] = "soft"
    """Pairs whose votes balance out: keep them with the label 1/2, or leave them out."""
    weight_pairs: bool = True
    """Weigh a pair by the votes behind it (mean 1)."""
    held_out: float = 0.1
    """Share of the prompts whose pairs are kept for measuring; 0 trains on all."""
    beta: float = 0.1
    """Price of drift from the reference: the larger, the closer it stays."""
    label_smoothing: float = 0.0
    """How often a label is thought to be wrong, 0 to 0.5 (conservative DPO)."""
    sft_weight: float = 0.0
    """Weight of the likelihood term on chosen clips (nats a code); raise it when the chosen clips' log-prob falls."""
    temperature: float = 1.0
    """The temperature at which the clips were sampled and will be."""
    r: int = 16
    """Rank of the adapter."""
    alpha: float = 32.0
    """Scale of the adapter: alpha / r."""
    lr: float = 2e-4
    """Peak learning rate (AdamW, linear warmup, cosine to 0)."""
    batch_size: int = 8
    """Pairs a step and process."""
    accumulation: int = 1
    """Microbatches a step."""
    epochs: float = 3.0
    """Passes over the pairs."""
    steps: int = 0
    """Stop after this many steps; 0 goes by --epochs."""
    max_minutes: float = 0.0
    """Stop after this time and keep what was learnt; 0 sets no limit."""
    warmup_steps: int = 5
    """Steps until the peak learning rate."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs matrix products in bfloat16; auto takes it where the processor is faster for it."""
    save_every: int = 50
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    kl_clips: int = 16
    """Clips that are sampled at the end to measure KL(policy || reference); 0 skips it."""
    licence: str = "unspecified"
    """Licence of the adapter, for its card."""
    processes: int = 0
    """Refuse to run with any other number of processes; 0 does not ask. `accelerate launch --cpu --num_processes 2` runs one."""
    seed: int = 0
    """Seed of the adapter's start and the order of the pairs."""


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"toy": True, "out": Path("runs/dpo-smoke"), "steps": 30, "r": 4, "alpha": 8.0, "lr": 5e-3, "kl_clips": 4}
}


@dataclass(frozen=True)
class Task:
    """What is trained on what: the LM, its prompts as conditions (one row a prompt), the pairs and the row of each."""

    lm: MusicLM
    table: Conditions
    pairs: list[Preference]
    rows: dict[str, int]
    base_sha256: str
    snapshot_sha256: str | None

    def row_of(self, pair: Preference) -> int:
        return self.rows[pair.prompt_id]


def main(cfg: Config) -> dict[str, Any]:
    """Run it; returns the figures of the adapter's manifest."""
    began = time.monotonic()
    # 1. What was rated, and by which policy it was played.
    task = toy_task(cfg.seed) if cfg.toy else load_task(cfg)
    pairs = task.pairs if cfg.ties == "soft" else decided(task.pairs)
    if cfg.shuffle_votes is not None:
        pairs = shuffled(pairs, cfg.shuffle_votes)
    train, held_out = split_by_prompt(pairs, cfg.held_out, cfg.seed) if cfg.held_out else (pairs, [])
    args = training_arguments(cfg, len(train))
    if cfg.processes and args.world_size != cfg.processes:
        raise UserError(
            f"{args.world_size} process(es)",
            f"{cfg.processes}, as --processes asks",
            "launch with torchrun --nproc-per-node N, or `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu` on a CPU",
        )
    if args.should_save:
        write_json(cfg.out / "config.json", to_mapping(cfg))

    # 2. The flat view; the reference speaks before there is an adapter.
    task.lm.to(args.device)
    if args.device.type == "cpu":  # torch's fused attention is five times slower backwards in bfloat16 on a CPU
        task.lm.decoder.set_attn_implementation("eager")
    flat = FlatCausalLM(task.lm, task.table, cfg.temperature).eval()
    collator = PreferenceCollator(pad_token_id=PAD, max_length=None)
    scored = []
    for part in (train, held_out):
        rows = preference_rows(flat, part, [task.row_of(pair) for pair in part], cfg.label_smoothing)
        rows = rows if cfg.weight_pairs else [{**row, "weight": 1.0} for row in rows]
        scored.append(reference_logps(flat, rows, args, collator, cfg.batch_size))

    # 3. Learn.
    recorder = Recorder(cfg, args)
    trainer = FlatDPOTrainer(flat, args, scored[0], scored[1], cfg.r, cfg.alpha, callbacks=[recorder])
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressBar)
    newest = latest_training_state(cfg.out) if cfg.resume else None
    result = trainer.train(resume_from_checkpoint=None if newest is None else str(newest))

    # 4. Measure.
    figures: dict[str, Any] = {"pairs": len(train), "pairs_held_out": len(held_out), "steps": trainer.state.global_step}
    figures |= recorder.summary()
    if held_out:
        evaluation = trainer.evaluate()
        figures["held_out_accuracy"] = evaluation.get("eval_dpo/accuracy_decided")
        figures["held_out_loss"] = evaluation["eval_dpo/loss"]
    if cfg.kl_clips and args.should_save:
        n_frames = int(train[0].chosen_codes.shape[1])
        figures["kl_nats_per_clip"] = sampled_kl(task, cfg.kl_clips, n_frames, cfg.temperature, cfg.seed, args.device)
    figures["train_seconds"] = round(result.metrics["train_runtime"], 2)
    figures["seconds"] = round(time.monotonic() - began, 2)

    # 5. Tell.
    if args.should_save:
        control = "" if cfg.shuffle_votes is None else "_shuffled"
        manifest = Manifest(
            name=f"dpo{control}",
            base_sha256=task.base_sha256,
            method=f"dpo{control}",
            snapshot_sha256=task.snapshot_sha256,
            licence=cfg.licence,
            config=to_mapping(cfg),
            figures=figures,
        )
        save_adapter(cfg.out / "adapter", task.lm, manifest)
        recorder.close()
        print(f"{cfg.out / 'adapter'}: " + ", ".join(f"{k} {v}" for k, v in figures.items()))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return figures


# ---- the pieces ------------------------------------------------------------------------------------------------------


def load_task(cfg: Config) -> Task:
    """The policy and the pairs of a snapshot; refuses clips of another base."""
    if cfg.snapshot is None:
        raise UserError("no --snapshot", "the folder of a frozen snapshot", "export one with `encore ratings export`")
    policy = load_policy(cfg.policy)
    snapshot = load_snapshot(cfg.snapshot, policy.sha256)
    pairs = training_pairs(snapshot, n_q=policy.lm.n_q, card=policy.lm.card)
    first = {pair.prompt_id: pair for pair in reversed(pairs)}
    table = policy.conditions([p.prompt for p in first.values()], [p.tempo_bpm for p in first.values()])
    rows = {prompt_id: row for row, prompt_id in enumerate(first)}
    return Task(policy.lm, table, pairs, rows, policy.sha256, snapshot.sha256)


def toy_task(seed: int, n_pairs: int = 64, n_prompts: int = 16, n_frames: int = 12) -> Task:
    """A random policy, and votes for clips whose codes come from the lower half of the codebooks; one pair in eight is a tie."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = MusicLMConfig(n_q=4, card=32, d_model=32, n_layers=2, n_heads=2, d_ff=64, text_dim=16)
        lm = MusicLM(config).eval()
    text = torch.randn((n_prompts, 6, config.text_dim), generator=generator)
    table = Conditions(text, torch.ones(n_prompts, 6, dtype=torch.bool), torch.full((n_prompts,), float("nan")))
    half, shape = config.card // 2, (n_pairs, config.n_q, n_frames)
    low = torch.randint(0, half, shape, generator=generator).numpy()
    high = torch.randint(half, config.card, shape, generator=generator).numpy()
    pairs = [
        Preference(
            prompt=f"toy prompt {i % n_prompts}",
            tempo_bpm=None,
            chosen_codes=low[i],
            rejected_codes=high[i],
            p=0.5 if i % 8 == 7 else 1.0,
            weight=1.0,
            pair_id=str(i),
            rater="toy",
            prompt_id=str(i % n_prompts),
            chosen_sha256=f"low{i}",
            rejected_sha256=f"high{i}",
        )
        for i in range(n_pairs)
    ]
    return Task(lm, table, pairs, {str(i): i for i in range(n_prompts)}, lm.sha256(), None)


def training_arguments(cfg: Config, n_pairs: int) -> DPOConfig:
    """TRL's settings. Never truncate (its default cuts at 1,024 ids silently), never phone, never pickle."""
    cpu = not torch.cuda.is_available()
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and bf16_is_faster())
    return DPOConfig(
        output_dir=str(cfg.out),
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=False,
        bf16=bf16,
        activation_checkpointing=False,
        max_length=None,
        remove_unused_columns=False,
        precompute_ref_log_probs=True,
        beta=cfg.beta,
        loss_type=["sigmoid", "sft"] if cfg.sft_weight else ["sigmoid"],
        loss_weights=[1.0, cfg.sft_weight] if cfg.sft_weight else None,
        learning_rate=cfg.lr,
        lr_scheduler_type="cosine",
        warmup_steps=cfg.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=cfg.batch_size,
        per_device_eval_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.accumulation,
        num_train_epochs=cfg.epochs,
        max_steps=cfg.steps or -1,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=cfg.save_every,
        report_to=[],
        dataloader_pin_memory=not cpu,
        seed=cfg.seed,
        data_seed=cfg.seed,
    )


def bf16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@torch.no_grad()
def sampled_kl(task: Task, n_clips: int, n_frames: int, temperature: float, seed: int, device: torch.device) -> float:
    """KL(policy || reference) in nats a clip: mean of log pi - log ref over clips that the policy plays now."""
    lm = task.lm
    cond = task.table.to(device).index([i % len(task.table) for i in range(n_clips)])
    played = generate(lm, cond, n_frames, temperature=temperature, seeds=[seed * 1_000_003 + i for i in range(n_clips)])
    with adapter_disabled(lm):
        reference = lm.logps(played.codes, cond, temperature)
    assert isinstance(reference, torch.Tensor)
    return float((played.logps - reference).sum(1).mean())


class ProgressBar(ProgressCallback):
    """transformers' bar, with the figures on it instead of a line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        shown = {"loss": "dpo/loss", "accuracy": "dpo/accuracy_decided", "margin": "rewards/margins"}
        if self.training_bar is not None and logs:
            self.training_bar.set_postfix({name: f"{float(logs[key]):.3f}" for name, key in shown.items() if key in logs})


class Recorder(TrainerCallback):
    """metrics.jsonl and TensorBoard, the check of the first step, and the clock."""

    def __init__(self, cfg: Config, args: DPOConfig) -> None:
        self.cfg, self.main = cfg, args.should_save
        self.began = time.monotonic()
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.board = SummaryWriter(str(cfg.out / "tensorboard")) if self.main else None
        if self.main and not cfg.resume:
            (cfg.out / "metrics.jsonl").unlink(missing_ok=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        row = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "dpo/loss_hard_labels" in row and not self.first:
            if state.global_step == 1 and abs(row["dpo/loss_hard_labels"] - math.log(2)) > 1e-3:
                raise RuntimeError(f"the first loss is {row['dpo/loss_hard_labels']}, not log 2: policy and reference differ")
            self.first = row
        if "dpo/loss_hard_labels" in row:
            self.last = row
        if self.main and self.board is not None:
            append_jsonl(self.cfg.out / "metrics.jsonl", {"step": state.global_step, **row})
            for name, value in row.items():
                self.board.add_scalar(name, value, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        late = bool(self.cfg.max_minutes) and time.monotonic() - self.began > 60 * self.cfg.max_minutes
        if self.cfg.max_minutes and args.world_size > 1:
            flag = torch.tensor(float(late), device=args.device)
            torch.distributed.all_reduce(flag)
            late = bool(flag > 0)
        if late:
            control.should_training_stop = True

    def summary(self) -> dict[str, float]:
        """First and last of what tells a healthy run from a collapsing one."""
        names = {
            "logps_chosen": "logps/chosen",
            "logps_rejected": "logps/rejected",
            "train_accuracy": "dpo/accuracy_decided",
            "margin": "rewards/margins",
        }
        told = {f"{name}_{when}": round(row[key], 4) for name, key in names.items() for when, row in self._ends() if key in row}
        return {"first_loss": self.first["dpo/loss_hard_labels"], **told} if self.first else told

    def _ends(self) -> tuple[tuple[str, dict[str, float]], ...]:
        return ("first", self.first), ("last", self.last)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


if __name__ == "__main__":
    run(main, Config, PRESETS)
