"""The trainer of a DPO run: over rated pairs, over rounds of own clips, or, for KTO, over clips one by one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from trl.trainer.dpo_config import DPOConfig

from rlhf.average import Average
from rlhf.controllers import AdaptiveKLController
from rlhf.dpo_arguments import kto_arguments
from rlhf.dpo_report import Recorder
from rlhf.dpo_task import Task
from rlhf.flat_dpo import FlatDPOTrainer, LiveRows, PreferenceCollator, preference_rows, reference_logps
from rlhf.flat_kto import FlatKTOTrainer, JudgementCollator, judgement_rows, judgements, reference_judgements
from rlhf.flat_policy import PAD, FlatCausalLM
from rlhf.own_pairs import OwnPairs
from rlhf.preferences import Preference
from rlhf.rewards import Mixed
from rlhf.round_plan import Plan
from rlhf.round_price import Price
from rlhf.rounds import Rounds

if TYPE_CHECKING:
    from rlhf.train_dpo import Config


def pair_trainer(
    cfg: Config,
    task: Task,
    flat: FlatCausalLM,
    args: DPOConfig,
    train: list[Preference],
    held_out: list[Preference],
    plan: Plan,
    recorder: Recorder,
) -> tuple[FlatDPOTrainer, Rounds | None]:
    """The reference scores what was rated; then the trainer over that, or over rounds of own clips."""
    collator = PreferenceCollator(pad_token_id=PAD, max_length=None)
    scored = []
    for part in (train, held_out):
        marks_at = task.frame_rate if cfg.marks == "mask" else None
        rows = preference_rows(flat, part, [task.row_of(pair) for pair in part], cfg.label_smoothing, marks_at)
        rows = rows if cfg.weight_pairs else [{**row, "weight": 1.0} for row in rows]
        scored.append(reference_logps(flat, rows, args, collator, cfg.batch_size))
    callbacks: list[TrainerCallback] = [recorder]
    rows_to_learn: list[dict[str, Any]] | LiveRows = scored[0]
    rounds = None
    if task.own is not None:
        rated = [{**row, "weight": row["weight"] * cfg.rated_weight} for row in scored[0]]
        own = OwnPairs(flat, args, plan, task.own.prompts, task.own.first_row, task.own.held_out, task.own.score, rated)
        rows_to_learn = LiveRows(plan.n_rows)
        price = Price(cfg.kl_weight, cfg.target_kl, cfg.out / "price.json", args.should_save, min(cfg.kl_ramp, cfg.rounds))
        rounds = Rounds(own, rows_to_learn, cfg.round_epochs, recorder, price, Average(flat.trunk.lm, cfg.average))
        callbacks.insert(0, rounds)  # it measures, also where the recorder has nothing left to do
    assert cfg.loss != "kto"
    codebooks = task.own.score.codebooks if task.own and isinstance(task.own.score, Mixed) else None
    paid = AdaptiveKLController(cfg.kl_weight, cfg.target_kl, least=cfg.kl_weight, power=cfg.kl_power)
    trainer = FlatDPOTrainer(
        flat,
        args,
        rows_to_learn,
        scored[1],
        cfg.r,
        cfg.alpha,
        callbacks,
        cfg.loss,
        cfg.gamma,
        paid,
        codebooks,
        cfg.edit_price,
        cfg.sft_weight,
    )
    if rounds is not None:
        rounds.trainer, trainer.average = trainer, rounds.average
    return trainer, rounds


def kto_trainer(
    cfg: Config, task: Task, flat: FlatCausalLM, args: DPOConfig, train: list[Preference], held_out: list[Preference], recorder: Recorder
) -> FlatKTOTrainer:
    """The same with clips one by one; those that were called bad under a held-out prompt are held out too."""
    groups = task.voted.groups if task.voted else {}
    kept = {groups.get(pair.prompt_id, pair.prompt_id) for pair in held_out}
    loose = [clip for clip in task.bad if groups.get(clip.prompt_id, clip.prompt_id) not in kept]
    bad = [(task.rows[clip.prompt_id], clip.codes, clip.weight) for clip in loose]
    pairs = train if cfg.weight_pairs else [dataclasses.replace(pair, weight=1.0) for pair in train]
    found = judgements(pairs, [task.row_of(pair) for pair in pairs], bad)
    kto = kto_arguments(cfg, args)
    rows = judgement_rows(flat, found, cfg.batch_size, cfg.seed)
    rows = reference_judgements(flat, rows, kto, JudgementCollator(pad_token_id=PAD, max_length=None), cfg.batch_size)
    return FlatKTOTrainer(flat, kto, rows, cfg.r, cfg.alpha, [recorder])
