"""Does a clip do what its prompt says? Checks that need no listener, as judges that mix with the listeners' reward.

    rewards = checks(policy)                          # name -> (codes [B, K, T], prompts) -> [B]
    codes -> embedding in the audio-text space, or the magnitudes that the codec is about to play (no phase, no waveform)
          -> similarity, mood, instrument | tempo, key -> [B], NaN where a prompt says nothing of the kind

`similarity` is a cosine. The others are probabilities of what the prompt states against everything it might have stated instead: a
tempo against all tempi, a key against 24, a mood or an instrument against the others by name, by exchanging the words *in the
prompt* and asking which version the clip fits best, so that the genre and all else that the prompt says cancels.

What they cannot do: the same space that judges mood and instrument is cheaply fooled by a policy that is trained on it alone. Keep
their weight small beside the listeners' reward, keep the price of drift, and measure with something else (benchmarks/consistency.py
asks a probe that is trained on waveforms of real clips).

Papers: CLAP zero-shot classification (Wu et al. 2023, arXiv:2211.06687); key profiles by Krumhansl and Kessler 1982 in Krumhansl 1990;
tempo by autocorrelation as in Ellis 2007, "Beat tracking by dynamic programming", J. New Music Research 36(1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from base_models.codec import Codec, MagnitudeCodec
from base_models.conditions import parse_tempo
from base_models.corpus.captions import TEMPO_WORDS
from base_models.corpus.harmony import PITCH_NAMES
from base_models.corpus.styles import BANDS, MOODS
from rlhf.descriptors import MAJOR, MINOR, autocorrelation, chromagram, onset_strength
from rlhf.rewards import Score, Slope

TEMPO_TOLERANCE = 0.08
"""A tempo is met within 8 %, as base_models.measures.tempo_matches has it."""
SHARPNESS = {"tempo": 12.0, "key": 8.0}
"""How decidedly a pulse or a key profile votes: the factor before the softmax."""


class Base(Protocol):
    """What of a policy is needed here (base_models.policy.Policy has it)."""

    @property
    def codec(self) -> Codec: ...
    @property
    def contrastive(self) -> Any: ...


def checks(base: Base) -> dict[str, Score]:
    """Every check that this base can make: similarity, mood and instrument need its audio-text space."""
    found: dict[str, Score] = {}
    if base.contrastive is not None:
        space = Space(base.contrastive)
        found["similarity"] = space.similarity
        found["mood"] = lambda codes, prompts: space.named(codes, prompts, mood_versions)
        found["instrument"] = lambda codes, prompts: space.named(codes, prompts, instrument_versions)
    found["tempo"] = lambda codes, prompts: tempo_probability(base.codec, codes, prompts)
    found["key"] = lambda codes, prompts: key_probability(base.codec, codes, prompts)
    return found


def slopes(base: Base) -> dict[str, Slope]:
    """The slopes of those checks that listen in the audio-text space, along the codec's latents."""
    if base.contrastive is None:
        return {}
    space = Space(base.contrastive)
    found: dict[str, Callable[[Tensor, Sequence[str]], Tensor]] = {
        "similarity": space.similarity_heard,
        "mood": lambda heard, prompts: space.named_heard(heard, prompts, mood_versions),
        "instrument": lambda heard, prompts: space.named_heard(heard, prompts, instrument_versions),
    }
    return {name: _slope(base, judge) for name, judge in found.items()}


