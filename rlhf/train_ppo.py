"""Proximal policy optimisation: the reward model's opinion into a LoRA adapter, by playing and being judged.

    accelerate launch rlhf/train_ppo.py --preset votes --reward runs/reward --prompts train.txt --heldout-prompts watch.txt
    python rlhf/train_ppo.py --preset smoke                       # a toy policy that learns to play one code, under a minute
    torchrun --nproc-per-node 2 rlhf/train_ppo.py ...             # or any accelerate configuration

    prompts -> codes [B, K, T] -> marks [B, P] -> score [B] -> per-step rewards [B, S] -> GAE -> clipped updates -> LoRA -> adapter folder

Several processes share one batch. Each plays and judges its part; the parts are gathered (codes and [B, S] numbers: kilobytes),
so that whitening and moments are global by construction; each learns from its rows of every minibatch, divides by the *global*
count of steps, and gradients are summed. Only LoRA and critic have any, some hundred thousand numbers: one flat all-reduce is
enough, and no DDP wrapper stands between the policy and the sampler. A clip's seed comes from its global index, so two
processes play what one would.

The brake (rlhf/brake.py) ends a run whose reward rises while the music does not, and can take it back to its best look.

Under configs/accelerate/fsdp2.yaml the frozen base is in shards while it learns, and whole while it plays: that saves memory beside
the activations, but a base that fits no single device cannot be played. There is no separate critic or reference network.

Papers: Schulman et al. 2017, arXiv:1707.06347 (PPO). Ziegler et al. 2019, arXiv:1909.08593 (KL in the reward, adaptive price).
Huang et al. 2024, arXiv:2403.17031 (the details that matter). Hu et al. 2021, arXiv:2106.09685 (LoRA).
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from adapters.library import Manifest, save_adapter
from base_models.checkpoint import refuse_another_run
from base_models.conditions import parse_tempo
from base_models.errors import UserError
from base_models.launch import check_processes, open_accelerator
from base_models.policy import PRETRAINED
from base_models.settings import run, to_mapping
from rlhf.average import check_decay
from rlhf.controllers import MOST_STEP, check_power
from rlhf.journal import timed
from rlhf.ppo_checkpoint import restore, save
from rlhf.ppo_look import look, look_is_due, rewind
from rlhf.ppo_run import Run, without_slope
from rlhf.ppo_task import Task, load_task, toy_task
from rlhf.ppo_teller import Teller
from rlhf.reward_gates import doubt
from rlhf.rewards import HUMAN, check_groups, check_hold, parse_weights
from rlhf.tracking import Kind


@dataclass(frozen=True)
class Config:
    """Settings of a PPO run."""

    out: Path = Path("runs/ppo")
    """Folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, adapter/."""
    policy: Path = PRETRAINED
    """The base to start from; it is also the reference."""
    reward: Path | None = None
    """Folder of a trained reward model (train_reward.py). Not needed where --weights gives `human` none: then checks are all."""
    score_command: str | None = None
    """A program that judges in place of --reward: JSON lines of wav files in, scores out (rlhf/outside_judge.py)."""
    watch_command: str | None = None
    """A program like --score-command that hears the clips of --heldout-prompts at every look: its opinion is plotted as `watched`, and
    neither learnt from nor heard by the brake."""
    prompts: Path | None = None
    """Prompts to play: a .jsonl file with `prompt` and, where wanted, `tempo_bpm`; or a text file, one prompt a line."""
    weights: str = f"{HUMAN}=1"
    """Weight of each part of the reward, which is measured in standard deviations of the base's clips of one prompt:
    human=1,similarity=0.3,tempo=0. Parts of weight 0 are measured every round and plotted, not trained on; parts that are not named are
    plotted at the looks at --heldout-prompts."""
    base_looks: int = 1
    """Number of validation passes of the base, with different seeds, from which each reward part's baseline level and within-prompt
    standard deviation are estimated; one pass leaves 10 to 20 percent error in a weight."""
    hold: str = ""
    """Parts kept at the base's level, such as similarity,tempo,genre. The weight of each is a Lagrange multiplier that begins at what
    --weights gives and moves at each look at --heldout-prompts: up while the clips score below the base's on it, else down."""
    hold_rate: float = 1.0
    """How far the weight of a held part moves at a validation pass for each standard deviation that it is off the base's level. Where
    weights and parts swing from pass to pass, lower it."""
    hold_slack: float = 0.0
    """Standard errors by which a held part may lie below the base's level before its weight rises. At 0 chance alone drives weights up,
    since none falls below its start, and the listeners' part pays for it."""
    frame_weight: float = 0.0
    """Weight of the reward of single frames, which a reward model that learnt from marked stretches gives; 0 leaves it out. A frame that is
    one nat better than the rest of its clip earns frame-weight / n-frames standard deviations of the score, for the steps that play it."""
    toy: bool = False
    """A tiny random policy rewarded for one code, instead of --policy, --reward and --prompts (what --preset smoke does)."""
    n_frames: int = 100
    """Codec frames T a clip; 100 = 4 s with the shipped base. Use the length that was rated."""
    steps: int = 60
    """Rounds of play and learning."""
    max_minutes: float = 0.0
    """Stop after this time and keep what was learnt; 0 sets no limit."""
    batch_size: int = 32
    """Clips a round, over all processes."""
    samples_per_prompt: int = 1
    """Clips of one prompt in a round, played one after another."""
    baseline: Literal["prompt", "loo", "none"] = "prompt"
    """What is subtracted from a clip's score: the running mean of its prompt over earlier rounds (prompt); the mean of the round's other
    clips of the prompt (loo, leave-one-out; needs --samples-per-prompt of 2 or more); nothing (none). With --credit codes it only enters
    the spread that the reward is divided by."""
    credit: Literal["auto", "score", "codes"] = "auto"
    """score: one number a clip, GAE and a critic. codes: what every other choice of every code would have changed, to first order, by
    the slope of the reward (rlhf/dense.py); a tenth of the clips teach as much. auto: codes where every part of the reward that is
    trained on has a slope (aspects, `acceptable` and --score-command have none), else score, and the run says so."""
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
    """Learning rate of the adapter (Adam). Healthy: 5 to 10 % of the ratios clipped, approx_kl about .005."""
    critic_lr: float = 1e-3
    """Learning rate of the critic's head (Adam). Only --credit score uses it."""
    lr_end: float = 0.1
    """Share of both learning rates that is left at the last step (linear)."""
    max_grad_norm: float = 1.0
    """Gradients of adapter and critic are clipped to this norm, each by itself."""
    cliprange: float = 0.2
    """How far a step's probability ratio may leave 1 and still be paid for."""
    cliprange_value: float = 0.2
    """The same for values, in units of the normalised score. Only --credit score uses it."""
    vf_coef: float = 0.5
    """Weight of the value loss. Critic and adapter share no parameters, so it only scales the critic's clipped gradient. Only --credit
    score uses it."""
    ent_coef: float = 0.0
    """Bonus for entropy, nats a step; --credit codes takes none."""
    gamma: float = 1.0
    """Discount a step; a clip ends by itself, so 1. Only --credit score uses it."""
    lam: float = 1.0
    """GAE's lambda: 1 trusts the score alone, 0 the critic alone. At .95 the first of 100 steps gets .6 % of a score that comes with the
    last, the rest is the critic's guess; use .95 to .99 where a run is long enough to train it. Only --credit score uses it."""
    kl_coef: float = 0.03
    """Price of a nat of KL, in standard deviations of the score."""
    target_kl: float | None = None
    """Nats a clip that the price is steered to (Ziegler's controller); not given: the price stays."""
    kl_horizon: int = 1000
    """Clips over which the controller moves the price by up to a fifth."""
    kl_coef_least: float = 0.0
    """What --target-kl never lowers the price below: without it a reward that says little is followed as far as one that says much."""
    kl_power: float = 0.0
    """With --target-kl: the price of a round is also multiplied by (its KL / target) to this power, which answers at once where the
    controller comes late and overshoots; 0 leaves it to the controller."""
    brake: Literal["off", "stop", "rewind"] = "stop"
    """What happens when one of the four signs below shows: nothing; the run ends and its adapter is kept; the run ends and the adapter of
    the best look (highest held-out score without a sign) is kept. The reason stands in the adapter's manifest."""
    kl_budget: float = 60.0
    """Sign 1: the policy's KL exceeds this many nats a clip; what is beyond fools the reward more than it pleases listeners."""
    heldout_prompts: Path | None = None
    """Prompts like --prompts, played to watch the run, always with the same seeds, and never learnt from; signs 2 to 4 need them."""
    heldout_clips: int = 4
    """Clips of each of them; two or more, or diversity is not known."""
    look_every: int = 10
    """Rounds between two looks at the held-out prompts, and between clips to listen to."""
    max_disagreement: float = 2.0
    """Sign 2: on held-out clips the reward's members disagree more than so many times as much as on the base's."""
    min_diversity: float = 0.8
    """Sign 3: held-out clips of one prompt lie closer together than this share of the base's distance, in the audio-text space."""
    patience: int = 2
    """Looks in a row in which sign 2, 3 or 4 must show. Sign 4: the held-out score, pessimistic as the reward is, is two standard errors
    below the best look's."""
    average: float = 0.0
    """Share that the mean of the rounds' adapters keeps each round (.9: of the last ten or so). Looks hear the mean, and it is what the run
    leaves: as much reward at less drift. 0 leaves the last round's adapter. --target-kl and --kl-budget go by the rounds' own KL."""
    r: int = 16
    """Rank of the adapter."""
    alpha: float = 32.0
    """Scale of the adapter: alpha / r."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: the learner's matrix products in bfloat16 (weights, log-softmax, sampler and reference in float32); auto: on fit hardware."""
    save_every: int = 10
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (from the start, if there is none yet)."""
    tracker: Kind = "tensorboard"
    """Where figures and clips can be watched; wandb and trackio have to be installed."""
    listen: int = 2
    """Clips, with their mel pictures, that are kept for listening every --look-every rounds; 0 keeps none."""
    licence: str = "unspecified"
    """Licence of the adapter, for its card."""
    processes: int = 0
    """Refuse to run with any other number of processes; 0 does not ask. `accelerate launch --cpu --num_processes 2` runs one."""
    seed: int = 0
    """Seed of the adapter's start, the prompts' order, the clips and the minibatches."""


GROUPS = {
    "reward": "reward score_command weights base_looks hold hold_rate hold_slack frame_weight",
    "sampling": "prompts n_frames batch_size samples_per_prompt temperature cfg_coef",
    "credit": "credit baseline gamma lam critic_lr vf_coef cliprange_value",
    "optimisation": "lr lr_end max_grad_norm cliprange ent_coef epochs minibatches microbatch average r alpha precision",
    "KL": "kl_coef target_kl kl_horizon kl_coef_least kl_power",
    "validation and early stopping": "heldout_prompts heldout_clips look_every watch_command brake kl_budget max_disagreement min_diversity"
    " patience",
}
"""What --help shows together; the rest is the run's."""
PRESETS_SAY = {
    "votes": "a reward model of listeners' votes, held to prompt, tempo, genre and diversity of the base; 40 rounds",
    "smoke": "a toy policy that learns to play one code; under a minute on a CPU, nothing to download",
}

