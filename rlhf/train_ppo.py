"""Proximal policy optimisation: the reward model's opinion into a LoRA adapter, by playing and being judged.

    accelerate launch rlhf/train_ppo.py --policy base_models/pretrained --reward runs/reward --prompts prompts.txt --out runs/ppo
    python rlhf/train_ppo.py --preset smoke                       # a toy policy that learns to play one code, under a minute
    torchrun --nproc-per-node 2 rlhf/train_ppo.py ...             # or any accelerate configuration

    prompts -> codes [B, K, T] -> score [B] -> per-step rewards [B, S] -> GAE -> clipped updates -> LoRA -> adapter folder

Several processes share one batch. Each plays and judges its part; the parts are gathered (codes and [B, S] numbers: kilobytes),
so that whitening and moments are global by construction; each learns from its rows of every minibatch, divides by the *global*
count of steps, and gradients are summed. Only LoRA and critic have any, some hundred thousand numbers: one flat all-reduce is
enough, and no DDP wrapper stands between the policy and the sampler. A clip's seed comes from its global index, so two
processes play what one would.

It is not sharded (a base that fits no single device needs FSDP) and has no separate critic or reference network.

Papers: Schulman et al. 2017, arXiv:1707.06347 (PPO). Ziegler et al. 2019, arXiv:1909.08593 (KL in the reward, adaptive price).
Huang et al. 2024, arXiv:2403.17031 (the details that matter). Hu et al. 2021, arXiv:2106.09685 (LoRA).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from adapters.library import Manifest, save_adapter
from adapters.lora import adapter_tensors, attach_lora, set_adapter_tensors, trainable_parameters
from base_models.checkpoint import append_jsonl, latest_training_state, load_training_state, save_training_state, write_json
from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.lm import MusicLM, MusicLMConfig, disable_functional_dropout
from base_models.policy import PRETRAINED, load_policy
from base_models.settings import run, to_mapping
from rlhf.controllers import AdaptiveKLController, PromptBaseline, RewardNormalizer
from rlhf.losses import explained_variance, gae, masked_mean, masked_whiten, ppo_policy_loss, ppo_value_loss
from rlhf.rewards import Score
from rlhf.rollout import Critic, Rollout, judge, play, prompt_of, sample_seed, score_steps


@dataclass(frozen=True)
class Config:
    """Settings of a PPO run."""

    out: Path = Path("runs/ppo")
    """Folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, adapter/."""
    policy: Path = PRETRAINED
    """The base to start from; it is also the reference."""
    reward: Path | None = None
    """Folder of a trained reward model (train_reward.py)."""
    prompts: Path | None = None
    """Prompts to play: a .jsonl file with `prompt` and, where wanted, `tempo_bpm`; or a text file, one prompt a line."""
    toy: bool = False
    """A tiny random policy rewarded for one code, instead of --policy, --reward and --prompts (what --preset smoke does)."""
    n_frames: int = 100
    """Codec frames T of a clip that is played."""
    steps: int = 60
    """Rounds of play and learning."""
    max_minutes: float = 0.0
    """Stop after this time and keep what was learnt; 0 sets no limit."""
    batch_size: int = 32
    """Clips a round, over all processes."""
    samples_per_prompt: int = 1
    """Clips of one prompt in a row."""
    prompt_baseline: bool = True
    """Take away what each prompt scores on the average; without it, easy prompts drown what the clip itself did."""
    epochs: int = 2
    """Passes over a round's clips."""
    minibatches: int = 2
    """Optimiser steps a pass."""
    microbatch: int = 16
    """Clips a forward pass and process; changes memory and speed, never the result."""
    temperature: float = 1.0
    """At which clips are played and scored; use the one that listeners will hear."""
    cfg_coef: float = 1.0
    """Guidance under which clips are played and scored; anything but 1 doubles the time."""
    lr: float = 1.5e-3
    """Learning rate of the adapter (Adam). Healthy: 5 to 10 % of the ratios clipped, approx_kl about .005. A third of it learnt nothing
    from 14 rounds in which this one raised the score of a 10M-parameter base by two standard deviations."""
    critic_lr: float = 1e-3
    """Learning rate of the critic's head."""
    lr_end: float = 0.1
    """Share of both learning rates that is left at the last step (linear)."""
    max_grad_norm: float = 1.0
    """Gradients of adapter and critic are clipped to this norm, each by itself."""
    cliprange: float = 0.2
    """How far a step's probability ratio may leave 1 and still be paid for."""
    cliprange_value: float = 0.2
    """The same for values, in units of the normalised score."""
    vf_coef: float = 0.5
    """Weight of the value loss. Critic and adapter share no parameters, so it only scales the critic's clipped gradient."""
    ent_coef: float = 0.0
    """Bonus for entropy, nats a step."""
    gamma: float = 1.0
    """Discount a step; a clip ends by itself, so 1."""
    lam: float = 1.0
    """GAE's trade: 1 trusts the score alone, 0 the critic alone. The usual .95 leaves the first of 100 steps .6 % of a score that
    comes with the last, until the critic knows better; in a run of a hundred rounds it never does. Long runs: .95 to .99."""
    kl_coef: float = 0.03
    """Price of a nat of KL, in standard deviations of the score."""
    target_kl: float | None = None
    """Nats a clip that the price is steered to (Ziegler's controller); not given: the price stays."""
    kl_horizon: int = 1000
    """Clips over which the controller moves the price by up to a fifth."""
    kl_budget: float = 60.0
    """Stop when the policy's KL exceeds this many nats a clip; what is beyond fools the reward more than it pleases listeners."""
    r: int = 16
    """Rank of the adapter."""
    alpha: float = 32.0
    """Scale of the adapter: alpha / r."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs matrix products in bfloat16 (weights, log-softmax, sampler stay float32); auto: where the processor has it."""
    save_every: int = 10
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (from the start, if there is none yet)."""
    licence: str = "unspecified"
    """Licence of the adapter, for its card."""
    processes: int = 0
    """Refuse to run with any other number of processes; 0 does not ask. `accelerate launch --cpu --num_processes 2` runs one."""
    seed: int = 0
    """Seed of the adapter's start, the prompts' order, the clips and the minibatches."""


TOY: dict[str, Any] = {
    "toy": True,
    "n_frames": 12,
    "steps": 40,
    "batch_size": 64,
    "lr": 3e-3,
    "critic_lr": 1e-2,
    "kl_coef": 0.01,
    "kl_budget": 1e3,
    "r": 4,
    "alpha": 8.0,
    "microbatch": 64,
    "precision": "fp32",
}
PRESETS: dict[str, dict[str, Any]] = {"smoke": {**TOY, "out": Path("runs/ppo-smoke")}}

PATIENCE = 5
"""Rounds in a row without one finite score, after which the reward is taken to be broken."""


@dataclass(frozen=True)
class Task:
    """What plays and who judges: the LM, its prompts (one row of `table` each), the score, and the hashes of the parents."""

    lm: MusicLM
    prompts: list[str]
    table: Conditions
    score: Score
    base_sha256: str
    reward_sha256: str | None = None
    snapshot_sha256: str | None = None


def main(cfg: Config, task: Task | None = None) -> dict[str, Any]:
    """Run it; returns the figures of the adapter's manifest. `task` replaces what --policy, --reward and --prompts name."""
    began = time.monotonic()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    check(cfg, accelerator.num_processes)

    # 1. Four roles, two networks: policy and reference are one LM with and without its adapter, the critic is a head on it.
    if task is None:
        task = toy_task(cfg.seed) if cfg.toy else load_task(cfg)
    run = Run(cfg, task, accelerator)
    if cfg.resume:
        run.restore()
    told = Teller(cfg, run.step, accelerator.is_main_process)
    stopped, kl = "steps", float("nan")

    while run.step < cfg.steps:
        seconds: dict[str, float] = {}
        # 2. Play.
        with timed(seconds, "play"):
            rollout = run.play()
        # 3. Judge.
        with timed(seconds, "judge"):
            rollout, figures = run.judge(rollout)
        kl = figures["kl"]
        if kl > cfg.kl_budget:
            stopped = f"kl {kl:.1f} nats a clip exceeds the budget of {cfg.kl_budget:g}"
            break
        # 4. Learn.
        with timed(seconds, "learn"):
            figures |= run.learn(rollout)
        # 5. Tell.
        run.step += 1
        told.step(run.step, {**figures, **{f"seconds_{k}": v for k, v in seconds.items()}})
        if run.blind_rounds >= PATIENCE:
            stopped = f"no finite score in {PATIENCE} rounds in a row"
            break
        late = bool(cfg.max_minutes) and time.monotonic() - began > 60 * cfg.max_minutes
        if run.any_rank(late):
            stopped = f"{cfg.max_minutes:g} minutes are over"
            break
        if run.step % cfg.save_every == 0 and run.step < cfg.steps:
            run.save()

    run.save()
    result = {"steps": run.step, "clips": run.clips, "stopped": stopped, **told.summary()}
    if math.isfinite(kl):
        result["kl"] = round(kl, 4)
    result["seconds"] = round(time.monotonic() - began, 1)
    if accelerator.is_main_process:
        manifest = Manifest(
            name="ppo",
            base_sha256=task.base_sha256,
            method="ppo",
            snapshot_sha256=task.snapshot_sha256,
            reward_sha256=task.reward_sha256,
            licence=cfg.licence,
            config=to_mapping(cfg),
            figures=result,
        )
        save_adapter(cfg.out / "adapter", task.lm, manifest)
    told.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


