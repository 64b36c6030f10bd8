"""Direct preference optimisation: votes straight into a LoRA adapter; with a reward model, the policy's own clips too.

    accelerate launch rlhf/train_dpo.py --snapshot runs/votes --policy base_models/pretrained --out runs/dpo
    accelerate launch rlhf/train_dpo.py --preset rounds --reward runs/reward --prompts examples/train.txt --out runs/dpo
    python rlhf/train_dpo.py --preset smoke                       # a toy policy and toy votes, under a minute on a CPU
    python rlhf/train_dpo.py --preset smoke_reward                # the same with a toy reward and rounds of own clips
    torchrun --nproc-per-node 2 rlhf/train_dpo.py ...             # or any accelerate configuration

    snapshot -> pairs (chosen, rejected: codes [K, T]) -> log-probs under policy and reference [B]
             -> -log sigmoid(beta * difference) -> LoRA -> adapter folder

--loss chooses among TRL's DPOTrainer (sigmoid, ipo), SimPO within it, and TRL's KTOTrainer, all over a flat view of the LM
(`rlhf.flat_policy`). The reference is the policy without its adapter, so DPO's loss begins at log 2 exactly, IPO's at 1/(4 beta^2),
KTO's at 1/2. A pair's label is soft: the share of its raters that preferred `chosen`, weighed by how far they can be relied on
(`rlhf.trusted`); a tie is 1/2, which pulls the two clips together (`--ties drop` leaves such pairs out). "Both bad" orders nothing
and never becomes a pair; KTO, which judges clips one by one, learns from it. --marks mask lets a pair act only at the times that
raters marked as bad in its rejected clip.

From rated pairs alone it is not on-policy: what it learns is what was rated, and a thousand pairs generalise hardly at all. With
--reward it goes in rounds: the policy as it is plays --round-clips clips of --round-prompts prompts, and each is edited for the
better and for the worse by the slope of the reward (`rlhf.edits`; drawn, or in expectation; or the best and the worst of each prompt
are the pairs). Rated pairs may be mixed in. The reference stays the base; between rounds reward and KL are measured on held-out
prompts, and a run beyond --kl-budget is drawn back (with --target-kl) or ends. It is the reward that limits it then: judge the result
by listeners, not by the score.

Papers: Rafailov et al. 2023, arXiv:2305.18290 (DPO). Mitchell 2023, "A note on DPO with noisy preferences" (soft labels). Pang et
al. 2024, arXiv:2404.19733 (the likelihood term that keeps the chosen clips likely). Liu et al. 2023, arXiv:2309.06657 (pairs from the
policy, ordered by a reward). Azar et al. 2023, arXiv:2310.12036 (IPO). Ethayarajh et al. 2024, arXiv:2402.01306 (KTO). Meng et al.
2024, arXiv:2405.14734 (SimPO). Xu et al. 2023, arXiv:2312.16682, and Dong et al. 2024, arXiv:2405.07863 (in rounds).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every run to its makers otherwise

from transformers import ProgressCallback

from adapters.library import Manifest, save_adapter
from base_models.checkpoint import latest_training_state, read_json, refuse_another_run
from base_models.errors import UserError
from base_models.launch import check_processes, check_sharding, end_in_good_order
from base_models.policy import PRETRAINED
from base_models.settings import run, to_mapping
from rlhf.average import check_decay
from rlhf.controllers import check_power
from rlhf.dpo_arguments import steps_of_round, training_arguments
from rlhf.dpo_pairs import learnt_and_held_out, parents_of
from rlhf.dpo_report import NothingLeftError, Recorder
from rlhf.dpo_task import load_task, toy_task
from rlhf.dpo_trainers import kto_trainer, pair_trainer
from rlhf.flat_dpo import FlatDPOTrainer
from rlhf.flat_kto import FlatKTOTrainer
from rlhf.flat_policy import FlatCausalLM
from rlhf.played import kl_figures, play_now
from rlhf.reward_gates import doubt
from rlhf.rewards import HUMAN, Mixed, check_hold, parse_weights
from rlhf.round_plan import BY_SLOPE, Labels, Pairing, round_plan
from rlhf.rounds import Rounds
from rlhf.tracking import Kind
from rlhf.trusted import WeightsBy


@dataclass(frozen=True)
class Config:
    """Settings of a DPO run."""

    out: Path = Path("runs/dpo")
    """Folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, adapter/."""
    snapshot: Path | None = None
    """Frozen snapshot of votes, as `encore ratings export` writes it."""
    policy: Path = PRETRAINED
    """The base whose clips were rated."""
    toy: bool = False
    """Take a tiny random policy and toy votes instead of --policy and --snapshot (what --preset smoke does)."""
    toy_reward: bool = False
    """With --toy: rounds of own clips, judged by a toy reward, instead of --reward (what --preset smoke_reward does)."""
    shuffle_votes: int | None = None
    """The control: turn half of each prompt's pairs round, drawn with this seed. What is learnt from that must not help, by held-out
    pairs as they were voted."""
    ties: Literal["soft", "drop"] = "soft"
    """Pairs whose votes balance out: keep them with the label 1/2, or leave them out."""
    weights_by: WeightsBy = "agreement"
    """What raters weigh by: how often they agree with others on common pairs (careless ones weigh little, adversaries nothing; alike
    where nobody shares a pair), or nothing, and then all votes count alike."""
    one_rater: bool = False
    """Allow the votes of a single rater: what is learnt is one person's taste, and nobody can tell how right it can be."""
    weight_pairs: bool = True
    """Weigh a pair by the votes behind it (mean 1)."""
    held_out: float = 0.1
    """Share of the prompts kept for measuring, at most half of them: of the rated ones (0 trains on all), and, with --reward, of --prompts
    (0 keeps one)."""
    loss: Literal["sigmoid", "ipo", "kto", "simpo"] = "sigmoid"
    """sigmoid is DPO; ipo asks for a fixed margin; simpo needs no reference; kto takes clips one by one, "both bad" too."""
    beta: float = 0.1
    """Price of drift from the reference: the larger, the closer it stays. ipo asks for a margin of 1 / (2 beta) nats a code, simpo
    multiplies nats a code by it: with clips of 400 codes about 20 for ipo (10 nats a clip) and 400 times DPO's for simpo."""
    gamma: float = 0.5
    """simpo: the margin that is asked for, nats of beta times the log-probs a code."""
    kl_weight: float = 0.0
    """What a nat of divergence from the reference costs in the loss, over the whole vocabulary at every code of a pair's clips: pairs say
    nothing of what both clips share, and noise moves that; this draws it back. Not for kto."""
    target_kl: float | None = None
    """In rounds: KL to the base on held-out prompts, nats a clip, that --kl-weight is moved to keep to, by the root of KL / target, at most
    twice or half as much a round and never less than given. Not given: it stays."""
    kl_ramp: int = 1
    """In rounds: the first that has the whole --target-kl, at most the last; those before it rise to it in equal steps. The leap of early
    rounds wins less of the reward for its nats than the same way in steps, and loses what is held."""
    kl_power: float = 0.0
    """With --target-kl: the price of a step is also multiplied by (KL of its pairs' clips / target) to this power, and never less than
    given: it answers within a round what the round's own price is too late for; 0 leaves it to that."""
    marks: Literal["ignore", "mask"] = "ignore"
    """Whether a pair acts only on the codes at the times that raters marked as bad in its rejected clip, where they marked any."""
    label_smoothing: float = 0.0
    """How often a label is thought to be wrong, 0 to 0.5 (conservative DPO)."""
    sft_weight: float = 0.0
    """Weight of the likelihood term on chosen clips (nats a code), each as far as it was preferred and its votes count; raise it when the
    chosen clips' log-prob falls."""
    temperature: float = 1.0
    """The temperature at which the clips were sampled and will be."""
    r: int = 16
    """Rank of the adapter."""
    alpha: float = 32.0
    """Scale of the adapter: alpha / r."""
    lr: float = 2e-4
    """Peak learning rate (AdamW, linear warmup, then a cosine down to --lr-end)."""
    lr_end: float = 0.0
    """Share of the peak learning rate that is left at the end; 1 keeps it, as --average wants: a mean needs rounds that differ."""
    batch_size: int = 8
    """Pairs (single clips with --loss kto) a microbatch and process; a step learns from batch-size x accumulation x processes."""
    accumulation: int = 1
    """Microbatches a step, whose gradients are averaged (gradient accumulation)."""
    epochs: float = 3.0
    """Passes over the pairs."""
    steps: int = 0
    """Stop after this many steps; 0 goes by --epochs."""
    max_minutes: float = 0.0
    """Stop after this time (in rounds: at the end of one), with a checkpoint; 0 sets no limit."""
    reward: Path | None = None
    """Reward model (train_reward.py) that judges the policy's own clips, round by round; not given: rated pairs only."""
    prompts: Path | None = None
    """Prompts that the policy plays for --reward: .jsonl with `prompt` and, where wanted, `tempo_bpm`, or text, one a line."""
    rounds: int = 8
    """Rounds of playing, judging and learning (--reward); --epochs then counts nothing."""
    round_prompts: int = 64
    """Prompts a round."""
    round_clips: int = 2
    """Clips of a prompt; with --pairing best_worst take 8, of which the best and the worst are learnt from."""
    round_epochs: int = 1
    """Passes over a round's pairs."""
    pairing: Pairing = "edits"
    """Which pairs: each clip edited for the better against the same clip edited for the worse, by the slope of the reward (rlhf/edits.py);
    the same with the mean over all such edits for a draw of them (expected, with --loss sigmoid); the extremes of a prompt's clips; or
    every pair of them (which costs more time than it tells)."""
    edit_price: float = 0.04
    """edits, expected: price of a nat of departure from the policy, in standard deviations of the base's scores; the lower it is, the more
    codes of a clip are changed."""
    weights: str = f"{HUMAN}=1"
    """Weight of each part of the reward, in standard deviations of the base's clips of one prompt, as in train_ppo.py:
    human=1,similarity=0.3 keeps the prompt in sight."""
    base_looks: int = 1
    """Number of validation passes of the base, with different seeds, from which each reward part's baseline level and within-prompt
    standard deviation are estimated; one pass leaves 10 to 20 percent error in a weight."""
    hold: str = ""
    """Parts that are to stay at the base's level, as in train_ppo.py; their weights move between rounds."""
    hold_rate: float = 1.0
    """How far the weight of a held part moves at a validation pass for each standard deviation that it is off the base's level. Where
    weights and parts swing from pass to pass, lower it."""
    hold_slack: float = 0.0
    """Standard errors by which a held part may lie below the base's level before its weight rises. At 0 chance alone drives weights up,
    since none falls below its start, and the listeners' part pays for it."""
    labels: Labels = "hard"
    """What is said of an own pair: that the better one wins, or how probably, by the reward model's calibration."""
    average: float = 0.0
    """In rounds, as in train_ppo.py: share that the mean of the rounds' adapters keeps each round. Looks hear the mean, and it is what the
    run leaves: as much reward at less drift. 0 leaves the last round's adapter. --target-kl and --kl-budget go by the rounds' own KL."""
    rated_share: float = 0.25
    """Share of a round's pairs that are rated ones, in turn, where --snapshot is given."""
    rated_weight: float = 1.0
    """Weight of a rated pair beside an own one in the loss."""
    n_frames: int = 100
    """Codec frames T of an own clip; 100 = 4 s with the shipped base. Use the length that was rated."""
    sample_batch: int = 64
    """Clips that are played at once."""
    held_out_clips: int = 32
    """Clips by which reward and KL are measured between rounds, on the held-out prompts."""
    kl_budget: float = 60.0
    """The rounds end when the policy's KL exceeds this many nats a clip: beyond, it fools the reward more than it pleases listeners. With
    --target-kl the adapter is scaled towards the base first, and the run goes on at a higher price where that brings it within."""
    warmup_steps: int = 5
    """Steps until the peak learning rate."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs matrix products in bfloat16; auto takes it where the processor is faster for it."""
    save_every: int = 50
    """Steps between checkpoints; in rounds there is one after each."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (from the start, if there is none yet)."""
    tracker: Kind = "tensorboard"
    """Where figures and clips can be watched; wandb and trackio have to be installed."""
    listen: int = 2
    """Clips, with their mel pictures, that are kept for listening: on held-out prompts between rounds, else at the end; 0 keeps none."""
    kl_clips: int = 16
    """Clips that are sampled at the end to measure KL(policy || reference), whole and by codebook; 0 skips it."""
    licence: str = "unspecified"
    """Licence of the adapter, for its card."""
    processes: int = 0
    """Refuse to run with any other number of processes; 0 does not ask. `accelerate launch --cpu --num_processes 2` runs one."""
    seed: int = 0
    """Seed of the adapter's start and the order of the pairs."""


