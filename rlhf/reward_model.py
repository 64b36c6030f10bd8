"""Codes -> how much the raters would like the clip: frozen features, a small head, an ensemble that knows what it does not know.

    codes [B, K, T] -> blocks of frozen features [B, F] -> standardise within prompts -> E heads
                    -> (mean - lam * spread) / temperature [B]

A few hundred votes cannot teach a network to listen, so nothing that listens is trained here: the features are descriptors and
statistics of the magnitudes that the codec is about to play (where the codec is ours), statistics of its latents, and the shared
audio-text space (base_models.contrastive). What learns is a head: a linear one; a Gaussian process over the features, whose score
returns to the mean where no clip has been heard (Chu and Ghahramani 2005, "Preference learning with Gaussian processes", ICML; its
posterior mode); or a relevance head, which thinks that a taste is a sum of bumps in a few of the features and finds out which.
Which blocks and which head is settled by held-out votes. Five heads see bootstraps of the prompts; where they disagree,
lam makes the score cautious, which keeps a policy from walking where no vote has been (Coste et al. 2024, arXiv:2310.02743).

Deliberately not here: the taste of any rater, or a waveform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from base_models.checkpoint import load_tensors, read_json, save_tensors, tensors_sha256, write_json
from base_models.codec import Codec, MagnitudeCodec
from base_models.errors import UserError
from rlhf.descriptors import describe
from rlhf.losses import bradley_terry_loss
from rlhf.token_reward import lm_statistics

if TYPE_CHECKING:
    from rlhf.frame_reward import FrameHead

REACH = 4.0
"""Features are cut off at so many spreads within a prompt: no score runs away where no clip has been heard."""
LANDMARKS = 1024
"""A Gaussian process is spanned by at most so many clips (Williams and Seeger 2001, "Using the Nystroem method"); fewer are exact."""
PARTS = 256
"""Columns of a relevance head's kernel part; the strongest directions of the process, the rest is not missed."""
ROUNDS, FLOOR = 3, 0.07
"""Rounds of reweighting by relevance, and what the least relevant feature keeps of the most relevant one's prior."""
LATENTS, MAGNITUDES, DESCRIPTORS, SHARED, FIT = "latents", "magnitudes", "descriptors", "shared", "fit"
STATES = "states"
"""What the base's own language model makes of a clip (rlhf.token_reward); read only where `--trunk` asks for it."""
Table = Mapping[str, Tensor]
"""Blocks of features by name, [N, F] each."""


class Base(Protocol):
    """What of a policy the reward reads (base_models.policy.Policy has it)."""

    @property
    def codec(self) -> Codec: ...
    @property
    def contrastive(self) -> Any: ...
    @property
    def sha256(self) -> str: ...


# ---- features --------------------------------------------------------------------------------------------------------


def over_time(series: Tensor) -> Tensor:
    """[B, D, T] -> [B, 3 D]: mean, spread and mean absolute step over time."""
    step = series[..., 1:] - series[..., :-1] if series.shape[-1] > 1 else torch.zeros_like(series)
    return torch.cat([series.mean(-1), series.std(-1, correction=0), step.abs().mean(-1)], dim=1)