def _slope(base: Base, judge: Callable[[Tensor, Sequence[str]], Tensor]) -> Slope:
    """judge: embeddings [B, E] and prompts -> scores [B]; rows that are NaN have the slope 0."""

    def slope(codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        latents = base.codec.latents(codes).detach().requires_grad_(True)
        with torch.enable_grad():
            scores = judge(base.contrastive.embed_latents(latents).float(), prompts)
            (found,) = torch.autograd.grad(scores[torch.isfinite(scores)].sum(), latents, allow_unused=True)
        return torch.zeros_like(latents) if found is None else found, scores.detach()

    return slope


# ---- the audio-text space --------------------------------------------------------------------------------------------

Versions = Callable[[str], "tuple[list[str], list[bool]] | None"]
"""A prompt -> (itself in all versions, which of them say what it says), or None where it says nothing of the kind."""


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


def mood_versions(prompt: str) -> tuple[list[str], list[bool]] | None:
    """The prompt with its mood's word exchanged for each mood's words (happy, calm, sad, dark in the demo's vocabulary)."""
    found = _first(prompt, mood_words(), instrument_words())
    if found is None:
        return None
    start, stop, word = found
    mood = mood_words()[word]
    options = [(name, other) for other, name in mood_words().items()]
    return [prompt[:start] + other + prompt[stop:] for _, other in options], [name == mood for name, _ in options]


def instrument_versions(prompt: str) -> tuple[list[str], list[bool]] | None:
    """The prompt with its first instrument exchanged for one of each family; its own family counts as what it says."""
    found = _first(prompt, instrument_words())
    if found is None:
        return None
    start, stop, word = found
    family = instrument_words()[word]
    options = [(family, word)] + [(name, name) for name in FAMILIES if name != family]
    return [prompt[:start] + other + prompt[stop:] for _, other in options], [name == family for name, _ in options]


FAMILIES: Mapping[str, str] = {
    "piano": r"piano|harpsichord",
    "organ": r"organ|accordion|harmonica",
    "vibraphone": r"vibraphone",
    "guitar": r"guitar|banjo",
    "violin": r"violin|fiddle|cello|strings?|contrabass",
    "trumpet": r"trumpet|horn|brass|tuba|trombone",
    "saxophone": r"sax(?:ophone)?",
    "flute": r"flute|oboe|clarinet|bassoon|winds?",
    "choir": r"choir|voices?|vocals?",
    "synth": r"synth|lead|pad|stabs",
}
"""Families of instruments that alternatives are taken from: a name, and the words that belong to it."""


@cache
def instrument_words() -> dict[str, str]:
    """Every instrument of the demo's bands and the families' own words -> its family; longer names first. Bass and drums, which
    nearly every band has, are left out: hearing them says little."""
    names = {name for bands in BANDS.values() for band in bands for name in (band.lead.name, band.comp.name)} | set(FAMILIES)
    known = {}
    for name in sorted(names, key=lambda name: (-len(name), name)):
        family = next((family for family, words in FAMILIES.items() if re.search(rf"\b(?:{words})\b", name)), None)
        if family is not None:
            known[name] = family
    return known


@cache
def mood_words() -> dict[str, str]:
    """Every word for a mood -> the mood."""
    return {word: mood.name for mood in MOODS.values() for word in mood.words}


def _first(prompt: str, words: Mapping[str, str], inside: Mapping[str, str] | None = None) -> tuple[int, int, str] | None:
    """(start, stop, word) of the earliest of `words` in the prompt, the longest where several begin there; none of those that lie
    inside a name of `inside` ("warm" of a warm pad is no mood)."""
    taken = [m.span() for m in _pattern(tuple(inside)).finditer(prompt)] if inside else []
    for match in _pattern(tuple(words)).finditer(prompt):
        if not any(start <= match.start() < stop for start, stop in taken):
            return match.start(), match.end(), match.group().lower()
    return None


@cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])", re.IGNORECASE)


# ---- tempo -----------------------------------------------------------------------------------------------------------


def asked_tempo(prompt: str) -> tuple[float, float, bool] | None:
    """(slowest, fastest, whether it is stated in BPM) that a prompt asks for, or None. Words have the ranges of the captions."""
    stated = parse_tempo(prompt)
    if stated is not None:
        return stated * (1 - TEMPO_TOLERANCE), stated * (1 + TEMPO_TOLERANCE), True
    ranges, low = {}, 30.0
    for high, words in TEMPO_WORDS:
        ranges.update(dict.fromkeys(words, (low, min(high, 300.0))))
        low = high
    found = _first(prompt, dict.fromkeys(ranges, ""))
    return None if found is None else (*ranges[found[2]], False)