GROUPS = {
    "votes": "snapshot shuffle_votes ties weights_by weight_pairs marks label_smoothing held_out",
    "loss": "loss beta gamma sft_weight",
    "reward and rounds of own clips": "reward prompts weights base_looks hold hold_rate hold_slack rounds round_prompts"
    " round_clips round_epochs pairing edit_price labels rated_share rated_weight",
    "sampling": "n_frames temperature sample_batch",
    "optimisation": "lr lr_end warmup_steps batch_size accumulation epochs steps max_minutes average r alpha precision",
    "KL": "kl_weight target_kl kl_ramp kl_power kl_budget",
    "validation": "held_out_clips kl_clips listen",
}
"""What --help shows together; the rest is the run's."""
PRESETS_SAY = {
    "rounds": "with --reward: ten rounds of own clips, edited in expectation, held to prompt, tempo, genre and diversity of the base",
    "best_worst": "with --reward: ten rounds, the best against the worst of eight clips of a prompt",
    "smoke": "a toy policy and toy votes; under a minute on a CPU, nothing to download",
    "smoke_reward": "the same with a toy reward and rounds of own clips",
}

TOY: dict[str, Any] = {"toy": True, "r": 4, "alpha": 8.0, "lr": 5e-3, "kl_clips": 4}
TOY_ROUNDS: dict[str, Any] = {
    "toy_reward": True,
    "rounds": 6,
    "round_prompts": 32,
    "round_clips": 4,
    "pairing": "best_worst",
    "n_frames": 12,
    "held_out_clips": 16,
}
PRESETS: dict[str, dict[str, Any]] = {
    "rounds": {
        "lr": 1e-3,
        "beta": 0.03,
        "kl_weight": 3e-4,
        "target_kl": 65.0,
        "kl_ramp": 6,
        "kl_power": 2.0,
        "kl_budget": 150.0,
        "pairing": "expected",
        "edit_price": 0.2,
        "rated_share": 0.0,
        "rounds": 10,
        "round_prompts": 100,
        "round_epochs": 2,
        "batch_size": 40,
        "held_out_clips": 96,
        "base_looks": 4,
        "weights": f"{HUMAN}=1,similarity=0.3,tempo=0.15,genre=0.6,diversity=0.4",
        "hold": "similarity,tempo,genre,diversity",
        "hold_rate": 0.5,
        "hold_slack": 1.0,
    },
    "best_worst": {"lr": 1e-3, "pairing": "best_worst", "rounds": 10, "round_prompts": 48, "round_clips": 8, "round_epochs": 2},
    "smoke": {**TOY, "out": Path("runs/dpo-smoke"), "steps": 30},
    "smoke_reward": {**TOY, **TOY_ROUNDS, "out": Path("runs/dpo-smoke-reward"), "lr": 1e-2},
}


