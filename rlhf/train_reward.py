"""A reward model from a frozen snapshot of votes, with an honest account of how well it predicts votes on prompts it
has not seen.

    accelerate launch rlhf/train_reward.py --snapshot runs/snapshots/first --policy base_models/pretrained --out runs/reward
    python rlhf/train_reward.py --preset smoke                    # a toy codec and made-up votes, under a minute
    python rlhf/train_reward.py --snapshot ... --strict           # exit code 1 when a gate fails
    torchrun --nproc-per-node 2 rlhf/train_reward.py ...          # the same result, bit for bit

    votes -> raters' reliability -> pairs -> blocks of frozen features [N, F] -> five folds by prompt and artist -> heads and
    raters' weights chosen, calibrated, judged -> ensemble on all pairs; heads of aspects, "both bad" and frames -> gates
    with --trunk: pairs -> the base's language model with a LoRA, judged by the same folds -> kept where it is surely better

Every figure comes from pairs whose *prompts* the fitted heads have never met: five folds by prompt (prompts of one artist stand
together); in each, the committee of heads is chosen by folds inside the training part. One figure comes from votes of *raters* nobody
has met either. The model that is saved is then fitted on everything, which can only help it. Accuracy is told against single
votes, beside the ceiling that the raters' own disagreement sets, and beside a model that hears only loudness and length.

Several processes share clips and fits; the parts are summed, and each part does not depend on who computed it.
It is not fine-tuning of the policy: no weight of the base changes (a trunk is a copy with an adapter), and nothing here samples.

Papers: Bradley & Terry 1952. Ziegler et al. 2019, arXiv:1909.08593 (rewards from comparisons). Coste et al. 2024,
arXiv:2310.02743 (ensembles against over-optimisation). Guo et al. 2017, arXiv:1706.04599 (temperature)."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator
from torch import Tensor

from base_models.checkpoint import write_json
from base_models.errors import UserError
from base_models.launch import open_accelerator
from base_models.policy import PRETRAINED, load_policy
from base_models.settings import run, to_mapping
from rlhf import metrics, raters, reward_gates
from rlhf.preferences import TIE, Preference, Snapshot, Vote, demand_decided, load_snapshot, pairs_sha256, shuffled, training_pairs
from rlhf.rater_weights import reliable, weigh
from rlhf.reward_committee import committees
from rlhf.reward_extras import Bench, fit_extras, fit_frame_head
from rlhf.reward_features import Base, blocks_of
from rlhf.reward_folds import Clips, Folds, baseline_scores, choose_committee, cross_calibrated, ordering, unseen_raters
from rlhf.reward_heads import Share, candidates, expand, make_lens, sure_temperature
from rlhf.reward_model import RewardModel
from rlhf.reward_report import judgement, name, report
from rlhf.reward_toy import toy_base, write_toy_snapshot
from rlhf.snapshot import NothingToLearnError
from rlhf.token_fit import Recipe
from rlhf.token_reward import TrunkShape
from rlhf.token_trial import Trial, verdict
from rlhf.trusted import demand_raters


@dataclass(frozen=True)
class Config:
    """Settings of a reward model."""

    out: Path = Path("runs/reward")
    """Folder of the model: config.json, model.safetensors, manifest.json, figures.json."""
    snapshot: Path | None = None
    """Frozen snapshot of votes, as `encore ratings export` writes it."""
    policy: Path = PRETRAINED
    """The base that the rated clips were sampled from."""
    toy: bool = False
    """Take a small random codec and made-up votes instead of --snapshot and --policy (what --preset smoke does)."""
    members: int = 5
    """Members of the ensemble: committees of heads, each on a bootstrap of the prompts."""
    lam: float = 0.5
    """Caution: how many standard deviations between the members are taken off the score."""
    folds: int = 5
    """Parts of the prompts, each held out once."""
    weights_by: Literal["auto", "agreement", "slopes", "nothing"] = "auto"
    """What raters weigh by: how they agree on common pairs, how their votes follow what the model hears (slopes), or alike. auto: the
    better of the first two, by held-out votes."""
    trunk: Literal["frozen", "tokens", "auto"] = "frozen"
    """What judges a clip: heads over frozen features of what the codec plays (frozen), the base's own language model with a LoRA that
    reads codec tokens (tokens), or the language model only where held-out votes say that it is surely better (auto)."""
    trunk_layers: int = 3
    """So many first layers of the language model are read."""
    trunk_members: int = 1
    """Adapters and heads of its ensemble; a single one cannot disagree with itself, and each costs as much again."""
    trunk_epochs: int = 4
    """Passes of a trunk over the pairs; kept is the one after which inner prompts were foretold best."""
    adversaries: Literal["silence", "invert"] = "silence"
    """What is done with raters who answer against the music beyond doubt: they weigh nothing, or count the other way round."""
    one_rater: bool = False
    """Allow the votes of a single rater: a reward of one person's taste, whose ceiling nobody can tell."""
    strict: bool = False
    """Exit with code 1 when a gate fails. The model is written all the same."""
    shuffle_labels: bool = False
    """The control: half of the pairs of each prompt are turned round. Accuracy is still told against the real votes, and must be one
    half."""
    processes: int = 0
    """Refuse to run with any other number of processes; 0 does not ask."""
    seed: int = 0
    """Seed of the folds and the bootstraps."""