def magnitude_statistics(magnitude: Tensor, n_bands: int = 24) -> Tensor:
    """Magnitudes [B, N, n_bins] -> [B, F]: log energies in bands, their movement, how often something is struck, and
    noisiness.

    All statistics forget *when* things happen: whether attacks keep a beat cannot be seen here.
    """
    power = magnitude.square()
    bins = power.shape[-1]
    edges = torch.logspace(torch.log10(torch.tensor(2.0)), torch.log10(torch.tensor(float(bins))), n_bands + 1).round().long()
    edges = torch.unique(edges)
    bands = torch.stack([torch.log10(power[..., a:b].mean(-1) + 1e-6) for a, b in pairwise(edges.tolist())], dim=1)
    rise = (bands[..., 1:] - bands[..., :-1]).clamp_min(0)
    flux = rise.mean(1)
    level = torch.log10(power.sum(-1) + 1e-5)
    flatness = torch.log10(power[..., 2:] + 1e-7).mean(-1) - torch.log10(power[..., 2:].mean(-1) + 1e-7)

    def quantiles(series: Tensor, *at: float) -> Tensor:
        return torch.quantile(series, torch.tensor(at, device=series.device), dim=1).T

    middle = flux[:, 1:-1]
    struck = (middle > flux[:, 2:]) & (middle >= flux[:, :-2]) & (middle > (flux.mean(1) + flux.std(1))[:, None])
    return torch.cat(
        [
            over_time(bands),
            rise.mean(-1),
            quantiles(flux, 0.5, 0.9, 0.98),
            flux.std(1, keepdim=True),
            struck.float().mean(1, keepdim=True),
            quantiles(level, 0.1, 0.5, 0.95),
            level.std(1, keepdim=True),
            quantiles(flatness, 0.1, 0.5, 0.9),
        ],
        dim=1,
    )


def blocks_of(base: Base) -> tuple[str, ...]:
    """The blocks of features that this base can give."""
    ours, shared = isinstance(base.codec, MagnitudeCodec), base.contrastive is not None
    known = {LATENTS: True, MAGNITUDES: ours, DESCRIPTORS: ours, SHARED: shared, FIT: shared}
    return tuple(name for name, there in known.items() if there)


@torch.no_grad()
def features(base: Base, codes: Tensor, prompts: Sequence[str], blocks: Sequence[str] | None = None) -> dict[str, Tensor]:
    """codes [B, K, T], prompts [B] -> the frozen features that a head sees, by block [B, F]; F depends on the base only.

    Args: blocks: which to compute; default: all that codec and shared space can give, which leaves STATES out.
    """
    wanted = blocks_of(base) if blocks is None else tuple(blocks)
    heard = [block for block in wanted if block != STATES]
    made = features_of_latents(base, base.codec.latents(codes), prompts, heard)
    if STATES in wanted:
        speaker: Any = base
        made[STATES] = lm_statistics(speaker, codes, prompts)
    return {block: made[block] for block in wanted}


def features_of_latents(base: Base, latents: Tensor, prompts: Sequence[str], blocks: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The same, with a gradient to the codes' latents [B, D, T]."""
    if len(prompts) != len(latents):
        raise ValueError(f"{len(latents)} clips and {len(prompts)} prompts")
    wanted = blocks_of(base) if blocks is None else tuple(blocks)
    if STATES in wanted:
        raise UserError("a reward that reads the language model", "one over what the codec plays", "train it with --trunk frozen")
    made: dict[str, Tensor] = {}
    if LATENTS in wanted:
        made[LATENTS] = over_time(latents).float()
    if {MAGNITUDES, DESCRIPTORS} & set(wanted):
        assert isinstance(base.codec, MagnitudeCodec)
        magnitude = _magnitudes(base.codec, latents)
        if MAGNITUDES in wanted:
            made[MAGNITUDES] = magnitude_statistics(magnitude).float()
        if DESCRIPTORS in wanted:
            made[DESCRIPTORS] = describe(magnitude, base.codec.sample_rate, base.codec.config.stft_hop).float()
    if {SHARED, FIT} & set(wanted):
        heard = base.contrastive.embed_latents(latents)
        with torch.no_grad():
            said = base.contrastive.embed_text(list(prompts)).to(heard)
        fit = (heard * said).sum(1, keepdim=True)
        if SHARED in wanted:
            made[SHARED] = torch.cat([base.contrastive.features_of_latents(latents), fit], dim=1).float()
        if FIT in wanted:
            made[FIT] = fit.float()
    return {block: made[block] for block in wanted}


@torch.no_grad()
def loudness_and_length(base: Base, codes: Tensor) -> Tensor:
    """codes [B, K, T] -> [B, 3]: median and peak level, length. What a reward model must beat to have heard
    anything."""
    if isinstance(base.codec, MagnitudeCodec):
        level = torch.log10(_magnitudes(base.codec, base.codec.latents(codes)).square().sum(-1) + 1e-5)
    else:
        level = base.codec.latents(codes).norm(dim=1)
    length = torch.full_like(level[:, 0], codes.shape[-1])
    return torch.stack([level.median(1).values, level.amax(1), length], dim=1)


def _magnitudes(codec: MagnitudeCodec, latents: Tensor) -> Tensor:
    """latents [B, D, T] -> the magnitudes [B, N, n_bins] that `decode` would give a phase to; clip by clip, as decode
    does."""
    return torch.cat([codec.expand(codec.from_latents(row.transpose(1, 2))) for row in latents.split(1)])


# ---- pairs of features, and heads on them ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Comparisons between rows of a feature table: chosen, rejected [N] long; p, weight [N]; prompt [N] long."""

    chosen: Tensor
    rejected: Tensor
    p: Tensor
    weight: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.p)

    def index(self, rows: Tensor) -> Pairs:
        return Pairs(self.chosen[rows], self.rejected[rows], self.p[rows], self.weight[rows], self.prompt[rows])

    def reweighted(self, weight: Tensor) -> Pairs:
        return Pairs(self.chosen, self.rejected, self.p, weight, self.prompt)


