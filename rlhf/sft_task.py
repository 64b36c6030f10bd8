"""What fine-tuning learns from: winners, as listeners chose them or as the best of n by a reward model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from base_models.checkpoint import read_jsonl
from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.lm import MusicLM, MusicLMConfig
from base_models.policy import load_policy
from rlhf.journal import Sound, sound_of
from rlhf.ppo_task import toy_sound
from rlhf.preferences import codes_sha256, decided, load_snapshot
from rlhf.snapshot import NothingToLearnError
from rlhf.trusted import Voted, trusted

if TYPE_CHECKING:
    from rlhf.train_sft import Config


@dataclass(frozen=True)
class Winner:
    """A clip to learn: codes [K, T] int64; the row of its prompt; its prompt's id; how much it weighs (mean about 1)."""

    codes: Tensor
    row: int
    prompt_id: str
    weight: float


@dataclass(frozen=True)
class Task:
    """What is trained on what."""

    lm: MusicLM
    table: Conditions
    winners: list[Winner]
    base_sha256: str
    snapshot_sha256: str | None = None
    reward_sha256: str | None = None
    words: tuple[str, ...] = ()
    """The prompts, one a row of the table."""
    sound: Sound | None = None
    """How clips are heard."""
    voted: Voted | None = None
    """Where winners were voted; None where they were sampled."""


def load_task(cfg: Config, accelerator: Accelerator) -> Task:
    """Winners of a snapshot, or of a reward model's best of n; refuses clips or rewards of another base."""
    if (cfg.snapshot is None) == (cfg.reward is None and cfg.prompts is None):
        got = f"--snapshot {cfg.snapshot}, --reward {cfg.reward}, --prompts {cfg.prompts}"
        raise UserError(got, "either --snapshot, or --reward and --prompts", "say whose winners; or --preset smoke")
    return voted(cfg, cfg.snapshot) if cfg.snapshot is not None else sampled(cfg, accelerator)


def voted(cfg: Config, folder: Path) -> Task:
    """The clips that listeners chose, each as often as it won."""
    policy = load_policy(cfg.policy)
    snapshot = load_snapshot(folder, policy.sha256)
    told = trusted(snapshot, cfg.weights_by, policy.lm.n_q, policy.lm.card, cfg.one_rater)
    pairs = decided(told.pairs)
    first = {pair.prompt_id: pair for pair in reversed(pairs)}
    table = policy.conditions([p.prompt for p in first.values()], [p.tempo_bpm for p in first.values()])
    rows = {prompt_id: row for row, prompt_id in enumerate(first)}
    winners = [Winner(torch.from_numpy(p.chosen_codes), rows[p.prompt_id], p.prompt_id, p.weight * (2 * p.p - 1)) for p in pairs]
    words = tuple(p.prompt for p in first.values())
    return Task(policy.lm, table, mean_one(winners), policy.sha256, snapshot.sha256, words=words, sound=sound_of(policy), voted=told)


def sampled(cfg: Config, accelerator: Accelerator) -> Task:
    """The best of n clips of each prompt; they are kept in out/winners, and a second call reads them there."""
    from rlhf.best_of_n import asked
    from rlhf.evaluate_models import read_codes
    from rlhf.reward_model import load_reward
    from rlhf.sample_pairs import Settings, read_prompts, sample

    if cfg.reward is None or cfg.prompts is None:
        raise UserError(f"--reward {cfg.reward}, --prompts {cfg.prompts}", "both", "train one with rlhf/train_reward.py")
    policy = load_policy(cfg.policy)
    prompts = read_prompts(cfg.prompts)
    how = Settings(n=cfg.clips_per_prompt, seed=cfg.seed, duration_s=cfg.duration_s)
    with accelerator.main_process_first():
        manifest = sample(policy, prompts, cfg.out / "winners", how, "winners", best=asked(cfg.best_of, cfg.reward, policy))
    rows = read_jsonl(manifest)
    place = {prompt.prompt_id: number for number, prompt in enumerate(prompts)}
    codes = read_codes(manifest, rows)
    winners = [Winner(clip, place[row["prompt_id"]], row["prompt_id"], 1.0) for clip, row in zip(codes, rows)]
    table = policy.conditions([p.prompt for p in prompts], [p.tempo_bpm for p in prompts])
    reward = load_reward(cfg.reward, policy)
    words = tuple(p.prompt for p in prompts)
    return Task(policy.lm, table, winners, policy.sha256, reward.snapshot_sha256, reward.sha256, words, sound_of(policy))


def mean_one(winners: Sequence[Winner]) -> list[Winner]:
    """The same with weights of mean 1."""
    scale = len(winners) / sum(winner.weight for winner in winners)
    return [replace(winner, weight=winner.weight * scale) for winner in winners]


def split(winners: Sequence[Winner], held_out: float, groups: Mapping[str, str]) -> tuple[list[Winner], list[Winner]]:
    """(to learn, to measure) without a common prompt, or group of prompts (of one artist); which ones depends on their ids alone."""
    if not held_out:
        return list(winners), []
    group = {w.prompt_id: groups.get(w.prompt_id, w.prompt_id) for w in winners}
    ids = sorted(set(group.values()), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    kept = set(ids[: max(1, round(held_out * len(ids)))])
    if len(kept) == len(ids):
        got = f"winners of {len(ids)} prompt(s) or artist(s)"
        raise NothingToLearnError(got, "two or more", "collect votes on more, or pass --held-out 0")
    return [w for w in winners if group[w.prompt_id] not in kept], [w for w in winners if group[w.prompt_id] in kept]


def winners_sha256(winners: Sequence[Winner]) -> str:
    """Of those that are learnt, their order and weights: what a resumed run has to find again, or it would measure on what it learnt."""
    return codes_sha256((f"{winner.row}|{winner.weight!r}|", winner.codes.numpy()) for winner in winners)


def toy_task(seed: int, n: int = 64, n_prompts: int = 16, n_frames: int = 12) -> Task:
    """A random policy, and winners whose codes come from the lower half of the codebooks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = MusicLMConfig(n_q=4, card=32, d_model=32, n_layers=2, n_heads=2, d_ff=64, text_dim=16)
        lm = MusicLM(shape).eval()
        for head in lm.decoder.lm_heads.parameters():  # fresh heads are almost flat; no adapter on the trunk could sharpen them
            nn.init.normal_(head, std=0.3)
    text = torch.randn((n_prompts, 6, shape.text_dim), generator=generator)
    table = Conditions(text, torch.ones(n_prompts, 6, dtype=torch.bool), torch.full((n_prompts,), float("nan")))
    codes = torch.randint(0, shape.card // 2, (n, shape.n_q, n_frames), generator=generator)
    winners = [Winner(clip, i % n_prompts, str(i % n_prompts), 1.0) for i, clip in enumerate(codes)]
    words = tuple(f"toy prompt {i}" for i in range(n_prompts))
    return Task(lm, table, winners, lm.sha256(), words=words, sound=toy_sound)
