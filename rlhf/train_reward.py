"""A reward model from a frozen snapshot of votes, with an honest account of how well it predicts votes on prompts it
has not seen.

    accelerate launch rlhf/train_reward.py --snapshot runs/snapshots/first --policy base_models/pretrained --out
    runs/reward python rlhf/train_reward.py --preset smoke                    # a toy codec and made-up votes, under a
    minute torchrun --nproc-per-node 2 rlhf/train_reward.py ...          # the same result, bit for bit

    votes -> raters' reliability -> pairs -> blocks of frozen features [N, F] -> five folds by prompt -> head chosen, calibrated,
    judged -> ensemble on all pairs -> reward folder

Every figure comes from pairs whose *prompts* the fitted heads have never met: five folds by prompt; in each, the kind
of head is chosen by folds inside the training part. The model that is saved is then fitted on everything, which can
only help it. Accuracy is told against single votes, beside the ceiling that the raters' own disagreement sets, and
beside a model that hears only loudness and length.

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
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from base_models.checkpoint import write_json
from base_models.codec import CodecConfig, MagnitudeCodec
from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from base_models.settings import run, to_mapping
from rlhf import metrics, raters
from rlhf.preferences import (
    TIE,
    Preference,
    Snapshot,
    X,
    Y,
    both_bad,
    content_sha256,
    load_snapshot,
    prompt_folds,
    shuffled,
    training_pairs,
)
from rlhf.reward_model import (
    Base,
    Head,
    Pairs,
    RewardModel,
    Share,
    Table,
    best_temperature,
    blocks_of,
    candidates,
    expand,
    features,
    fit,
    fit_ensemble,
    log_loss,
    loudness_and_length,
    make_lens,
    pessimistic,
)


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
    reliability: bool = True
    """Weigh votes by how reliable their raters are; else all count alike."""
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
    quality = raters.reliability(snapshot.votes)
    trusted = raters.weights(quality) if cfg.reliability else None
    truth = training_pairs(snapshot, trusted, n_q=base.codec.n_q, card=base.codec.card)
    learnt = shuffled(truth, cfg.seed) if cfg.shuffle_labels else truth

    # 2. Features of every clip, once.
    clips = Clips(truth)
    table = clips.table(base, share, progress=accelerator.is_main_process)
    lenses = {head: make_lens(head, table, clips.prompt) for head in candidates(blocks_of(base))}
    inputs = {head: expand(lens, head, table) for head, lens in lenses.items()}
    pairs, true_pairs = clips.pairs(learnt), clips.pairs(truth)

    # 3. Judge by folds of prompts: every margin comes from heads that never met the pair's prompt.
    fold = clips.folds(truth, cfg)
    losses, chosen = choose_heads(inputs, pairs, fold, cfg, share)
    margin = unseen_margins(inputs, pairs, true_pairs, fold, chosen, cfg, share)
    baseline = baseline_margins(base, clips, pairs, true_pairs, fold, cfg, share)
    head = min(losses, key=lambda option: losses[option])

    # 4. Learn from everything.
    members, offsets = fit_ensemble(head, inputs[head], pairs, cfg.members, cfg.seed, share)
    temperature = best_temperature(margin, pairs)
    model = RewardModel(base, head, lenses[head], members, offsets, cfg.lam, temperature)
    model.snapshot_sha256 = snapshot.sha256

    # 5. Tell.
    calibrated = cross_calibrated(margin, pairs, fold, cfg.folds)
    figures = {
        **judgement(snapshot, truth, true_pairs, margin.numpy(), calibrated.numpy(), baseline.numpy(), cfg.seed),
        "head": asdict(head),
        "held_out_loss": {name(option): round(loss, 4) for option, loss in losses.items()},
        "temperature": temperature,
        "features": lenses[head].mean.numel(),
        "raters": {rater: asdict(q) for rater, q in quality.items()},
        "snapshot_sha256": snapshot.sha256,
        "reward_sha256": model.sha256,
        "base_sha256": base.sha256,
        "shuffled_labels": cfg.shuffle_labels,
        "processes": accelerator.num_processes,
        "seconds": round(time.monotonic() - began, 1),
    }
    if accelerator.is_main_process:
        model.save(cfg.out)
        write_json(cfg.out / "config.json", to_mapping(cfg))
        write_json(cfg.out / "figures.json", figures)
    accelerator.wait_for_everyone()
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


class Clips:
    """The clips that pairs are about, as rows of a table in the order of their hashes."""

    def __init__(self, preferences: Sequence[Preference]) -> None:
        known = {p.chosen_sha256: (p.chosen_codes, p) for p in preferences}
        known |= {p.rejected_sha256: (p.rejected_codes, p) for p in preferences}
        self.row = {sha256: index for index, sha256 in enumerate(sorted(known))}
        ordered = [known[sha256] for sha256 in self.row]
        self.codes = [torch.from_numpy(codes)[None] for codes, _ in ordered]
        self.prompts = [p.prompt for _, p in ordered]
        ids = sorted({p.prompt_id for p in preferences})
        self.prompt_number = {prompt_id: index for index, prompt_id in enumerate(ids)}
        self.prompt = torch.tensor([self.prompt_number[p.prompt_id] for _, p in ordered])

    def table(self, base: Base, share: Share, progress: bool) -> Table:
        """The frozen features of all clips: blocks [N, F]."""
        bar = tqdm(total=len(self.codes), desc="features", unit="clip", disable=not progress, dynamic_ncols=True)
        width: dict[str, int] = {}

        def job(index: int) -> Tensor:
            bar.update()
            made = features(base, self.codes[index], [self.prompts[index]])
            width.update({block: rows.shape[1] for block, rows in made.items()})
            return torch.cat([rows[0] for rows in made.values()])

        with bar:
            whole = share(len(self.codes), job)
        return dict(zip(width, whole.split(list(width.values()), dim=1)))

    def pairs(self, preferences: Sequence[Preference]) -> Pairs:
        return Pairs(
            chosen=torch.tensor([self.row[p.chosen_sha256] for p in preferences]),
            rejected=torch.tensor([self.row[p.rejected_sha256] for p in preferences]),
            p=torch.tensor([p.p for p in preferences], dtype=torch.float32),
            weight=torch.tensor([p.weight for p in preferences], dtype=torch.float32),
            prompt=torch.tensor([self.prompt_number[p.prompt_id] for p in preferences]),
        )

    def folds(self, preferences: Sequence[Preference], cfg: Config) -> Tensor:
        """[N]: the fold of each pair, by its prompt."""
        fold = prompt_folds(self.prompt_number, cfg.folds, cfg.seed)
        return torch.tensor([fold[p.prompt_id] for p in preferences])


def choose_heads(
    inputs: Mapping[Head, Tensor], pairs: Pairs, fold: Tensor, cfg: Config, share: Share
) -> tuple[dict[Head, float], list[Head]]:
    """Held-out loss of every candidate over all folds, and for each fold the head that is best on the *other* folds.

    For fold f the candidates are compared on folds g != f with heads that have seen neither f nor g: fold f has no say in its own
    head. Args: inputs: what each head is linear in [N, P]."""
    outs: list[tuple[int, ...]] = [(f,) for f in range(cfg.folds)] + list(combinations(range(cfg.folds), 2))
    jobs = [(head, out) for head in inputs for out in outs]

    def job(index: int) -> Tensor:
        head, out = jobs[index]
        seen = ~torch.isin(fold, torch.tensor(out))
        score = inputs[head] @ fit(head, inputs[head], pairs.index(seen))
        return score[pairs.chosen] - score[pairs.rejected]

    margins = dict(zip(jobs, share(len(jobs), job)))

    def loss(head: Head, out: tuple[int, ...], on: int) -> float:
        rows = fold == on
        return log_loss(margins[head, out][rows], pairs.index(rows)) if bool(rows.any()) else 0.0

    size = [float(pairs.weight[fold == f].sum()) for f in range(cfg.folds)]
    total = {head: sum(size[f] * loss(head, (f,), f) for f in range(cfg.folds)) / sum(size) for head in inputs}
    chosen = []
    for f in range(cfg.folds):
        others = [g for g in range(cfg.folds) if g != f]
        inner = {head: sum(size[g] * loss(head, (min(f, g), max(f, g)), g) for g in others) for head in inputs}
        chosen.append(min(inner, key=lambda head: inner[head]))
    return total, chosen


def unseen_margins(
    inputs: Mapping[Head, Tensor], pairs: Pairs, true_pairs: Pairs, fold: Tensor, chosen: list[Head], cfg: Config, share: Share
) -> Tensor:
    """score(chosen) - score(rejected) [N] in the order of `true_pairs`, by ensembles that never met the pair's prompt."""
    margin = torch.zeros(len(pairs))
    for f, head in enumerate(chosen):
        held = fold == f
        members, offsets = fit_ensemble(head, inputs[head], pairs.index(~held), cfg.members, cfg.seed + f + 1, share)
        score = pessimistic(members @ inputs[head].T - offsets[:, None], cfg.lam)
        margin[held] = (score[true_pairs.chosen] - score[true_pairs.rejected])[held]
    return margin