@torch.no_grad()
def tempo_probability(codec: Codec, codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """Probability of the tempo that a prompt asks for [B], NaN where it asks for none. Of a stated BPM, half and double count too."""
    asked = [asked_tempo(prompt) for prompt in prompts]
    scores = torch.full((len(codes),), math.nan, device=codes.device)
    rows = [row for row, wanted in enumerate(asked) if wanted is not None]
    if not rows:
        return scores
    bpm, share = tempo_distribution(codec, codes[rows])
    for row, mass in zip(rows, share):
        wanted = asked[row]
        assert wanted is not None
        low, high, octaves = wanted
        inside = torch.zeros_like(bpm, dtype=torch.bool)
        for factor in (0.5, 1.0, 2.0) if octaves else (1.0,):
            inside |= (bpm >= low * factor) & (bpm <= high * factor)
        scores[row] = mass[inside].sum()
    return scores


def tempo_distribution(codec: Codec, codes: Tensor) -> tuple[Tensor, Tensor]:
    """codes [B, K, T] -> (bpm [N] evenly spaced on a logarithmic scale from 40 to 240, probability [B, N]).

    softmax of the onset strength's autocorrelation at each tempo's period, with half of that at twice the period and a quarter at
    half of it, weighed by a log-normal prior of an octave around 120 BPM: base_models.measures.estimate_tempo on magnitudes.
    """
    power, sample_rate, hop = spectra(codec, codes)
    hz = torch.linspace(0, sample_rate / 2, power.shape[-1], device=power.device)
    flux = onset_strength(power / power.sum(-1).amax(1).clamp_min(1e-20)[:, None, None], hz)  # the loudest moment is 1
    similar = autocorrelation(flux - flux.mean(1, keepdim=True))
    bpm = torch.logspace(math.log2(40), math.log2(240), 200, base=2, device=power.device)
    period = 60 / bpm * sample_rate / hop
    strength = _at(similar, period) + 0.5 * _at(similar, 2 * period) + 0.25 * _at(similar, period / 2)
    prior = torch.exp(-0.5 * torch.log2(bpm / 120).square())
    return bpm, (SHARPNESS["tempo"] * strength * prior).softmax(1)


def _at(series: Tensor, place: Tensor) -> Tensor:
    """series [B, N] between its samples, at place [P] -> [B, P]; 0 beyond its end."""
    low = place.floor().long()
    share = place - low
    padded = torch.nn.functional.pad(series, (0, max(0, int(low.max()) + 2 - series.shape[1])))
    return padded[:, low] * (1 - share) + padded[:, low + 1] * share


# ---- key -------------------------------------------------------------------------------------------------------------

_KEY = re.compile(r"(?:\b([A-Gb-g])([#b♯♭]| sharp| flat)?[ -])?\b((?i:major|minor|maj|min))\b")
"""A lower-case "a" is the article of "in a minor key"."""


def asked_keys(prompt: str) -> list[int] | None:
    """The keys that answer a prompt: 0 to 11 are C major upwards, 12 to 23 C minor; one for "Eb minor", twelve for "minor", or None."""
    found = _KEY.search(prompt)
    if found is None:
        return None
    minor = 12 if found.group(3).lower().startswith("min") else 0
    if found.group(1) is None:
        return list(range(minor, minor + 12))
    letter = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[found.group(1).upper()]
    sign = (found.group(2) or "").strip().lower()
    return [minor + (letter + (sign in ("#", "♯", "sharp")) - (sign in ("b", "♭", "flat"))) % 12]


def key_name(key: int) -> str:
    """3 -> 'Eb major'."""
    return f"{PITCH_NAMES[key % 12]} {'minor' if key >= 12 else 'major'}"


@torch.no_grad()
def key_probability(codec: Codec, codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """Probability of the key, or of the mode, that a prompt names [B]; NaN where it names none."""
    asked = [asked_keys(prompt) for prompt in prompts]
    scores = torch.full((len(codes),), math.nan, device=codes.device)
    rows = [row for row, wanted in enumerate(asked) if wanted is not None]
    if rows:
        for row, mass in zip(rows, key_distribution(codec, codes[rows])):
            scores[row] = mass[asked[row]].sum()
    return scores


def key_distribution(codec: Codec, codes: Tensor) -> Tensor:
    """codes [B, K, T] -> probability of each key [B, 24]: softmax of the chroma's correlation with the 24 probe-tone profiles."""
    power, sample_rate, _ = spectra(codec, codes)
    hz = torch.linspace(0, sample_rate / 2, power.shape[-1], device=power.device)
    chroma = chromagram(power, hz).mean(1)
    chroma = chroma - chroma.mean(1, keepdim=True)
    fit = chroma / chroma.norm(dim=1, keepdim=True).clamp_min(1e-9) @ _profiles().to(chroma).T
    return (SHARPNESS["key"] * fit).softmax(1)


@cache
def _profiles() -> Tensor:
    """[24, 12], each row of mean 0 and length 1."""
    table = torch.stack([torch.tensor(kind).roll(tonic) for kind in (MAJOR, MINOR) for tonic in range(12)])
    table = table - table.mean(1, keepdim=True)
    return table / table.norm(dim=1, keepdim=True)


def spectra(codec: Codec, codes: Tensor) -> tuple[Tensor, int, int]:
    """codes [B, K, T] -> (power [B, N, n_bins], sample rate, samples a frame).

    Ours plays magnitudes, which are taken before they get a phase. Any other codec is decoded, and its waveform transformed.
    """
    if isinstance(codec, MagnitudeCodec):
        parts = [codec.expand(codec.from_latents(codec.latents(part).transpose(1, 2))) for part in codes.split(1)]
        return torch.cat(parts).square(), codec.sample_rate, codec.config.stft_hop
    wav = codec.decode(codes).float().mean(1)
    hop = max(1, codec.sample_rate // 100)
    n_fft = 1 << math.ceil(math.log2(codec.sample_rate / 16))
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.stft(wav, n_fft, hop, window=window, return_complex=True)
    return spectrum.abs().square().transpose(1, 2), codec.sample_rate, hop