TOY: dict[str, Any] = {
    "toy": True,
    "credit": "score",
    "n_frames": 12,
    "steps": 40,
    "batch_size": 64,
    "lr": 3e-3,
    "critic_lr": 1e-2,
    "kl_coef": 0.01,
    "kl_budget": 1e3,
    "max_disagreement": 1e3,
    "min_diversity": 0.0,
    "r": 4,
    "alpha": 8.0,
    "microbatch": 64,
    "precision": "fp32",
}
PRESETS: dict[str, dict[str, Any]] = {
    "votes": {
        "steps": 40,
        "samples_per_prompt": 2,
        "kl_coef": 0.005,
        "kl_coef_least": 0.0025,
        "target_kl": 65.0,
        "kl_horizon": 120,
        "kl_power": 1.0,
        "kl_budget": 150.0,
        "average": 0.9,
        "look_every": 5,
        "heldout_clips": 2,
        "base_looks": 4,
        "weights": f"{HUMAN}=1,similarity=0.4,tempo=0.15,genre=0.8,diversity=0.3",
        "hold": "similarity,tempo,genre,diversity",
        "hold_rate": 0.5,
        "hold_slack": 1.0,
    },
    "smoke": {**TOY, "out": Path("runs/ppo-smoke")},
}

PATIENCE = 5
"""Rounds in a row without one finite score, after which the reward is taken to be broken."""