def baseline_margins(base: Base, clips: Clips, pairs: Pairs, true_pairs: Pairs, fold: Tensor, cfg: Config, share: Share) -> Tensor:
    """The same for a Gaussian process over loudness and length: what needs no ear."""
    table = {"loudness": share(len(clips.codes), lambda index: loudness_and_length(base, clips.codes[index])[0])}
    head = Head("kernel", ("loudness",), 1.0)
    inputs = expand(make_lens(head, table, clips.prompt), head, table)
    margin = torch.zeros(len(pairs))
    for f in range(cfg.folds):
        held = fold == f
        score = inputs @ fit(head, inputs, pairs.index(~held))
        margin[held] = (score[true_pairs.chosen] - score[true_pairs.rejected])[held]
    return margin


def cross_calibrated(margin: Tensor, pairs: Pairs, fold: Tensor, n_folds: int) -> Tensor:
    """Margins divided by a temperature from the other folds [N], so that the calibration error is not told on its own
    fit."""
    result = torch.empty_like(margin)
    for f in range(n_folds):
        held = fold == f
        result[held] = margin[held] / best_temperature(margin[~held], pairs.index(~held))
    return result


def judgement(
    snapshot: Snapshot,
    truth: Sequence[Preference],
    pairs: Pairs,
    margin: np.ndarray,
    calibrated: np.ndarray,
    baseline: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """How far unseen margins agree with the votes, with intervals by prompt, the raters' ceiling and what was left
    out."""
    place = {p.pair_id: index for index, p in enumerate(truth)}
    votes = [v for v in snapshot.votes if v.choice in (X, Y) and not v.gold and v.pair_id in place]
    sign, rows, prompts = [], [], []
    for vote in votes:
        index = place[vote.pair_id]
        named = vote.clip_x if vote.choice == X else vote.clip_y
        sign.append(1.0 if named == truth[index].chosen_sha256 else -1.0)
        rows.append(index)
        prompts.append(vote.prompt_id)
    by_vote = metrics.accuracy(np.array(sign) * margin[rows], prompts, seed=seed)
    plain = metrics.accuracy(np.array(sign) * baseline[rows], prompts, seed=seed)
    pair_prompts = [p.prompt_id for p in truth]
    p, weight = pairs.p.numpy(), pairs.weight.numpy()
    by_pair = metrics.accuracy(margin, pair_prompts, p, seed) if (p != 0.5).any() else None
    agreed = raters.agreement(snapshot.votes, seed=seed)
    choices = Counter(vote.choice for vote in snapshot.votes)
    return {
        "accuracy": by_vote.value,
        "ci": list(by_vote.ci),
        "n": by_vote.n,
        "n_prompts": by_vote.n_clusters,
        "ceiling": None if agreed is None else agreed.ceiling,
        "ceiling_ci": None if agreed is None else list(agreed.ci),
        "agreement": None if agreed is None else agreed.rate,
        "accuracy_majority": None if by_pair is None else by_pair.as_json(),
        "baseline": plain.as_json(),
        "ece": metrics.pair_calibration_error(calibrated, p, weight),
        "n_votes": len(snapshot.votes),
        "n_pairs": len(truth),
        "n_ties": choices[TIE],
        "n_both_bad": len(both_bad(snapshot)),
        "n_excluded": dict(snapshot.n_excluded),
    }


def name(head: Head) -> str:
    reach = f", length {head.length:g}" if head.kind == "kernel" else ""
    return f"{head.kind} on {' + '.join(head.blocks)}{reach}, prior {head.prior:g}"


def report(figures: dict[str, Any]) -> str:
    """What the script prints."""
    low, high = figures["ci"]
    head = Head(**{**figures["head"], "blocks": tuple(figures["head"]["blocks"])})
    ceiling = figures["ceiling"]
    best = "unknown: no pair has two votes" if ceiling is None else f"{ceiling:.3f} (raters agree in {figures['agreement']:.3f})"
    excluded = ", ".join(f"{n} {reason}" for reason, n in figures["n_excluded"].items()) or "none"
    silenced = [rater for rater, q in figures["raters"].items() if q["weight"] < 0.25]
    lines = [
        f"votes      {figures['n_votes']} on {figures['n_pairs']} pairs of {figures['n_prompts']} prompts; "
        f"{figures['n_ties']} ties, {figures['n_both_bad']} both bad; excluded: {excluded}",
        f"accuracy   {figures['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {figures['n']} single votes on unseen prompts",
        f"ceiling    {best}",
        f"baseline   {figures['baseline']['value']:.3f} by loudness and length alone",
        f"calibrated {figures['ece']:.3f} expected calibration error at temperature {figures['temperature']:.2f}",
        f"head       {name(head)}, over {figures['features']} features",
        f"raters     {len(figures['raters'])}, of whom {len(silenced)} hardly count: {', '.join(silenced) or '-'}",
    ]
    return "\n".join(lines)


# ---- the toy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyBase:
    """A codec alone, for runs that need no base."""

    codec: MagnitudeCodec
    contrastive: None
    sha256: str


def toy_task(cfg: Config, accelerator: Accelerator) -> tuple[Base, Snapshot]:
    """A small random codec, and a snapshot on disk whose raters like clips of low codes: learnable, and nothing
    else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        codec = MagnitudeCodec(CodecConfig(width=32, latent_dim=16, encoder_blocks=1, decoder_blocks=1, n_q=2, card=32)).eval()
        for k, layer in enumerate(codec.rvq.layers):
            layer._codebook.embed.copy_(torch.randn(layer._codebook.embed.shape) / (k + 1))
    base = ToyBase(codec, None, codec.sha256())
    folder = cfg.out / "toy_snapshot"
    if accelerator.is_main_process:
        write_toy_snapshot(folder, base.sha256, cfg.seed)
    accelerator.wait_for_everyone()
    return base, load_snapshot(folder, base.sha256)


def write_toy_snapshot(folder: Path, base_sha256: str, seed: int, n_prompts: int = 20, n_pairs: int = 120) -> None:
    """Clips of 2 codebooks of 32 by 12 frames, five raters of whom one is careless, two votes a pair."""
    rng = np.random.default_rng(seed)
    (folder / "codes").mkdir(parents=True, exist_ok=True)
    clips: list[dict[str, Any]] = []
    votes: list[dict[str, Any]] = []
    liked: dict[str, float] = {}
    for number in range(2 * n_pairs):
        prompt = number // 2 % n_prompts
        codes = rng.binomial(31, rng.uniform(0.3, 0.7), (2, 12)).astype(np.int16)
        sha256 = hashlib.sha256(f"{number}".encode() + codes.tobytes()).hexdigest()
        np.save(folder / "codes" / f"{number}.npy", codes)
        liked[sha256] = -codes.mean() / 4
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
            wish = 0.0 if rater == 4 else liked[x["sha256"]] - liked[y["sha256"]]
            choice = X if rng.logistic(0, 0.3) < wish else Y
            row = {
                "vote_id": len(votes),
                "pair_id": pair,
                "prompt_id": x["prompt_id"],
                "prompt": x["prompt"],
                "split": "train",
            }
            votes.append({**row, "rater": f"r{rater}", "choice": choice, "clip_x": x["sha256"], "clip_y": y["sha256"]})
    for file, rows in (("votes.jsonl", votes), ("clips.jsonl", clips)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(folder / "snapshot.json", {"name": "toy", "sha256": content_sha256(folder), "n_votes": len(votes)})


if __name__ == "__main__":
    run(main, Config, PRESETS, show=report)
