"""One round of play: prompts -> codes [B, K, T] -> log-probs, values, score -> rewards [B, S].

A step is an action: the K codes of a pattern step are drawn together, so their log-probs add and everything here is [B, S].
Three of the four roles share one network. The *policy* is the language model with its adapter; the *reference* is the same
model with the adapter switched off; the *critic* is a small head on the policy's trunk states, which the sampler returns for
nothing, so old log-probs and values cost no extra pass. Only the reward is a second network.

Sampling and scoring use one distribution: temperature and guidance enter `generate` and `score_steps` alike, and there is no
top-k, under which an action of the old policy could become impossible for the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.lora import adapter_disabled
from base_models.conditions import Conditions
from base_models.lm import MusicLM, sum_by_step
from base_models.patterns import delay_mask
from base_models.sampling import generate
from base_models.sharding import gathered
from rlhf.controllers import RewardNormalizer
from rlhf.losses import entropy, kl_k1


@dataclass(frozen=True)
class Rollout:
    """What a batch of clips is to PPO.

    codes [B, K, T] int64; prompt_ids [B] int64, rows of the run's prompts; mask [B, S], True where a step counts;
    logps (of the policy that played), ref_logps, values, rewards [B, S]; book_kl [B, K], each codebook's share of the clip's
    log-ratio; marks [B, P] of the reward's parts (P = 0 until it was asked); slope [B, D, T] of the score along the codec's latents
    (of the total and perhaps of the frames, [B, 1 or 2, D, T], until it was judged; D = 0 where credit is not given code by code);
    frames [B, S], what a step's frames are worth beside the rest of the clip, in nats, 0 where nobody asked; score [B] as
    judged, NaN until `judge`. choice_logps, choice_ref_logps [b, K, T, V]: log-probs of every code that could have stood there, of the
    policy that played and of the reference (V = 0 unless credit is given code by code): as large as all else together, so they
    stay with the process that played the clips, and b are its own.
    """

    codes: Tensor
    prompt_ids: Tensor
    mask: Tensor
    logps: Tensor
    ref_logps: Tensor
    values: Tensor
    book_kl: Tensor
    marks: Tensor
    slope: Tensor
    frames: Tensor
    score: Tensor
    rewards: Tensor
    choice_logps: Tensor
    choice_ref_logps: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Rollout:
        """The same with every tensor passed through a function (index rows, move to a device)."""
        return Rollout(**{f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def gathered(self, gather: Callable[[Tensor], Tensor]) -> Rollout:
        """All processes' clips, by a function that gathers a tensor over them; the choices are this process's own as before.

        What has no elements is not gathered: on GPUs accelerate (1.15) ends in a `view` that cannot tell its rows.
        """
        own = {"choice_logps": self.choice_logps, "choice_ref_logps": self.choice_ref_logps}
        nothing = {name: tensor[..., :0] for name, tensor in own.items()}
        codes = gather(self.codes)

        def of_all(x: Tensor) -> Tensor:
            return gather(x) if x.numel() else x.new_empty((len(codes), *x.shape[1:]))

        return dataclasses.replace(dataclasses.replace(self, **nothing).map(of_all), codes=codes, **own)


class Critic(nn.Module):
    """Trunk states [B, S, d] -> values [B, S]: what score and KL are still to come, seen before step s is drawn.

    The trunk is read detached: with a fresh head the value loss is far larger than the policy's, and through a low-rank adapter
    it would move the music before it can judge it. The last layer starts at zero, so the first advantages are the plain returns.
    """

    def __init__(self, d_model: int, width: int = 256) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, width), nn.GELU())
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        values: Tensor = self.head(self.trunk(hidden.detach().float()))
        return values[..., 0]


# ---- whose turn it is ------------------------------------------------------------------------------------------------


def sample_seed(seed: int, index: int) -> int:
    """The seed of the run's index-th clip (splitmix64), so that seeds depend on neither rank, batch size nor resumption."""
    bits = (1 << 64) - 1
    z = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & bits
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & bits
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & bits
    return (z ^ (z >> 31)) >> 1


def look_seed(seed: int, lot: int, number: int = 0) -> int:
    """What the seeds of a look's clips are drawn from: a lot beside the run's own. number: of a look of the base with other seeds than all
    looks have."""
    return seed ^ lot ^ number << 32


