"""Does a clip do what its prompt says? Checks that need no listener, as judges that mix with the listeners' reward.

    rewards = checks(policy)                          # name -> (codes [B, K, T], prompts) -> [B]
    codes -> embedding in the audio-text space, or the magnitudes that the codec is about to play (no phase, no waveform)
          -> similarity, diversity | mood, instrument, genre | tempo, key -> [B], NaN where a prompt says nothing of the kind (rlhf.asked)

`similarity` is a cosine; `diversity` how far clips of one prompt lie apart in the same space. The others are probabilities of what the
prompt states against everything it might have stated instead: a tempo against all tempi, a key against 24, a mood, an instrument or a
genre against the others by name. These three are heard by the base's ears (rlhf/ears.py), where it has them, and are log-probabilities
then (`SOFTENED` has the temperatures). A base without ears is asked in its audio-text space, by exchanging the words *in the prompt* and
asking which version the clip fits best, so that all else that the prompt says cancels.

What they cannot do: no judge that a policy is trained on stays a fair one. The audio-text space takes for a piano what goes with a piano,
and ears are linear in what they hear. Keep their weight small beside the listeners' reward, keep the price of drift, and measure with
something else (benchmarks/consistency.py asks probes of waveforms, fitted on other melodies).

Papers: CLAP zero-shot classification (Wu et al. 2023, arXiv:2211.06687); key profiles by Krumhansl and Kessler 1982 in Krumhansl 1990;
tempo by autocorrelation as in Ellis 2007, "Beat tracking by dynamic programming", J. New Music Research 36(1).
"""

from __future__ import annotations

import hashlib
import json
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
from rlhf.ears import Ears, ears_of, sound_heard
from rlhf.judges import Judge, Slope, SlopeOf
from rlhf.reward_features import Heard

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
SOFTENED = {"genre": 3.0}
"""Temperature at which ears are asked, beside their own. At 1 a clip that is clearly right has no slope (half of the base's are above -.005
nats), so that a policy which drifts towards the border of a genre is told only once it has crossed it."""
HEARD: Mapping[str, Callable[[str], str | None]] = {"mood": asked_mood, "instrument": asked_lead, "genre": asked_genre}
"""Checks by ears, and how what they are asked for is read out of a prompt."""


def checks(base: Base, ears: Ears | None = None) -> dict[str, Judge]:
    """Every check that this base can make, by name; they share what they hear. similarity needs its audio-text space; mood, instrument
    and genre its ears, or that space. ears: the base's, where somebody has loaded them already."""
    found: dict[str, Judge] = {}
    ears = ears or ears_of(base)
    if base.contrastive is not None:
        space = Space(base.contrastive)
        found["similarity"] = Judge(base, space.similarity)
        found["diversity"] = Judge(base, lambda heard: diversity_heard(heard.embedding.float(), heard.prompts), compares=True)
        found |= {name: Judge(base, partial(space.named, versions), partial(space.names, versions)) for name, versions in NAMED.items()}
    if ears is not None:
        found |= {kind: Judge(base, partial(ears_say, ears, kind), partial(ears_are_asked, ears, kind)) for kind in HEARD}
    found["tempo"] = Judge(base, tempo_probability, lambda prompt: asked_tempo(prompt) is not None)
    found["key"] = Judge(base, key_probability, lambda prompt: asked_keys(prompt) is not None)
    return found


def slopes(base: Base, found: Mapping[str, Judge] | None = None) -> dict[str, Slope]:
    """The slopes of the checks along the codec's latents: of those in the audio-text space and by ears, and of tempo and key where the
    codec plays magnitudes (a foreign codec is heard through its waveform, without a slope).

    found: the base's `checks`, where somebody has them already; score and slope then remember the same prompts."""
    ours = isinstance(base.codec, MagnitudeCodec)
    judges = checks(base) if found is None else found
    return {name: SlopeOf(judge) for name, judge in judges.items() if ours or name not in ("tempo", "key")}


# ---- ears ------------------------------------------------------------------------------------------------------------


def asked_of_ears(ears: Ears | None) -> str | None:
    """A hash of the ears and of how they are asked; None without ears."""
    if ears is None:
        return None
    return hashlib.sha256(f"{ears.sha256()}|{json.dumps(SOFTENED, sort_keys=True)}".encode()).hexdigest()


def ears_are_asked(ears: Ears, kind: str, prompt: str) -> bool:
    """Whether a prompt names something of a kind that these ears know."""
    return ears.place(kind, HEARD[kind](prompt)) is not None


