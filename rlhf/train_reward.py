"""A reward model from a frozen snapshot of votes, with an honest account of how well it predicts votes on prompts it
has not seen.

    accelerate launch rlhf/train_reward.py --snapshot runs/snapshots/first --policy base_models/pretrained --out runs/reward
    python rlhf/train_reward.py --preset smoke                    # a toy codec and made-up votes, under a minute
    python rlhf/train_reward.py --snapshot ... --strict           # exit code 1 when a gate fails
    torchrun --nproc-per-node 2 rlhf/train_reward.py ...          # the same result, bit for bit

    votes -> raters' reliability -> pairs -> blocks of frozen features [N, F] -> five folds by prompt and artist -> head and
    raters' weights chosen, calibrated, judged -> ensemble on all pairs; heads of aspects, "both bad" and frames -> gates

Every figure comes from pairs whose *prompts* the fitted heads have never met: five folds by prompt (prompts of one artist stand
together); in each, the kind of head is chosen by folds inside the training part. One figure comes from votes of *raters* nobody
has met either. The model that is saved is then fitted on everything, which can only help it. Accuracy is told against single
votes, beside the ceiling that the raters' own disagreement sets, and beside a model that hears only loudness and length.

Several processes share clips and fits; the parts are summed, and each part does not depend on who computed it.
It is not fine-tuning: no weight of the base changes, and nothing here samples.

Papers: Bradley & Terry 1952. Ziegler et al. 2019, arXiv:1909.08593 (rewards from comparisons). Coste et al. 2024,
arXiv:2310.02743 (ensembles against over-optimisation). Guo et al. 2017, arXiv:1706.04599 (temperature)."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from base_models.checkpoint import write_json
from base_models.codec import CodecConfig, MagnitudeCodec
from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from base_models.settings import run, to_mapping
from rlhf import frame_reward, metrics, raters, reward_gates
from rlhf.preferences import (
    BOTH_BAD,
    TIE,
    Preference,
    Snapshot,
    Vote,
    X,
    Y,
    both_bad,
    clip_marks,
    content_sha256,
    decided,
    load_snapshot,
    pairs_sha256,
    shuffled,
    training_pairs,
)
from rlhf.reward_extras import fit_extras
from rlhf.reward_folds import (
    Choice,
    Clips,
    Folds,
    baseline_scores,
    choose_heads,
    cross_calibrated,
    loss_by_fold,
    ordering,
    unseen_raters,
    unseen_scores,
)
from rlhf.reward_model import (
    STATES,
    Base,
    Head,
    Pairs,
    RewardModel,
    Share,
    best_temperature,
    blocks_of,
    candidates,
    expand,
    fit_ensemble,
    make_lens,
)

MIN_MARKED = 20
"""Frames have a head from so many marked clips on."""


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
    """Heads of the ensemble, each on a bootstrap of the prompts."""
    lam: float = 0.5
    """Caution: how many standard deviations between the heads are taken off the score."""
    folds: int = 5
    """Parts of the prompts, each held out once."""
    weights_by: Literal["auto", "agreement", "slopes", "nothing"] = "auto"
    """What raters weigh by: how they agree on common pairs, how their votes follow what the model hears (slopes), or alike. auto: the
    better of the first two, by held-out votes."""
    trunk: Literal["frozen", "tokens", "auto"] = "frozen"
    """What heads read: what the codec plays and the shared space (frozen), the states of the base's own language model (tokens), or
    either and both, by held-out votes (auto). The language model costs a forward pass a clip, at every step of PPO too."""
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
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    check(cfg, accelerator.num_processes)
    share = sharing(accelerator)

    # 1. Votes: whom to believe, and what they say about which clips.
    base, snapshot = toy_task(cfg, accelerator) if cfg.toy else load_task(cfg)
    check_votes(snapshot, cfg)
    quality = raters.reliability(snapshot.votes)
    agreed = None if cfg.weights_by == "nothing" else raters.weights(quality, cfg.adversaries)
    clips = Clips(snapshot, base.codec.n_q, base.codec.card)

    def preferences(weights: Mapping[str, float] | None, votes: Sequence[Vote] | None = None) -> list[Preference]:
        told = snapshot if votes is None else replace(snapshot, votes=tuple(votes))
        return training_pairs(told, weights, known=clips.known)

    truth = preferences(agreed)
    if not decided(truth):
        raise UserError(f"{len(truth)} pairs, all of them ties", "votes for a side", "collect votes on pairs that differ more")
    learnt = shuffled(truth, cfg.seed) if cfg.shuffle_labels else truth

    # 2. Features of every clip, once.
    heads = trunk_heads(cfg.trunk, base)
    table = clips.table(base, sorted({block for head in heads for block in head.blocks}), share, progress=accelerator.is_main_process)
    lenses = {head: make_lens(head, table, clips.prompt) for head in heads}
    inputs = {head: expand(lens, head, table) for head, lens in lenses.items()}

    # 3. Judge by folds of prompts: every margin comes from heads that never met the pair's prompt.
    folds = Folds(inputs, clips.fold_of_prompt(cfg.folds, cfg.seed), cfg.folds, share)
    choice = choose_heads(folds, clips.pairs(learnt))
    head = choice.best
    weighing = weigh(cfg, folds, clips, snapshot, agreed, clips.pairs(learnt), choice, preferences)
    if weighing.weights is not agreed:
        learnt = truth = preferences(weighing.weights)
    pairs, true_pairs = clips.pairs(learnt), clips.pairs(truth)
    margin = folds.margins(weighing.scores, true_pairs)
    baseline = baseline_scores(base, clips, folds, pairs)
    votes = ordering(snapshot.votes)
    stranger = None if cfg.shuffle_labels else unseen_raters(folds, clips, votes, _reliable(preferences, cfg), choice.chosen, cfg.seed)

    # 4. Learn from everything.
    members, offsets = fit_ensemble(head, inputs[head], pairs, cfg.members, cfg.seed, share)
    model = RewardModel(base, head, lenses[head], members, offsets, cfg.lam, best_temperature(margin, true_pairs))
    model.snapshot_sha256 = snapshot.sha256
    extras = fit_extras(folds, clips, learnt, snapshot.votes, weighing.weights, choice.chosen, head, cfg.members, cfg.seed)
    model.extras = {name: found.extra for name, found in extras.items() if found.extra is not None}
    model.frames, of_frames = fit_frames(base, clips, snapshot, weighing.weights, folds, cfg.seed)

    # 5. Tell.
    figures = {
        **judgement(snapshot, truth, clips, folds, weighing.scores, baseline, stranger, cfg.seed),
        "ece": metrics.pair_calibration_error(
            cross_calibrated(margin, true_pairs, folds).numpy(), true_pairs.p.numpy(), true_pairs.weight.numpy()
        ),
        "overfit": reward_gates.overfit(head, inputs[head], pairs, cfg.seed),
        "head": asdict(head),
        "held_out_loss": {name(option): round(loss, 4) for option, loss in choice.losses.items()},
        "temperature": model.temperature,
        "features": lenses[head].mean.numel(),
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


def check(cfg: Config, num_processes: int) -> None:
    """Refuse settings that cannot work before anything is read."""
    if cfg.processes not in (0, num_processes):
        raise UserError(f"{num_processes} processes", f"{cfg.processes}, as --processes says", "start with torchrun --nproc-per-node")
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
        raise UserError(f"{len(ordered)} votes that order, all of them ties", "votes for a side", "collect votes on pairs that differ more")
    if len(who) == 1 and not cfg.one_rater:
        raise UserError(
            f"votes of one rater alone ({who[0]})",
            "at least two raters, else nobody can tell how right a model can be",
            "invite a second rater, or pass --one-rater for a reward of this one person's taste",
        )


def trunk_heads(trunk: Literal["frozen", "tokens", "auto"], base: Base) -> tuple[Head, ...]:
    """The heads that held-out votes choose among. Raises: UserError when the language model is asked for and there is none."""
    frozen = candidates(blocks_of(base))
    if trunk == "frozen":
        return frozen
    if not hasattr(base, "lm"):
        raise UserError(f"--trunk {trunk} with a base that has no language model", "a policy's folder", "use --trunk frozen")
    tokens = (Head("linear", (STATES,), 0.6), Head("kernel", (STATES,), 1.0, 2.0), Head("kernel", (STATES,), 2.0, 1.5))
    if trunk == "tokens":
        return tokens
    kernels = [head for head in frozen if head.kind != "linear"]
    both = tuple(dict.fromkeys(replace(head, kind="kernel", blocks=(*head.blocks, STATES), prior=2.0, length=2.0) for head in kernels))
    return (*frozen, *tokens, *both)


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


@dataclass(frozen=True)
class Weighing:
    """By what raters weigh, and what came of it."""

    name: str
    weights: Mapping[str, float] | None
    scores: Tensor
    """[n_folds, N]: row f by heads that have not seen fold f; in each fold with the weights that are better on the others."""
    losses: dict[str, float]
    """Held-out loss of single votes, nats, by what raters weigh."""
    habits: raters.Habits | None

    @property
    def lean(self) -> float | None:
        """The mean rater's lean to the left side, nats."""
        return None if self.habits is None else self.habits.lean

    def told(self, rater: str) -> dict[str, Any]:
        """What else is known of a rater. A slope that is surely negative makes an adversary, too."""
        habit = None if self.habits is None else self.habits.raters.get(rater)
        if habit is None:
            return {}
        told = {"slope": habit.slope, "slope_se": habit.slope_se, "lean": habit.lean, "against_the_music": habit.adversary}
        return told | ({"weight": float(self.weights[rater])} if self.name == "slopes" and self.weights is not None else {})


