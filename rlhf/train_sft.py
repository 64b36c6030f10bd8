"""Supervised fine-tuning on winners: the simplest thing that votes can be used for, and so a rival that PPO and DPO must beat.

    accelerate launch rlhf/train_sft.py --snapshot runs/votes --out runs/sft                  # the clips that listeners chose
    accelerate launch rlhf/train_sft.py --reward runs/reward --prompts prompts.txt --out runs/sft   # the best of n, by the reward
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

import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn

from adapters.library import Manifest, save_adapter
from adapters.lora import adapter_disabled, adapter_tensors, attach_lora, set_adapter_tensors, trainable_parameters
from base_models.checkpoint import (
    latest_training_state,
    load_training_state,
    read_jsonl,
    refuse_another_run,
    save_training_state,
)
from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.launch import open_accelerator
from base_models.lm import MusicLM, MusicLMConfig, disable_functional_dropout
from base_models.policy import PRETRAINED, load_policy
from base_models.settings import run, to_mapping
from rlhf.journal import Journal, Sound, sound_of, speeds, timed
from rlhf.metrics import mean_ci
from rlhf.played import Played, kl_figures, play_now
from rlhf.ppo_task import toy_sound
from rlhf.preferences import decided, load_snapshot
from rlhf.tracking import Kind
from rlhf.trusted import Voted, WeightsBy, trusted


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


@dataclass(frozen=True)
class Winner:
    """A clip to learn: codes [K, T] int64; the row of its prompt; its prompt's id; how much it weighs (mean about 1)."""

    codes: Tensor
    row: int
    prompt_id: str
    weight: float


@dataclass(frozen=True)
class Task:
    """What is trained on what."""

    lm: MusicLM
    table: Conditions
    winners: list[Winner]
    base_sha256: str
    snapshot_sha256: str | None = None
    reward_sha256: str | None = None
    words: tuple[str, ...] = ()
    """The prompts, one a row of the table."""
    sound: Sound | None = None
    """How clips are heard."""
    voted: Voted | None = None
    """Where winners were voted; None where they were sampled."""

    @property
    def sha256(self) -> str:
        """Of the winners, their order and weights: what a resumed run has to find again."""
        digest = hashlib.sha256()
        for winner in self.winners:
            digest.update(f"{winner.row}|{winner.weight!r}|{tuple(winner.codes.shape)}|".encode() + winner.codes.numpy().tobytes())
        return digest.hexdigest()


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


