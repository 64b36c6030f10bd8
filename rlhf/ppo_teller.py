"""What a PPO run says of itself while it runs, and what its adapter's manifest will say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from rlhf.journal import Journal, speeds
from rlhf.ppo_task import Task
from rlhf.rewards import WATCHED

if TYPE_CHECKING:
    from rlhf.train_ppo import Config

LOOKS = (
    *("heldout_gain", "heldout_gain_error", "heldout_kl", "heldout_spread_of_base", "heldout_diversity_of_base"),
    *(f"heldout_reward_{WATCHED}", f"heldout_reward_{WATCHED}_z"),
)
"""What the manifest says of the last look."""


class Teller:
    """The journal and a progress bar; silent on all processes but the first."""

    def __init__(self, cfg: Config, task: Task, first_step: int, speaks: bool) -> None:
        self.cfg, self.task, self.speaks = cfg, task, speaks
        self.journal = Journal(cfg, "ppo", first_step, speaks)
        self.bar = self.journal.bar(cfg.steps)

    def first_look(self, figures: dict[str, float], examples: list[tuple[str, Tensor]]) -> None:
        """What the base makes of the held-out prompts."""
        self.journal.tracker.scalars(figures, 0)
        self.journal.play(0, examples, self.task.sound)

    def step(self, step: int, figures: dict[str, float], seconds: dict[str, float], codes: int, examples: list[tuple[str, Tensor]]) -> None:
        """One round's figures, NaN as null; how long its phases took and how many codes went through; now and then clips."""
        if not self.speaks:
            return
        self.journal.tell(step, {**figures, **speeds(seconds, codes)})
        if step % self.cfg.look_every == 0:
            self.journal.play(step, examples, self.task.sound)
        if figures["scores_not_finite"]:
            tqdm.write(f"step {step}: {figures['scores_not_finite']:.0f} clips left out, their score is not finite")
        self.bar.update()
        self.bar.set_postfix(score=f"{figures['score']:.3f}", kl=f"{figures['kl']:.2f}", kl_coef=f"{figures['kl_coef']:.3g}")

    def summary(self) -> dict[str, Any]:
        """First and last scores (means over up to five rounds), the last KL, the last look, mean seconds of a round by phase."""
        rows = self.journal.rows
        if not rows:
            return {}
        scores = [row["score"] for row in rows if row["score"] is not None]
        few = max(1, min(5, len(scores) // 2))
        told: dict[str, Any] = {"kl": rows[-1]["kl"], "entropy": rows[-1]["entropy"]}
        if scores:
            told |= {"score_first": round(sum(scores[:few]) / few, 4), "score_last": round(sum(scores[-few:]) / few, 4)}
        for row in rows:
            told |= {name: row[name] for name in LOOKS if row.get(name) is not None}
        for phase in ("play", "judge", "learn"):
            told[f"seconds_{phase}"] = round(sum(row[f"seconds_{phase}"] for row in rows) / len(rows), 3)
        return told

    def close(self) -> None:
        self.bar.close()
        self.journal.close()