def weigh(
    cfg: Config,
    folds: Folds,
    clips: Clips,
    snapshot: Snapshot,
    agreed: Mapping[str, float] | None,
    pairs: Pairs,
    choice: Choice,
    preferences: Callable[[Mapping[str, float] | None], list[Preference]],
) -> Weighing:
    """Fit with the weights of agreement and with the raters' slopes, and see which foretells held-out votes better.

    Slopes come from margins of heads that have met neither the vote's prompt nor the fold that is judged; the heads are then fitted
    again with them: one turn of expectation and maximisation. Both are judged by every rater's votes at this rater's slope, from
    the other folds: what foretells an adversary's votes the wrong way round is right. The control of turned labels is not weighed anew.
    """
    votes = ordering(snapshot.votes)
    single = clips.single(votes)
    fold = folds.of(single)

    def habits(scores: Tensor, seen: Tensor) -> raters.Habits | None:
        margin = folds.margins(scores, single) * torch.tensor([-1.0 if vote.choice == Y else 1.0 for vote in votes])
        rows = seen.nonzero()[:, 0].tolist()
        return raters.habits([votes[row] for row in rows], margin.double().numpy()[rows])

    def loss(scores: Tensor) -> np.ndarray:
        margin = cross_calibrated(folds.margins(scores, single), single, folds)
        for f in range(folds.n):
            if (found := habits(scores, fold != f)) is not None:
                slope = [found.scale * (found.raters[vote.rater].slope if vote.rater in found.raters else 1.0) for vote in votes]
                margin = torch.where(fold == f, folds.margins(scores, single) * torch.tensor(slope), margin)
        return loss_by_fold(margin, single, folds)

    def slopes(found: raters.Habits | None) -> Mapping[str, float] | None:
        return agreed if found is None else {rater: habit.used(cfg.adversaries) for rater, habit in found.raters.items()}

    plain = "nothing" if cfg.weights_by == "nothing" else "agreement"
    scores = {plain: unseen_scores(folds, pairs, choice.chosen, cfg.members, cfg.seed, cfg.lam)}
    overall = habits(scores[plain], torch.ones(len(votes), dtype=torch.bool))
    weights = {plain: agreed, "slopes": slopes(overall)}
    if cfg.weights_by in ("auto", "slopes") and overall is not None and not cfg.shuffle_labels:
        turned = [clips.pairs(preferences(slopes(habits(choice.inner[f], fold != f)))) for f in range(folds.n)]
        scores["slopes"] = unseen_scores(folds, turned, choice.chosen, cfg.members, cfg.seed, cfg.lam)
    losses = {option: loss(rows) for option, rows in scores.items()}
    allowed = ["slopes"] if cfg.weights_by == "slopes" and "slopes" in scores else list(scores)
    kept = [min(allowed, key=lambda option: losses[option].sum() - losses[option][f]) for f in range(folds.n)]
    best = min(allowed, key=lambda option: losses[option].sum())
    return Weighing(
        best,
        weights[best],
        torch.stack([scores[option][f] for f, option in enumerate(kept)]),
        {option: round(float(loss.sum()) / len(votes), 4) for option, loss in losses.items()},
        overall,
    )