def main(cfg: Config, task: Task | None = None) -> dict[str, Any]:
    """Run it; returns the figures of the adapter's manifest. `task` replaces what --policy, --reward and --prompts name."""
    began = time.monotonic()
    accelerator = open_accelerator(can=("fsdp",))
    check(cfg, accelerator.num_processes)

    # 1. Four roles, two networks: policy and reference are one LM with and without its adapter, the critic is a head on it.
    if task is None:
        listeners = bool(parse_weights(cfg.weights).get(HUMAN))
        sources = (cfg.policy, cfg.reward, cfg.prompts, cfg.heldout_prompts, cfg.score_command, listeners, cfg.watch_command)
        task = toy_task(cfg.seed) if cfg.toy else load_task(*sources)
    check_task(cfg, task)
    doubted = doubt(cfg.reward)
    if doubted:
        accelerator.print(doubted)
    for note in (played_too(task), unsaid_tempi(task) if parse_weights(cfg.weights).get("tempo") else None):
        if note:
            accelerator.print(note)
    run = Run(cfg, task, accelerator)
    if cfg.credit == "auto" and run.credit == "score":
        flat = ", ".join(without_slope(task, run.reward.trained, bool(cfg.frame_weight)))
        accelerator.print(f"credit by score, which needs ten times the clips of credit code by code: {flat} has no slope")
    if idle := idle_settings(cfg, run.credit):
        accelerator.print(f"credit code by code has no critic and no returns: {', '.join(idle)} change nothing; they are of --credit score")
    if cfg.base_looks > 1 and task.heldout is None:
        accelerator.print(f"--base-looks {cfg.base_looks} changes nothing without --heldout-prompts, which the base would play")
    if cfg.resume:
        restore(run)
    if run.step == 0 and len(run.reward.trained) > 1 and (remedy := blind_to_spreads(cfg, task)):
        accelerator.print(
            "parts are weighed by how clips of all prompts differ, which gives a taste less say than its weight: no prompt has two clips to"
            f" measure by; give {remedy}"
        )
    told = Teller(cfg, task, run.step + (run.over_budget is not None), accelerator.is_main_process)
    stopped, kl = "steps", float("nan")
    if run.step == 0 and look_is_due(run):
        told.first_look(look(run), run.examples)
    unseen = [] if cfg.brake == "off" else run.brake.unseen
    if unseen:
        remedy = "nobody can tell" if cfg.heldout_clips > 1 else "give --heldout-clips 2"
        accelerator.print(f"the brake does not watch {', '.join(unseen)}: {remedy if task.heldout else 'give --heldout-prompts'}")

    while run.step < cfg.steps and run.braked is None:
        seconds: dict[str, float] = {}
        # 2. Play.
        with timed(seconds, "play"):
            mine = run.play()
        # 3. Judge.
        with timed(seconds, "judge"):
            rollout, figures = run.judge(mine)
        kl = figures["kl"]
        if run.step == 0 and run.reward.without_scale:
            silent = ", ".join(run.reward.without_scale)
            accelerator.print(f"not trained on: {silent}, which no prompt asked of the base; give --heldout-prompts that do", flush=True)
        if run.braked is not None:  # the round that went too far is told and not learnt from
            told.step(run.step + 1, figures, {**seconds, "learn": 0.0}, rollout.codes.numel(), run.examples)
            break
        # 4. Learn.
        with timed(seconds, "learn"):
            figures |= run.learn(rollout)
            run.average.update()
        run.step += 1
        # 5. Look, now and then, at prompts that are never learnt from.
        if look_is_due(run):
            with timed(seconds, "look"), run.average.in_place():
                figures |= look(run)
        # 6. Tell.
        told.step(run.step, figures, seconds, rollout.codes.numel(), run.examples)
        del mine, rollout  # or their tables of all choices would stand beside the next round's
        if run.blind_rounds >= PATIENCE:
            stopped = f"no finite score in {PATIENCE} rounds in a row"
            break
        late = bool(cfg.max_minutes) and time.monotonic() - began > 60 * cfg.max_minutes
        if run.any_rank(late):
            stopped = f"{cfg.max_minutes:g} minutes are over"
            break
        if run.step % cfg.save_every == 0 and run.step < cfg.steps:
            save(run)

    save(run)
    result = {"steps": run.step, "clips": run.clips, "credit": run.credit, "stopped": run.braked or stopped, **told.summary()}
    if run.braked is not None and cfg.brake == "rewind":
        result["rewound_to"] = rewind(run)
        assert run.brake.best is not None
        kl = run.brake.best.kl
    elif run.average.tensors or run.over_budget is None:
        run.average.keep()
        kl = run.drift()  # no round has played what the last one has learnt, or the mean
    result |= {"kl": round(kl, 4)} if math.isfinite(kl) else {}
    result["reward_in_doubt"] = doubted is not None
    result["brake_unseen"] = unseen
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
            figures=result | ({"ears_sha256": task.ears_sha256} if task.ears_sha256 else {}),
            objective=run.reward.state_dict(),
        )
        save_adapter(cfg.out / "adapter", task.lm, manifest)
    told.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


