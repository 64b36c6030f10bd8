"""Between the rounds of a DPO run: measure; draw back, or stop, where the KL budget is spent; else play, judge and hand the trainer its
next rows and the price of drift. With --average the mean of the rounds' adapters is what is looked at and left (rlhf/average.py), while
budget and price go by what the round itself has come to.

A round can go much further than the one before: the first ones have the highest rate, and what a LoRA does grows with the product of its
two factors. A run that is steered (--target-kl) and finds itself beyond its budget scales its adapter back, by the root of target / KL as
KL is quadratic in a small step, measures again, up to three times until it is within the budget, and goes on at the price that the KL
before had called for: a line search (as in TRPO, Schulman et al. 2015, arXiv:1502.05477, appendix C) on the way to the base. Adam forgets
where it was going, or the next round would leap again. It needs nothing but what a checkpoint has and what was measured, so that a resumed
run does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from adapters.lora import scale_adapter
from rlhf.average import Average
from rlhf.dpo_report import NothingLeftError, Recorder
from rlhf.flat_dpo import FlatDPOTrainer, LiveRows
from rlhf.journal import speeds
from rlhf.own_pairs import OwnPairs
from rlhf.round_price import Price

DRAWN_BACK = 3
"""How often the adapter of one round is scaled back, at most."""


class Rounds(TrainerCallback):
    """Between rounds: measure; draw back, or stop, where the KL budget is spent; else play, judge and hand the next rows to the trainer."""

    def __init__(self, own: OwnPairs, live: LiveRows, epochs: int, recorder: Recorder, price: Price, average: Average) -> None:
        self.own, self.live, self.epochs, self.recorder, self.price, self.average = own, live, epochs, recorder, price, average
        self.trainer: FlatDPOTrainer | None = None
        """Whose price of drift follows what is measured."""
        self.seconds: dict[str, float] = {}
        """Of the round that is being learnt."""
        recorder.by_step = False
        self.stopped = ""
        self.last: dict[str, float] = {}
        self.number = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._next(state, control)
        if self.stopped:
            raise NothingLeftError  # a resumed run that had stopped: the trainer would take a step before it asks

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if int(state.epoch + 1e-6) % self.epochs == 0 or control.should_training_stop:
            self._next(state, control)

    def _next(self, state: Any, control: Any) -> None:
        number = int((state.epoch or 0) + 1e-6) // self.epochs
        figures, kl, gone = self._measure(number)
        if not kl <= self.own.plan.kl_budget:  # NaN too
            self.stopped = f"kl {kl:.1f} nats a clip exceeds the budget of {self.own.plan.kl_budget:g}"
            control.should_training_stop = True
        if not control.should_training_stop and state.global_step < state.max_steps:
            rows, more = self.own.round(number)
            self.live.fill(rows)
            assert self.trainer is not None
            figures["kl_weight"] = self.trainer.kl_price.kl_coef = self.price.of(number, gone)
            self.trainer.kl_price.target_kl = self.price.target(number)
            figures |= more
        self.last = figures
        self.number = number
        self.recorder.tell(state.global_step, {"round": float(number), **figures, **self._speeds()})
        heard = self.own.heard
        assert heard is not None
        self.recorder.play(state.global_step, [(self.own.prompts[row], codes) for row, codes in zip(heard.rows, heard.codes)])

    def _measure(self, number: int) -> tuple[dict[str, float], float, float]:
        """Figures on held-out prompts of what the run would leave now; the KL of the adapter that it goes on with, and that which the
        round had gone to before it was drawn back, nats a clip."""
        averages = bool(self.average.decay and number)
        look = self.own.drift if averages else self.own.measure
        figures = self._agreed(look, number)
        gone = kl = figures["held_out/kl"]
        budget, target = self.own.plan.kl_budget, self.price.target(number)
        drawn_back = target is not None and budget < gone < math.inf
        if target is not None and drawn_back:
            for _ in range(DRAWN_BACK):
                scale_adapter(self.own.lm, math.sqrt(target / kl))
                figures = self._agreed(look, number)
                kl = figures["held_out/kl"]
                if not kl > budget:
                    break
            assert self.trainer is not None
            forget_direction(self.trainer.optimizer)
        if averages:
            if kl <= budget:  # what ends a run for having leapt is no part of what it leaves
                self.average.update()
            with self.average.in_place():
                figures = self._agreed(self.own.measure, number) | {"held_out/kl_round": kl}
        return figures | ({"held_out/kl_before": gone} if drawn_back else {}), kl, gone

    def _agreed(self, look: Callable[[int], dict[str, float]], number: int) -> dict[str, float]:
        """What the first process measures: all measure the same clips, but rounding may differ by device, and an adapter must not."""
        told = [look(number)]
        broadcast_object_list(told)
        return told[0]

    def _speeds(self) -> dict[str, float]:
        """Seconds of what has just been played and judged, and of learning in the round before, whose speed is known now."""
        lm, plan = self.own.lm, self.own.plan
        codes = plan.n_prompts * plan.n_clips * lm.n_q * plan.n_frames
        before, self.seconds = self.seconds | self.recorder.seconds, dict(self.own.seconds)
        self.recorder.seconds.clear()
        self.own.seconds.clear()
        told = speeds(before, codes) if "learn" in before else {}
        return {name: told[name] for name in ("seconds_learn", "tokens_per_second") if name in told} | speeds(self.seconds, codes)

    def summary(self) -> dict[str, Any]:
        """First and last held-out figures, and why it ended."""
        names = ("held_out/score", "held_out/preferred_to_base", "held_out/kl", "held_out/kl_round", "held_out/kl_before")
        told = {name.replace("/", "_"): round(self.last[name], 4) for name in names if name in self.last}
        return {
            "rounds": self.number,
            "stopped": self.stopped or "rounds",
            "held_out_score_base": round(self.last["held_out/score_base"], 4),
        } | told


def forget_direction(optimizer: torch.optim.Optimizer) -> None:
    """Adam's mean gradients become 0, in place; their spread, by which it measures its steps, stays."""
    for state in optimizer.state.values():
        if "exp_avg" in state:
            state["exp_avg"].zero_()