def ears_say(ears: Ears, kind: str, heard: Heard) -> Tensor:
    """Log-probability that a clip is what its prompt names [B], nats; mood, instrument and genre are heard at once.

    Its slope is steepest where the clip is surely something else, and at a temperature of 1 none where it is surely right. That of the
    probability is next to none at both ends, so that a clip that has lost its genre would be left alone. (Dhariwal and Nichol 2021,
    arXiv:2105.05233, guide by the slope of a classifier's log-probability, too.)
    """
    told = heard.once((ears_say, id(ears)), lambda: ears.log_probabilities_of(sound_heard(heard)))[kind]
    if kind in SOFTENED:
        told = (told / SOFTENED[kind]).log_softmax(1)
    places = [ears.place(kind, HEARD[kind](prompt)) for prompt in heard.prompts]
    return told.gather(1, torch.tensor(places, device=told.device)[:, None])[:, 0]


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

    def similarity(self, heard: Heard) -> Tensor:
        """Cosine of clip and prompt [B]."""
        points = heard.embedding.float()
        return (points * self.text(heard.prompts).to(points)).sum(1)

    def names(self, versions: Versions, prompt: str) -> bool:
        """Whether a prompt names something that could be exchanged."""
        return self._known(prompt, versions) is not None

    def named(self, versions: Versions, heard: Heard) -> Tensor:
        """Probability that the clip is what its prompt names, among the prompt's versions [B].

        softmax over the versions of scale * cosine, summed over those that say the same.
        """
        scale = float(self.model.log_scale.detach().exp().clamp(max=100))
        scores = []
        for row, prompt in zip(heard.embedding.float(), heard.prompts, strict=True):
            known = self._known(prompt, versions)
            assert known is not None
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


@dataclass(frozen=True)
class Spectrum:
    """Of clips: power [B, N, n_bins] at N moments, `hop` samples apart."""

    power: Tensor
    sample_rate: int
    hop: int


def tempo_probability(heard: Heard) -> Tensor:
    """Probability of the tempo that a prompt asks for [B]. Of a stated BPM, half and double count too."""
    bpm, share = tempo_distribution(spectrum(heard))
    return torch.stack([row[_asked_bpm(prompt, bpm)].sum() for row, prompt in zip(share, heard.prompts, strict=True)])


def _asked_bpm(prompt: str, bpm: Tensor) -> Tensor:
    """Which of these tempi would do [N] bool."""
    asked = asked_tempo(prompt)
    assert asked is not None
    low, high, octaves = asked
    inside = torch.zeros_like(bpm, dtype=torch.bool)
    for factor in (0.5, 1.0, 2.0) if octaves else (1.0,):
        inside |= (bpm >= low * factor) & (bpm <= high * factor)
    return inside


def tempo_distribution(heard: Spectrum) -> tuple[Tensor, Tensor]:
    """-> (bpm [N] evenly spaced on a logarithmic scale from 40 to 240, probability [B, N]).

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


def key_probability(heard: Heard) -> Tensor:
    """Probability of the key, or of the mode, that a prompt names [B]."""
    share = key_distribution(spectrum(heard))
    return torch.stack([row[asked_keys(prompt)].sum() for row, prompt in zip(share, heard.prompts, strict=True)])


def key_distribution(heard: Spectrum) -> Tensor:
    """-> probability of each key [B, 24]: softmax of the chroma's correlation with the 24 probe-tone profiles."""
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


def spectrum(heard: Heard) -> Spectrum:
    """What clips sound like. Ours plays magnitudes, which are taken before they get a phase. Any other codec is decoded, and its waveform
    transformed."""
    codec = heard.base.codec
    if isinstance(codec, MagnitudeCodec):
        return Spectrum(heard.magnitude.square(), codec.sample_rate, codec.config.stft_hop)
    codes = heard.codes
    assert codes is not None
    return heard.once(spectrum, lambda: _decoded(codec, codes))


def _decoded(codec: Codec, codes: Tensor) -> Spectrum:
    wav = codec.decode(codes).float().mean(1)
    hop = max(1, codec.sample_rate // 100)
    n_fft = 1 << math.ceil(math.log2(codec.sample_rate / 16))
    window = torch.hann_window(n_fft, device=wav.device)
    transformed = torch.stft(wav, n_fft, hop, window=window, return_complex=True)
    return Spectrum(transformed.abs().square().transpose(1, 2), codec.sample_rate, hop)
