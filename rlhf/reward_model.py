"""Codes -> how much the raters would like the clip: frozen features, a small head, an ensemble that knows what it does
not know.

    codes [B, K, T] -> magnitudes -> descriptors [B, D]                                        } -> standardise [B, D +
    P] -> E heads -> latents, audio-text space -> principal parts within a prompt [B, P]     } -> (mean - lam * spread)
    / temperature [B]

A few hundred votes cannot teach a network to listen, so nothing that listens is trained here. The features are some
thirty descriptors of what is about to be played (octave bands, noisiness, movement, dynamics: the usual set of music
information retrieval), and principal parts of the codec's latents and of the shared audio-text space
(base_models.contrastive). Only a head of some hundred numbers learns, as a Bradley-Terry model: sigmoid(score(a) -
score(b)) is the probability that a is preferred. Squares let it learn a taste with an optimum. Five heads see
bootstraps of the prompts; where they disagree, lam makes the score cautious, which is what keeps a policy from walking
where no vote has been (Coste et al. 2024, arXiv:2310.02743).

Deliberately not here: the taste of any rater, a waveform, or a gradient to the codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from base_models.checkpoint import load_tensors, read_json, save_tensors, tensors_sha256, write_json
from base_models.codec import Codec, MagnitudeCodec
from base_models.errors import UserError
from rlhf.losses import bradley_terry_loss

REACH = 4.0
"""Inputs are cut off at so many standard deviations: a square must not run away where no clip has been heard."""


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


N_OCTAVES = 8
"""Octave bands up to half the sample rate."""


def describe(magnitude: Tensor, sample_rate: int) -> Tensor:
    """Magnitudes [B, N, n_bins] of short frames -> descriptors [B, D], as music information retrieval uses them.

    Balance: share of each octave, centroid and width on a logarithmic frequency axis. Noisiness: spectral flatness.
    Movement: spectral flux, and how often it peaks. Dynamics: distances between quiet, usual and loud frames. All of it
    in dB, octaves or rates, none of it depends on the overall gain. All statistics forget *when* things happen: a kept
    beat cannot be seen here."""
    power = magnitude.square()
    bins = power.shape[-1]
    hertz = torch.linspace(0, sample_rate / 2, bins, device=power.device)
    octave = torch.log2(hertz[1:] / (sample_rate / 2))  # 0 at the top, -1 an octave lower
    power = power[..., 1:]
    level = 10 * torch.log10(power.sum(-1) + 1e-6)

    def quantiles(series: Tensor, *at: float) -> Tensor:
        return torch.quantile(series, torch.tensor(at, device=series.device), dim=1).T

    quiet, usual, loud = quantiles(level, 0.05, 0.5, 0.95).split(1, dim=1)
    heard = (level > loud - 30).float()
    spectrum = (power * heard[..., None]).sum(1)
    whole = spectrum.sum(1) + 1e-9
    band = octave.ceil().clamp_min(1 - N_OCTAVES)
    shares = [10 * torch.log10(spectrum[:, band == -o].sum(1) / whole + 1e-5) for o in range(N_OCTAVES)]
    amplitude = spectrum.sqrt() + 1e-9
    centroid = (amplitude * octave).sum(1) / amplitude.sum(1)
    width = ((amplitude * (octave - centroid[:, None]).square()).sum(1) / amplitude.sum(1)).sqrt()

    floor = 1e-7 * power.mean((1, 2))[:, None, None] + 1e-10
    flatness = 10 * (torch.log10(power + floor).mean(-1) - torch.log10(power.mean(-1, keepdim=True) + floor)[..., 0])
    log_power = torch.log10(power + 1e-3 * power.mean((1, 2))[:, None, None] + 1e-10)
    flux = (log_power[:, 1:] - log_power[:, :-1]).clamp_min(0).mean(-1)
    middle = flux[:, 1:-1]
    peak = (middle > flux[:, 2:]) & (middle >= flux[:, :-2])
    over = middle - flux.median(1, keepdim=True).values
    rates = [(peak & (over > height)).float().mean(1) for height in (0.02, 0.05, 0.1)]
    columns = [*shares, centroid, width, (flatness * heard).sum(1) / heard.sum(1), *rates, flux.std(1), level.std(1)]
    return torch.cat(
        [
            torch.stack(columns, dim=1),
            quantiles(flatness, 0.1, 0.5, 0.9),
            quantiles(flux, 0.5, 0.9, 0.98),
            loud - quiet,
            loud - usual,
        ],
        dim=1,
    )


@torch.no_grad()
def magnitudes(codec: Codec, codes: Tensor) -> Tensor:
    """codes [B, K, T] -> magnitudes of short frames [B, N, n_bins].

    Our codec speaks in magnitudes and needs no phase for them; others are decoded. Clip by clip, so that a clip's
    features do not depend on its batch."""
    if isinstance(codec, MagnitudeCodec):
        rows = [codec.expand(codec.from_latents(codec.latents(row).transpose(1, 2))) for row in codes.split(1)]
        return torch.cat(rows)
    n_fft = 2 ** round(math.log2(0.064 * codec.sample_rate))
    wav = codec.decode(codes).mean(1)
    wav = torch.nn.functional.pad(wav, (0, max(0, 4 * n_fft - wav.shape[-1])))
    window = torch.hann_window(n_fft, device=wav.device)
    return torch.stft(wav, n_fft, n_fft // 4, window=window, return_complex=True).abs().transpose(1, 2)


@torch.no_grad()
def descriptors(base: Base, codes: Tensor) -> Tensor:
    """codes [B, K, T] -> [B, D]. T of a few frames at least: a shorter clip has no movement."""
    return describe(magnitudes(base.codec, codes), base.codec.sample_rate)


@torch.no_grad()
def backdrop(base: Base, codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """codes [B, K, T], prompts [B] -> [B, R]: statistics of latents, the audio-text space, and how well prompt and
    sound match."""
    parts = [over_time(base.codec.latents(codes))]
    if base.contrastive is not None:
        heard = base.contrastive.embed_codes(codes)
        said = base.contrastive.embed_text(list(prompts)).to(heard)
        parts += [base.contrastive.features(codes), (heard * said).sum(1, keepdim=True)]
    return torch.cat([part.float() for part in parts], dim=1)


def features(base: Base, codes: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """codes [B, K, T], prompts [B] -> descriptors [B, D] and backdrop [B, R]. D and R depend on the base only."""
    if len(prompts) != len(codes):
        raise ValueError(f"{len(codes)} clips and {len(prompts)} prompts")
    return descriptors(base, codes), backdrop(base, codes, prompts)


@torch.no_grad()
def loudness_and_length(base: Base, codes: Tensor) -> Tensor:
    """codes [B, K, T] -> [B, 3]: median and peak level, length. What a reward model must beat to have heard
    anything."""
    level = torch.log10(magnitudes(base.codec, codes).square().sum(-1) + 1e-5)
    length = torch.full_like(level[:, 0], codes.shape[-1])
    return torch.stack([level.median(1).values, level.amax(1), length], dim=1)


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

    kind: Literal["linear", "mlp"] = "linear"
    squares: bool = True
    """linear: the descriptors also enter as squares, for tastes with an optimum."""
    parts: int = 0
    """Principal parts of the backdrop that enter beside the descriptors."""
    l2: float = 0.01
    """Price of the sum of squared weights; weight decay for the mlp."""
    hidden: int = 32


CANDIDATES = (
    Head("linear", False, 0, 0.01),
    Head("linear", True, 0, 0.005),
    Head("linear", True, 0, 0.02),
    Head("linear", True, 0, 0.1),
    Head("linear", True, 32, 0.05),
    Head("mlp", False, 0, 0.5),
)


@dataclass(frozen=True)
class Lens:
    """What turns features into inputs: mean and scale of descriptors [D] and backdrop [R], basis [R, P] and part scale
    [P]."""

    mean: Tensor
    scale: Tensor
    back_mean: Tensor
    back_scale: Tensor
    basis: Tensor
    part_scale: Tensor

    def described(self, table: Tensor) -> Tensor:
        """Descriptors [B, D], standardised over all clips and cut off at REACH."""
        return ((table - self.mean) / self.scale).clamp(-REACH, REACH)

    def parts(self, back: Tensor, n: int) -> Tensor:
        """Backdrop [B, R] -> [B, n], about 1 wide within a prompt, cut off at REACH."""
        white = ((back - self.back_mean) / self.back_scale) @ self.basis[:, :n] / self.part_scale[:n]
        return white.clamp(-REACH, REACH)


LENS = ("mean", "scale", "back_mean", "back_scale", "basis", "part_scale")


def make_lens(table: Tensor, back: Tensor, prompt: Tensor, n: int = 32) -> Lens:
    """Moments, and principal parts of the differences *within* prompts, since only these are ever compared. No vote is
    used.

    Args: table [N, D], back [N, R]. prompt [N] long: which prompt a clip answers.
    """
    mean, scale = back.mean(0), back.std(0, correction=0).clamp_min(1e-4)
    standard = (back - mean) / scale
    count = torch.zeros(int(prompt.max()) + 1).index_add_(0, prompt, torch.ones(len(prompt))).clamp_min(1)
    centre = torch.zeros(len(count), back.shape[1]).index_add_(0, prompt, standard) / count[:, None]
    within = standard - centre[prompt]
    covariance = (within.T @ within / max(1, len(back) - len(count))).double()
    values, vectors = torch.linalg.eigh(covariance)
    n = min(n, back.shape[1])
    basis = vectors.flip(1)[:, :n]
    basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))  # a sign, not the solver's whim
    part_scale = values.flip(0)[:n].clamp_min(1e-4).sqrt().float()
    return Lens(table.mean(0), table.std(0, correction=0).clamp_min(1e-4), mean, scale, basis.float(), part_scale)


def expand(lens: Lens, head: Head, table: Tensor, back: Tensor | None) -> Tensor:
    """Descriptors [B, D] and backdrop [B, R] (None will do for a head without parts) -> the head's inputs [B, P']."""
    inputs = [lens.described(table)]
    if head.parts:
        assert back is not None
        inputs.append(lens.parts(back, head.parts))
    if head.kind == "linear" and head.squares:
        inputs.append(inputs[0].square() / 2)
    return torch.cat(inputs, dim=1)


Weights = dict[str, Tensor]


def apply(head: Head, weights: Weights, inputs: Tensor) -> Tensor:
    """inputs [B, P'] -> score [B]."""
    if head.kind == "mlp":
        return torch.tanh(inputs @ weights["into"] + weights["bias"]) @ weights["out"]
    return inputs @ weights["linear"]


def fit(head: Head, inputs: Tensor, pairs: Pairs, seed: int = 0) -> Weights:
    """Minimise the weighted Bradley-Terry loss plus l2; a function of its arguments alone.

    linear is convex (L-BFGS to the end); the mlp takes 200 steps of AdamW with dropout from a seeded
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
            keep = torch.rand(inputs.shape, generator=generator) > 0.2
            loss(inputs * keep / 0.8).backward()
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

    def member_scores(self, table: Tensor, back: Tensor | None) -> Tensor:
        """Descriptors [B, D] and backdrop [B, R] -> [E, B], each head about 0 on the clips it was fitted on."""
        inputs = expand(self.lens, self.head, table, back)
        return torch.stack([apply(self.head, member, inputs) for member in self.members]) - self.offsets[:, None]

    def score_features(self, table: Tensor, back: Tensor | None) -> Tensor:
        """Descriptors [B, D] and backdrop [B, R] -> (mean - lam * spread over the heads) / temperature [B]."""
        return pessimistic(self.member_scores(table, back), self.lam) / self.temperature

    @torch.no_grad()
    def score(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """codes [B, K, T] and their prompts -> score [B] on the codes' device."""
        if len(prompts) != len(codes):
            raise ValueError(f"{len(codes)} clips and {len(prompts)} prompts")
        back = backdrop(self.base, codes, prompts).cpu() if self.head.parts else None
        return self.score_features(descriptors(self.base, codes).cpu(), back).to(codes.device)

    def tensors(self) -> dict[str, Tensor]:
        state = {f"lens.{name}": getattr(self.lens, name) for name in LENS}
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
    lens = Lens(*(state[f"lens.{name}"] for name in LENS))
    model = RewardModel(base, Head(**manifest["head"]), lens, members, state["offsets"], manifest["lam"], manifest["temperature"])
    model.snapshot_sha256 = manifest["snapshot_sha256"]
    return model


Share = Callable[[int, Callable[[int], Tensor]], Tensor]
"""(number of jobs, job -> tensor of one shape) -> [jobs, ...]: does the jobs, possibly spread over processes."""


def alone(n: int, job: Callable[[int], Tensor]) -> Tensor:
    """All jobs in this process."""
    return torch.stack([job(index) for index in range(n)])


def fit_ensemble(head: Head, inputs: Tensor, pairs: Pairs, n_members: int, seed: int, share: Share = alone) -> tuple[list[Weights], Tensor]:
    """Members fitted on bootstraps of the prompts, and their offsets [E]. The result does not depend on `share`.

    Args: inputs [N, P'], as `expand` makes them for this head.
    """
    shapes = fit_shapes(head, inputs.shape[1])

    def member(index: int) -> Tensor:
        weights = fit(head, inputs, bootstrap(pairs, seed * 1000 + index) if n_members > 1 else pairs, seed * 1000 + index)
        return torch.cat([weights[name].flatten() for name in shapes])

    flat = share(n_members, member)
    members = [
        {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, row.split([s.numel() for s in shapes.values()]))} for row in flat
    ]
    used = torch.unique(torch.cat([pairs.chosen, pairs.rejected]))
    offsets = torch.stack([apply(head, weights, inputs[used]).mean() for weights in members])
    return members, offsets


def fit_shapes(head: Head, width: int) -> dict[str, torch.Size]:
    """Names and shapes of what `fit` returns."""
    if head.kind == "mlp":
        return {
            "into": torch.Size([width, head.hidden]),
            "bias": torch.Size([head.hidden]),
            "out": torch.Size([head.hidden]),
        }
    return {"linear": torch.Size([width])}
