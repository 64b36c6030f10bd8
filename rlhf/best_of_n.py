"""Best of n: play n clips for each prompt and keep the one that is liked best: by a reward model, or by all that an adapter was trained
for. The rival that any training must beat.

    encore sample --best-of 8 --reward runs/reward --prompts examples/heldout.txt --out runs/best-of-8
    encore evaluate --best-of 8 --reward runs/reward --prompts heldout.jsonl --out runs/compared
    encore sample --best-of 8 --score-command "python my_judge.py" --prompts examples/heldout.txt --out runs/best-of-8
    encore generate "sad piano" --adapter runs/ppo/adapter --best-of 4 --reward runs/reward --out track.wav

    prompts -> n candidates each, codes [B, K, T] -> score [B] -> the best one -> the manifest that any sampling writes

It costs n times the sampling, every time, and no training; it can be had on top of training, from an adapter's clips. How far it moves
from the model that plays is known without measuring:
KL <= log n - (n - 1) / n nats a clip (Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; that it is a bound: Beirami et al. 2024,
arXiv:2401.01879). The candidates have seeds of their own, so that the base's clip of the same row is none of them and a comparison
with it is one of strangers.
"""

from __future__ import annotations

import hashlib
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.library import Manifest
from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.lm import MusicLM
from base_models.pipeline import MusicPipeline, Track, check_request, check_sampling
from base_models.policy import Policy
from base_models.sampling import generate
from rlhf.judges import Score
from rlhf.rewards import parse_weights

MOST = 1024
"""Candidates a clip; log n grows so slowly that more are better spent on training."""


@dataclass(frozen=True)
class BestOf:
    """How the best is chosen: out of how many, by whom."""

    n: int
    score: Score
    reward_sha256: str | None
    command: str | None = None
    """The program that chooses, where no reward model does."""
    weights: Mapping[str, float] | None = None
    """What the parts of the objective weigh, where clips are chosen by what their adapter was trained for (rlhf.objective)."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MOST:
            raise UserError(f"best of {self.n}", f"1 to {MOST} candidates", "pass another --best-of")

    @property
    def chooser(self) -> dict[str, Any]:
        """Who chooses, as clips tell it."""
        if self.command is not None:
            return {"score_command": self.command}
        return {"reward_sha256": self.reward_sha256} | ({} if self.weights is None else {"weights": dict(self.weights)})

    @property
    def by(self) -> str:
        """Who chooses, in words."""
        if self.command is not None:
            return "the program"
        return "the reward alone" if self.weights is None else ", ".join(f"{name} {weight:.3g}" for name, weight in self.weights.items())

    @property
    def kl_bound(self) -> float:
        return kl_bound(self.n)


@dataclass(frozen=True)
class Best:
    """codes [B, K, T]; score [B]; candidate [B] long: which of the n it was; seeds: those of the winners."""

    codes: Tensor
    score: Tensor
    candidate: Tensor
    seeds: list[int]


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: the most that the best of n strays from the policy it is drawn from, nats a clip."""
    return math.log(n) - (n - 1) / n


