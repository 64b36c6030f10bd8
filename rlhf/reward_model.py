"""Codes -> how much the raters would like the clip: frozen features, a small head, an ensemble that knows what it does
not know.

    codes [B, K, T] -> frozen features [B, F] -> standardise -> principal parts of the differences within a prompt [B,
    P] -> E heads -> (mean - lam * spread) / temperature [B]

A few hundred votes cannot teach a network to listen, so nothing that listens is trained here: the features are the
shared audio-text space (base_models.contrastive), statistics of the codec's latents and, where the codec is ours, of
the magnitudes that it is about to play. Only a head of some hundred numbers learns, with a strong pull towards zero, as
a Bradley-Terry model: sigmoid(score(a) - score(b)) is the probability that a is preferred. Five heads see bootstraps of
the prompts; where they disagree, lam makes the score cautious, which is what keeps a policy from walking where no vote
has been (Coste et al. 2024, arXiv:2310.02743).

Deliberately not here: the taste of any rater, a waveform, or a gradient to the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from base_models.checkpoint import load_tensors, read_json, save_tensors, tensors_sha256, write_json
from base_models.codec import Codec, MagnitudeCodec
from base_models.errors import UserError
from rlhf.losses import bradley_terry_loss

REACH = 4.0
"""Parts are cut off at so many standard deviations: a square must not run away where no clip has been heard."""


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


@torch.no_grad()
def features(base: Base, codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """codes [B, K, T], prompts [B] -> the frozen features [B, F] that a head sees. F depends on the base only."""
    if len(prompts) != len(codes):
        raise ValueError(f"{len(codes)} clips and {len(prompts)} prompts")
    parts = [over_time(base.codec.latents(codes))]
    if isinstance(base.codec, MagnitudeCodec):
        parts.append(magnitude_statistics(_magnitudes(base.codec, codes)))
    if base.contrastive is not None:
        heard = base.contrastive.embed_codes(codes)
        said = base.contrastive.embed_text(list(prompts)).to(heard)
        parts += [base.contrastive.features(codes), (heard * said).sum(1, keepdim=True)]
    return torch.cat([part.float() for part in parts], dim=1)


@torch.no_grad()
def loudness_and_length(base: Base, codes: Tensor) -> Tensor:
    """codes [B, K, T] -> [B, 3]: median and peak level, length. What a reward model must beat to have heard
    anything."""
    if isinstance(base.codec, MagnitudeCodec):
        level = torch.log10(_magnitudes(base.codec, codes).square().sum(-1) + 1e-5)
    else:
        level = base.codec.latents(codes).norm(dim=1)
    length = torch.full_like(level[:, 0], codes.shape[-1])
    return torch.stack([level.median(1).values, level.amax(1), length], dim=1)


def _magnitudes(codec: MagnitudeCodec, codes: Tensor) -> Tensor:
    """codes [B, K, T] -> the magnitudes [B, N, n_bins] that `decode` would give a phase to; clip by clip, as decode
    does."""
    return torch.cat([codec.expand(codec.from_latents(codec.latents(row).transpose(1, 2))) for row in codes.split(1)])


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
    """One way from features to a score."""

    kind: Literal["linear", "quadratic", "mlp"] = "quadratic"
    parts: int = 64
    """Principal parts that are kept."""
    squares: int = 8
    """quadratic: the first so many parts also enter as squares and products, for tastes with an optimum."""
    l2: float = 0.01
    """Price of the sum of squared weights; weight decay for the mlp."""
    hidden: int = 32


CANDIDATES = (
    Head("linear", 64, 0, 0.01),
    Head("linear", 64, 0, 0.03),
    Head("quadratic", 64, 8, 0.01),
    Head("quadratic", 64, 8, 0.03),
    Head("quadratic", 64, 16, 0.02),
    Head("mlp", 24, 0, 0.5),
)


@dataclass(frozen=True)
class Lens:
    """What turns features into parts: mean, scale [F], basis [F, P], part scale [P]."""

    mean: Tensor
    scale: Tensor
    basis: Tensor
    part_scale: Tensor

    def parts(self, table: Tensor, n: int) -> Tensor:
        """[B, F] -> [B, n], about 1 wide within a prompt, cut off at REACH."""
        white = ((table - self.mean) / self.scale) @ self.basis[:, :n] / self.part_scale[:n]
        return white.clamp(-REACH, REACH)


def make_lens(table: Tensor, prompt: Tensor, n: int = 64) -> Lens:
    """Principal parts of the differences *within* prompts, since only these are ever compared. No vote is used.

    Args: table [N, F]. prompt [N] long: which prompt a clip answers.
    """
    mean, scale = table.mean(0), table.std(0, correction=0).clamp_min(1e-4)
    standard = (table - mean) / scale
    count = torch.zeros(int(prompt.max()) + 1).index_add_(0, prompt, torch.ones(len(prompt))).clamp_min(1)
    centre = torch.zeros(len(count), table.shape[1]).index_add_(0, prompt, standard) / count[:, None]
    within = standard - centre[prompt]
    covariance = (within.T @ within / max(1, len(table) - len(count))).double()
    values, vectors = torch.linalg.eigh(covariance)
    n = min(n, table.shape[1])
    basis = vectors.flip(1)[:, :n]
    basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))  # a sign, not the solver's whim
    return Lens(mean, scale, basis.float(), values.flip(0)[:n].clamp_min(1e-4).sqrt().float())


def expand(lens: Lens, head: Head, table: Tensor) -> Tensor:
    """[B, F] -> what the head is linear in [B, P'] (for the mlp: its input)."""
    parts = lens.parts(table, head.parts)
    if head.kind != "quadratic":
        return parts
    first = parts[:, : head.squares] / 2
    i, j = torch.triu_indices(first.shape[1], first.shape[1])
    return torch.cat([parts, first[:, i] * first[:, j]], dim=1)


Weights = dict[str, Tensor]


def apply(head: Head, weights: Weights, inputs: Tensor) -> Tensor:
    """inputs [B, P'] -> score [B]."""
    if head.kind == "mlp":
        return torch.tanh(inputs @ weights["into"] + weights["bias"]) @ weights["out"]
    return inputs @ weights["linear"]


def fit(head: Head, inputs: Tensor, pairs: Pairs, seed: int = 0) -> Weights:
    """Minimise the weighted Bradley-Terry loss plus l2; a function of its arguments alone.

    linear and quadratic are convex (L-BFGS to the end); the mlp takes 200 steps of AdamW with dropout from a seeded
    start. Bradley & Terry 1952; soft labels p for ties and for several raters."""
    generator = torch.Generator().manual_seed(seed)
    width = inputs.shape[1]
    if head.kind == "mlp":
        weights = {
            "into": torch.randn(width, head.hidden, generator=generator) / width**0.5,
            "bias": torch.zeros(head.hidden),
            "out": torch.randn(head.hidden, generator=generator) / head.hidden**0.5,
        }
    else:
        weights = {"linear": torch.zeros(width)}
    for tensor in weights.values():
        tensor.requires_grad_(True)
    weight = pairs.weight / pairs.weight.sum().clamp_min(1e-12)

    def loss(table: Tensor) -> Tensor:
        score = apply(head, weights, table)
        return (weight * bradley_terry_loss(score[pairs.chosen], score[pairs.rejected], pairs.p)).sum()

    if head.kind == "mlp":
        adam = torch.optim.AdamW(weights.values(), lr=3e-3, weight_decay=head.l2)
        for _ in range(200):
            adam.zero_grad()
            keep = torch.rand(inputs.shape, generator=generator) > 0.3
            loss(inputs * keep / 0.7).backward()
            adam.step()
    else:
        newton = torch.optim.LBFGS(weights.values(), max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            newton.zero_grad()
            value = loss(inputs) + head.l2 * weights["linear"].square().sum()
            value.backward()
            return value

        newton.step(closure)
    return {name: tensor.detach() for name, tensor in weights.items()}


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


class RewardModel:
    """An ensemble of heads over a base's frozen features.

    score(codes, prompts) -> [B], in calibrated nats: sigmoid(score(a) - score(b)) is how probably a is preferred to b.
    """

    def __init__(
        self, base: Base, head: Head, lens: Lens, members: Sequence[Weights], offsets: Tensor, lam: float, temperature: float
    ) -> None:
        self.base, self.head, self.lens, self.members = base, head, lens, list(members)
        self.offsets = offsets
        """[E]: each head's mean over the clips it was fitted on; heads are only defined up to a constant."""
        self.lam, self.temperature = lam, temperature
        self.snapshot_sha256: str | None = None
        """The votes it was fitted on."""

    def member_scores(self, table: Tensor) -> Tensor:
        """Features [B, F] -> [E, B], each head about 0 on the clips it was fitted on."""
        inputs = expand(self.lens, self.head, table)
        return torch.stack([apply(self.head, member, inputs) for member in self.members]) - self.offsets[:, None]

    def score_features(self, table: Tensor) -> Tensor:
        """Features [B, F] -> (mean - lam * spread over the heads) / temperature [B]."""
        return pessimistic(self.member_scores(table), self.lam) / self.temperature

    @torch.no_grad()
    def score(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """codes [B, K, T] and their prompts -> score [B] on the codes' device."""
        table = features(self.base, codes, prompts)
        return self.score_features(table.cpu()).to(codes.device)

    def tensors(self) -> dict[str, Tensor]:
        state = {f"lens.{name}": getattr(self.lens, name) for name in ("mean", "scale", "basis", "part_scale")}
        for index, member in enumerate(self.members):
            state |= {f"member.{index}.{name}": tensor for name, tensor in member.items()}
        state["offsets"] = self.offsets
        return state

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
            "members": len(self.members),
            "lam": self.lam,
            "temperature": self.temperature,
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
    members = [
        {name.split(".", 2)[2]: tensor for name, tensor in state.items() if name.startswith(f"member.{index}.")}
        for index in range(manifest["members"])
    ]
    lens = Lens(*(state[f"lens.{name}"] for name in ("mean", "scale", "basis", "part_scale")))
    model = RewardModel(base, Head(**manifest["head"]), lens, members, state["offsets"], manifest["lam"], manifest["temperature"])
    model.snapshot_sha256 = manifest["snapshot_sha256"]
    return model


Share = Callable[[int, Callable[[int], Tensor]], Tensor]
"""(number of jobs, job -> tensor of one shape) -> [jobs, ...]: does the jobs, possibly spread over processes."""


def alone(n: int, job: Callable[[int], Tensor]) -> Tensor:
    """All jobs in this process."""
    return torch.stack([job(index) for index in range(n)])


def fit_ensemble(
    head: Head, lens: Lens, table: Tensor, pairs: Pairs, n_members: int, seed: int, share: Share = alone
) -> tuple[list[Weights], Tensor]:
    """Members fitted on bootstraps of the prompts, and their offsets [E]. The result does not depend on `share`."""
    inputs = expand(lens, head, table)
    shapes = fit_shapes(head, inputs.shape[1])

    def member(index: int) -> Tensor:
        weights = fit(head, inputs, bootstrap(pairs, seed * 1000 + index) if n_members > 1 else pairs, seed * 1000 + index)
        return torch.cat([tensor.flatten() for tensor in weights.values()])

    flat = share(n_members, member)
    members = [
        {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, row.split([s.numel() for s in shapes.values()]))} for row in flat
    ]
    used = torch.unique(torch.cat([pairs.chosen, pairs.rejected]))
    offsets = torch.stack([apply(head, weights, inputs[used]).mean() for weights in members])
    return members, offsets


def fit_shapes(head: Head, width: int) -> dict[str, torch.Size]:
    """Names and shapes of what `fit` returns, in its order."""
    if head.kind == "mlp":
        return {
            "into": torch.Size([width, head.hidden]),
            "bias": torch.Size([head.hidden]),
            "out": torch.Size([head.hidden]),
        }
    return {"linear": torch.Size([width])}