class Learner:
    """What a checkpoint holds, and one step of learning."""

    def __init__(self, cfg: Config, task: Task, winners: Sequence[Winner], accelerator: Accelerator) -> None:
        self.cfg, self.task, self.winners, self.accelerator = cfg, task, winners, accelerator
        set_seed(cfg.seed)
        self.lm = task.lm.eval()
        disable_functional_dropout(self.lm)
        attach_lora(self.lm, cfg.r, cfg.alpha)
        self.lm.to(accelerator.device).fast_training()
        self.table = task.table.to(accelerator.device)
        self.parameters = trainable_parameters(self.lm)
        for parameter in self.parameters:
            parameter.data.copy_(broadcast(parameter.data))
        self.a_pass = math.ceil(len(winners) / cfg.batch_size)
        self.steps = cfg.steps or cfg.epochs * self.a_pass
        self.optimizer = torch.optim.Adam(self.parameters, lr=cfg.lr)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, total_iters=max(self.steps - 1, 1))
        self.step = 0

    def _batch(self) -> list[Winner]:
        """This step's winners, the same on every process, drawn from (seed, pass): there is no sampler to save."""
        number, place = divmod(self.step, self.a_pass)
        order = torch.randperm(len(self.winners), generator=torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + number))
        return [self.winners[i] for i in order.tolist()[place * self.cfg.batch_size : (place + 1) * self.cfg.batch_size]]

    def learn(self) -> tuple[dict[str, float], int]:
        """One optimiser step on the weighted mean of nats a code over the batch; skipped where it is not finite. Returns figures and how
        many codes were learnt from."""
        batch, world = self._batch(), self.accelerator.num_processes
        weight = sum(winner.weight for winner in batch)
        self.optimizer.zero_grad(set_to_none=False)
        total = torch.zeros((), device=self.accelerator.device)
        for part in by_length(batch[self.accelerator.process_index :: world], self.cfg.microbatch):
            loss = (self._weights(part) * self._nats(part)).sum() / weight
            loss.backward()
            total += loss.detach()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = self.accelerator.reduce(torch.cat([g.reshape(-1) for g in gradients] + [total.reshape(1)]), "sum")
        for parameter, piece in zip(self.parameters, flat[:-1].split([g.numel() for g in gradients])):
            parameter.grad = piece.view_as(parameter)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.cfg.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        told = {"nats_a_code": float(flat[-1]), "grad_norm": norm, "lr": float(self.scheduler.get_last_lr()[0])}
        self.scheduler.step()
        self.step += 1
        return told, sum(winner.codes.numel() for winner in batch)

    def _nats(self, part: Sequence[Winner]) -> Tensor:
        codes = torch.stack([winner.codes for winner in part]).to(self.accelerator.device)
        logps = self.lm.logps(codes, self.table.index([winner.row for winner in part]))
        return -logps.sum(1) / (codes.shape[1] * codes.shape[2])

    def _weights(self, part: Sequence[Winner]) -> Tensor:
        return torch.tensor([winner.weight for winner in part], device=self.accelerator.device)

    @torch.no_grad()
    def nats_a_code(self, winners: Sequence[Winner]) -> float | None:
        """Weighted mean over winners; None where there are none."""
        if not winners:
            return None
        parts = by_length(winners, self.cfg.microbatch)
        total = sum(float((self._weights(part) * self._nats(part)).sum()) for part in parts)
        return total / sum(winner.weight for winner in winners)

    def save(self) -> None:
        """A whole checkpoint or none."""
        if self.accelerator.is_main_process:
            states = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
            save_training_state(self.cfg.out, self.step, {"adapter": adapter_tensors(self.lm)}, states, self._parents())
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Back to the newest checkpoint, if there is one. UserError where base or winners are not those that it knew."""
        newest = latest_training_state(self.cfg.out, self._parents())
        if newest is None:
            return
        step, tensors, states, _ = load_training_state(newest)
        set_adapter_tensors(self.lm, tensors["adapter"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.scheduler.load_state_dict(states["scheduler"])
        self.step = step

    def _parents(self) -> dict[str, Any]:
        return {"base_sha256": self.task.base_sha256, "winners_sha256": self.task.sha256, "seed": self.cfg.seed}


# ---- the pieces ------------------------------------------------------------------------------------------------------


def check(cfg: Config) -> None:
    """Refuse what cannot work, before anything is loaded or written."""
    sizes = (cfg.batch_size, cfg.microbatch, cfg.epochs, cfg.best_of, cfg.clips_per_prompt, cfg.look_every)
    if min(sizes) < 1 or not 0 <= cfg.held_out < 1:
        raise UserError("a size below 1, or --held-out out of [0, 1)", "1 or more everywhere", "correct the settings")
    refuse_another_run(cfg.out, cfg.resume)


def load_task(cfg: Config, accelerator: Accelerator) -> Task:
    """Winners of a snapshot, or of a reward model's best of n; refuses clips or rewards of another base."""
    if (cfg.snapshot is None) == (cfg.reward is None and cfg.prompts is None):
        got = f"--snapshot {cfg.snapshot}, --reward {cfg.reward}, --prompts {cfg.prompts}"
        raise UserError(got, "either --snapshot, or --reward and --prompts", "say whose winners; or --preset smoke")
    return voted(cfg, cfg.snapshot) if cfg.snapshot is not None else sampled(cfg, accelerator)


def voted(cfg: Config, folder: Path) -> Task:
    """The clips that listeners chose, each as often as it won."""
    policy = load_policy(cfg.policy)
    snapshot = load_snapshot(folder, policy.sha256)
    told = trusted(snapshot, cfg.weights_by, policy.lm.n_q, policy.lm.card)
    pairs = decided(told.pairs)
    first = {pair.prompt_id: pair for pair in reversed(pairs)}
    table = policy.conditions([p.prompt for p in first.values()], [p.tempo_bpm for p in first.values()])
    rows = {prompt_id: row for row, prompt_id in enumerate(first)}
    winners = [Winner(torch.from_numpy(p.chosen_codes), rows[p.prompt_id], p.prompt_id, p.weight * (2 * p.p - 1)) for p in pairs]
    words = tuple(p.prompt for p in first.values())
    return Task(policy.lm, table, mean_one(winners), policy.sha256, snapshot.sha256, words=words, sound=sound_of(policy), voted=told)


