"""What a PPO run says of itself while it runs, and what its adapter's manifest will say of it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from base_models.checkpoint import append_jsonl, write_json
from base_models.settings import to_mapping
from rlhf.ppo_task import Task
from rlhf.tracking import open_tracker, read_metrics

if TYPE_CHECKING:
    from rlhf.train_ppo import Config

LOOKS = ("heldout_gain", "heldout_gain_error", "heldout_kl", "heldout_spread_of_base", "heldout_diversity_of_base")
"""What the manifest says of the last look."""


class Teller:
    """config.json, metrics.jsonl, the tracker and a progress bar; silent on all processes but the first."""

    def __init__(self, cfg: Config, task: Task, first_step: int, speaks: bool) -> None:
        self.cfg, self.task, self.speaks, self.rows = cfg, task, speaks, []
        self.path = cfg.out / "metrics.jsonl"
        self.tracker = open_tracker(cfg.tracker, cfg.out, "ppo", to_mapping(cfg), first_step, speaks)
        if not speaks:
            return
        write_json(cfg.out / "config.json", to_mapping(cfg))
        self.rows = read_metrics(self.path, first_step)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self.bar = tqdm(total=cfg.steps, initial=first_step, desc="ppo", unit="step", dynamic_ncols=True)

    def first_look(self, figures: dict[str, float], examples: list[tuple[str, Tensor]]) -> None:
        """What the base makes of the held-out prompts."""
        self.tracker.scalars(figures, 0)
        self._play(0, examples)

    def step(self, step: int, figures: dict[str, float], seconds: dict[str, float], codes: int, examples: list[tuple[str, Tensor]]) -> None:
        """One round's figures, NaN as null; how long its phases took and how many codes went through; now and then clips."""
        if not self.speaks:
            return
        figures = {**figures, **{f"seconds_{phase}": value for phase, value in seconds.items()}}
        figures["tokens_per_second_play"] = codes / seconds["play"]
        figures["tokens_per_second"] = codes / (seconds["play"] + seconds["judge"] + seconds["learn"])
        row = {"step": step, **{k: round(v, 6) if math.isfinite(v) else None for k, v in figures.items()}}
        self.rows.append(row)
        append_jsonl(self.path, row)
        self.tracker.scalars(figures, step)
        if step % self.cfg.look_every == 0:
            self._play(step, examples)
        if figures["scores_not_finite"]:
            tqdm.write(f"step {step}: {figures['scores_not_finite']:.0f} clips left out, their score is not finite")
        self.bar.update()
        self.bar.set_postfix(score=f"{figures['score']:.3f}", kl=f"{figures['kl']:.2f}", kl_coef=f"{figures['kl_coef']:.3g}")

    def _play(self, step: int, examples: list[tuple[str, Tensor]]) -> None:
        if self.speaks and self.task.sound is not None:
            for number, (prompt, codes) in enumerate(examples):
                wav, sample_rate = self.task.sound(codes)
                self.tracker.clip(f"{number} {prompt}", wav, sample_rate, step, prompt)

    def summary(self) -> dict[str, Any]:
        """First and last scores (means over up to five rounds), the last KL, the last look, mean seconds of a round by phase."""
        if not self.rows:
            return {}
        scores = [row["score"] for row in self.rows if row["score"] is not None]
        few = max(1, min(5, len(scores) // 2))
        told: dict[str, Any] = {"kl": self.rows[-1]["kl"], "entropy": self.rows[-1]["entropy"]}
        if scores:
            told |= {"score_first": round(sum(scores[:few]) / few, 4), "score_last": round(sum(scores[-few:]) / few, 4)}
        for row in self.rows:
            told |= {name: row[name] for name in LOOKS if row.get(name) is not None}
        for phase in ("play", "judge", "learn"):
            told[f"seconds_{phase}"] = round(sum(row[f"seconds_{phase}"] for row in self.rows) / len(self.rows), 3)
        return told

    def close(self) -> None:
        if self.speaks:
            self.bar.close()
        self.tracker.close()