def _reliable(
    preferences: Callable[[Mapping[str, float] | None, Sequence[Vote]], list[Preference]], cfg: Config
) -> Callable[[Sequence[Vote]], list[Preference]]:
    """Votes -> preferences, with weights from these votes alone."""

    def made(votes: Sequence[Vote]) -> list[Preference]:
        return preferences(None if cfg.weights_by == "nothing" else raters.weights(raters.reliability(votes), cfg.adversaries), votes)

    return made


def fit_frames(
    base: Base, clips: Clips, snapshot: Snapshot, weights: Mapping[str, float] | None, folds: Folds, seed: int
) -> tuple[frame_reward.FrameHead | None, dict[str, Any]]:
    """The head of frames where enough clips are marked, and how well it finds marks in clips of unseen prompts."""
    prompt_of = {sha256: snapshot.clips[sha256].prompt_id for sha256 in clips.row}
    found = frame_reward.marked_clips(base.codec, clips.known, clip_marks(snapshot, weights), prompt_of)
    n = len(found.tables)
    if n < MIN_MARKED:
        return None, {"n": n, "auc": None, "ci": None, "asked": MIN_MARKED}
    fold = {name: int(folds.fold[number]) for name, number in clips.prompt_number.items()}
    told = metrics.mean_ci(frame_reward.held_out_auc(found, fold, seed), found.prompt_ids, seed=seed)
    head = frame_reward.fit_frames(found.tables, found.marked, seed)
    return head, {"n": n, "auc": told.value, "ci": list(told.ci), "asked": MIN_MARKED}