def candidate_seed(seed: int, candidate: int) -> int:
    """The seed of a row's candidate: a hash of the row's seed, which itself is left to the plain sample."""
    digest = hashlib.sha256(f"{seed}|candidate|{candidate}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def play_best(lm: MusicLM, cond: Conditions, n_frames: int, seeds: Sequence[int], prompts: Sequence[str], best: BestOf, **how: Any) -> Best:
    """Sample `best.n` clips for each of B conditions, keep each row's best. how: temperature, top_k, cfg_coef.

    A score that is not finite never wins; the earlier of two equals does. Memory is that of B clips, whatever n.
    Raises: UserError when no candidate of a row has a finite score.
    """
    codes, top, candidate = None, None, torch.zeros(len(cond), dtype=torch.long)
    kept = list(seeds)
    for number in range(best.n):
        drawn = [candidate_seed(seed, number) for seed in seeds]
        played = generate(lm, cond, n_frames, seeds=drawn, **how).codes
        score = best.score(played, list(prompts)).float().cpu()
        score = torch.where(torch.isfinite(score), score, -math.inf)
        better = score > top if top is not None else torch.ones(len(cond), dtype=torch.bool)
        codes = played if codes is None else torch.where(better.to(played.device)[:, None, None], played, codes)
        top = score if top is None else torch.maximum(top, score)
        candidate[better] = number
        kept = [new if won else old for new, old, won in zip(drawn, kept, better.tolist())]
    assert codes is not None
    assert top is not None
    if not bool(torch.isfinite(top).all()):
        blind = [prompts[row] for row in torch.isinf(top).nonzero()[:, 0].tolist()]
        raise UserError(f"no finite score for any of {best.n} clips of {blind[0]!r}", "a reward that can judge them", "train it again")
    return Best(codes, top, candidate, kept)


def best_track(
    pipeline: MusicPipeline,
    prompt: str,
    duration_s: float,
    seed: int,
    best: BestOf,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    cfg_coef: float = 1.0,
    **how: Any,
) -> tuple[Track, float]:
    """The best of n tracks, and its score. Its seed is the candidate's own, by which `pipeline.generate` plays it again without a reward
    model; the candidates' seeds follow from `seed`. how: sample_rate, stereo. Raises UserError for what the pipeline would refuse."""
    text, policy = check_request(prompt, duration_s, seed), pipeline.policy
    check_sampling(temperature, top_k, cfg_coef, policy.lm.card)
    drawn = {"temperature": temperature, "top_k": top_k, "cfg_coef": cfg_coef}
    won = play_best(policy.lm, policy.conditions([text], [None]), policy.n_frames(duration_s), [seed], [text], best, **drawn)
    return pipeline.finish(won.codes, text, won.seeds[0], **how), float(won.score[0])


def asked(
    n: int,
    reward_dir: str | Path | None,
    policy: Policy,
    command: str | None = None,
    manifests: Sequence[Manifest] = (),
    choose_by: str | None = None,
) -> BestOf | None:
    """What the command line's `--best-of`, `--reward`, `--score-command` and `--choose-by` ask for; None where none of them was given.

    The judge is a reward model's folder on the policy that plays, or a program (rlhf.outside_judge). manifests: of the adapters that the
    policy carries. Where the reward model trained the only one of them, clips are chosen by all that it was trained for, and not by the
    listeners' part alone: that may be against the prompt (docs/proof-history.md). choose_by: weights of the parts, instead of the run's.
    Raises UserError for a reward of another base, for none or two judges, and for weights without an adapter that has scales for them.
    """
    if (n, reward_dir, command, choose_by) == (1, None, None, None):
        return None
    from rlhf.objective import objective_of
    from rlhf.outside_judge import OutsideJudge
    from rlhf.reward_gates import doubt
    from rlhf.reward_model import load_reward

    weights = None if choose_by is None else parse_weights(choose_by)
    if weights is not None and command is not None:
        raise UserError("--choose-by with --score-command", "one of them", "a program chooses by itself: leave out --choose-by")
    if weights is not None and reward_dir is None:
        raise UserError("--choose-by without --reward", "the reward model that trained the adapter", "give --best-of N --reward DIR")
    if (reward_dir is None) == (command is None):
        got = f"--best-of {n} without --reward or --score-command" if command is None else "--reward and --score-command"
        raise UserError(got, "one of them: the folder of a reward model, or a program", "train a reward with rlhf/train_reward.py")
    if command is not None:
        return BestOf(n, OutsideJudge(shlex.split(command), policy), None, command)
    assert reward_dir is not None
    reward = load_reward(reward_dir, policy)
    if doubted := doubt(Path(reward_dir)):
        print(f"{doubted}; the best of {n} is one by chance", file=sys.stderr, flush=True)
    objective = objective_of(policy, reward, manifests, weights)
    if objective is None:
        return BestOf(n, reward.score, reward.sha256)
    return BestOf(n, objective, reward.sha256, weights=objective.weights)
