"""Supervised fine-tuning on winners: the simplest thing that votes can be used for, and so a rival that PPO and DPO must beat.

    accelerate launch rlhf/train_sft.py --snapshot runs/votes --out runs/sft                  # the clips that listeners chose
    accelerate launch rlhf/train_sft.py --reward runs/reward --prompts examples/train.txt --out runs/sft   # the best of n, by the reward
    python rlhf/train_sft.py --preset smoke                      # a toy policy and toy votes, seconds on a CPU

    snapshot, or prompts -> best of n -> winners: codes [K, T], weight -> -log pi(codes) in nats a code -> LoRA -> adapter folder

A pair's winner weighs 2 p - 1 of the votes behind it: all of a pair that everybody agrees on, nothing of a tie; raters weigh by how
far they can be relied on (`rlhf.trusted`). What losers sound like is never learnt, and nothing but the number of steps holds the policy
near its base: watch the KL that is measured at the end.

Several processes each take their rows of a batch; gradients are summed over the batch's weight, so two learn what one would.

Papers: Stiennon et al. 2020, arXiv:2009.01325 (best of n against a learned reward). Dong et al. 2023, arXiv:2304.06767 (RAFT:
fine-tuning on the best of n). Hu et al. 2021, arXiv:2106.09685 (LoRA).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from adapters.library import Manifest, save_adapter
from adapters.lora import adapter_disabled
from base_models.checkpoint import refuse_another_run
from base_models.errors import UserError
from base_models.launch import open_accelerator
from base_models.policy import PRETRAINED
from base_models.settings import run, to_mapping
from rlhf.journal import Journal, speeds, timed
from rlhf.metrics import mean_ci
from rlhf.sft_run import Learner, look
from rlhf.sft_task import Task, load_task, split, toy_task
from rlhf.tracking import Kind
from rlhf.trusted import WeightsBy


@dataclass(frozen=True)
class Config:
    """Settings of a run on winners."""

    out: Path = Path("runs/sft")
    """Folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, adapter/, and winners/ where they are sampled."""
    policy: Path = PRETRAINED
    """The base to start from."""
    snapshot: Path | None = None
    """Frozen snapshot of votes: learn the clips that were chosen."""
    reward: Path | None = None
    """Folder of a reward model: learn the best of --best-of clips for each of --prompts. Instead of --snapshot."""
    prompts: Path | None = None
    """Prompts to sample winners for."""
    weights_by: WeightsBy = "agreement"
    """What raters weigh by: how often they agree with others on common pairs (careless ones weigh little, adversaries nothing; alike
    where nobody shares a pair), or nothing, and then all votes count alike."""
    one_rater: bool = False
    """Allow the votes of a single rater: what is learnt is one person's taste, and nobody can tell how right it can be."""
    best_of: int = 8
    """Candidates for each winner that is sampled."""
    clips_per_prompt: int = 1
    """Winners sampled for each prompt."""
    duration_s: float = 4.0
    """Length of the winners that are sampled."""
    toy: bool = False
    """A tiny random policy and toy winners (what --preset smoke does)."""
    held_out: float = 0.1
    """Share of the prompts whose winners are kept for measuring; 0 trains on all."""
    r: int = 16
    """Rank of the adapter."""
    alpha: float = 32.0
    """Scale of the adapter: alpha / r."""
    lr: float = 5e-4
    """Peak learning rate (Adam, linear to a tenth)."""
    batch_size: int = 16
    """Winners a step, over all processes."""
    microbatch: int = 16
    """Winners a forward pass and process; changes memory and speed, never the result."""
    epochs: int = 2
    """Passes over the winners. Held-out nats a code rise again when these are too many."""
    steps: int = 0
    """Stop after this many steps; 0 goes by --epochs."""
    max_grad_norm: float = 1.0
    """The gradient is clipped to this norm."""
    save_every: int = 50
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (from the start, if there is none yet)."""
    kl_clips: int = 32
    """Clips that are sampled to measure KL(policy || base), whole and by codebook, at the end and every --look-every; 0 skips it."""
    look_every: int = 50
    """Steps between two looks: held-out nats a code, KL, and clips to listen to."""
    tracker: Kind = "tensorboard"
    """Where figures and clips can be watched; wandb and trackio have to be installed."""
    listen: int = 2
    """Of those clips, how many are kept for listening with their mel pictures; 0 keeps none."""
    licence: str = "unspecified"
    """Licence of the adapter, for its card."""
    processes: int = 0
    """Refuse to run with any other number of processes; 0 does not ask. `accelerate launch --cpu --num_processes 2` runs one."""
    seed: int = 0
    """Seed of the adapter's start, the order of the winners, and the clips that are sampled."""


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"toy": True, "out": Path("runs/sft-smoke"), "r": 4, "alpha": 8.0, "lr": 1e-2, "epochs": 12, "kl_clips": 16}
}


