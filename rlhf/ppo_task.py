"""What PPO plays and who judges it: read from a policy, a reward model and files of prompts; or a toy that needs none of them."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.lm import MusicLM, MusicLMConfig
from base_models.policy import Policy, load_policy
from rlhf.consistency import asked_of_ears, checks, slopes
from rlhf.ears import ears_of
from rlhf.journal import Sound, sound_of
from rlhf.judges import Score, Slope
from rlhf.outside_judge import OutsideJudge
from rlhf.reward_features import LATENTS, features
from rlhf.reward_model import RewardModel, load_reward
from rlhf.rewards import HUMAN, LEAST_LOGITS
from rlhf.sample_pairs import read_prompts

Embed = Callable[[Tensor, list[str]], Tensor]
"""codes [B, K, T] and prompts -> features [B, F], in which distance is difference to the ear."""
Frames = Callable[[Tensor, list[str]], Tensor]
"""codes [B, K, T] and prompts -> how good each frame is beside the rest of its clip [B, T], nats, 0 on average."""


@dataclass(frozen=True)
class Prompts:
    """Prompts and their conditions, one row of `table` each."""

    texts: list[str]
    table: Conditions

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """The LM, its prompts, the listeners' score, and the hashes of the parents; what else is known is None or empty where it is not."""

    lm: MusicLM
    prompts: list[str]
    table: Conditions
    """One row a prompt."""
    score: Score | None
    """The part `human` of the reward; None in a run of checks alone."""
    base_sha256: str
    least: float = 0.0
    """The least spread of that score among the base's clips which counts as one (rlhf.rewards.LEAST_LOGITS)."""
    voted: tuple[str, ...] = ()
    """The checks that votes taught too, of which the same holds."""
    reward_sha256: str | None = None
    snapshot_sha256: str | None = None
    ears_sha256: str | None = None
    """The ears that some of the checks ask, and how (rlhf.consistency.asked_of_ears)."""
    checks: Mapping[str, Score] = field(default_factory=dict)
    """The reward's verifiable parts, by name."""
    slopes: Mapping[str, Slope] = field(default_factory=dict)
    """Where each frame should have moved for a part of the reward to rise, for those parts that can say."""
    codebooks: Tensor | None = None
    """What each code adds to the latents [K, V, D]; with `slopes`."""
    spread: Score | None = None
    """How far the reward's members disagree about clips."""
    embed: Embed | None = None
    """Where diversity is measured."""
    sound: Sound | None = None
    """How clips are heard."""
    heldout: Prompts | None = None
    """Prompts that are played to watch the run and never learnt from."""
    frames: Frames | None = None
    """Where each clip is good and bad, where raters marked stretches."""
    frame_slope: Slope | None = None
    """Where each frame should have moved for its stretch to sound better, and `frames`."""
    watched: Score | None = None
    """A judge whose opinion of them is plotted, and that is all."""


def load_task(
    policy_dir: Path,
    reward_dir: Path | None,
    prompts_file: Path | None,
    heldout_file: Path | None = None,
    command: str | None = None,
    listeners: bool = True,
    watch: str | None = None,
) -> Task:
    """The policy, the prompts and the reward model, or a program in its place, that the settings name.

    listeners: whether `human` has a weight; without, neither of the two need be given, and the checks are the whole reward.
    watch: a program whose opinion is only plotted.
    """
    given = (reward_dir is not None) + (command is not None)
    if given > 1 or given < listeners:
        raise UserError(
            f"--reward {reward_dir}, --score-command {command}",
            "one of them",
            "train a reward; or --weights without human, such as mood=1,instrument=1; or --preset smoke",
        )
    if prompts_file is None:
        raise UserError("no --prompts", "a file of prompts to play", "give one; or --preset smoke")
    policy = load_policy(policy_dir)
    prompts = load_prompts(policy, prompts_file)
    reward = None if reward_dir is None else load_reward(reward_dir, policy)

    ears = ears_of(policy)
    found = checks(policy, ears)
    score: Score | None = None if reward is None else reward.judge
    if command is not None:
        score = OutsideJudge(shlex.split(command), policy)

    return Task(
        lm=policy.lm,
        prompts=prompts.texts,
        table=prompts.table,
        score=score,
        base_sha256=policy.sha256,
        least=0.0 if reward is None else LEAST_LOGITS,
        voted=() if reward is None else tuple(reward.extras),
        reward_sha256=None if reward is None else reward.sha256,
        snapshot_sha256=None if reward is None else reward.snapshot_sha256,
        ears_sha256=asked_of_ears(ears),
        checks=found | ({} if reward is None else reward.judges_of_extras()),
        slopes=({HUMAN: reward.judge_of_slope} if reward is not None and reward.has_slope else {}) | slopes(policy, found),
        codebooks=policy.codec.codebooks,
        spread=reward.judge_of_spread if reward is not None and reward.has_spread else None,
        embed=embedding(policy, reward),
        sound=sound_of(policy),
        heldout=None if heldout_file is None else load_prompts(policy, heldout_file),
        frames=None if reward is None or reward.frames is None else reward.per_frame,
        frame_slope=None if reward is None or reward.frames is None else reward.frame_slope,
        watched=None if watch is None else OutsideJudge(shlex.split(watch), policy, "--watch-command"),
    )