def judgement(
    snapshot: Snapshot,
    truth: Sequence[Preference],
    clips: Clips,
    folds: Folds,
    scores: Tensor,
    baseline: Tensor,
    stranger: Tensor | None,
    seed: int,
) -> dict[str, Any]:
    """How far unseen margins agree with single votes, with intervals by prompt, the raters' ceiling and what was left out.

    Args: scores, baseline [n_folds, N]. stranger: margins of the votes that order, by fits that have met neither prompt nor rater.
    """
    ordered = ordering(snapshot.votes)
    votes = [vote for vote in ordered if vote.choice != TIE]
    single, prompts = clips.single(votes), [vote.prompt_id for vote in votes]
    by_vote, plain = (folds.margins(rows, single).numpy() for rows in (scores, baseline))
    accuracy = metrics.accuracy(by_vote, prompts, seed=seed)
    above = metrics.mean_ci(_right(by_vote) - _right(plain), prompts, seed=seed)
    pairs = clips.pairs(truth)
    majority = folds.margins(scores, pairs).numpy()
    agreed = raters.agreement(snapshot.votes, seed=seed)
    choices = Counter(vote.choice for vote in snapshot.votes)
    decided_rows = [row for row, vote in enumerate(ordered) if vote.choice != TIE]
    return {
        "accuracy": accuracy.value,
        "ci": list(accuracy.ci),
        "n": accuracy.n,
        "n_prompts": accuracy.n_clusters,
        "ceiling": None if agreed is None else agreed.ceiling,
        "ceiling_ci": None if agreed is None else list(agreed.ci),
        "agreement": None if agreed is None else agreed.rate,
        "accuracy_majority": metrics.accuracy(majority, [p.prompt_id for p in truth], pairs.p.numpy(), seed).as_json(),
        "accuracy_unseen_raters": None
        if stranger is None
        else metrics.accuracy(stranger[decided_rows].numpy(), prompts, seed=seed).as_json(),
        "baseline": metrics.accuracy(plain, prompts, seed=seed).as_json(),
        "above_baseline": above.as_json(),
        "n_votes": len(snapshot.votes),
        "n_pairs": len(truth),
        "n_ties": choices[TIE],
        "n_both_bad": len(both_bad(snapshot)),
        "n_excluded": dict(snapshot.n_excluded),
        "n_artists": clips.n_artists,
    }