@dataclass(frozen=True)
class Head:
    """One way from features to a score, with how far scores are expected to range before any vote was heard."""

    kind: Literal["linear", "kernel", "relevance"]
    """relevance: bumps in every feature by itself, plus a process over all of them, whose priors follow what proves relevant."""
    blocks: tuple[str, ...]
    """The blocks of features it reads; each weighs alike, however many features it has (relevance: each feature by itself)."""
    prior: float
    """Standard deviation of a score (kernel, relevance) or of a weight (linear) before any vote, in nats."""
    length: float = 2.0
    """kernel: the distance over which scores stay alike; 1 is one spread within a prompt in every feature. relevance: width of a bump."""


def candidates(blocks: Sequence[str]) -> tuple[Head, ...]:
    """The heads that held-out votes choose among, for a base that gives these blocks."""
    plain = tuple(block for block in blocks if block in (LATENTS, MAGNITUDES, SHARED))
    groups = [plain] + [(MAGNITUDES,)] * (MAGNITUDES in blocks and len(plain) > 1)
    named = tuple(block for block in blocks if block in (DESCRIPTORS, FIT))
    relevant = (
        Head("relevance", named, 2.0, 2.0),
        Head("relevance", named, 3.0, 2.5),
        Head("kernel", (DESCRIPTORS,), 2.0, 1.5),
        Head("linear", named, 0.6),
    )
    return (relevant if DESCRIPTORS in named else ()) + tuple(
        head
        for group in groups
        for head in (
            Head("linear", group, 0.6),
            Head("kernel", group, 1.0, 2.0),
            Head("kernel", group, 2.0, 1.5),
            Head("kernel", group, 4.0, 2.0),
        )
    )


@dataclass(frozen=True)
class Lens:
    """What turns a head's features into what it is linear in. mean, spread, share [F]; landmarks [M, F]; whiten [M, P]."""

    mean: Tensor
    spread: Tensor
    """How far clips of one prompt lie apart."""
    share: Tensor
    """What a feature weighs; the squares sum to 1, alike for every block."""
    landmarks: Tensor
    """Standardised clips that span a kernel head; none for a linear one."""
    whiten: Tensor
    """K(landmarks, landmarks) to the power -1/2."""

    def standard(self, rows: Tensor) -> Tensor:
        """[B, F] -> [B, F], all features together about 1 wide within a prompt."""
        return ((rows - self.mean) / self.spread).clamp(-REACH, REACH) * self.share


def joined(table: Table, blocks: Sequence[str]) -> Tensor:
    """Blocks side by side: [N, F]."""
    return torch.cat([table[block] for block in blocks], dim=1)


