"""A PPO run: all that it remembers, and the verbs of a round (play, judge, learn).

rlhf/train_ppo.py says in which order they are called, and what each setting means; rlhf/ppo_look.py looks at held-out prompts,
rlhf/ppo_checkpoint.py saves and restores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn

from adapters.lora import attach_lora, trainable_parameters
from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.launch import asked_sharding, bf16_is_faster
from base_models.lm import codes_of_steps, disable_functional_dropout
from base_models.sharding import shard_frozen
from rlhf.average import Average
from rlhf.brake import Brake
from rlhf.controllers import AdaptiveKLController, PromptBaseline, RewardNormalizer, leave_one_out
from rlhf.dense import limited
from rlhf.judges import weighted_slope
from rlhf.losses import explained_variance, gae, masked_mean, masked_spread, masked_whiten, ppo_policy_loss, ppo_value_loss
from rlhf.ppo_dense import DenseTable, dense_table
from rlhf.ppo_task import Task
from rlhf.rewards import held_parts, parse_weights, weighted
from rlhf.rollout import Critic, Rollout, code_logits, frames_on_steps, judge, play, prompt_of, sample_seed, score_steps

if TYPE_CHECKING:
    from rlhf.train_ppo import Config

FRAME_GAMMA = 0.9
"""Discount a step of what frames are worth: some ten steps, .4 s of the shipped codec, the window in which a frame is judged. Each clip's
frames sum to 0, so that without a discount of their own they would tell a policy nothing at all."""
LEAST_SPREAD = {"score": 0.1, "codes": 0.001}
"""Spread of a round's advantages, in standard deviations of the score, below which its steps shorten in proportion. Whitening makes what is
left of them as large as any advantages, and Adam every gradient as large as any: rounding alone would then be learnt at the full rate.
Measured where a reward has something to say: about 1 a clip, .006 to .03 a code; where it is constant, .01 and .0002."""


class Run:
    """A policy on its way, with all that it remembers."""

    def __init__(self, cfg: Config, task: Task, accelerator: Accelerator) -> None:
        self.cfg, self.task, self.accelerator = cfg, task, accelerator
        self.reward = weighted(parse_weights(cfg.weights), task.score, task.checks, task.least, task.watched, task.voted)
        self.held = held_parts(cfg.hold, parse_weights(cfg.weights))
        self.credit = credit_of(cfg.credit, task, self.reward.trained, bool(cfg.frame_weight))
        self.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and bf16_is_faster(accelerator.device))
        self.table = task.table.to(accelerator.device)
        set_seed(cfg.seed)
        self.lm = task.lm.eval()
        disable_functional_dropout(self.lm)
        attach_lora(self.lm, cfg.r, cfg.alpha)
        self.lm.to(accelerator.device).fast_training()
        if asked_sharding() == "fsdp":
            shard_frozen(self.lm)
        self.average = Average(self.lm, cfg.average)
        self.critic = Critic(self.lm.config.d_model).to(accelerator.device)
        self.groups = [trainable_parameters(self.lm), list(self.critic.parameters())]
        for parameter in self.parameters():
            parameter.data.copy_(broadcast(parameter.data))
        rates = [cfg.lr, cfg.critic_lr]
        self.optimizer = torch.optim.Adam([{"params": p, "lr": lr} for p, lr in zip(self.groups, rates)], eps=1e-5)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, cfg.lr_end, total_iters=max(cfg.steps - 1, 1))
        self.controller = AdaptiveKLController(cfg.kl_coef, cfg.target_kl, cfg.kl_horizon, cfg.kl_coef_least, cfg.kl_power)
        self.baseline = PromptBaseline(len(task.prompts))
        self.normalizer = RewardNormalizer(least=self.reward.least)
        self.brake = Brake(cfg.max_disagreement, cfg.min_diversity, cfg.patience)
        self.best: dict[str, Tensor] = {}
        """The adapter of the best look."""
        self.braked: str | None = None
        """Why the run should end, once it should."""
        self.over_budget: float | None = None
        """The KL, nats a clip, of the round that exceeded the budget."""
        self.examples: list[tuple[str, Tensor]] = []
        """Clips to listen to, with what they are: prompt, codes [K, T]."""
        self.price = cfg.kl_coef
        """Of a nat, in the round that is being learnt."""
        self.step, self.clips, self.blind_rounds = 0, 0, 0

    def parameters(self) -> Iterator[nn.Parameter]:
        for group in self.groups:
            yield from group

    def play(self, to_learn: bool = True) -> Rollout:
        """This process's contiguous share of the next `batch_size` clips of the run; not judged yet. to_learn: note what learning needs."""
        cfg, rank, world = self.cfg, self.accelerator.process_index, self.accelerator.num_processes
        share = cfg.batch_size // world
        indices = range(self.clips + rank * share, self.clips + (rank + 1) * share)
        rows = prompt_of(indices, len(self.task.prompts), cfg.samples_per_prompt, cfg.seed)
        self.clips += cfg.batch_size
        return play(
            self.lm,
            self.critic,
            self.table.index(rows),
            rows,
            [sample_seed(cfg.seed, index) for index in indices],
            cfg.n_frames,
            temperature=cfg.temperature,
            cfg_coef=cfg.cfg_coef,
            with_choices=to_learn and self.credit == "codes",
        )

    def drift(self) -> float:
        """KL to the base of the adapter as it stands, nats a clip, on the clips of a round that nobody learns from."""
        played = self.clips
        mine = self.play(to_learn=False)
        self.clips = played
        kl: Tensor = self.accelerator.gather((mine.logps - mine.ref_logps).sum(1))
        return kl.mean().item()

    def judge(self, mine: Rollout) -> tuple[Rollout, dict[str, float]]:
        """This process's clips -> all clips, in the order of their indices, with rewards at the present price of drift, which is then
        adapted."""
        prompts = self._words(mine.prompt_ids)
        known: dict[str, Tensor] = {}
        slopes: list[Tensor] = []
        if self.credit == "codes":
            if self.step == 0 and not self.reward.measured:  # no look has: what a part is worth has to be known before its slope is
                ids = self.accelerator.gather(mine.prompt_ids)
                self.reward.measure(self.accelerator.gather(self.reward.marks(mine.codes, prompts)), self._words(ids), ids.tolist())
            ways = {name: self.task.slopes[name] for name in self.reward.trained}
            slope, known = weighted_slope(ways, self.reward.worth(prompts), mine.codes, prompts)
            slopes.append(slope)
        if self.cfg.frame_weight:
            frames, slope_of_frames = self._frames(mine.codes, prompts)
            slopes += slope_of_frames
            mine = dataclasses.replace(mine, frames=frames_on_steps(frames, mine.codes.shape[1]).to(mine.logps))
        if slopes:
            mine = dataclasses.replace(mine, slope=torch.stack(slopes, 1).to(mine.logps))
        marks = self.reward.marks(mine.codes, prompts, known=known)
        rollout = dataclasses.replace(mine, marks=marks).gathered(self.accelerator.gather)
        everyone = self._words(rollout.prompt_ids)
        if self.step == 0:
            self.reward.measure(rollout.marks, everyone, rollout.prompt_ids.tolist())
        total = self.reward.judge(rollout.marks, everyone).total
        if self.cfg.baseline == "prompt":
            centred = self.baseline(rollout.prompt_ids, total)
        else:
            centred = leave_one_out(rollout.prompt_ids, total) if self.cfg.baseline == "loo" else total
        kl = (rollout.logps - rollout.ref_logps).sum(1).mean().item()
        self.price = price = self.controller.price(kl)
        judged = judge(rollout, centred, self.normalizer, price)
        if self.credit == "codes":
            slope = limited(judged.slope[:, 0])
            if self.cfg.frame_weight:
                slope = slope + self.normalizer.std * self.frame_price * limited(judged.slope[:, 1])
            judged = dataclasses.replace(judged, slope=slope)
        self.controller.update(kl, len(rollout.codes))
        finite = total[torch.isfinite(total)]
        self.blind_rounds = 0 if len(finite) else self.blind_rounds + 1
        none = torch.full((1,), float("nan"))
        figures = {
            "score": (finite if len(finite) else none).mean().item(),
            "score_std": finite.std(correction=0).item() if len(finite) else float("nan"),
            "scores_not_finite": float(len(total) - len(finite)),
            **self.reward.figures(rollout.marks),
            "kl": kl,
            **{f"kl_book_{k}": value for k, value in enumerate(rollout.book_kl.mean(0).tolist())},
            "kl_coef": price,
            "reward": judged.rewards.sum(1).mean().item(),
            "entropy": -masked_mean(rollout.logps, rollout.mask).item(),
            **({"frames_worst": rollout.frames.min(1).values.mean().item()} if self.cfg.frame_weight else {}),
        }
        if self.cfg.brake != "off" and kl > self.cfg.kl_budget:
            self.braked, self.over_budget = f"kl {kl:.1f} nats a clip exceeds the budget of {self.cfg.kl_budget:g}", kl
        if self.task.heldout is None:
            self.examples = [(self.task.prompts[int(i)], codes) for i, codes in zip(rollout.prompt_ids[: self.cfg.listen], rollout.codes)]
        return judged, figures

    def _words(self, rows: Tensor) -> list[str]:
        """The prompts of these rows."""
        return [self.task.prompts[row] for row in rows.tolist()]

    def _frames(self, codes: Tensor, prompts: list[str]) -> tuple[Tensor, list[Tensor]]:
        """How good each frame is beside the rest of its clip [B, T]; and the slope of that [B, D, T], where credit is given by slopes."""
        if self.credit == "codes":
            assert self.task.frame_slope is not None
            slope, frames = self.task.frame_slope(codes, prompts)
            return frames, [slope]
        assert self.task.frames is not None
        return self.task.frames(codes, prompts), []

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """`epochs` passes of clipped updates over a judged, global rollout. Returns means over the updates."""
        first_ratio = 0.0
        sums: dict[str, float] = {}
        if not rollout.mask.any():
            return {}
        updates = self._minibatches(len(rollout.codes))
        if self.credit == "codes":
            return self._learn_by_codes(rollout, updates)
        advantages, returns, spread = self.advantages(rollout)
        for number, rows in enumerate(updates):
            stats = self._update(rollout, advantages, returns, rows, self.heed(spread))
            first_ratio = stats["ratio"] if number == 0 else first_ratio
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value / len(updates)
        sums |= {"lr": float(self.scheduler.get_last_lr()[0]), "ratio_first": first_ratio, "advantage_spread": spread}
        sums["explained_variance"] = explained_variance(rollout.values, returns, rollout.mask).item()
        self.scheduler.step()
        return sums

    def advantages(self, rollout: Rollout) -> tuple[Tensor, Tensor, float]:
        """Advantages, whitened over the steps of all processes, and returns [B, S] of a judged, global rollout; and the former's spread.
        What frames are worth has a discount of its own (as Burda et al. 2018, arXiv:1810.12894, have for a second reward) and no critic:
        it is 0 on average."""
        advantages, returns = gae(rollout.rewards, rollout.values, rollout.mask, self.cfg.gamma, self.cfg.lam)
        if self.cfg.frame_weight:
            worth = self.frame_price * rollout.frames
            advantages = advantages + gae(worth, torch.zeros_like(worth), rollout.mask, FRAME_GAMMA, 1.0)[0]
        return masked_whiten(advantages, rollout.mask), returns, masked_spread(advantages, rollout.mask)

    def heed(self, spread: float) -> float:
        """Share of the learning rate for a round whose advantages have this spread: all of it, unless that is next to nothing."""
        unit = self.frame_price if self.cfg.frame_weight else 1.0  # of which a frame is worth a small part
        return min(1.0, spread / (LEAST_SPREAD[self.credit] * unit))

    @property
    def frame_price(self) -> float:
        """Of a nat of one frame, in standard deviations of the score."""
        return self.cfg.frame_weight / self.cfg.n_frames

    def _minibatches(self, n: int) -> list[Tensor]:
        """Rows of each update, the same on every process; drawn from (seed, step), so that nothing has to be remembered.

        Of each `minibatches` rows that follow one another a minibatch has one (n is a multiple): so all processes, whose clips do follow
        one another, have as many of theirs in it, whatever their number; and a prompt's clips are spread over the minibatches.
        """
        generator = torch.Generator().manual_seed(sample_seed(self.cfg.seed ^ 0xBA7C4, self.step))
        strata = torch.arange(n).view(-1, self.cfg.minibatches)
        passes = [strata.gather(1, torch.rand(strata.shape, generator=generator).argsort(1)) for _ in range(self.cfg.epochs)]
        return [rows for dealt in passes for rows in dealt.unbind(1)]

    def own(self, n: int) -> range:
        """Which of a global rollout's n rows this process played."""
        share = n // self.accelerator.num_processes
        return range(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)

    def _mine(self, rows: Tensor, n: int) -> Tensor:
        """Of an update's rows those that this process played, and learns from."""
        own = self.own(n)
        return rows[(rows >= own.start) & (rows < own.stop)]

    def _update(self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor, heed: float) -> dict[str, float]:
        """One optimiser step on global rows: this process takes its share in microbatches; gradients and figures are summed."""
        cfg, device = self.cfg, self.accelerator.device
        rows = rows.to(device)
        count = rollout.mask[rows].sum().clamp(min=1)
        mine = self._mine(rows, len(rollout.codes))
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
        return self._optimise(totals, heed)

    def _learn_by_codes(self, rollout: Rollout, updates: list[Tensor]) -> dict[str, float]:
        """The same passes with credit for every choice of every code (rlhf.dense); the critic has nothing to add and rests."""
        table = self.advantages_by_codes(rollout)
        told = [self._update_by_codes(rollout, table, rows.to(rollout.codes.device)) for rows in updates]
        sums = {name: sum(stats[name] for stats in told) / len(told) for name in told[0]}
        sums |= {"lr": float(self.scheduler.get_last_lr()[0]), "ratio_first": told[0]["ratio"], "advantage_spread": table.scale}
        self.scheduler.step()
        return sums

    def advantages_by_codes(self, rollout: Rollout) -> DenseTable:
        """What each choice in this process's clips of a judged, global rollout is worth, on one scale for all; to be asked once."""
        assert self.task.codebooks is not None
        return dense_table(
            rollout,
            self.own(len(rollout.codes)).start,
            self.task.codebooks.to(rollout.slope),
            self.normalizer.std,
            self.price,
            lambda x: self.accelerator.reduce(x, "sum"),
        )

    def _update_by_codes(self, rollout: Rollout, table: DenseTable, rows: Tensor) -> dict[str, float]:
        """One optimiser step on global rows, of which this process takes those that it played."""
        device = rollout.codes.device
        mask = rollout.mask[rows]
        n_steps, n_codes = mask.sum().clamp(min=1), codes_of_steps(mask, rollout.codes.shape[1]).sum().clamp(min=1)
        self.optimizer.zero_grad(set_to_none=False)
        totals: dict[str, Tensor] = {}
        for part in self._mine(rows, len(rollout.codes)).split(self.cfg.microbatch):
            codes = rollout.codes[part]
            logits = self._logits(codes, self.table.index(rollout.prompt_ids[part]))
            loss, stats, logps = table.loss(logits, codes, part, self.cfg.cliprange, n_codes)
            loss.backward()
            with torch.no_grad():
                log_ratio = logps - rollout.logps[part]
                stats["ratio"] = masked_mean(log_ratio.exp(), rollout.mask[part], n_steps)
                stats["approx_kl"] = masked_mean(log_ratio.exp() - 1 - log_ratio, rollout.mask[part], n_steps)
            for name, value in {**stats, "clipfrac": stats["dense_clipfrac"], "policy_loss": loss.detach()}.items():
                totals[name] = totals.get(name, torch.zeros((), device=device)) + value
        return self._optimise(totals, self.heed(table.scale))

    def _logits(self, codes: Tensor, cond: Conditions) -> Tensor:
        cfg = self.cfg
        return code_logits(self.lm, codes, cond, temperature=cfg.temperature, cfg_coef=cfg.cfg_coef, bf16=self.bf16)[0]

    def _optimise(self, totals: dict[str, Tensor], heed: float) -> dict[str, float]:
        """Sum gradients and figures over the processes in one flat tensor, clip each group, step; skip where not finite.

        heed: share of the adapter's learning rate that this step takes; Adam would undo a share of the gradient.
        """
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
            adapter = self.optimizer.param_groups[0]
            rate, adapter["lr"] = adapter["lr"], adapter["lr"] * heed
            self.optimizer.step()
            adapter["lr"] = rate
        return {**stats, "grad_norm": norms[0].item() if healthy else 0.0, "updates_skipped": float(not healthy)}

    def any_rank(self, flag: bool) -> bool:
        """Whether any process says so; all get the same answer."""
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum").item() > 0)


def without_slope(task: Task, trained: tuple[str, ...], frames: bool) -> list[str]:
    """What is trained on and cannot say where a clip should have moved: parts of the reward, and `frames` where they have a weight."""
    return [name for name in trained if name not in task.slopes] + ["frames"] * (frames and task.frame_slope is None)


def credit_of(wanted: str, task: Task, trained: tuple[str, ...], frames: bool = False) -> str:
    """`score` or `codes`. Code by code where all that is trained on has a slope; UserError where that is asked for and cannot be."""
    flat = without_slope(task, trained, frames)
    if wanted == "codes" and flat:
        raise UserError(
            f"--credit codes with {', '.join(flat)}, without a slope", f"parts among {sorted(task.slopes)}", "use --credit score"
        )
    return ("score" if flat else "codes") if wanted == "auto" else wanted