def main(cfg: Config) -> dict[str, Any]:
    """Run it; returns the figures of the adapter's manifest."""
    began = time.monotonic()
    # 1. What was rated, and by which policy it was played; or what it is to play now, and who judges it.
    check(cfg)
    task = toy_task(cfg) if cfg.toy else load_task(cfg)
    train, held_out = learnt_and_held_out(cfg, task)
    if task.own and cfg.pairing in BY_SLOPE and not isinstance(task.own.score, Mixed):
        raise UserError(f"--pairing {cfg.pairing} with a reward without a slope", "a reward model", "use --pairing best_worst")
    plan = round_plan(cfg, len(train))
    args = training_arguments(cfg, plan.n_rows if task.own else len(train))
    end_in_good_order()
    check_processes(args.world_size, cfg.processes)
    if task.own and cfg.round_prompts < args.world_size:
        got = f"--round-prompts {cfg.round_prompts} for {args.world_size} processes"
        raise UserError(got, "a prompt a process, or more", "raise it, or start fewer processes")
    parents = parents_of(cfg, task, train)
    newest = latest_training_state(cfg.out, parents) if cfg.resume else None
    first_step = 0 if newest is None else read_json(newest / "state.json")["step"]
    recorder = Recorder(cfg, "dpo", first_step, args.should_save, task.sound)
    recorder.whole = steps_of_round(cfg, plan.n_rows) if task.own else 1
    doubted = doubt(cfg.reward)
    for line in (*(task.voted.notes if task.voted else ()), *([doubted] if doubted else [])):
        if args.should_save:
            print(line)

    # 2. The flat view; the reference speaks before there is an adapter.
    task.lm.to(args.device)
    if args.device.type == "cpu":  # torch's fused attention is five times slower backwards in bfloat16 on a CPU
        task.lm.decoder.set_attn_implementation("eager")
    flat = FlatCausalLM(task.lm, task.table, cfg.temperature).eval()
    trainer: FlatDPOTrainer | FlatKTOTrainer
    rounds: Rounds | None
    if cfg.loss == "kto":
        trainer, rounds = kto_trainer(cfg, task, flat, args, train, held_out, recorder), None
    else:
        trainer, rounds = pair_trainer(cfg, task, flat, args, train, held_out, plan, recorder)
    trainer.pop_callback(ProgressCallback)  # ours begins where a resumed run does
    trainer.parents = parents

    # 3. Learn: from what was rated, or in rounds from what the policy plays.
    learning = time.monotonic()
    with contextlib.suppress(NothingLeftError):
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))

    # 4. Measure.
    figures: dict[str, Any] = {"pairs": len(train), "pairs_held_out": len(held_out), "steps": trainer.state.global_step}
    figures |= (task.voted.figures if task.voted else {}) | recorder.summary()
    if rounds is not None:
        rounds.average.keep()
        figures |= rounds.summary()
    if held_out and cfg.loss != "kto":
        evaluation = trainer.evaluate()
        figures["held_out_accuracy"] = evaluation.get("eval_dpo/accuracy_decided")
        figures["held_out_margin"] = evaluation.get("eval_rewards/margins")
        figures["held_out_loss"] = evaluation["eval_dpo/loss"]
    if cfg.kl_clips and rounds is None and args.should_save:
        n_frames = int(train[0].chosen_codes.shape[1])
        played = play_now(task.lm, task.table, cfg.kl_clips, n_frames, cfg.seed, cfg.temperature, cfg.sample_batch)
        recorder.tell(trainer.state.global_step, kl_figures(played.book_kl.mean(0)))
        recorder.play(trainer.state.global_step, [(task.words[row], codes) for row, codes in zip(played.rows, played.codes)])
        figures["kl_nats_per_clip"] = float(played.book_kl.sum(1).mean())
    if task.own:
        figures["reward_in_doubt"] = doubted is not None
    figures["train_seconds"] = round(time.monotonic() - learning, 2)
    figures["seconds"] = round(time.monotonic() - began, 2)

    # 5. Tell.
    if args.should_save:
        name = (
            ("dpo" if cfg.loss == "sigmoid" else cfg.loss)
            + ("_own" if task.own else "")
            + ("" if cfg.shuffle_votes is None else "_shuffled")
        )
        manifest = Manifest(
            name=name,
            base_sha256=task.base_sha256,
            method=name,
            snapshot_sha256=task.snapshot_sha256,
            reward_sha256=task.own.reward_sha256 if task.own else None,
            licence=cfg.licence,
            config=to_mapping(cfg),
            figures=figures | ({"ears_sha256": task.own.ears_sha256} if task.own and task.own.ears_sha256 else {}),
            objective=task.own.score.reward.state_dict() if task.own and isinstance(task.own.score, Mixed) else {},
        )
        save_adapter(cfg.out / "adapter", task.lm, manifest)
        recorder.close()
        print(f"{cfg.out / 'adapter'}: " + ", ".join(f"{k} {v}" for k, v in figures.items()))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return figures