def make_lens(head: Head, table: Table, prompt: Tensor) -> Lens:
    """Standardise by what clips differ by *within* prompts, since only these are ever compared. No vote is used.

    Args: table: blocks [N, F]. prompt [N] long: which prompt a clip answers.
    """
    rows = joined(table, head.blocks)
    count = torch.zeros(int(prompt.max()) + 1).index_add_(0, prompt, torch.ones(len(prompt))).clamp_min(1)
    centre = torch.zeros(len(count), rows.shape[1]).index_add_(0, prompt, rows) / count[:, None]
    spread = (rows - centre[prompt]).square().mean(0).sqrt()
    floor = 1e-3 * rows.std(0, correction=0) + 1e-6  # a feature that is constant within prompts tells nothing
    share = torch.cat([torch.full((table[block].shape[1],), (table[block].shape[1] * len(head.blocks)) ** -0.5) for block in head.blocks])
    nothing = rows.new_zeros((0, 0))
    lens = Lens(rows.mean(0), torch.maximum(spread, floor), share, nothing, nothing)
    if head.kind == "linear":
        return lens
    if head.kind == "relevance":
        lens = replace(lens, share=torch.full_like(lens.share, len(lens.share) ** -0.5))
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:LANDMARKS].sort().values
    landmarks = lens.standard(rows[chosen])
    values, vectors = torch.linalg.eigh(_kernel(landmarks, landmarks, _reach(head)).double())
    kept = values > 1e-6 * values[-1]
    if head.kind == "relevance":
        kept[:-PARTS] = False
    return replace(lens, landmarks=landmarks, whiten=(vectors[:, kept] / values[kept].sqrt()).float().contiguous())


def _kernel(one: Tensor, other: Tensor, length: float) -> Tensor:
    """exp(-|a - b|^2 / (2 length^2)): [B, F], [M, F] -> [B, M]."""
    return torch.exp(-torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * length**2))


def expand(lens: Lens, head: Head, table: Table) -> Tensor:
    """Blocks [B, F] -> what the head is linear in [B, P]."""
    standard = lens.standard(joined(table, head.blocks))
    if head.kind == "linear":
        return standard
    together = _kernel(standard, lens.landmarks, _reach(head)) @ lens.whiten
    if head.kind == "kernel":
        return together
    padded = torch.nn.functional.pad(together, (0, PARTS - together.shape[1]))
    return torch.cat([padded, bumps(standard / lens.share, head.length).flatten(1)], dim=1)


def _reach(head: Head) -> float:
    """The length of the process over all features together."""
    return 1.5 if head.kind == "relevance" else head.length


def bumps(standard: Tensor, width: float) -> Tensor:
    """Features [B, F] -> [B, F, G]: a smooth function of one feature is linear in its G numbers, and a priori about 1 wide.

    The Gaussian process of one variable with length `width`, spanned by a grid over the range that is not cut off.
    """
    grid = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.exp(-(grid[:, None] - grid[None]).square() / (2 * width**2)))
    kept = values > 1e-3 * values[-1]
    onto = (vectors[:, kept] / values[kept].sqrt()).to(standard)
    return torch.exp(-(standard[..., None] - grid.to(standard)).square() / (2 * width**2)) @ onto