def _right(margin: np.ndarray) -> np.ndarray:
    return np.where(margin == 0, 0.5, (margin > 0).astype(float))


def name(head: Head) -> str:
    reach = f", length {head.length:g}" if head.kind == "kernel" else ""
    return f"{head.kind} on {' + '.join(head.blocks)}{reach}, prior {head.prior:g}"


def report(figures: dict[str, Any]) -> str:
    """What the script prints."""
    low, high = figures["ci"]
    head = Head(**{**figures["head"], "blocks": tuple(figures["head"]["blocks"])})
    ceiling, stranger = figures["ceiling"], figures["accuracy_unseen_raters"]
    best = "unknown: no pair has two votes" if ceiling is None else f"{ceiling:.3f} (raters agree in {figures['agreement']:.3f})"
    new = "unknown" if stranger is None else "{:.3f} [{:.3f}, {:.3f}]".format(stranger["value"], *stranger["ci"])
    excluded = ", ".join(f"{n} {reason}" for reason, n in figures["n_excluded"].items()) or "none"
    lines = [
        f"votes      {figures['n_votes']} on {figures['n_pairs']} pairs of {figures['n_prompts']} prompts; "
        f"{figures['n_ties']} ties, {figures['n_both_bad']} both bad; excluded: {excluded}",
        f"accuracy   {figures['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {figures['n']} single votes on unseen prompts",
        f"strangers  {new} on unseen prompts by unseen raters",
        f"ceiling    {best}",
        f"baseline   {figures['baseline']['value']:.3f} by loudness and length alone",
        f"calibrated {figures['ece']:.3f} expected calibration error at temperature {figures['temperature']:.2f}",
        f"head       {name(head)}, over {figures['features']} features",
        _of_raters(figures),
        *(_of_extra(name, told) for name, told in figures["extras"].items()),
    ]
    frames = figures["frames"]
    if frames["n"]:
        told = (
            "too few"
            if frames["auc"] is None
            else "a marked frame is told from others in {:.3f} [{:.3f}, {:.3f}]".format(frames["auc"], *frames["ci"])
        )
        lines.append(f"marks      on {frames['n']} clips: {told}")
    return "\n".join([*lines, *(f"gate       {gate.line}" for gate in reward_gates.gates(figures))])


def _of_raters(figures: dict[str, Any]) -> str:
    people = figures["raters"]
    silenced = [rater for rater, told in people.items() if told["weight"] < 0.25]
    against = [rater for rater, told in people.items() if told["adversary"] or told.get("against_the_music")]
    done = {"silence": "silenced", "invert": "turned round"}[figures["adversaries"]]
    losses = ", ".join(f"{option} {loss:.4f}" for option, loss in figures["weights_loss"].items())
    return (
        f"raters     {len(people)}, weighed by {figures['weights_by']} (held-out loss: {losses}); "
        f"hardly count: {', '.join(silenced) or '-'}; adversaries, {done}: {', '.join(against) or '-'}"
    )


def _of_extra(name: str, told: dict[str, Any]) -> str:
    if "auc" in told:
        value = "too few" if told["auc"] is None else f"ranked below other votes in {told['auc']:.3f} on unseen prompts"
        return f"both bad   {told['n']} votes: {value}"
    value = "too few" if told["accuracy"] is None else "{:.3f} [{:.3f}, {:.3f}] on unseen prompts".format(told["accuracy"], *told["ci"])
    return f"aspect     {name}, {told['n']} decided pairs: {value}"


# ---- the toy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyBase:
    """A codec alone, for runs that need no base."""

    codec: MagnitudeCodec
    contrastive: None
    sha256: str


