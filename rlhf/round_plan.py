"""How large the rounds of `train_dpo.py --reward` are, and what pairs they are made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from base_models.errors import UserError
from rlhf.rewards import held_parts, parse_weights

if TYPE_CHECKING:
    from rlhf.train_dpo import Config

Pairing = Literal["best_worst", "all", "edits", "expected"]
Labels = Literal["hard", "soft"]
BY_SLOPE: tuple[Pairing, ...] = ("edits", "expected")
"""Pairings of which a clip is edited instead of being compared."""


@dataclass(frozen=True)
class Plan:
    """How a round is made; `rlhf.train_dpo.Config` says what each figure means."""

    n_prompts: int
    n_clips: int
    n_rated: int
    pairing: Pairing
    labels: Labels
    label_smoothing: float
    n_frames: int
    temperature: float
    sample_batch: int
    score_batch: int
    held_out_clips: int
    kl_budget: float
    edit_price: float
    seed: int
    held: tuple[str, ...] = ()
    """Parts of the reward that stay at the base's level (rlhf.rewards.Reward.hold)."""
    hold_rate: float = 1.0
    hold_slack: float = 0.0
    base_looks: int = 1

    @property
    def by_slope(self) -> bool:
        """Whether clips are edited, instead of compared."""
        return self.pairing in BY_SLOPE

    @property
    def pairs_per_prompt(self) -> int:
        if self.by_slope:
            return self.n_clips
        return 1 if self.pairing == "best_worst" else self.n_clips * (self.n_clips - 1) // 2

    @property
    def n_rows(self) -> int:
        return self.n_prompts * self.pairs_per_prompt + self.n_rated


def whole_prompts(n: int, n_clips: int) -> int:
    """The most clips, up to n, that are whole prompts of n_clips each, at least one: parts of a reward that compare a prompt's clips
    (diversity) need all of them at once."""
    return max(n // n_clips, 1) * n_clips


def round_plan(cfg: Config, n_rated: int) -> Plan:
    """How a round is made. Raises UserError for sizes that make no pair."""
    least = 1 if cfg.pairing in BY_SLOPE else 2
    sizes = (cfg.rounds, cfg.round_prompts, cfg.round_epochs, cfg.n_frames, cfg.sample_batch, cfg.held_out_clips, cfg.base_looks)
    if cfg.pairing in BY_SLOPE and cfg.held_out_clips < 2:
        raise UserError(f"--held-out-clips {cfg.held_out_clips}", "2 or more, better 96: they give the score its unit", "raise it")
    if min(sizes) < 1 or cfg.round_clips < least:
        raise UserError("a size too small", f"1 or more everywhere, and {least} or more --round-clips", "correct the sizes of the rounds")
    if cfg.pairing == "expected" and (cfg.loss != "sigmoid" or (n_rated and cfg.rated_share) or cfg.labels != "hard"):
        got = f"--pairing expected with --loss {cfg.loss}, --labels {cfg.labels}, --rated-share {cfg.rated_share}"
        raise UserError(got, "sigmoid, hard and 0: there are no two clips to compare or to mix with", "take these, or --pairing edits")
    if cfg.pairing == "expected" and (cfg.sft_weight or cfg.marks == "mask"):
        got = f"--pairing expected with --sft-weight {cfg.sft_weight:g}, --marks {cfg.marks}"
        raise UserError(got, "0 and ignore: both sides of a pair are one clip of the policy's own", "leave them out, or --pairing edits")
    if not 0 <= cfg.rated_share < 1:
        raise UserError(f"--rated-share {cfg.rated_share}", "0 to less than 1", "to learn from rated pairs alone leave --reward out")
    plan = Plan(
        n_prompts=cfg.round_prompts,
        n_clips=cfg.round_clips,
        n_rated=0,
        pairing=cfg.pairing,
        labels=cfg.labels,
        label_smoothing=cfg.label_smoothing,
        n_frames=cfg.n_frames,
        temperature=cfg.temperature,
        sample_batch=whole_prompts(cfg.sample_batch, cfg.round_clips),
        score_batch=whole_prompts(2 * cfg.batch_size, cfg.round_clips),
        held_out_clips=cfg.held_out_clips,
        kl_budget=cfg.kl_budget,
        edit_price=cfg.edit_price,
        seed=cfg.seed,
        held=held_parts(cfg.hold, parse_weights(cfg.weights)),
        hold_rate=cfg.hold_rate,
        hold_slack=cfg.hold_slack,
        base_looks=cfg.base_looks,
    )
    share = cfg.rated_share / (1 - cfg.rated_share) if n_rated else 0.0
    return dataclasses.replace(plan, n_rated=round(plan.n_rows * share))