def sampled(cfg: Config, accelerator: Accelerator) -> Task:
    """The best of n clips of each prompt; they are kept in out/winners, and a second call reads them there."""
    from rlhf.best_of_n import best_of
    from rlhf.evaluate_models import read_codes
    from rlhf.reward_model import load_reward
    from rlhf.sample_pairs import Settings, read_prompts, sample

    if cfg.reward is None or cfg.prompts is None:
        raise UserError(f"--reward {cfg.reward}, --prompts {cfg.prompts}", "both", "train one with rlhf/train_reward.py")
    policy = load_policy(cfg.policy)
    prompts = read_prompts(cfg.prompts)
    how = Settings(n=cfg.clips_per_prompt, seed=cfg.seed, duration_s=cfg.duration_s)
    with accelerator.main_process_first():
        manifest = sample(policy, prompts, cfg.out / "winners", how, "winners", best=best_of(cfg.best_of, cfg.reward, policy))
    rows = read_jsonl(manifest)
    place = {prompt.prompt_id: number for number, prompt in enumerate(prompts)}
    codes = read_codes(manifest, rows)
    winners = [Winner(clip, place[row["prompt_id"]], row["prompt_id"], 1.0) for clip, row in zip(codes, rows)]
    table = policy.conditions([p.prompt for p in prompts], [p.tempo_bpm for p in prompts])
    reward = load_reward(cfg.reward, policy)
    words = tuple(p.prompt for p in prompts)
    return Task(policy.lm, table, winners, policy.sha256, reward.snapshot_sha256, reward.sha256, words, sound_of(policy))


def mean_one(winners: Sequence[Winner]) -> list[Winner]:
    """The same with weights of mean 1."""
    scale = len(winners) / sum(winner.weight for winner in winners)
    return [replace(winner, weight=winner.weight * scale) for winner in winners]


def split(winners: Sequence[Winner], held_out: float, groups: Mapping[str, str]) -> tuple[list[Winner], list[Winner]]:
    """(to learn, to measure) without a common prompt, or group of prompts (of one artist); which ones depends on their ids alone."""
    if not held_out:
        return list(winners), []
    group = {w.prompt_id: groups.get(w.prompt_id, w.prompt_id) for w in winners}
    ids = sorted(set(group.values()), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    kept = set(ids[: max(1, round(held_out * len(ids)))])
    if len(kept) == len(ids):
        raise UserError(f"winners of {len(ids)} prompt(s) or artist(s)", "two or more", "collect votes on more, or pass --held-out 0")
    return [w for w in winners if group[w.prompt_id] not in kept], [w for w in winners if group[w.prompt_id] in kept]


def by_length(winners: Sequence[Winner], most: int) -> list[list[Winner]]:
    """Batches of at most `most` clips that are equally long: nothing is padded, so nothing has to be masked."""
    lengths: dict[int, list[Winner]] = {}
    for winner in winners:
        lengths.setdefault(winner.codes.shape[1], []).append(winner)
    return [group[start : start + most] for group in lengths.values() for start in range(0, len(group), most)]


def look(learner: Learner, held_out: Sequence[Winner], journal: Journal) -> tuple[dict[str, float], Played | None]:
    """Held-out nats a code, and what the policy plays now: its KL, whole and by codebook, and clips for the journal."""
    cfg, task = learner.cfg, learner.task
    nats = learner.nats_a_code(held_out)
    told = {} if nats is None else {"held_out_nats_a_code": nats}
    if not cfg.kl_clips:
        return told, None
    n_frames = learner.winners[0].codes.shape[1]
    played = play_now(learner.lm, learner.table, cfg.kl_clips, n_frames, cfg.seed)
    journal.play(learner.step, [(task.words[row], codes) for row, codes in zip(played.rows, played.codes)], task.sound)
    return told | kl_figures(played.book_kl.mean(0)), played


def toy_task(seed: int, n: int = 64, n_prompts: int = 16, n_frames: int = 12) -> Task:
    """A random policy, and winners whose codes come from the lower half of the codebooks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = MusicLMConfig(n_q=4, card=32, d_model=32, n_layers=2, n_heads=2, d_ff=64, text_dim=16)
        lm = MusicLM(shape).eval()
        for head in lm.decoder.lm_heads.parameters():  # fresh heads are almost flat; no adapter on the trunk could sharpen them
            nn.init.normal_(head, std=0.3)
    text = torch.randn((n_prompts, 6, shape.text_dim), generator=generator)
    table = Conditions(text, torch.ones(n_prompts, 6, dtype=torch.bool), torch.full((n_prompts,), float("nan")))
    codes = torch.randint(0, shape.card // 2, (n, shape.n_q, n_frames), generator=generator)
    winners = [Winner(clip, i % n_prompts, str(i % n_prompts), 1.0) for i, clip in enumerate(codes)]
    words = tuple(f"toy prompt {i}" for i in range(n_prompts))
    return Task(lm, table, winners, lm.sha256(), words=words, sound=toy_sound)


if __name__ == "__main__":
    run(main, Config, PRESETS, show=lambda figures: json.dumps(figures, indent=2))