def fit(head: Head, inputs: Tensor, pairs: Pairs) -> Tensor:
    """The most probable weights [P] of a head. A relevance head is fitted several times: what has moved scores gets more of the
    prior, what has not gets less, down to FLOOR (as in automatic relevance determination: MacKay 1994; here by the spread of
    each feature's part of the score, which needs no inverse of [P, P])."""
    if head.kind != "relevance":
        return _most_probable(inputs, pairs, head.prior)
    width = bumps(torch.zeros(1, 1), head.length).shape[-1]
    group = torch.cat([torch.zeros(PARTS, dtype=torch.long), 1 + torch.arange((inputs.shape[1] - PARTS) // width).repeat_interleave(width)])
    n_groups = int(group.max()) + 1
    scale = torch.full((n_groups,), (2 * (n_groups - 1)) ** -0.5)
    scale[0] = 0.5**0.5
    used = torch.unique(torch.cat([pairs.chosen, pairs.rejected]))
    for turn in range(ROUNDS + 1):
        weights = scale[group] * _most_probable(inputs * scale[group], pairs, head.prior)
        if turn < ROUNDS:
            parts = inputs.new_zeros((len(used), n_groups)).index_add_(1, group, inputs[used] * weights)
            moved = parts.std(0, correction=0)
            scale = moved / moved.max().clamp_min(1e-12) + FLOOR
            scale = scale / scale.norm()
    return weights


def _most_probable(inputs: Tensor, pairs: Pairs, prior: float) -> Tensor:
    """The most probable weights [P]: Bradley-Terry likelihood, soft labels p, a normal prior; convex, by L-BFGS to the end.

    Weights are scaled to a mean of 1 over the pairs that have any, so that they say whom to believe more and not how many
    votes there are. Bradley and Terry 1952.
    """
    there = pairs.weight > 0
    loudness = pairs.weight / pairs.weight[there].mean().clamp_min(1e-12)
    difference = inputs[pairs.chosen] - inputs[pairs.rejected]
    weights = torch.zeros(inputs.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        margin = difference @ weights
        loss = (loudness * bradley_terry_loss(margin, torch.zeros_like(margin), pairs.p)).sum()
        value = (loss + weights.square().sum() / (2 * prior**2)) / len(pairs)
        value.backward()
        return value

    solver.step(closure)
    return weights.detach()


def bootstrap(pairs: Pairs, seed: int) -> Pairs:
    """The pairs with the weights of one draw of whole prompts with replacement."""
    labels, index = torch.unique(pairs.prompt, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    times = torch.bincount(torch.randint(len(labels), (len(labels),), generator=generator), minlength=len(labels))
    return pairs.reweighted(pairs.weight * times[index])


def log_loss(margin: Tensor, pairs: Pairs) -> float:
    """Weighted mean Bradley-Terry loss of margins score(chosen) - score(rejected) [N]; nats, log 2 for ignorance."""
    loss = bradley_terry_loss(margin, torch.zeros_like(margin), pairs.p)
    return float((pairs.weight * loss).sum() / pairs.weight.sum())


def best_temperature(margin: Tensor, pairs: Pairs) -> float:
    """The divisor that makes sigmoid(margin / temperature) most probable: by golden section on its logarithm.

    Guo et al. 2017, arXiv:1706.04599. Margins must come from pairs that the heads have not seen.
    """
    low, high, ratio = -3.0, 4.0, 0.6180339887
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if log_loss(margin / float(torch.tensor(a).exp()), pairs) < log_loss(margin / float(torch.tensor(b).exp()), pairs):
            high = b
        else:
            low = a
    return float(torch.tensor((low + high) / 2).exp())


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extra:
    """A second opinion over the same features: one aspect of the music, or whether a clip is acceptable at all."""

    members: Tensor
    """[E, P]"""
    offsets: Tensor
    """[E]: what a score of 0 stands for: the mean clip, or of `acceptable` the level that raters draw."""
    temperature: float


ACCEPTABLE = "acceptable"
"""The extra head of "both bad": log-odds that the better of two clips like this one is not called bad."""


class RewardModel:
    """An ensemble of heads over a base's frozen features.

    score(codes, prompts) -> [B], in calibrated nats: sigmoid(score(a) - score(b)) is how probably a is preferred to b.
    spread(codes, prompts) -> [B]: how far the heads are apart, in the same unit. extra_scores: by aspect, and `acceptable`.
    per_frame(codes, prompts) -> [B, T]: where a clip is good and bad, where raters have marked clips.
    """

    def __init__(self, base: Base, head: Head, lens: Lens, members: Tensor, offsets: Tensor, lam: float, temperature: float) -> None:
        self.base, self.head, self.lens = base, head, lens
        self.members = members
        """[E, P]: the heads' weights."""
        self.offsets = offsets
        """[E]: each head's mean over the clips it was fitted on; heads are only defined up to a constant."""
        self.lam, self.temperature = lam, temperature
        self.snapshot_sha256: str | None = None
        """The votes it was fitted on."""
        self.extras: dict[str, Extra] = {}
        """Heads of aspects, and ACCEPTABLE, where votes told enough."""
        self.frames: FrameHead | None = None
        """rlhf.frame_reward.FrameHead, where raters marked enough."""

    def member_scores(self, table: Table) -> Tensor:
        """Features, blocks [B, F] -> [E, B], each head about 0 on the clips it was fitted on."""
        return self.members @ expand(self.lens, self.head, table).T - self.offsets[:, None]

    def score_features(self, table: Table) -> Tensor:
        """Features, blocks [B, F] -> (mean - lam * spread over the heads) / temperature [B]."""
        return pessimistic(self.member_scores(table), self.lam) / self.temperature

    @torch.no_grad()
    def score(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """codes [B, K, T] and their prompts -> score [B] on the codes' device."""
        return self.score_features(self._heard(codes, prompts)).to(codes.device)

    @property
    def has_slope(self) -> bool:
        """Whether all that the head reads follows from the codec's latents; what a language model makes of codes does not."""
        return STATES not in self.head.blocks

    def slope(self, codes: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """codes [B, K, T] and their prompts -> d score / d latents [B, D, T] and score [B]: where each frame should have moved."""
        latents = self.base.codec.latents(codes).detach().requires_grad_(True)
        with torch.enable_grad():
            table = features_of_latents(self.base, latents, prompts, self.head.blocks)
            score = self.score_features({block: rows.cpu() for block, rows in table.items()})
            (slope,) = torch.autograd.grad(score.sum(), latents)
        return slope, score.detach().to(codes.device)

    @torch.no_grad()
    def spread(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """codes [B, K, T] and their prompts -> standard deviation between the heads [B], in units of the score; 0 for one head."""
        members = self.member_scores(self._heard(codes, prompts)) / self.temperature
        return (members.std(0, correction=1) if len(members) > 1 else torch.zeros_like(members[0])).to(codes.device)

    @torch.no_grad()
    def extra_scores(self, codes: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """codes [B, K, T] and their prompts -> aspect, or `acceptable` -> [B] in calibrated nats, without caution."""
        inputs = expand(self.lens, self.head, self._heard(codes, prompts)) if self.extras else None
        return {
            name: ((extra.members @ inputs.T - extra.offsets[:, None]).mean(0) / extra.temperature).to(codes.device)
            for name, extra in self.extras.items()
            if inputs is not None
        }

    @torch.no_grad()
    def per_frame(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """codes [B, K, T] and their prompts -> [B, T] in nats: how good each frame is beside the rest of its clip; 0 on average.

        Raises: UserError when the votes it was fitted on had too few marks.
        """
        if len(prompts) != len(codes):
            raise ValueError(f"{len(codes)} clips and {len(prompts)} prompts")
        if self.frames is None:
            got = "a reward model without a head for frames"
            raise UserError(got, "votes with stretches marked as bad", "ask raters to mark stretches, then train again")
        from rlhf.frame_reward import frame_features

        return self.frames(frame_features(self.base.codec, codes).cpu()).to(codes.device)

    def _heard(self, codes: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {block: rows.cpu() for block, rows in features(self.base, codes, prompts, self.head.blocks).items()}

    def tensors(self) -> dict[str, Tensor]:
        from rlhf.frame_reward import frame_tensors

        state = {f"lens.{field.name}": getattr(self.lens, field.name) for field in fields(self.lens)}
        for name, extra in self.extras.items():
            state |= {f"extra.{name}.members": extra.members, f"extra.{name}.offsets": extra.offsets}
        return {**state, **frame_tensors(self.frames), "members": self.members, "offsets": self.offsets}

    @property
    def sha256(self) -> str:
        return tensors_sha256(self.tensors())

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors, then manifest.json with its hash: without a manifest that fits, nothing loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", self.tensors())
        manifest = {
            "kind": "reward",
            "base_sha256": self.base.sha256,
            "features_sha256": features_sha256(self.base),
            "snapshot_sha256": self.snapshot_sha256,
            "reward_sha256": self.sha256,
            "head": asdict(self.head),
            "lam": self.lam,
            "temperature": self.temperature,
            "extras": {name: extra.temperature for name, extra in self.extras.items()},
        }
        write_json(folder / "manifest.json", manifest)


def pessimistic(member_scores: Tensor, lam: float) -> Tensor:
    """[E, B] -> mean - lam * spread [B]; a single head has no spread."""
    spread = member_scores.std(0, correction=1) if len(member_scores) > 1 else torch.zeros_like(member_scores[0])
    return member_scores.mean(0) - lam * spread


def features_sha256(base: Base) -> str:
    """What the features come from: the codec and the shared audio-text space."""
    tower = "" if base.contrastive is None else base.contrastive.sha256()
    return f"{base.codec.sha256()}|{tower}"


def load_reward(folder: str | Path, base: Base) -> RewardModel:
    """Read a reward model onto the base whose clips it was trained on.

    Raises: UserError when the folder is not one, was changed, or belongs to another base.
    """
    from rlhf.frame_reward import read_frame_head

    folder = Path(folder)
    manifest = read_json(folder / "manifest.json")
    if manifest.get("kind") != "reward":
        raise UserError(f"{folder} of kind {manifest.get('kind')!r}", "a reward model", "train one with rlhf/train_reward.py")
    if manifest["base_sha256"] != base.sha256:
        raise UserError(
            f"a reward model of base {manifest['base_sha256'][:12]}",
            f"one of base {base.sha256[:12]}",
            "train a reward model on votes about this base's clips",
        )
    if manifest["features_sha256"] != features_sha256(base):
        raise UserError(
            "a reward model over another audio-text space",
            "the one it was trained on",
            "restore the policy's contrastive/ folder",
        )
    state = load_tensors(folder / "model.safetensors")
    if tensors_sha256(state) != manifest["reward_sha256"]:
        raise UserError(f"{folder} with changed weights", f"hash {manifest['reward_sha256'][:12]}", "train or copy it again")
    lens = Lens(**{field.name: state[f"lens.{field.name}"] for field in fields(Lens)})
    head = Head(**{**manifest["head"], "blocks": tuple(manifest["head"]["blocks"])})
    model = RewardModel(base, head, lens, state["members"], state["offsets"], manifest["lam"], manifest["temperature"])
    model.snapshot_sha256 = manifest["snapshot_sha256"]
    for name, temperature in manifest.get("extras", {}).items():
        model.extras[name] = Extra(state[f"extra.{name}.members"], state[f"extra.{name}.offsets"], temperature)
    model.frames = read_frame_head(state)
    return model


Share = Callable[[int, Callable[[int], Tensor]], Tensor]
"""(number of jobs, job -> tensor of one shape) -> [jobs, ...]: does the jobs, possibly spread over processes."""


def alone(n: int, job: Callable[[int], Tensor]) -> Tensor:
    """All jobs in this process."""
    return torch.stack([job(index) for index in range(n)])


def fit_ensemble(head: Head, inputs: Tensor, pairs: Pairs, n_members: int, seed: int, share: Share = alone) -> tuple[Tensor, Tensor]:
    """inputs [N, P] -> members [E, P] fitted on bootstraps of the prompts, and their offsets [E]. Whatever `share` is."""
    members = share(n_members, lambda index: fit(head, inputs, bootstrap(pairs, seed * 1000 + index) if n_members > 1 else pairs))
    used = torch.unique(torch.cat([pairs.chosen, pairs.rejected]))
    return members, (members @ inputs[used].T).mean(1)