# ---- the pieces ------------------------------------------------------------------------------------------------------


def check(cfg: Config, world: int) -> None:
    """Refuse what cannot work, before anything is loaded or written."""
    check_hold(cfg.hold, parse_weights(cfg.weights), cfg.hold_rate, cfg.hold_slack)
    if cfg.watch_command and (cfg.toy or cfg.heldout_prompts is None):
        raise UserError("--watch-command without --heldout-prompts", "prompts at whose looks it is asked", "give a file of them")
    check_processes(world, cfg.processes)
    sizes = (cfg.batch_size, cfg.minibatches, cfg.epochs, cfg.microbatch, cfg.n_frames, cfg.samples_per_prompt, cfg.steps)
    if min(*sizes, cfg.look_every, cfg.heldout_clips, cfg.base_looks, cfg.patience) < 1:
        raise UserError("a size below 1", "1 or more everywhere", "correct batch_size, minibatches, epochs, steps, n_frames or look_every")
    if min(cfg.save_every, cfg.temperature) <= 0 or not 0 < cfg.lr_end <= 1:
        got = f"--save-every {cfg.save_every}, --temperature {cfg.temperature:g}, --lr-end {cfg.lr_end:g}"
        raise UserError(got, "1 or more, above 0, and above 0 up to 1", "correct it")
    if cfg.target_kl is not None and (cfg.target_kl <= 0 or cfg.kl_horizon <= MOST_STEP * cfg.batch_size):
        got = f"--target-kl {cfg.target_kl:g} with --kl-horizon {cfg.kl_horizon} and --batch-size {cfg.batch_size}"
        more = f"a target above 0, and a horizon of more than {MOST_STEP:g} batches: a round would take the whole price away for good"
        raise UserError(got, more, "raise them")
    if not 0 <= cfg.kl_coef_least <= cfg.kl_coef:
        raise UserError(f"--kl-coef-least {cfg.kl_coef_least:g}", f"0 to --kl-coef, {cfg.kl_coef:g}", "lower it, or raise the first price")
    check_decay(cfg.average)
    check_power(cfg.kl_power, cfg.target_kl)
    if cfg.credit == "codes" and cfg.ent_coef:
        raise UserError("--ent-coef with --credit codes", "0", "the KL price keeps its entropy; or use --credit score")
    if cfg.baseline == "loo" and (cfg.samples_per_prompt < 2 or cfg.batch_size % cfg.samples_per_prompt):
        raise UserError(
            f"--baseline loo with {cfg.samples_per_prompt} clips a prompt in a batch of {cfg.batch_size}",
            "two or more, and whole groups in a batch",
            "set --samples-per-prompt 2 or 4, or use --baseline prompt",
        )
    if parse_weights(cfg.weights).get("diversity") and (cfg.samples_per_prompt < 2 or cfg.heldout_clips < 2):
        raise UserError(
            f"a weight of diversity with {cfg.samples_per_prompt} clips a prompt, {cfg.heldout_clips} at looks",
            "two or more: a clip by itself differs from nothing",
            "set --samples-per-prompt 2 and --heldout-clips 2",
        )
    check_groups(parse_weights(cfg.weights), cfg.batch_size // world, cfg.samples_per_prompt)
    if cfg.batch_size % (world * cfg.minibatches):
        raise UserError(
            f"batch_size {cfg.batch_size} for {world} process(es) x {cfg.minibatches} minibatches",
            f"a multiple of {world * cfg.minibatches}",
            "change --batch-size or --minibatches",
        )
    refuse_another_run(cfg.out, cfg.resume)


BY_SCORE_ALONE = ("ent_coef", "gamma", "lam", "critic_lr", "vf_coef", "cliprange_value")


def idle_settings(cfg: Config, credit: str) -> list[str]:
    """Flags that were given a value of their own and that this credit leaves unused."""
    if credit != "codes":
        return []
    return [f"--{name.replace('_', '-')}" for name in BY_SCORE_ALONE if getattr(cfg, name) != getattr(Config, name)]


def blind_to_spreads(cfg: Config, task: Task) -> str | None:
    """What to give so that some prompt has two clips of the base, by which parts are measured; None where one has."""
    if task.heldout is not None:
        return "--heldout-clips 2" if cfg.heldout_clips * cfg.base_looks < 2 else None
    alone = cfg.samples_per_prompt < 2 and cfg.batch_size <= len(task.prompts)
    return "--heldout-prompts, or --samples-per-prompt 2" if alone else None


def played_too(task: Task) -> str | None:
    """What to say where prompts that should only be watched are learnt from, too; None where there are none."""
    watched = [] if task.heldout is None else task.heldout.texts
    if not (shared := sorted(set(watched) & set(task.prompts))):
        return None
    return f"{len(shared)} of {len(watched)} held-out prompts are in --prompts too, such as {shared[0]!r}: looks tell how these were learnt"


def unsaid_tempi(task: Task) -> str | None:
    """What to say where prompts have a tempo that their words do not: clips are played at it, and the part `tempo` reads words."""
    played = [text for text, bpm in zip(task.prompts, task.table.tempo_bpm.tolist()) if not math.isnan(bpm)]
    if not (unsaid := [text for text in played if parse_tempo(text) is None]):
        return None
    got = f"{len(unsaid)} of {len(task.prompts)} prompts have a tempo_bpm that their words do not say, such as {unsaid[0]!r}"
    return f"{got}: the part `tempo` reads words alone, and judges them by none or by another; write '96 BPM' into the prompt"


def check_task(cfg: Config, task: Task) -> None:
    """Refuse frames that nobody judges, and a brake that has nothing to go by."""
    if cfg.frame_weight and task.frames is None:
        got = f"--frame-weight {cfg.frame_weight:g} with a reward that knows nothing of frames"
        raise UserError(
            got, "a --reward that learnt from marked stretches", "ask raters to mark stretches and train it again, or leave it 0"
        )
    if cfg.hold and task.heldout is None:
        raise UserError(f"--hold {cfg.hold} without --heldout-prompts", "prompts on which to compare with the base", "give them")
    if cfg.brake == "rewind" and task.heldout is None:
        raise UserError("--brake rewind without --heldout-prompts", "prompts by which to know the best", "give them, or use --brake stop")
    if task.heldout is not None and len(task.heldout) < 2:
        raise UserError("1 held-out prompt", "2 or more, better 16", "add prompts to --heldout-prompts: one tells no error")


if __name__ == "__main__":
    run(main, Config, PRESETS, show=lambda figures: json.dumps(figures, indent=2), say=PRESETS_SAY, groups=GROUPS)