PRESETS: dict[str, dict[str, Any]] = {"smoke": {"toy": True, "out": Path("runs/reward-smoke")}}


def main(cfg: Config) -> dict[str, Any]:
    """Run it; returns the figures. On one thread, since sums in another order would make another model of the same votes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _main(cfg)
    finally:
        torch.set_num_threads(threads)


def _main(cfg: Config) -> dict[str, Any]:
    began = time.monotonic()
    accelerator = open_accelerator(cfg.processes)
    check(cfg)
    share = sharing(accelerator)

    # 1. Votes: whom to believe, and what they say about which clips.
    base, snapshot = toy_task(cfg, accelerator) if cfg.toy else load_task(cfg)
    check_votes(snapshot, cfg)
    check_base(base, cfg)
    quality = raters.reliability(snapshot.votes)
    agreed = None if cfg.weights_by == "nothing" else raters.weights(quality, cfg.adversaries)
    clips = Clips(snapshot, base.codec.n_q, base.codec.card)

    def preferences(weights: Mapping[str, float] | None, votes: Sequence[Vote] | None = None) -> list[Preference]:
        told = snapshot if votes is None else replace(snapshot, votes=tuple(votes))
        return training_pairs(told, weights, known=clips.known)

    truth = demand_decided(preferences(agreed))
    learnt = shuffled(truth, cfg.seed) if cfg.shuffle_labels else truth

    # 2. Features of every clip, once.
    among = committees(blocks_of(base))
    heads = candidates(blocks_of(base))
    table = clips.table(base, sorted({block for head in heads for block in head.blocks}), share, progress=accelerator.is_main_process)
    lenses = {head: make_lens(head, table, clips.prompt) for head in heads}
    inputs = {head: expand(lens, head, table) for head, lens in lenses.items()}

    # 3. Judge by folds of prompts: every margin comes from heads that never met the pair's prompt.
    folds = Folds(inputs, clips.fold_of_prompt(cfg.folds, cfg.seed), cfg.folds, share)
    trial = None if cfg.trunk == "frozen" else trial_of(cfg, base, clips, folds, accelerator.is_main_process)
    choice = choose_committee(folds, clips.pairs(learnt), among)
    committee = choice.best
    weighing = weigh(cfg, folds, clips, snapshot, agreed, clips.pairs(learnt), choice, preferences)
    if weighing.weights is not agreed:
        learnt = truth = preferences(weighing.weights)
    pairs = clips.pairs(learnt)
    rival = None if trial is None else verdict(trial, weighing, snapshot.votes, forced=cfg.trunk == "tokens")
    by_trunk, scores = (trial, rival.scores) if rival is not None and rival.kept else (None, weighing.scores)
    margin = folds.margins(scores, pairs)  # shuffled labels know no more than they taught
    baseline = baseline_scores(base, clips, folds, pairs)
    votes = ordering(snapshot.votes)
    stranger = (
        None
        if cfg.shuffle_labels or by_trunk is not None
        else unseen_raters(folds, clips, votes, reliable(preferences, cfg), choice.chosen, cfg.seed)
    )

    # 4. Learn from everything.
    members, offsets = committee.ensemble(inputs, pairs, cfg.members, cfg.seed, share)
    temperature, t = sure_temperature(margin, pairs)
    model = RewardModel(base, committee, [lenses[head] for head in committee.heads], members, offsets, cfg.lam, temperature)
    model.snapshot_sha256 = snapshot.sha256
    model.trunk = None if by_trunk is None else by_trunk.kept(pairs)
    bench = Bench(folds, clips, choice.chosen, committee, cfg.members, cfg.seed)
    extras = fit_extras(bench, learnt, snapshot.votes, weighing.weights)
    model.extras = {name: found.extra for name, found in extras.items() if found.extra is not None}
    model.frames, of_frames = fit_frame_head(bench, base.codec, snapshot, weighing.weights)

    # 5. Tell.
    calibrated, votes_of_each = cross_calibrated(margin, pairs, folds).numpy(), [pair.n_votes for pair in learnt]
    figures = {
        **judgement(snapshot, truth, clips, folds, scores, baseline, stranger, cfg.seed),
        "ece": metrics.pair_calibration_error(calibrated, pairs.p.numpy(), pairs.weight.numpy()),
        "ece_by_chance": metrics.calibration_error_by_chance(calibrated, votes_of_each, pairs.weight.numpy(), seed=cfg.seed),
        "overfit": by_trunk.overfit(pairs) if by_trunk is not None else reward_gates.overfit(committee, inputs, pairs, cfg.seed),
        "trunk": None if rival is None else rival.figures,
        "heads": committee.as_json(),
        "held_out_loss": {name(option): round(loss, 4) for option, loss in choice.losses.items()},
        "temperature": temperature,
        "evidence": round(t, 3) if math.isfinite(t) else None,
        "features": sum(table[block].shape[1] for block in committee.blocks),
        "raters": {rater: asdict(q) | weighing.told(rater) for rater, q in quality.items()},
        "weights_by": weighing.name,
        "weights_loss": weighing.losses,
        "adversaries": cfg.adversaries,
        "side_lean": weighing.lean,
        "extras": {name: found.figures for name, found in extras.items()},
        "frames": of_frames,
        "snapshot_sha256": snapshot.sha256,
        "pairs_sha256": pairs_sha256(learnt),
        "reward_sha256": model.sha256,
        "base_sha256": base.sha256,
        "shuffled_labels": cfg.shuffle_labels,
        "processes": accelerator.num_processes,
        "seconds": round(time.monotonic() - began, 1),
    }
    figures["gates"] = reward_gates.as_json(reward_gates.gates(figures))
    if accelerator.is_main_process:
        model.save(cfg.out)
        write_json(cfg.out / "config.json", to_mapping(cfg))
        write_json(cfg.out / "figures.json", figures)
    accelerator.wait_for_everyone()
    return figures


def script(cfg: Config) -> dict[str, Any]:
    """What the command does: `main`, and with --strict an error when a gate fails, after everything was written and told.

    Raises: reward_gates.GateError.
    """
    figures = main(cfg)
    asked = reward_gates.gates(figures)
    if cfg.strict and any(gate.passed is False for gate in asked):
        print(report(figures) if Accelerator().is_main_process else "", flush=True)
        reward_gates.demand(asked)
    return figures


# ---- the pieces ------------------------------------------------------------------------------------------------------


def check(cfg: Config) -> None:
    """Refuse settings that cannot work before anything is read."""
    if cfg.trunk_members < 1 or cfg.trunk_epochs < 1:
        raise UserError(f"trunk members {cfg.trunk_members}, epochs {cfg.trunk_epochs}", "1 or more of each", "correct the settings")
    if cfg.folds < 3 or cfg.members < 1 or cfg.lam < 0:
        raise UserError(
            f"folds {cfg.folds}, members {cfg.members}, lam {cfg.lam}",
            "3 folds or more, 1 member or more, lam 0 or more",
            "correct the settings",
        )


def check_votes(snapshot: Snapshot, cfg: Config) -> None:
    """Refuse votes that nothing can be learnt from, or nothing told of."""
    ordered = ordering(snapshot.votes)
    who = sorted({vote.rater for vote in ordered})
    if ordered and all(vote.choice == TIE for vote in ordered):
        got = f"{len(ordered)} votes that order, all of them ties"
        raise NothingToLearnError(got, "votes for a side", "collect votes on pairs that differ more")
    demand_raters(who, cfg.one_rater)


def check_base(base: Base, cfg: Config) -> None:
    """Refuse to look for a trunk where there is none, before anything is computed."""
    if cfg.trunk != "frozen" and not hasattr(base, "lm"):
        raise UserError(f"--trunk {cfg.trunk} with a base that has no language model", "a policy's folder", "use --trunk frozen")


def trial_of(cfg: Config, base: Base, clips: Clips, folds: Folds, progress: bool) -> Trial:
    """Where a trunk over codec tokens is tried."""
    shape, recipe = TrunkShape(cfg.trunk_layers), Recipe(epochs=cfg.trunk_epochs)
    speaker: Any = base
    return Trial(speaker, base.sha256, clips, folds, shape, recipe, cfg.trunk_members, cfg.lam, cfg.seed, cfg.out / "trunk", progress)


def sharing(accelerator: Accelerator) -> Share:
    """Spread jobs over the processes: job j is done by rank j mod n, and the zero-filled parts are summed, which is
    exact."""

    def share(n: int, job: Callable[[int], Tensor]) -> Tensor:
        if accelerator.num_processes == 1:
            return torch.stack([job(index) for index in range(n)])
        mine = {index: job(index) for index in range(accelerator.process_index, n, accelerator.num_processes)}
        # A process without a job still has to know the shape of the result.
        shape = job(0).shape if not mine else next(iter(mine.values())).shape
        result = torch.zeros((n, *shape))
        for index, value in mine.items():
            result[index] = value
        summed: Tensor = accelerator.reduce(result.to(accelerator.device), reduction="sum").cpu()
        return summed

    return share


def load_task(cfg: Config) -> tuple[Base, Snapshot]:
    """The base and the votes on its clips; refuses clips of another base."""
    if cfg.snapshot is None:
        raise UserError("no --snapshot", "the folder of a frozen snapshot", "export one with `encore ratings export`")
    policy = load_policy(cfg.policy)
    return policy, load_snapshot(cfg.snapshot, policy.sha256)


def toy_task(cfg: Config, accelerator: Accelerator) -> tuple[Base, Snapshot]:
    """A small random codec, and a snapshot on disk whose raters like clips of low codes: learnable, and nothing
    else."""
    base = toy_base(cfg.seed)
    folder = cfg.out / "toy_snapshot"
    if accelerator.is_main_process:
        write_toy_snapshot(folder, base.sha256, cfg.seed)
    accelerator.wait_for_everyone()
    return base, load_snapshot(folder, base.sha256)


if __name__ == "__main__":
    run(script, Config, PRESETS, show=report)
