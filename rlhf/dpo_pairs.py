"""Which rated pairs a DPO run learns from, which it is measured on, and what that binds a resumed run to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf.dpo_task import Task
from rlhf.ppo_task import tempi_sha256
from rlhf.preferences import Preference, codes_sha256, decided, demand_decided, shuffled, split_by_prompt

if TYPE_CHECKING:
    from rlhf.train_dpo import Config

SETTLED = (
    *("loss", "beta", "gamma", "sft_weight", "label_smoothing", "marks", "weight_pairs"),
    *("round_prompts", "round_clips", "round_epochs", "pairing", "edit_price", "labels", "rated_share", "rated_weight", "n_frames"),
    *("weights", "base_looks", "hold", "hold_rate", "hold_slack", "held_out_clips", "average"),
    *("temperature", "r", "alpha", "lr", "lr_end", "warmup_steps", "batch_size", "accumulation", "seed"),
)
"""Settings that a run keeps: with another value the rest of it would be another run, or the checkpoint's states would overrule it. What
steers KL may change: the next round answers to it."""


def learnt_and_held_out(cfg: Config, task: Task) -> tuple[list[Preference], list[Preference]]:
    """The task's pairs on two sides, no prompt (and no artist's prompts) on both; by --shuffle-votes the learnt ones are turned at random.
    Pairs of prompts whose own clips are held out are held out too.

    Raises: NothingToLearnError where a snapshot has nothing but ties to learn from.
    """
    pairs = task.pairs if cfg.ties == "soft" else decided(task.pairs)
    groups = task.voted.groups if task.voted else None
    train, held_out = split_by_prompt(pairs, cfg.held_out, cfg.seed, groups) if cfg.held_out and pairs else (pairs, [])
    if task.own:
        watched = {task.own.prompts[place] for place in task.own.held_out}
        held_out = held_out + [pair for pair in train if pair.prompt in watched]
        train = [pair for pair in train if pair.prompt not in watched]
    if task.voted:
        demand_decided(train)
    return train if cfg.shuffle_votes is None else shuffled(train, cfg.shuffle_votes), held_out


def parents_of(cfg: Config, task: Task, train: Sequence[Preference]) -> dict[str, Any]:
    """What a resumed run has to find again: the base, the votes and their pairs in order, their codes, the reward, the prompts to play
    and those of them that are held out, all tempi, and SETTLED."""
    pairs = [(p.chosen_sha256, p.rejected_sha256, p.prompt_id, p.p, p.weight) for p in train]
    clips = [("", codes) for p in train for codes in (p.chosen_codes, p.rejected_codes)] + [("", clip.codes) for clip in task.bad]
    own = task.own
    return {
        "base_sha256": task.base_sha256,
        "snapshot_sha256": task.snapshot_sha256,
        "ordered_pairs_sha256": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
        "codes_sha256": codes_sha256(clips) if clips else None,
        "reward_sha256": own and own.reward_sha256,
        "ears_sha256": own and own.ears_sha256,
        "prompts_sha256": own and hashlib.sha256("\n".join(own.prompts).encode()).hexdigest(),
        "held_out_sha256": own and hashlib.sha256(json.dumps(sorted(own.held_out)).encode()).hexdigest(),
        "tempi_sha256": tempi_sha256(task.table),
        **{name: getattr(cfg, name) for name in SETTLED},
    }