def main(cfg: Config, task: Task | None = None) -> dict[str, Any]:
    """Run it; returns the figures of the adapter's manifest. `task` replaces what the settings name."""
    began = time.monotonic()
    accelerator = open_accelerator(cfg.processes)
    check(cfg)
    # 1. Who won.
    if task is None:
        task = toy_task(cfg.seed) if cfg.toy else load_task(cfg, accelerator)
    train, held_out = split(task.winners, cfg.held_out, task.voted.groups if task.voted else {})
    learner = Learner(cfg, task, train, accelerator)
    if cfg.resume:
        learner.restore()
    figures: dict[str, Any] = {"winners": len(train), "winners_held_out": len(held_out), **(task.voted.figures if task.voted else {})}
    with adapter_disabled(learner.lm):
        figures["held_out_nats_a_code_base"] = learner.nats_a_code(held_out)

    # 2. Learn; look, now and then and at the end, at what that does.
    for note in task.voted.notes if task.voted and accelerator.is_main_process else ():
        print(note, file=sys.stderr)
    journal = Journal(cfg, "sft", learner.step, accelerator.is_main_process)
    bar = journal.bar(learner.steps)
    while learner.step < learner.steps:
        seconds: dict[str, float] = {}
        with timed(seconds, "learn"):
            told, n_codes = learner.learn()
        if learner.step % cfg.look_every == 0 and learner.step < learner.steps:
            with timed(seconds, "look"):
                told |= look(learner, held_out, journal)[0]
        bar.update()
        bar.set_postfix(nats_a_code=f"{told['nats_a_code']:.3f}")
        journal.tell(learner.step, told | speeds(seconds, n_codes))
        if learner.step % cfg.save_every == 0 and learner.step < learner.steps:
            learner.save()
    bar.close()
    learner.save()

    # 3. Measure.
    told, played = look(learner, held_out, journal)
    journal.tell(learner.step, told)
    figures |= {"steps": learner.step, "held_out_nats_a_code": told.get("held_out_nats_a_code")}
    if played is not None:
        kl = mean_ci(played.book_kl.sum(1), played.rows)
        figures |= {"kl_nats_per_clip": kl.value, "kl_ci": list(kl.ci)}
    figures["seconds"] = round(time.monotonic() - began, 1)

    # 4. Tell.
    journal.close()
    if accelerator.is_main_process:
        manifest = Manifest(
            name="sft",
            base_sha256=task.base_sha256,
            method="sft",
            snapshot_sha256=task.snapshot_sha256,
            reward_sha256=task.reward_sha256,
            licence=cfg.licence,
            config=to_mapping(cfg),
            figures=figures,
        )
        save_adapter(cfg.out / "adapter", task.lm, manifest)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return figures


def check(cfg: Config) -> None:
    """Refuse what cannot work, before anything is loaded or written."""
    sizes = (cfg.batch_size, cfg.microbatch, cfg.epochs, cfg.best_of, cfg.clips_per_prompt, cfg.look_every)
    if min(sizes) < 1 or not 0 <= cfg.held_out < 1:
        raise UserError("a size below 1, or --held-out out of [0, 1)", "1 or more everywhere", "correct the settings")
    refuse_another_run(cfg.out, cfg.resume)


if __name__ == "__main__":
    run(main, Config, PRESETS, show=lambda figures: json.dumps(figures, indent=2))
