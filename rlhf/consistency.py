"""Does a clip do what its prompt says? Checks that need no listener, as judges that mix with the listeners' reward.

    rewards = checks(policy)                          # name -> (codes [B, K, T], prompts) -> [B]
    codes -> embedding in the audio-text space, or the magnitudes that the codec is about to play (no phase, no waveform)
          -> similarity, diversity | mood, instrument, genre | tempo, key -> [B], NaN where a prompt says nothing of the kind (rlhf.asked)

`similarity` is a cosine; `diversity` how far clips of one prompt lie apart in the same space. The others are probabilities of what the
prompt states against everything it might have stated instead: a tempo against all tempi, a key against 24, a mood, an instrument or a
genre against the others by name. These three are heard by the base's ears (rlhf/ears.py), where it has them. A base without ears is
asked in its audio-text space, by exchanging the words *in the prompt* and asking which version the clip fits best, so that all else
that the prompt says cancels.

What they cannot do: no judge that a policy is trained on stays a fair one. The audio-text space takes for a piano what goes with a piano,
and ears are linear in what they hear. Keep their weight small beside the listeners' reward, keep the price of drift, and measure with
something else (benchmarks/consistency.py asks probes of waveforms, fitted on other melodies).

Papers: CLAP zero-shot classification (Wu et al. 2023, arXiv:2211.06687); key profiles by Krumhansl and Kessler 1982 in Krumhansl 1990;
tempo by autocorrelation as in Ellis 2007, "Beat tracking by dynamic programming", J. New Music Research 36(1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from base_models.codec import Codec, MagnitudeCodec
from rlhf.asked import (
    Versions,
    asked_genre,
    asked_keys,
    asked_lead,
    asked_mood,
    asked_tempo,
    genre_versions,
    instrument_versions,
    mood_versions,
)
from rlhf.descriptors import MAJOR, MINOR, autocorrelation, chromagram, onset_strength
from rlhf.ears import Ears, ears_of
from rlhf.rewards import Score, Slope

SHARPNESS = {"tempo": 12.0, "key": 8.0}
"""How decidedly a pulse or a key profile votes: the factor before the softmax."""


class Base(Protocol):
    """What of a policy is needed here (base_models.policy.Policy has it)."""

    @property
    def codec(self) -> Codec: ...
    @property
    def contrastive(self) -> Any: ...
    @property
    def path(self) -> Path: ...


NAMED: Mapping[str, Versions] = {"mood": mood_versions, "instrument": instrument_versions, "genre": genre_versions}
"""Checks by exchanging words in the prompt."""
HEARD: Mapping[str, Callable[[str], str | None]] = {"mood": asked_mood, "instrument": asked_lead, "genre": asked_genre}
"""Checks by ears, and how what they are asked for is read out of a prompt."""


def space_of(base: Base) -> Space | None:
    """The base's audio-text space with a memory for prompts. One for `checks` and `slopes` together embeds a prompt's versions once."""
    return None if base.contrastive is None else Space(base.contrastive)


def checks(base: Base, space: Space | None = None) -> dict[str, Score]:
    """Every check that this base can make: similarity needs its audio-text space (`space_of`); mood, instrument and genre its ears, or
    that space."""
    found: dict[str, Score] = {}
    space, ears = space or space_of(base), ears_of(base)
    if space is not None:
        found["similarity"] = space.similarity
        found["diversity"] = space.diversity
        found |= {name: partial(space.named, versions=versions) for name, versions in NAMED.items()}
    if ears is not None:
        memory = Listener(ears)
        found |= {kind: partial(memory.score, kind) for kind in HEARD}
    found["tempo"] = partial(tempo_probability, base.codec)
    found["key"] = partial(key_probability, base.codec)
    return found


def slopes(base: Base, space: Space | None = None) -> dict[str, Slope]:
    """The slopes of the checks along the codec's latents: of those in the audio-text space and by ears, and of tempo and key where the
    codec plays magnitudes (a foreign codec is heard through its waveform, without a slope)."""
    found: dict[str, Slope] = {}
    space, ears = space or space_of(base), ears_of(base)
    if space is not None:
        found["similarity"] = _slope(base, space.similarity_heard)
        found["diversity"] = _slope(base, diversity_heard)
        found |= {name: _slope(base, partial(space.named_heard, versions=versions)) for name, versions in NAMED.items()}
    if ears is not None:
        found |= {kind: partial(_slope_by_ear, ears, kind) for kind in HEARD}
    if isinstance(base.codec, MagnitudeCodec):
        found["tempo"] = partial(_slope_of_magnitudes, base.codec, tempo_heard)
        found["key"] = partial(_slope_of_magnitudes, base.codec, key_heard)
    return found


def _slope(base: Base, judge: Callable[[Tensor, Sequence[str]], Tensor]) -> Slope:
    """judge: embeddings [B, E] and prompts -> scores [B]; rows that are NaN have the slope 0."""

    def slope(codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        latents = base.codec.latents(codes).detach().requires_grad_(True)
        with torch.enable_grad():
            scores = judge(base.contrastive.embed_latents(latents).float(), prompts)
            (found,) = torch.autograd.grad(scores[torch.isfinite(scores)].sum(), latents, allow_unused=True)
        return torch.zeros_like(latents) if found is None else found, scores.detach()

    return slope


def _slope_of_magnitudes(codec: MagnitudeCodec, judge: Heard, codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The same for a judge of spectra, clip by clip: a clip that is asked nothing costs nothing."""
    latents, scores = codec.latents(codes).detach(), torch.full((len(codes),), math.nan, device=codes.device)
    found = torch.zeros_like(latents)
    for row, prompt in enumerate(prompts):
        with torch.enable_grad():
            latent = latents[row : row + 1].clone().requires_grad_(True)
            score = judge(partial(_magnitudes, codec, latent), prompt)
        if score is not None:
            (found[row : row + 1],) = torch.autograd.grad(score, latent)
            scores[row] = score.detach()
    return found, scores


