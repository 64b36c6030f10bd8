"""What a DPO run learns from: rated pairs of a snapshot, bad clips, and prompts that the policy plays for a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.lm import MusicLM, MusicLMConfig
from base_models.policy import load_policy
from rlhf.consistency import asked_of_ears, checks, slopes
from rlhf.ears import ears_of
from rlhf.flat_kto import BadClip, bad_clips
from rlhf.journal import Sound, sound_of
from rlhf.judges import Score
from rlhf.ppo_task import toy_sound
from rlhf.preferences import Preference, load_snapshot, prompt_folds
from rlhf.reward_model import load_reward
from rlhf.rewards import HUMAN, LEAST_LOGITS, Mixed, Part, Reward, parse_weights, weighted
from rlhf.sample_pairs import read_prompts
from rlhf.trusted import Voted, trusted

if TYPE_CHECKING:
    from rlhf.train_dpo import Config


@dataclass(frozen=True)
class OwnTask:
    """What the policy is to play, and who judges it: prompts, one a row of the task's table from `first_row` on; which of them are
    held out."""

    prompts: list[str]
    first_row: int
    held_out: list[int]
    score: Score
    reward_sha256: str | None = None
    ears_sha256: str | None = None


@dataclass(frozen=True)
class Task:
    """What is trained on what: the LM, its prompts as conditions (one row a prompt), the pairs and the row of each."""

    lm: MusicLM
    table: Conditions
    pairs: list[Preference]
    rows: dict[str, int]
    base_sha256: str
    snapshot_sha256: str | None
    own: OwnTask | None = None
    bad: tuple[BadClip, ...] = ()
    """Clips that were called bad without a comparison (read for --loss kto)."""
    frame_rate: float = 25.0
    """Codec frames a second, to find marks."""
    words: tuple[str, ...] = ()
    """The prompts, one a row of the table."""
    sound: Sound | None = None
    """How clips are heard."""
    voted: Voted | None = None
    """Where the pairs come from; None without a snapshot."""

    def row_of(self, pair: Preference) -> int:
        return self.rows[pair.prompt_id]


def load_task(cfg: Config) -> Task:
    """The policy, the pairs of a snapshot and the prompts to play; refuses clips, or a reward, of another base."""
    policy = load_policy(cfg.policy)
    pairs: list[Preference] = []
    snapshot_sha256 = None
    voted = None
    bad: tuple[BadClip, ...] = ()
    if cfg.snapshot is not None:
        snapshot = load_snapshot(cfg.snapshot, policy.sha256)
        voted = trusted(snapshot, cfg.weights_by, policy.lm.n_q, policy.lm.card, cfg.one_rater)
        pairs, snapshot_sha256 = voted.pairs, snapshot.sha256
        bad = bad_clips(snapshot, voted.weights, policy.lm.n_q, policy.lm.card) if cfg.loss == "kto" else ()
    asked = {pair.prompt_id: (pair.prompt, pair.tempo_bpm) for pair in reversed(pairs)}
    asked = {clip.prompt_id: (clip.prompt, clip.tempo_bpm) for clip in bad} | asked
    rows = {prompt_id: row for row, prompt_id in enumerate(asked)}
    words, tempi = [prompt for prompt, _ in asked.values()], [tempo for _, tempo in asked.values()]
    own = None
    if cfg.reward is not None and cfg.prompts is not None:
        prompts = read_prompts(cfg.prompts)
        reward = load_reward(cfg.reward, policy)
        held_out = held_out_prompts([p.prompt_id for p in prompts], cfg.held_out, cfg.seed)
        ears = ears_of(policy)
        found = checks(policy, ears)
        parts = weighted(parse_weights(cfg.weights), reward.judge, found, LEAST_LOGITS)
        judge = Mixed(parts, ({HUMAN: reward.judge_of_slope} if reward.has_slope else {}) | slopes(policy, found), policy.codec.codebooks)
        own = OwnTask([p.prompt for p in prompts], len(words), held_out, judge, reward.sha256, asked_of_ears(ears))
        words, tempi = words + own.prompts, tempi + [p.tempo_bpm for p in prompts]
        snapshot_sha256 = snapshot_sha256 or reward.snapshot_sha256
    table = policy.conditions(words, tempi)
    heard = (policy.codec.frame_rate, tuple(words), sound_of(policy), voted)
    return Task(policy.lm, table, pairs, rows, policy.sha256, snapshot_sha256, own, bad, *heard)


def held_out_prompts(ids: list[str], share: float, seed: int) -> list[int]:
    """Places of the prompts that own clips are measured on and never learnt from: about `share` of them, at least one."""
    if len(ids) < 2:
        raise UserError(f"{len(ids)} prompt to play", "2 or more: some are kept for measuring", "add prompts to --prompts")
    folds = prompt_folds(ids, min(max(2, round(1 / share)), len(ids)) if share else len(ids), seed)
    return [place for place, name in enumerate(ids) if folds[name] == 0]


def toy_task(cfg: Config, n_pairs: int = 64, n_prompts: int = 16, n_frames: int = 12) -> Task:
    """A random policy, and votes for clips whose codes come from the lower half of the codebooks; one pair in eight is a tie.

    With `toy_reward` the policy also plays the prompts, and is judged by the share of its codes in the lower half."""
    seed = cfg.seed
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = MusicLMConfig(n_q=4, card=32, d_model=32, n_layers=2, n_heads=2, d_ff=64, text_dim=16)
        lm = MusicLM(config).eval()
        if cfg.toy_reward:  # fresh heads are almost flat; no adapter on the trunk could sharpen what it plays
            for head in lm.decoder.lm_heads.parameters():
                torch.nn.init.normal_(head, std=0.3)
    text = torch.randn((n_prompts, 6, config.text_dim), generator=generator)
    table = Conditions(text, torch.ones(n_prompts, 6, dtype=torch.bool), torch.full((n_prompts,), float("nan")))
    half, shape = config.card // 2, (n_pairs, config.n_q, n_frames)
    low = torch.randint(0, half, shape, generator=generator).numpy()
    high = torch.randint(half, config.card, shape, generator=generator).numpy()
    pairs = [
        Preference(
            prompt=f"toy prompt {i % n_prompts}",
            tempo_bpm=None,
            chosen_codes=low[i],
            rejected_codes=high[i],
            p=0.5 if i % 8 == 7 else 1.0,
            weight=1.0,
            pair_id=str(i),
            rater="toy",
            prompt_id=str(i % n_prompts),
            chosen_sha256=f"low{i}",
            rejected_sha256=f"high{i}",
        )
        for i in range(n_pairs)
    ]
    own = None
    if cfg.toy_reward:
        held_out = held_out_prompts([str(i) for i in range(n_prompts)], cfg.held_out, seed)

        def score(codes: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return 10 * (codes < half).float().mean((1, 2))

        def slope(codes: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full((len(codes), 1, codes.shape[2]), 10 / codes[0].numel()), score(codes, prompts)

        low_ones = (torch.arange(config.card) < half).float()[None, :, None].expand(config.n_q, -1, -1)
        judge = Mixed(Reward({HUMAN: Part(score)}), {HUMAN: slope}, low_ones)
        own = OwnTask([f"toy prompt {i}" for i in range(n_prompts)], 0, held_out, judge)
    words = tuple(f"toy prompt {i}" for i in range(n_prompts))
    rows = {str(i): i for i in range(n_prompts)}
    return Task(lm, table, pairs, rows, lm.sha256(), None, own, words=words, sound=toy_sound)