def tempi_sha256(*tables: Conditions) -> str | None:
    """What the tempi of prompts are known by, beside the prompts' words; None where none has any."""
    tempi = [table.tempo_bpm.tolist() for table in tables]
    if all(math.isnan(tempo) for rows in tempi for tempo in rows):
        return None
    return hashlib.sha256(repr(tempi).encode()).hexdigest()


def load_prompts(policy: Policy, path: Path) -> Prompts:
    """Prompts of a file (rlhf.sample_pairs.read_prompts) with the policy's conditions."""
    rows = read_prompts(path)
    texts, tempi = [row.prompt for row in rows], [row.tempo_bpm for row in rows]
    return Prompts(texts, policy.conditions(texts, tempi))


def embedding(policy: Policy, reward: RewardModel | None) -> Embed | None:
    """The shared audio-text space where the policy has one (unit vectors), else the reward's statistics of the codec's latents, if any."""
    contrastive = policy.contrastive
    if contrastive is None:
        if reward is None:
            return None
        return lambda codes, prompts: features(reward.base, codes, prompts, [LATENTS])[LATENTS].to(codes.device)
    return lambda codes, prompts: contrastive.embed_codes(codes).to(codes.device)


def toy_task(seed: int, n_prompts: int = 8) -> Task:
    """A random policy of 2 codebooks of 16, paid for the share of code 3 among its codes (at first about 1/16); its checks are the share
    of code 5, asked for by even prompts, and how seldom a code follows itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = MusicLMConfig(n_q=2, card=16, d_model=32, n_layers=2, n_heads=2, d_ff=64, text_dim=16)
        lm = MusicLM(shape).eval()
        for head in lm.decoder.lm_heads.parameters():  # fresh heads are almost flat; no adapter on the trunk could sharpen them
            nn.init.normal_(head, std=0.3)
        text = torch.cat([torch.randn(n_prompts, 4, shape.text_dim), torch.randn(4, 4, shape.text_dim)])
    rows = Conditions(text, torch.ones(n_prompts + 4, 4, dtype=torch.bool), torch.full((n_prompts + 4,), float("nan")))
    texts = [f"toy prompt {i}" for i in range(n_prompts + 4)]
    return Task(
        lm,
        texts[:n_prompts],
        rows.index(range(n_prompts)),
        share_of_code_3,
        lm.sha256(),
        checks={"code_5": share_of_code_5, "movement": movement},
        slopes={HUMAN: slope_of_code_3},
        codebooks=F.one_hot(torch.tensor([3]), lm.card).float()[..., None].expand(lm.n_q, -1, -1),
        spread=lambda codes, prompts: 0.1 + (codes[..., 1:] == codes[..., :-1]).float().mean((1, 2)),
        embed=lambda codes, prompts: F.one_hot(codes, lm.card).float().mean((1, 2)),
        sound=toy_sound,
        heldout=Prompts(texts[n_prompts:], rows.index(range(n_prompts, n_prompts + 4))),
    )


def share_of_code_3(codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """The toy's reward: codes [B, K, T] -> share of the codes that are 3 [B]."""
    return (codes == 3).float().mean((1, 2))


def slope_of_code_3(codes: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Its slope [B, 1, T] along latents that count code 3, and the score."""
    return codes.new_ones((len(codes), 1, codes.shape[2]), dtype=torch.float32) / codes[0].numel(), share_of_code_3(codes, prompts)


def share_of_code_5(codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """codes [B, K, T] -> share of the codes that are 5 [B]; NaN for prompts that end in an odd digit, which do not ask for it."""
    asked = torch.tensor([int(prompt[-1]) % 2 == 0 for prompt in prompts], device=codes.device)
    return torch.where(asked, (codes == 5).float().mean((1, 2)), float("nan"))


def movement(codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """codes [B, K, T] -> share of the codes that differ from the one before [B]."""
    return (codes[..., 1:] != codes[..., :-1]).float().mean((1, 2))


def toy_sound(codes: Tensor) -> tuple[NDArray[np.float32], int]:
    """codes [K, T] -> one sine a frame of 50 ms, the first codebook its pitch: wav [1, L], 8000 Hz."""
    pitch = (200.0 * 2 ** (codes[0].double() / 6)).repeat_interleave(400)
    return (0.3 * torch.sin(2 * torch.pi * pitch.cumsum(0) / 8000))[None].float().cpu().numpy(), 8000