def toy_base(seed: int, n_q: int = 2) -> ToyBase:
    """A small codec with random weights and codebooks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = MagnitudeCodec(CodecConfig(width=32, latent_dim=16, encoder_blocks=1, decoder_blocks=1, n_q=n_q, card=32)).eval()
        for k, layer in enumerate(codec.rvq.layers):
            layer._codebook.embed.copy_(torch.randn(layer._codebook.embed.shape) / (k + 1))
    return ToyBase(codec, None, codec.sha256())


def toy_task(cfg: Config, accelerator: Accelerator) -> tuple[Base, Snapshot]:
    """A small random codec, and a snapshot on disk whose raters like clips of low codes: learnable, and nothing
    else."""
    base = toy_base(cfg.seed)
    folder = cfg.out / "toy_snapshot"
    if accelerator.is_main_process:
        write_toy_snapshot(folder, base.sha256, cfg.seed)
    accelerator.wait_for_everyone()
    return base, load_snapshot(folder, base.sha256)


def write_toy_snapshot(folder: Path, base_sha256: str, seed: int, n_prompts: int = 20, n_pairs: int = 120) -> None:
    """Clips of 2 codebooks of 32 by 12 frames, five raters of whom one is careless, two votes a pair.

    The careful ones call two clips of high codes both bad, judge an aspect that follows the codes of the first book, and mark the
    half of a clip that is worse.
    """
    rng = np.random.default_rng(seed)
    (folder / "codes").mkdir(parents=True, exist_ok=True)
    clips: list[dict[str, Any]] = []
    votes: list[dict[str, Any]] = []
    liked: dict[str, float] = {}
    first: dict[str, float] = {}
    worse: dict[str, int] = {}
    for number in range(2 * n_pairs):
        prompt = number // 2 % n_prompts
        codes = rng.binomial(31, rng.uniform(0.3, 0.7), (2, 12)).astype(np.int16)
        sha256 = hashlib.sha256(f"{number}".encode() + codes.tobytes()).hexdigest()
        np.save(folder / "codes" / f"{number}.npy", codes)
        liked[sha256] = -codes.mean() / 4
        first[sha256] = codes[0].mean() / 4  # as the app counts: above 0 where y is better
        worse[sha256] = int(codes[:, 6:].mean() > codes[:, :6].mean())  # which half
        row: dict[str, Any] = {
            "sha256": sha256,
            "codes_uri": f"codes/{number}.npy",
            "prompt_id": f"p{prompt}",
            "prompt": f"toy prompt {prompt}",
        }
        clips.append({**row, "policy_sha256": base_sha256})
    for pair in range(n_pairs):
        x, y = clips[2 * pair], clips[2 * pair + 1]
        for rater in rng.choice(5, 2, replace=False):
            careless = rater == 4
            wish = 0.0 if careless else liked[x["sha256"]] - liked[y["sha256"]]
            choice = X if rng.logistic(0, 0.3) < wish else Y
            aspect = 0 if careless else int(np.clip(np.round(first[x["sha256"]] - first[y["sha256"]]), -2, 2))
            if not careless and max(liked[x["sha256"]], liked[y["sha256"]]) < -4.5:
                choice = BOTH_BAD
            mark = {"side": "y", "t0_ms": 240 * worse[y["sha256"]], "t1_ms": 240 * worse[y["sha256"]] + 240, "tag": "bad"}
            row = {
                "vote_id": len(votes),
                "pair_id": pair,
                "prompt_id": x["prompt_id"],
                "prompt": x["prompt"],
                "split": "train",
                "shown_first": str(rng.choice([X, Y])),
                "aspects": {"musicality": aspect},
                "marks": [] if careless else [mark],
            }
            votes.append({**row, "rater": f"r{rater}", "choice": choice, "clip_x": x["sha256"], "clip_y": y["sha256"]})
    for file, rows in (("votes.jsonl", votes), ("clips.jsonl", clips)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(folder / "snapshot.json", {"name": "toy", "sha256": content_sha256(folder), "n_votes": len(votes)})


if __name__ == "__main__":
    run(script, Config, PRESETS, show=report)
