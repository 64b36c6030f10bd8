"""A fine-tuning run: what a checkpoint holds, one step of learning, and a look.

rlhf/train_sft.py says in which order they are called, and what each setting means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn

from adapters.lora import adapter_tensors, attach_lora, set_adapter_tensors, trainable_parameters
from base_models.checkpoint import latest_training_state, load_training_state, save_training_state
from base_models.lm import disable_functional_dropout
from rlhf.journal import Journal
from rlhf.linear_rate import restore_linear
from rlhf.played import Played, kl_figures, play_now
from rlhf.sft_task import Task, Winner, winners_sha256

if TYPE_CHECKING:
    from rlhf.train_sft import Config

SETTLED = ("r", "alpha", "lr", "batch_size", "max_grad_norm", "seed")
"""Settings that a run keeps: with another value the rest of it would be another run, or the checkpoint's states would overrule it."""


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
        """Back to the newest checkpoint, if there is one. UserError where base, winners or settings are not those that it knew."""
        newest = latest_training_state(self.cfg.out, self._parents())
        if newest is None:
            return
        step, tensors, states, _ = load_training_state(newest)
        set_adapter_tensors(self.lm, tensors["adapter"])
        self.optimizer.load_state_dict(states["optimizer"])
        restore_linear(self.scheduler, states["scheduler"], step)
        self.step = step

    def _parents(self) -> dict[str, Any]:
        settled = {name: getattr(self.cfg, name) for name in SETTLED}
        return {"base_sha256": self.task.base_sha256, "winners_sha256": winners_sha256(self.winners), **settled}


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