# ---- ears ------------------------------------------------------------------------------------------------------------


@dataclass
class Listener:
    """Ears that remember the clips of the last question: mood, instrument and genre are asked of the same ones, one after the other."""

    ears: Ears
    _codes: Tensor | None = None
    _heard: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def score(self, kind: str, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probability that a clip is what its prompt names [B]; NaN where it names nothing, or nothing that ears know."""
        asked = asked_of(self.ears, kind, prompts)
        if not any(place is not None for place in asked):
            return torch.full((len(codes),), math.nan, device=codes.device)
        if self._codes is None or not torch.equal(self._codes, codes):
            parts = [self.ears.probabilities(self.ears.codec.latents(part)) for part in codes.split(CLIPS_AT_ONCE)]
            self._codes, self._heard = codes.clone(), {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return answers(self._heard[kind], asked)


CLIPS_AT_ONCE = 8
"""Clips that ears hear at once: a clip's spectrum is large."""


def asked_of(ears: Ears, kind: str, prompts: Sequence[str]) -> list[int | None]:
    """The column of ears' answers that each prompt asks for, or None."""
    return [ears.place(kind, HEARD[kind](prompt)) for prompt in prompts]


def answers(heard: Tensor, asked: Sequence[int | None]) -> Tensor:
    """heard [B, n_classes] -> what was asked for [B], NaN where nothing was."""
    rows = [row.new_full((), math.nan) if place is None else row[place] for row, place in zip(heard, asked, strict=True)]
    return torch.stack(rows)


def _slope_by_ear(ears: Ears, kind: str, codes: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Slope and score of the clips that are asked for something; the others cost nothing."""
    latents, scores = ears.codec.latents(codes).detach(), torch.full((len(codes),), math.nan, device=codes.device)
    found, asked = torch.zeros_like(latents), asked_of(ears, kind, prompts)
    for rows in torch.tensor([row for row, place in enumerate(asked) if place is not None], dtype=torch.long).split(CLIPS_AT_ONCE):
        if not len(rows):
            continue
        with torch.enable_grad():
            part = latents[rows].requires_grad_(True)
            told = answers(ears.probabilities(part)[kind], [asked[int(row)] for row in rows])
            (found[rows],) = torch.autograd.grad(told.sum(), part)
        scores[rows] = told.detach()
    return found, scores


# ---- the audio-text space --------------------------------------------------------------------------------------------


@dataclass
class Space:
    """The audio-text model with what it was asked before: prompts come back every round, and so do their versions."""

    model: Any
    _text: dict[str, Tensor] = field(default_factory=dict)
    _versions: dict[tuple[Versions, str], tuple[Tensor, Tensor] | None] = field(default_factory=dict)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """[N, E], from memory where a prompt was asked before."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text]
        if missing:
            self._text.update(zip(missing, self.model.embed_text(missing).float()))
        return torch.stack([self._text[prompt] for prompt in prompts])

    @torch.no_grad()
    def similarity(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of clip and prompt [B]."""
        return self.similarity_heard(self.model.embed_codes(codes).float(), prompts)

    def similarity_heard(self, heard: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same of embedded clips [B, E]."""
        return (heard * self.text(prompts).to(heard)).sum(1)

    @torch.no_grad()
    def diversity(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """How far a clip lies from the others of its prompt among these clips [B]; NaN where it is the only one."""
        return diversity_heard(self.model.embed_codes(codes).float(), prompts)

    @torch.no_grad()
    def named(self, codes: Tensor, prompts: Sequence[str], versions: Versions) -> Tensor:
        """Probability that the clip is what the prompt names, among its versions [B]; NaN where it names nothing.

        softmax over the versions of scale * cosine, summed over those that say the same.
        """
        return self.named_heard(self.model.embed_codes(codes).float(), prompts, versions)

    def named_heard(self, heard: Tensor, prompts: Sequence[str], versions: Versions) -> Tensor:
        """The same of embedded clips [B, E]."""
        scale = float(self.model.log_scale.detach().exp().clamp(max=100))
        scores = []
        for row, prompt in zip(heard, prompts, strict=True):
            known = self._known(prompt, versions)
            if known is None:
                scores.append(row.new_full((), math.nan))
                continue
            said, same = (t.to(row.device) for t in known)
            scores.append((scale * said @ row).softmax(0)[same].sum())
        return torch.stack(scores)

    def _known(self, prompt: str, versions: Versions) -> tuple[Tensor, Tensor] | None:
        key = (versions, prompt)
        if key not in self._versions:
            found = versions(prompt)
            self._versions[key] = None if found is None else (self.text(found[0]), torch.tensor(found[1]))
        return self._versions[key]


def diversity_heard(heard: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean Euclidean distance of each clip to the others of its prompt: embedded clips [B, E] -> [B], NaN where there is no other.

    Its mean over clips is `rlhf.metrics.diversity` of the same embeddings, which is what the brake and the proof look at.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    label = torch.tensor([numbers[prompt] for prompt in prompts], device=heard.device)
    others = (label[:, None] == label[None]) & ~torch.eye(len(label), dtype=torch.bool, device=heard.device)
    apart = ((heard[:, None] - heard[None]).square().sum(-1) + 1e-12).sqrt()
    n = others.sum(1)
    return torch.where(n > 0, (apart * others).sum(1) / n.clamp_min(1), torch.full_like(apart[0], math.nan))


# ---- tempo and key -------------------------------------------------------------------------------------------------------


Heard = Callable[["Callable[[], Spectrum]", str], "Tensor | None"]
"""What is heard (computed if it is wanted) and a prompt -> the probability [] of what it asks for, or None where it asks nothing."""


@dataclass(frozen=True)
class Spectrum:
    """One clip: power [1, N, n_bins] at N moments, `hop` samples apart."""

    power: Tensor
    sample_rate: int
    hop: int


@torch.no_grad()
def tempo_probability(codec: Codec, codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """Probability of the tempo that a prompt asks for [B], NaN where it asks for none. Of a stated BPM, half and double count too."""
    return _probabilities(codec, codes, prompts, tempo_heard)


def tempo_heard(listen: Callable[[], Spectrum], prompt: str) -> Tensor | None:
    """The same of one clip [], or None."""
    asked = asked_tempo(prompt)
    if asked is None:
        return None
    bpm, share = tempo_distribution(listen())
    low, high, octaves = asked
    inside = torch.zeros_like(bpm, dtype=torch.bool)
    for factor in (0.5, 1.0, 2.0) if octaves else (1.0,):
        inside |= (bpm >= low * factor) & (bpm <= high * factor)
    return share[0, inside].sum()


def tempo_distribution(heard: Spectrum) -> tuple[Tensor, Tensor]:
    """-> (bpm [N] evenly spaced on a logarithmic scale from 40 to 240, probability [1, N]).

    softmax of the onset strength's autocorrelation at each tempo's period, with half of that at twice the period and a quarter at
    half of it, weighed by a log-normal prior of an octave around 120 BPM: base_models.measures.estimate_tempo on magnitudes.
    """
    power, device = heard.power, heard.power.device
    hz = torch.linspace(0, heard.sample_rate / 2, power.shape[-1], device=device)
    flux = onset_strength(power / power.sum(-1).amax(1).clamp_min(1e-20)[:, None, None], hz)  # the loudest moment is 1
    similar = autocorrelation(flux - flux.mean(1, keepdim=True))
    bpm = torch.logspace(math.log2(40), math.log2(240), 200, base=2, device=device)
    period = 60 / bpm * heard.sample_rate / heard.hop
    strength = _at(similar, period) + 0.5 * _at(similar, 2 * period) + 0.25 * _at(similar, period / 2)
    prior = torch.exp(-0.5 * torch.log2(bpm / 120).square())
    return bpm, (SHARPNESS["tempo"] * strength * prior).softmax(1)


def _at(series: Tensor, place: Tensor) -> Tensor:
    """series [B, N] between its samples, at place [P] -> [B, P]; 0 beyond its end."""
    low = place.floor().long()
    share = place - low
    padded = torch.nn.functional.pad(series, (0, max(0, int(low.max()) + 2 - series.shape[1])))
    return padded[:, low] * (1 - share) + padded[:, low + 1] * share


@torch.no_grad()
def key_probability(codec: Codec, codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """Probability of the key, or of the mode, that a prompt names [B]; NaN where it names none."""
    return _probabilities(codec, codes, prompts, key_heard)


def key_heard(listen: Callable[[], Spectrum], prompt: str) -> Tensor | None:
    """The same of one clip [], or None."""
    asked = asked_keys(prompt)
    return None if asked is None else key_distribution(listen())[0, asked].sum()


def key_distribution(heard: Spectrum) -> Tensor:
    """-> probability of each key [1, 24]: softmax of the chroma's correlation with the 24 probe-tone profiles."""
    hz = torch.linspace(0, heard.sample_rate / 2, heard.power.shape[-1], device=heard.power.device)
    chroma = chromagram(heard.power, hz).mean(1)
    chroma = chroma - chroma.mean(1, keepdim=True)
    fit = chroma / chroma.norm(dim=1, keepdim=True).clamp_min(1e-9) @ _profiles().to(chroma).T
    return (SHARPNESS["key"] * fit).softmax(1)


@cache
def _profiles() -> Tensor:
    """[24, 12], each row of mean 0 and length 1."""
    table = torch.stack([torch.tensor(kind).roll(tonic) for kind in (MAJOR, MINOR) for tonic in range(12)])
    table = table - table.mean(1, keepdim=True)
    return table / table.norm(dim=1, keepdim=True)


def _probabilities(codec: Codec, codes: Tensor, prompts: Sequence[str], judge: Heard) -> Tensor:
    scores = torch.full((len(codes),), math.nan, device=codes.device)
    for row, prompt in enumerate(prompts):
        score = judge(partial(spectrum, codec, codes[row : row + 1]), prompt)
        if score is not None:
            scores[row] = score
    return scores


def spectrum(codec: Codec, codes: Tensor) -> Spectrum:
    """What codes [1, K, T] sound like. Ours plays magnitudes, which are taken before they get a phase. Any other codec is decoded, and
    its waveform transformed."""
    if isinstance(codec, MagnitudeCodec):
        return _magnitudes(codec, codec.latents(codes))
    wav = codec.decode(codes).float().mean(1)
    hop = max(1, codec.sample_rate // 100)
    n_fft = 1 << math.ceil(math.log2(codec.sample_rate / 16))
    window = torch.hann_window(n_fft, device=wav.device)
    transformed = torch.stft(wav, n_fft, hop, window=window, return_complex=True)
    return Spectrum(transformed.abs().square().transpose(1, 2), codec.sample_rate, hop)


def _magnitudes(codec: MagnitudeCodec, latents: Tensor) -> Spectrum:
    power = codec.expand(codec.from_latents(latents.transpose(1, 2))).square()
    return Spectrum(power, codec.sample_rate, codec.config.stft_hop)