def prompt_of(indices: Sequence[int], n_prompts: int, samples_per_prompt: int, seed: int) -> list[int]:
    """Which prompt the clips of these global indices answer: groups of `samples_per_prompt`, reshuffled every round."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for index in indices:
        round_, place = divmod(index // samples_per_prompt, n_prompts)
        if round_ not in orders:
            generator = torch.Generator().manual_seed(sample_seed(seed ^ 0x5EED, round_))
            orders[round_] = torch.randperm(n_prompts, generator=generator).tolist()
        chosen.append(orders[round_][place])
    return chosen


# ---- scoring under teacher forcing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepScores:
    """logps [B, S] in nats; hidden [B, S, d]; entropy [B, S] in nats, zeros unless it was asked for."""

    logps: Tensor
    hidden: Tensor
    entropy: Tensor


def code_logits(
    lm: MusicLM, codes: Tensor, cond: Conditions, *, temperature: float = 1.0, cfg_coef: float = 1.0, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """codes [B, K, T] -> logits [B, K, T, V] in float32 of the distribution that `generate` samples with these settings, and the trunk
    states [B, S, d]. bf16: matrix products in bfloat16."""
    with torch.autocast(codes.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
        hidden = lm.hidden(codes, cond)
        logits = lm.aligned(hidden)
        if cfg_coef != 1.0:
            null = lm.aligned(lm.hidden(codes, cond.null()))
            logits = null + cfg_coef * (logits - null)
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature, hidden


def score_steps(
    lm: MusicLM,
    codes: Tensor,
    cond: Conditions,
    *,
    temperature: float = 1.0,
    cfg_coef: float = 1.0,
    bf16: bool = False,
    with_entropy: bool = False,
) -> StepScores:
    """Log-prob of each pattern step of codes [B, K, T] under the distribution that `generate` samples with these settings.

    Sums run over the codes that stand at a step; the delay pattern's fillers add nothing. bf16: matrix products in bfloat16,
    the log-softmax always in float32.
    """
    logits, hidden = code_logits(lm, codes, cond, temperature=temperature, cfg_coef=cfg_coef, bf16=bf16)
    picked = -F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none").view_as(codes)
    logps = sum_by_step(picked)
    spread = sum_by_step(entropy(logits)) if with_entropy else torch.zeros_like(logps)
    return StepScores(logps, hidden, spread)


# ---- play and judge --------------------------------------------------------------------------------------------------


@torch.no_grad()
def play(
    lm: MusicLM,
    critic: Critic,
    cond: Conditions,
    prompt_ids: Sequence[int],
    seeds: Sequence[int],
    n_frames: int,
    *,
    temperature: float = 1.0,
    cfg_coef: float = 1.0,
    with_choices: bool = False,
) -> Rollout:
    """Sample one clip for each of the B conditions and note what policy, reference and critic think of each step.

    The policy's log-probs are the sampler's own, in float32, and so are the reference's: KL is never rounding. Under bf16 those of the
    learner differ from them by rounding (measured on the shipped base, 16 clips of 100 frames: .023 nats rms a step, .09 at most), far
    below the clip range; one more pass would only make the figure tidier.

    Args: cond: B conditions. prompt_ids, seeds: one a row. with_choices: note what they think of every choice, too.
    Returns: a Rollout that `judge` has still to complete (score NaN, rewards 0).
    """
    device = next(lm.parameters()).device
    cond = cond.to(device)
    with gathered(lm):
        made = generate(lm, cond, n_frames, seeds=seeds, temperature=temperature, cfg_coef=cfg_coef, with_choices=with_choices)
    with adapter_disabled(lm):
        ref, _ = code_logits(lm, made.codes, cond, temperature=temperature, cfg_coef=cfg_coef)
    for clip in ref:  # one by one, so that what is needed in between stays in the cache
        clip.copy_(clip.log_softmax(-1))
    ref_code_logps = ref.gather(-1, made.codes[..., None])[..., 0]
    mask = delay_mask(lm.n_q, n_frames, device).any(0).expand_as(made.logps)
    return Rollout(
        codes=made.codes,
        prompt_ids=torch.as_tensor(prompt_ids, device=device),
        mask=mask.clone(),
        logps=made.logps,
        ref_logps=sum_by_step(ref_code_logps),
        values=critic(made.hidden),
        book_kl=kl_k1(made.code_logps, ref_code_logps).sum(-1),
        marks=made.logps.new_zeros((len(cond), 0)),
        slope=made.logps.new_zeros((len(cond), 0, n_frames)),
        frames=torch.zeros_like(made.logps),
        score=torch.full((len(cond),), float("nan"), device=device),
        rewards=torch.zeros_like(made.logps),
        choice_logps=made.choice_logps,
        choice_ref_logps=ref if with_choices else made.choice_logps,
    )


def frames_on_steps(frames: Tensor, n_q: int) -> Tensor:
    """frames [B, T] -> [B, S]: each frame's worth in equal parts on the K steps that play its codes; a clip's sum stays what it was."""
    return sum_by_step((frames / n_q)[:, None].expand(-1, n_q, -1))


def add_score_once(rewards: Tensor, score: Tensor, mask: Tensor) -> Tensor:
    """rewards [B, S] with score [B] added on each row's last valid step. The place comes from the mask, never from a token id."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, steps, -1).max(1).values
    here = (steps[None] == last[:, None]) & mask
    return torch.where(here, rewards + score[:, None], rewards)


def judge(rollout: Rollout, score: Tensor, normalizer: RewardNormalizer, kl_coef: float) -> Rollout:
    """Complete a (global) rollout: r_s = -kl_coef * (log pi - log ref)_s, plus the normalised score on the last step.

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2, with k1 step by step. Rows whose score is not finite are masked out entirely
    and do not touch the normaliser; the caller reports them.
    """
    assert score.shape == rollout.score.shape, f"expected {tuple(rollout.score.shape)}, got {tuple(score.shape)}"
    normalizer.update(score)
    finite = torch.isfinite(score)
    mask = rollout.mask & finite[:, None]
    price = -kl_coef * kl_k1(rollout.logps, rollout.ref_logps)
    normal = torch.where(finite, normalizer(score), torch.zeros_like(score)).to(price.dtype)
    rewards = torch.where(mask, add_score_once(price, normal, mask), torch.zeros_like(price))
    return dataclasses.replace(rollout, mask=mask, score=score, rewards=rewards)