# ---- the pieces ------------------------------------------------------------------------------------------------------


def check(cfg: Config) -> None:
    """Refuse what cannot work, before anything is loaded or written."""
    refuse_another_run(cfg.out, cfg.resume)
    check_sharding()
    if cfg.toy_reward and not cfg.toy:
        raise UserError("--toy-reward without --toy", "both: a toy reward judges a toy policy alone", "add --toy, or give --reward")
    if not 0 <= cfg.held_out <= 0.5:
        raise UserError(f"--held-out {cfg.held_out:g}", "0 to 0.5", "a share of the prompts is kept for measuring, the rest is learnt from")
    if cfg.kl_weight < 0:
        raise UserError(f"--kl-weight {cfg.kl_weight}", "0 or more", "a nat has a price, or none")
    if cfg.target_kl is not None and cfg.target_kl >= cfg.kl_budget:
        got = f"--target-kl {cfg.target_kl:g} with --kl-budget {cfg.kl_budget:g}"
        raise UserError(got, "a target below the budget", "lower the target, or raise the budget: beyond it a run is drawn back, or ends")
    if cfg.target_kl is not None and (cfg.target_kl <= 0 or not cfg.kl_weight or not (cfg.reward or cfg.toy_reward)):
        got = f"--target-kl {cfg.target_kl} with --kl-weight {cfg.kl_weight}, --reward {cfg.reward}"
        raise UserError(got, "nats above 0, a price above 0 and rounds of own clips", "give --reward and --kl-weight, or leave it out")
    check_power(cfg.kl_power, cfg.target_kl)
    if cfg.kl_ramp < 1 or (cfg.kl_ramp > 1 and cfg.target_kl is None):
        got = f"--kl-ramp {cfg.kl_ramp} with --target-kl {cfg.target_kl}"
        raise UserError(got, "1 or more, and a target to rise to", "give --target-kl, or leave it out")
    if not 0 <= cfg.label_smoothing < 0.5 or (cfg.label_smoothing and cfg.loss == "kto"):
        got = f"--label-smoothing {cfg.label_smoothing:g} with --loss {cfg.loss}"
        raise UserError(got, "0 to less than 0.5, and pairs: beyond, labels are turned round", "lower it, or leave it out")
    weighed = {name: weight for name, weight in parse_weights(cfg.weights).items() if weight}
    if cfg.labels == "soft" and weighed != {HUMAN: 1.0}:
        got = f"--labels soft with --weights {cfg.weights}"
        raise UserError(got, f"{HUMAN}=1 alone, which is calibrated to votes: a sum of parts is not", "leave --labels hard")
    if not 0 <= cfg.lr_end <= 1:
        raise UserError(f"--lr-end {cfg.lr_end:g}", "0 to 1", "a share of --lr: 0 to end at none, 1 to keep it")
    check_decay(cfg.average)
    if cfg.average and not (cfg.reward or cfg.toy_reward):
        raise UserError(f"--average {cfg.average:g} without --reward", "rounds of own clips", "give --reward, or leave it out")
    if cfg.loss == "kto" and (cfg.marks == "mask" or cfg.sft_weight or cfg.kl_weight):
        raise UserError(
            "--loss kto with --marks mask, --sft-weight or --kl-weight", "a loss over pairs for those", "leave them out, or choose another"
        )
    if cfg.loss == "kto" and cfg.batch_size < 2:
        got = f"--loss kto with --batch-size {cfg.batch_size}"
        raise UserError(got, "2 or more: KL is estimated by clips of a batch that change prompts", "raise it")
    check_hold(cfg.hold, parse_weights(cfg.weights), cfg.hold_rate, cfg.hold_slack)
    if cfg.hold and cfg.reward is None and not cfg.toy_reward:
        raise UserError(f"--hold {cfg.hold} without --reward", "a reward of several parts", "give --reward and --prompts, or leave it out")
    if parse_weights(cfg.weights).get("diversity") and cfg.round_clips < 2:
        raise UserError("a weight of diversity with --round-clips 1", "2 or more: a clip by itself differs from nothing", "raise it")
    if cfg.toy:
        return
    if cfg.snapshot is None and cfg.reward is None:
        raise UserError(
            "neither --snapshot nor --reward",
            "the folder of a frozen snapshot, or a reward model and --prompts",
            "export one with `encore ratings export`, or train a reward with train_reward.py",
        )
    if cfg.loss == "kto" and cfg.reward is not None:
        raise UserError("--loss kto with --reward", "a loss over pairs", "the policy's own clips come in pairs: take sigmoid, ipo or simpo")
    if (cfg.reward is None) != (cfg.prompts is None):
        raise UserError(f"--reward {cfg.reward}, --prompts {cfg.prompts}", "both or neither", "give the prompts that the policy is to play")


if __name__ == "__main__":
    run(main, Config, PRESETS, say=PRESETS_SAY, groups=GROUPS)