class Run:
    """Everything that a checkpoint holds, and the three verbs of a round."""

    def __init__(self, cfg: Config, task: Task, accelerator: Accelerator) -> None:
        self.cfg, self.task, self.accelerator = cfg, task, accelerator
        self.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and bf16_is_faster(accelerator.device))
        self.table = task.table.to(accelerator.device)
        set_seed(cfg.seed)
        self.lm = task.lm.eval()
        disable_functional_dropout(self.lm)
        attach_lora(self.lm, cfg.r, cfg.alpha)
        self.lm.to(accelerator.device).fast_training()
        self.critic = Critic(self.lm.config.d_model).to(accelerator.device)
        self.groups = [trainable_parameters(self.lm), list(self.critic.parameters())]
        for parameter in self.parameters():
            parameter.data.copy_(broadcast(parameter.data))
        rates = [cfg.lr, cfg.critic_lr]
        self.optimizer = torch.optim.Adam([{"params": p, "lr": lr} for p, lr in zip(self.groups, rates)], eps=1e-5)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, cfg.lr_end, total_iters=max(cfg.steps - 1, 1))
        self.controller = AdaptiveKLController(cfg.kl_coef, cfg.target_kl, cfg.kl_horizon)
        self.baseline = PromptBaseline(len(task.prompts))
        self.normalizer = RewardNormalizer()
        self.step, self.clips, self.blind_rounds = 0, 0, 0

    def parameters(self) -> Iterator[nn.Parameter]:
        for group in self.groups:
            yield from group

    # ---- a round -----------------------------------------------------------------------------------------------------

    def play(self) -> Rollout:
        """The next `batch_size` clips of the run, this process its contiguous share; gathered, in the order of their indices."""
        cfg, rank, world = self.cfg, self.accelerator.process_index, self.accelerator.num_processes
        share = cfg.batch_size // world
        indices = range(self.clips + rank * share, self.clips + (rank + 1) * share)
        rows = prompt_of(indices, len(self.task.prompts), cfg.samples_per_prompt, cfg.seed)
        mine = play(
            self.lm,
            self.critic,
            self.table.index(rows),
            rows,
            [sample_seed(cfg.seed, index) for index in indices],
            cfg.n_frames,
            temperature=cfg.temperature,
            cfg_coef=cfg.cfg_coef,
            bf16=self.bf16,
        )
        score = self.task.score(mine.codes, [self.task.prompts[row] for row in rows])
        score = score.detach().to(mine.logps)
        self.clips += cfg.batch_size
        return dataclasses.replace(mine, score=score).map(self.accelerator.gather)

    def judge(self, rollout: Rollout) -> tuple[Rollout, dict[str, float]]:
        """Scores -> rewards, at the present price of drift; then the price is adapted."""
        price = self.controller.kl_coef
        score = rollout.score
        if self.cfg.prompt_baseline:
            score = self.baseline(rollout.prompt_ids, score)
        judged = judge(rollout, score, self.normalizer, price)
        kl = (rollout.logps - rollout.ref_logps).sum(1).mean().item()
        self.controller.update(kl, len(rollout.codes))
        finite = rollout.score[torch.isfinite(rollout.score)]
        self.blind_rounds = 0 if len(finite) else self.blind_rounds + 1
        none = torch.full((1,), float("nan"))
        return judged, {
            "score": (finite if len(finite) else none).mean().item(),
            "score_std": finite.std(correction=0).item() if len(finite) else float("nan"),
            "scores_not_finite": float(len(rollout.score) - len(finite)),
            "kl": kl,
            "kl_coef": price,
            "reward": judged.rewards.sum(1).mean().item(),
            "entropy": -masked_mean(rollout.logps, rollout.mask).item(),
        }

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """`epochs` passes of clipped updates over a judged, global rollout. Returns means over the updates."""
        cfg, first_ratio = self.cfg, 0.0
        sums: dict[str, float] = {}
        if not rollout.mask.any():
            return {}
        advantages, returns = gae(rollout.rewards, rollout.values, rollout.mask, cfg.gamma, cfg.lam)
        advantages = masked_whiten(advantages, rollout.mask)
        updates = self._minibatches(len(rollout.codes))
        for number, rows in enumerate(updates):
            stats = self._update(rollout, advantages, returns, rows)
            first_ratio = stats["ratio"] if number == 0 else first_ratio
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value / len(updates)
        sums |= {"lr": float(self.scheduler.get_last_lr()[0]), "ratio_first": first_ratio}
        sums["explained_variance"] = explained_variance(rollout.values, returns, rollout.mask).item()
        self.scheduler.step()
        return sums

    def _minibatches(self, n: int) -> list[Tensor]:
        """Rows of each update, the same on every process; drawn from (seed, step), so that nothing has to be remembered."""
        generator = torch.Generator().manual_seed(sample_seed(self.cfg.seed ^ 0xBA7C4, self.step))
        passes = [torch.randperm(n, generator=generator) for _ in range(self.cfg.epochs)]
        return [rows for order in passes for rows in order.chunk(self.cfg.minibatches)]

    def _update(self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor) -> dict[str, float]:
        """One optimiser step on global rows: this process takes its share in microbatches; gradients and figures are summed."""
        cfg, device = self.cfg, self.accelerator.device
        rows = rows.to(device)
        count = rollout.mask[rows].sum().clamp(min=1)
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        self.optimizer.zero_grad(set_to_none=False)
        totals: dict[str, Tensor] = {}
        for part in mine.split(cfg.microbatch):
            mask, cond = rollout.mask[part], self.table.index(rollout.prompt_ids[part])
            scored = score_steps(
                self.lm,
                rollout.codes[part],
                cond,
                temperature=cfg.temperature,
                cfg_coef=cfg.cfg_coef,
                bf16=self.bf16,
                with_entropy=cfg.ent_coef != 0,
            )
            values = self.critic(scored.hidden)
            policy_loss, stats = ppo_policy_loss(scored.logps, rollout.logps[part], advantages[part], mask, cfg.cliprange, count)
            value_loss, more = ppo_value_loss(values, rollout.values[part], returns[part], mask, cfg.cliprange_value, count)
            loss = policy_loss + cfg.vf_coef * value_loss - cfg.ent_coef * masked_mean(scored.entropy, mask, count)
            loss.backward()
            losses = {"policy_loss": policy_loss.detach(), "value_loss": value_loss.detach()}
            for name, value in {**stats, **more, **losses}.items():
                totals[name] = totals.get(name, torch.zeros((), device=device)) + value
        return self._optimise(totals)

    def _optimise(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Sum gradients and figures over the processes in one flat tensor, clip each group, step; skip where not finite."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters()]
        flat = torch.cat([g.reshape(-1) for g in gradients] + [value.float().reshape(1) for value in totals.values()])
        flat = self.accelerator.reduce(flat, "sum")
        sizes = [g.numel() for g in gradients] + [1] * len(totals)
        pieces = flat.split(sizes)
        for parameter, piece in zip(self.parameters(), pieces):
            parameter.grad = piece.view_as(parameter)
        stats = {name: piece.item() for name, piece in zip(totals, pieces[len(gradients) :])}
        norms = [nn.utils.clip_grad_norm_(group, self.cfg.max_grad_norm) for group in self.groups]
        healthy = all(math.isfinite(norm.item()) for norm in norms)
        if healthy:
            self.optimizer.step()
        return {**stats, "grad_norm": norms[0].item() if healthy else 0.0, "updates_skipped": float(not healthy)}

    def any_rank(self, flag: bool) -> bool:
        """Whether any process says so; all get the same answer."""
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum").item() > 0)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A whole checkpoint or none. Seeds and minibatches follow from (seed, clips, step): there is no sampler to save."""
        if self.accelerator.is_main_process:
            save_training_state(
                self.cfg.out,
                self.step,
                {"adapter": adapter_tensors(self.lm), "critic": self.critic.state_dict()},
                {
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "controller": self.controller.state_dict(),
                    "baseline": self.baseline.state_dict(),
                    "normalizer": self.normalizer.state_dict(),
                },
                {**self._parents(), "clips": self.clips, "blind_rounds": self.blind_rounds},
            )
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Back to the newest checkpoint, if there is one. Raises UserError where base, reward or prompts are not those that it knew."""
        newest = latest_training_state(self.cfg.out)
        if newest is None:
            return
        step, tensors, states, extra = load_training_state(newest)
        for name, value in self._parents().items():
            if extra[name] != value:
                raise UserError(f"{newest} of {name} {extra[name]}, now {value}", "the same one", "resume with it, or start a new --out")
        set_adapter_tensors(self.lm, tensors["adapter"])
        self.critic.load_state_dict(tensors["critic"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.scheduler.load_state_dict(states["scheduler"])
        self.controller.load_state_dict(states["controller"])
        self.baseline.load_state_dict(states["baseline"])
        self.normalizer.load_state_dict(states["normalizer"])
        self.step, self.clips, self.blind_rounds = step, extra["clips"], extra["blind_rounds"]

    def _parents(self) -> dict[str, Any]:
        prompts = hashlib.sha256("\n".join(self.task.prompts).encode()).hexdigest()
        return {
            "base_sha256": self.task.base_sha256,
            "reward_sha256": self.task.reward_sha256,
            "prompts_sha256": prompts,
            "seed": self.cfg.seed,
        }


# ---- the pieces ------------------------------------------------------------------------------------------------------


def check(cfg: Config, world: int) -> None:
    """Refuse what cannot work, before anything is loaded or written."""
    if cfg.processes and world != cfg.processes:
        raise UserError(
            f"{world} process(es)",
            f"{cfg.processes}, as --processes asks",
            "launch with torchrun --nproc-per-node N, or `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu` on a CPU",
        )
    if min(cfg.batch_size, cfg.minibatches, cfg.epochs, cfg.microbatch, cfg.n_frames, cfg.samples_per_prompt, cfg.steps) < 1:
        raise UserError("a size below 1", "1 or more everywhere", "correct batch_size, minibatches, epochs, steps or n_frames")
    if cfg.batch_size % (world * cfg.minibatches):
        raise UserError(
            f"batch_size {cfg.batch_size} for {world} process(es) x {cfg.minibatches} minibatches",
            f"a multiple of {world * cfg.minibatches}",
            "change --batch-size or --minibatches",
        )
    if not cfg.resume and latest_training_state(cfg.out) is not None:
        raise UserError(f"{cfg.out} with checkpoints of another run", "a new folder", "add --resume, or choose another --out")


def load_task(cfg: Config) -> Task:
    """The policy, the prompts and the reward model that the settings name."""
    from rlhf.reward_model import load_reward

    if cfg.reward is None or cfg.prompts is None:
        raise UserError(f"--reward {cfg.reward}, --prompts {cfg.prompts}", "both", "train one with train_reward.py; or --preset smoke")
    policy = load_policy(cfg.policy)
    prompts, tempi = read_prompts(cfg.prompts)
    reward = load_reward(cfg.reward, policy)
    return Task(
        lm=policy.lm,
        prompts=prompts,
        table=policy.conditions(prompts, tempi),
        score=reward.score,
        base_sha256=policy.sha256,
        reward_sha256=reward.sha256,
        snapshot_sha256=reward.snapshot_sha256,
    )


def read_prompts(path: Path) -> tuple[list[str], list[float | None]]:
    """Prompts and tempi of a .jsonl file (rows with `prompt`, perhaps `tempo_bpm`) or of a text file, one prompt a line."""
    if not path.is_file():
        raise UserError(f"no file {path}", "prompts, .jsonl or one a line", "check --prompts")
    lines = [line for line in io.StringIO(path.read_text(encoding="utf-8")) if line.strip()]
    if not lines:
        raise UserError(f"{path} without a prompt", "at least one", "write one prompt a line")
    if path.suffix != ".jsonl":
        return [line.strip() for line in lines], [None] * len(lines)
    prompts: list[str] = []
    tempi: list[float | None] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompts.append(str(row["prompt"]))
            tempi.append(None if row.get("tempo_bpm") is None else float(row["tempo_bpm"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: {line[:60]!r}", 'a row like {"prompt": "calm piano", "tempo_bpm": 90}', "correct it"
            ) from error
    return prompts, tempi


def toy_task(seed: int, n_prompts: int = 8) -> Task:
    """A random policy of 2 codebooks of 16, paid for the share of code 3 among its codes (at first about 1/16)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = MusicLMConfig(n_q=2, card=16, d_model=32, n_layers=2, n_heads=2, d_ff=64, text_dim=16)
        lm = MusicLM(shape).eval()
        for head in lm.decoder.lm_heads.parameters():  # fresh heads are almost flat; no adapter on the trunk could sharpen them
            nn.init.normal_(head, std=0.3)
        text = torch.randn(n_prompts, 4, shape.text_dim)
    table = Conditions(text, torch.ones(n_prompts, 4, dtype=torch.bool), torch.full((n_prompts,), float("nan")))
    return Task(lm, [f"toy prompt {i}" for i in range(n_prompts)], table, share_of_code_3, lm.sha256())


def share_of_code_3(codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """The toy's reward: codes [B, K, T] -> share of the codes that are 3 [B]."""
    return (codes == 3).float().mean((1, 2))


def bf16_is_faster(device: torch.device) -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


class Teller:
    """config.json, metrics.jsonl, TensorBoard and a progress bar; silent on all processes but the first."""

    def __init__(self, cfg: Config, first_step: int, speaks: bool) -> None:
        self.cfg, self.speaks, self.rows = cfg, speaks, []
        self.path = cfg.out / "metrics.jsonl"
        if not speaks:
            return
        cfg.out.mkdir(parents=True, exist_ok=True)
        write_json(cfg.out / "config.json", to_mapping(cfg))
        self.rows = read_metrics(self.path, first_step)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self.board = SummaryWriter(str(cfg.out / "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(total=cfg.steps, initial=first_step, desc="ppo", unit="step", dynamic_ncols=True)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """One round's figures; NaN is written as null."""
        if not self.speaks:
            return
        row = {"step": step, **{k: round(v, 6) if math.isfinite(v) else None for k, v in figures.items()}}
        self.rows.append(row)
        append_jsonl(self.path, row)
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)
        if figures["scores_not_finite"]:
            tqdm.write(f"step {step}: {figures['scores_not_finite']:.0f} clips left out, their score is not finite")
        self.bar.update()
        self.bar.set_postfix(score=f"{figures['score']:.3f}", kl=f"{figures['kl']:.2f}", kl_coef=f"{figures['kl_coef']:.3g}")

    def summary(self) -> dict[str, Any]:
        """First and last scores (means over up to five rounds), the last KL, mean seconds of a round by phase."""
        if not self.rows:
            return {}
        scores = [row["score"] for row in self.rows if row["score"] is not None]
        few = max(1, min(5, len(scores) // 2))
        told: dict[str, Any] = {"kl": self.rows[-1]["kl"], "entropy": self.rows[-1]["entropy"]}
        if scores:
            told |= {"score_first": round(sum(scores[:few]) / few, 4), "score_last": round(sum(scores[-few:]) / few, 4)}
        for phase in ("play", "judge", "learn"):
            told[f"seconds_{phase}"] = round(sum(row[f"seconds_{phase}"] for row in self.rows) / len(self.rows), 3)
        return told

    def close(self) -> None:
        if self.speaks:
            self.bar.close()
            self.board.close()


def read_metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The rows up to a step: what came after the checkpoint, half-written lines too, will be told again."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] > last_step:
                break
            rows.append(row)
    return rows


if __name__ == "__main__":
    run(main, Config, PRESETS, show=lambda figures: json.dumps(figures, indent=2))
