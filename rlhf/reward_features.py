"""What of a clip a reward's heads see: frozen features of the codes, in blocks.

    codes [B, K, T] + prompts [B] -> latents [B, D, T] -> blocks [B, F]: latents, magnitudes, descriptors, details, shared, fit

Statistics of the magnitudes that the codec is about to play and descriptors of them (where the codec is ours), statistics of its
latents, and the shared audio-text space (base_models.contrastive). Nothing here has parameters that votes train, or decodes a waveform.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from base_models.codec import Codec, MagnitudeCodec
from rlhf.descriptors import describe
from rlhf.details import detail

LATENTS, MAGNITUDES, DESCRIPTORS, DETAILS, SHARED, FIT = "latents", "magnitudes", "descriptors", "details", "shared", "fit"
Table = Mapping[str, Tensor]
"""Blocks of features by name, [N, F] each."""


class Hearing(Protocol):
    """What of a policy clips are heard through (base_models.policy.Policy has it)."""

    @property
    def codec(self) -> Codec: ...
    @property
    def contrastive(self) -> Any: ...


class Base(Hearing, Protocol):
    """What of a policy the reward reads (base_models.policy.Policy has it)."""

    @property
    def sha256(self) -> str: ...


Made = TypeVar("Made")


class Heard:
    """Clips with their prompts, as judges hear them: whatever follows from the codes is made when it is first wanted, and once.

    Of codes [B, K, T], or of latents [B, D, T], to which everything then has a gradient.
    """

    def __init__(self, base: Hearing, prompts: Sequence[str], codes: Tensor | None = None, latents: Tensor | None = None) -> None:
        clips = latents if codes is None else codes
        assert clips is not None
        if len(prompts) != len(clips):
            raise ValueError(f"{len(clips)} clips and {len(prompts)} prompts")
        self.base, self.prompts, self.codes, self._latents = base, list(prompts), codes, latents
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gave when something was first asked for by this key."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    @cached_property
    def latents(self) -> Tensor:
        """[B, D, T]"""
        if self._latents is not None:
            return self._latents
        assert self.codes is not None
        return self.base.codec.latents(self.codes)

    @cached_property
    def magnitude(self) -> Tensor:
        """[B, N, n_bins]: what the codec is about to play. Ours only."""
        assert isinstance(self.base.codec, MagnitudeCodec)
        return magnitudes(self.base.codec, self.latents)

    @cached_property
    def statistics(self) -> Tensor:
        """Of the magnitudes [B, F]."""
        return magnitude_statistics(self.magnitude).float()

    @cached_property
    def described(self) -> Tensor:
        """Descriptors of the magnitudes [B, F]."""
        assert isinstance(self.base.codec, MagnitudeCodec)
        return describe(self.magnitude, self.base.codec.sample_rate, self.base.codec.config.stft_hop).float()

    @cached_property
    def detailed(self) -> Tensor:
        """Finer descriptors of the magnitudes [B, F]."""
        assert isinstance(self.base.codec, MagnitudeCodec)
        return detail(self.magnitude, self.base.codec.sample_rate, self.base.codec.config.stft_hop).float()

    @cached_property
    def embedding(self) -> Tensor:
        """In the audio-text space: unit vectors [B, E]."""
        found: Tensor = self.base.contrastive.embed_latents(self.latents)
        return found


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
    widths = [int(edges[0]), *edges.diff().tolist()]  # split: the way back writes each bin once, where slices would write all bins a band
    bands = torch.stack([torch.log10(band.mean(-1) + 1e-6) for band in power.split(widths, -1)[1:]], dim=1)
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


def blocks_of(base: Hearing) -> tuple[str, ...]:
    """The blocks of features that this base can give."""
    ours, shared = isinstance(base.codec, MagnitudeCodec), base.contrastive is not None
    known = {LATENTS: True, MAGNITUDES: ours, DESCRIPTORS: ours, DETAILS: ours, SHARED: shared, FIT: shared}
    return tuple(name for name, there in known.items() if there)


@torch.no_grad()
def features(base: Base, codes: Tensor, prompts: Sequence[str], blocks: Sequence[str] | None = None) -> dict[str, Tensor]:
    """codes [B, K, T], prompts [B] -> the frozen features that a head sees, by block [B, F]; F depends on the base only.

    Args: blocks: which to compute; default: all that codec and shared space can give.
    """
    return features_heard(Heard(base, prompts, codes=codes), blocks)


def features_heard(heard: Heard, blocks: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The same of clips that other judges hear as well, with a gradient to their latents where they were given as such."""
    contrastive = heard.base.contrastive
    wanted = blocks_of(heard.base) if blocks is None else tuple(blocks)
    made: dict[str, Tensor] = {}
    if LATENTS in wanted:
        made[LATENTS] = over_time(heard.latents).float()
    if MAGNITUDES in wanted:
        made[MAGNITUDES] = heard.statistics
    if DESCRIPTORS in wanted:
        made[DESCRIPTORS] = heard.described
    if DETAILS in wanted:
        made[DETAILS] = heard.detailed
    if {SHARED, FIT} & set(wanted):
        with torch.no_grad():  # over the text alone: what is heard first in here would have no gradient
            said = contrastive.embed_text(heard.prompts)
        fit = (heard.embedding * said.to(heard.embedding)).sum(1, keepdim=True)
        if SHARED in wanted:
            made[SHARED] = torch.cat([contrastive.features_of_latents(heard.latents), fit], dim=1).float()
        if FIT in wanted:
            made[FIT] = fit.float()
    return {block: made[block] for block in wanted}


@torch.no_grad()
def loudness_and_length(base: Base, codes: Tensor) -> Tensor:
    """codes [B, K, T] -> [B, 3]: median and peak level, length. What a reward model must beat to have heard
    anything."""
    if isinstance(base.codec, MagnitudeCodec):
        level = torch.log10(magnitudes(base.codec, base.codec.latents(codes)).square().sum(-1) + 1e-5)
    else:
        level = base.codec.latents(codes).norm(dim=1)
    length = torch.full_like(level[:, 0], codes.shape[-1])
    return torch.stack([level.median(1).values, level.amax(1), length], dim=1)


def magnitudes(codec: MagnitudeCodec, latents: Tensor) -> Tensor:
    """latents [B, D, T] -> the magnitudes [B, N, n_bins] that `decode` would give a phase to; clip by clip, as decode
    does."""
    return torch.cat([codec.expand(codec.from_latents(row.transpose(1, 2))) for row in latents.split(1)])


def features_sha256(base: Base) -> str:
    """What the features come from: the codec and the shared audio-text space."""
    tower = "" if base.contrastive is None else base.contrastive.sha256()
    return f"{base.codec.sha256()}|{tower}"
