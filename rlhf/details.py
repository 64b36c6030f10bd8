"""Finer descriptors of a clip: what lasts, what rings together, what swells and fades, octave by octave.

    magnitude [B, N, n_bins] -> continuity, intervals, harmonicity, cepstrum, octaves, course, pulse -> [B, F], one name each (`names`)

The descriptors (rlhf.descriptors) are what a listener would name first; these are what is left to like or dislike after them. They
are of the same schools: harmonic and percussive parts by smoothing along time and along frequency (after Fitzgerald 2010), salience
of a fundamental by the sum of its partials (Klapuri 2006), the tonal centroid (Harte et al. 2006), cepstra (Davis and Mermelstein
1980), modulation by band (Pampalk et al. 2002), sensory dissonance (Plomp and Levelt 1965). Which heads hear them is settled by
held-out votes (rlhf.reward_committee).

Every one of them is smooth, counts and choices included, so that a score has a slope to each (rlhf.dense); none depends on the
playback level.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from rlhf.descriptors import (
    OCTAVES_HZ,
    POOL,
    autocorrelation,
    beats,
    between,
    chromagram,
    in_bands,
    mean_over,
    moments,
    onset_strength,
    pooled,
    power_and_hz,
)

LAGS_S = (0.1, 0.25, 0.5, 1.0, 2.0)
"""How far apart the moments are that continuity compares."""
RATES_HZ = (0.5, 2.0, 4.0, 8.0, 16.0)
"""Edges of the bands of an octave's modulation."""
PERIODS_S = (0.12, 0.2, 0.3, 0.45, 0.7, 1.1, 1.7)
"""Edges of the ranges in which a pulse is looked for."""
EDGES_S = (0.25, 0.5, 1.0, 2.0)
"""How much of the start, and of the end, is set against the whole."""
QUIETEST_DB = -60.0
"""Levels below this, against the loudest moment, are all alike."""
Found = dict[str, Tensor]


def detail(magnitude: Tensor, sample_rate: int, hop: int) -> Tensor:
    """Magnitudes [B, N, n_bins] of an STFT (`hop` samples a frame) -> details [B, F] in the order of `names()`."""
    return torch.stack(list(_detailed(magnitude, sample_rate, hop).values()), dim=1)


@cache
def names() -> tuple[str, ...]:
    """The name of each detail; units stand in the name where there is one."""
    return tuple(_detailed(torch.rand(1, 64, 513, generator=torch.Generator().manual_seed(0)), 16_000, 160))


def _detailed(magnitude: Tensor, sample_rate: int, hop: int) -> Found:
    power, hz = power_and_hz(magnitude, sample_rate)
    frame_s = hop / sample_rate
    level_db = (10 * torch.log10(power.sum(-1) + 1e-8)).clamp_min(QUIETEST_DB)
    slow = pooled(power, POOL)
    root = (slow + 1e-14).sqrt()
    loud = torch.sigmoid((10 * torch.log10(slow.sum(-1) + 1e-8) + 40) / 3)
    octaves_db = 10 * torch.log10(torch.stack([power[..., between(hz, *edges)].sum(-1) for edges in pairwise(OCTAVES_HZ)], dim=1) + 1e-7)
    return {
        **_continuity(slow, root, hz, loud, POOL * frame_s),
        **_intervals(slow, hz, loud, POOL * frame_s),
        **_harmonicity(slow, root, hz, loud),
        **_cepstrum(slow, hz, loud, POOL * frame_s),
        **_octaves(octaves_db, frame_s),
        **_course(power.sum(-1), level_db, frame_s),
        **_pulse(onset_strength(power, hz), frame_s),
    }


# ---- shared ----------------------------------------------------------------------------------------------------------


def _length(rows: Tensor) -> Tensor:
    """Euclidean over the last axis; has a slope at 0."""
    return (rows.square().sum(-1) + 1e-12).sqrt()


def _steps(seconds: float, frame_s: float, n: int) -> int:
    """Frames in so many seconds: at least one, and less than there are."""
    return max(1, min(round(seconds / frame_s), n - 1))


def _unit(rows: Tensor) -> Tensor:
    """[..., D], each row one long."""
    return rows / _length(rows)[..., None]


def _alike(unit: Tensor, step: int, loud: Tensor | None = None) -> Tensor:
    """Cosine between frames `step` apart, averaged over time, where `loud` if given: unit vectors [B, N, D] -> [B]."""
    cosine = (unit[:, step:] * unit[:, :-step]).sum(-1)
    return cosine.mean(1) if loud is None else mean_over(cosine, loud[:, step:])


# ---- what lasts ------------------------------------------------------------------------------------------------------


def _continuity(power: Tensor, root: Tensor, hz: Tensor, loud: Tensor, frame_s: float) -> Found:
    """How alike the spectrum is to itself a little later, as a whole and by register, and how much of it stays."""
    found: Found = {}
    shape = torch.log10(power[..., 4:] + 1e-6)
    shape, spectrum = _unit(shape - shape.mean(-1, keepdim=True)), _unit(root)
    n = power.shape[1]
    for lag in LAGS_S:
        step = _steps(lag, frame_s, n)
        found[f"shape_held_{lag:g}s"] = _alike(shape, step)
        found[f"spectrum_held_{lag:g}s"] = _alike(spectrum, step)
    for low, high in ((60.0, 250.0), (250.0, 1000.0), (1000.0, 4000.0)):
        register = _unit(root[..., between(hz, low, high)])
        for lag in LAGS_S[1:4]:
            found[f"spectrum_held_{low:.0f}hz_{lag:g}s"] = _alike(register, _steps(lag, frame_s, n), loud)
    for lag in LAGS_S[:4]:
        step = _steps(lag, frame_s, n)
        found[f"stays_{lag:g}s"] = torch.minimum(root[:, step:], root[:, :-step]).sum((1, 2)) / root[:, :-step].sum((1, 2)).clamp_min(1e-6)
    return found


# ---- what rings together ---------------------------------------------------------------------------------------------


def _intervals(power: Tensor, hz: Tensor, loud: Tensor, frame_s: float) -> Found:
    """Which intervals sound at once, by register and over the clip, how long pitch classes last, and where the harmony lies."""
    found: Found = {}
    n = power.shape[1]
    usual = chromagram(power, hz)
    views = {
        "all": usual,
        "strong": chromagram(power, hz, width=0.35, exponent=1.0),
        "low": chromagram(power, hz, low=65.0, high=500.0),
        "high": chromagram(power, hz, low=500.0),
    }
    for view, chroma in views.items():
        pitches = _unit(chroma)
        for semitones in range(1, 7):
            found[f"interval_{view}_{semitones}"] = mean_over(_interval(chroma, semitones), loud)
        for lag in LAGS_S[1:]:
            found[f"pitch_held_{view}_{lag:g}s"] = _alike(pitches, _steps(lag, frame_s, n), loud)
    whole = (views["strong"] * loud[..., None]).sum(1) / loud.sum(1, keepdim=True).clamp_min(1e-6)
    found |= {f"interval_whole_{semitones}": _interval(whole, semitones) for semitones in range(1, 7)}
    angle = 2 * math.pi / 12 * torch.arange(12, device=hz.device)
    for name, turns in (("fifths", 7), ("minor_thirds", 3), ("major_thirds", 4)):
        point = torch.stack([usual @ torch.cos(turns * angle), usual @ torch.sin(turns * angle)], dim=-1)
        found[f"tonal_{name}"] = _length((point * loud[..., None]).sum(1) / loud.sum(1, keepdim=True).clamp_min(1e-6))
        found[f"tonal_moves_{name}"] = _length(point[:, 1:] - point[:, :-1]).mean(1)
    return found


def _interval(chroma: Tensor, semitones: int) -> Tensor:
    """How much of the energy by pitch class meets itself so many semitones higher: [..., 12] -> [...]."""
    return (chroma * chroma.roll(semitones, -1)).sum(-1) / chroma.square().sum(-1).clamp_min(1e-9)


# ---- tone against noise ----------------------------------------------------------------------------------------------


def _harmonicity(power: Tensor, root: Tensor, hz: Tensor, loud: Tensor) -> Found:
    """What is tone and what is stroke, how clear a fundamental is and where, how many there are, and how rough the moment."""
    found: Found = {}
    along_time = avg_pool1d(root.transpose(1, 2), 7, 1, 3).transpose(1, 2).square()
    across = avg_pool1d(root, 17, 1, 8).square()
    tonal = power * (along_time / (along_time + across + 1e-9))
    for name, low, high in (("all", 0.0, math.inf), ("low", 60.0, 500.0), ("middle", 500.0, 2000.0), ("high", 2000.0, 8000.0)):
        inside = between(hz, low, high)
        found[f"tonal_share_{name}"] = tonal[..., inside].sum((1, 2)) / power[..., inside].sum((1, 2)).clamp_min(1e-9)
    fundamental = 110.0 * 2 ** (torch.arange(48, device=hz.device) / 12)
    partial = torch.arange(1, 7, device=hz.device)[:, None, None] * fundamental[:, None]  # [6, 48, 1]
    comb = (
        torch.exp(-0.5 * ((hz - partial) / (0.03 * partial).clamp_min(12.0)).square()) / torch.arange(1, 7, device=hz.device)[:, None, None]
    ).sum(0)
    comb = comb / comb.norm(dim=1, keepdim=True)
    salience = _unit(root) @ comb.T
    found |= moments("salience", torch.logsumexp(20 * salience, -1) / 20, loud)
    belief = torch.softmax(15 * salience, -1)
    found |= moments("fundamental_octaves", belief @ torch.log2(fundamental / 440.0), loud)
    found |= moments("fundamentals", -(belief * torch.log(belief + 1e-9)).sum(-1), loud)
    found["fundamental_moves"] = mean_over((belief[:, 1:] - belief[:, :-1]).abs().sum(-1), loud[:, 1:])
    inside = between(hz, 130.0, 4000.0)
    sharp = power[..., inside].square()
    pitch = (sharp @ torch.log2(hz[inside] / 440.0)) / sharp.sum(-1).clamp_min(1e-14)
    found |= moments("loudest_partial_octaves", pitch, loud)
    inside = between(hz, 80.0, 3000.0)
    spectrum = _unit(root[..., inside])
    found |= moments("dissonance", ((spectrum @ beats(hz[inside])) * spectrum).sum(-1), loud)
    return found


# ---- timbre ----------------------------------------------------------------------------------------------------------


def _cepstrum(power: Tensor, hz: Tensor, loud: Tensor, frame_s: float) -> Found:
    """Entropy and tilt of the spectrum, ten cepstral coefficients, and how fast they move."""
    share = power / power.sum(-1, keepdim=True).clamp_min(1e-9)
    found = moments("spectral_entropy", -(share * torch.log(share + 1e-9)).sum(-1), loud)
    inside = between(hz, 80.0, 7000.0)
    octave = torch.log2(hz[inside])
    octave = octave - octave.mean()
    found |= moments("tilt_db_per_octave", (10 * torch.log10(power[..., inside] + 1e-7)) @ (octave / octave.square().sum()), loud)
    bands_db = 10 * torch.log10(in_bands(power, hz, 24, 60.0, 7500.0) + 1e-6)
    place = torch.arange(24, device=hz.device) + 0.5
    waves = torch.cos(math.pi / 24 * place[:, None] * torch.arange(1, 11, device=hz.device)) / 24**0.5
    cepstra = bands_db @ waves
    for index in range(cepstra.shape[-1]):
        found |= moments(f"cepstrum_{index + 1}", cepstra[..., index], loud)
    for lag in (0.1, 0.5, 2.0):
        step = _steps(lag, frame_s, power.shape[1])
        found[f"cepstrum_moves_{lag:g}s"] = _length(cepstra[:, step:] - cepstra[:, :-step]).mean(1)
    return found


# ---- what swells and fades -------------------------------------------------------------------------------------------


def _octaves(level_db: Tensor, frame_s: float) -> Found:
    """Octave by octave [B, O, N]: modulation by rate, spread, how steeply it rises and falls; and who strikes together with whom."""
    found: Found = {}
    centred = (level_db - level_db.mean(-1, keepdim=True)).clamp(-30, 30)
    spectrum = torch.fft.rfft(centred, dim=-1).abs().square()
    rate = torch.fft.rfftfreq(level_db.shape[-1], frame_s, device=level_db.device)
    whole = spectrum[..., 1:].sum(-1).clamp_min(1e-6)
    step = level_db[..., 1:] - level_db[..., :-1]
    rise, fall = step.clamp_min(0), (-step).clamp_min(0)
    by_octave = {
        f"modulation_{low:g}hz": torch.log10(spectrum[..., between(rate, low, high)].sum(-1) / whole + 1e-4)
        for low, high in pairwise(RATES_HZ)
    }
    by_octave |= {
        "level_sd_db": _length(centred) / centred.shape[-1] ** 0.5,
        "attack_against_decay": torch.log((rise.square().mean(-1) + 1e-3) / (fall.square().mean(-1) + 1e-3)),
        "steepest_rise_db": rise.square().sum(-1) / (rise.sum(-1) + 1e-3),
        "steepest_fall_db": fall.square().sum(-1) / (fall.sum(-1) + 1e-3),
    }
    struck = avg_pool1d(rise, 3, 1, 1)
    by_octave["struck_db"] = struck.mean(-1)
    for name, rows in by_octave.items():
        found |= {f"{name}_of_{low:.0f}hz": row for low, row in zip(OCTAVES_HZ, rows.unbind(1))}
    strokes = _unit(struck - struck.mean(-1, keepdim=True))
    together = strokes @ strokes.transpose(1, 2)
    n = together.shape[1]
    found["strike_together"] = (together.sum((1, 2)) - together.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))
    found["strike_together_low_high"] = together[:, :2, 4:].mean((1, 2))
    return found


def _course(energy: Tensor, level_db: Tensor, frame_s: float) -> Found:
    """Energy and level over the clip [B, N]: how far the level falls and rises within a lag, start and end
    against the whole, and where the weight lies."""
    found: Found = {}
    n = level_db.shape[1]
    for lag in LAGS_S[:4]:
        step = _steps(lag, frame_s, n)
        change = level_db[:, step:] - level_db[:, :-step]
        found[f"rises_{lag:g}s_db"], found[f"falls_{lag:g}s_db"] = change.clamp_min(0).mean(1), (-change).clamp_min(0).mean(1)
    mean = level_db.mean(1)
    for edge in EDGES_S:
        size = _steps(edge, frame_s, n)
        found[f"start_{edge:g}s_db"], found[f"end_{edge:g}s_db"] = level_db[:, :size].mean(1) - mean, level_db[:, -size:].mean(1) - mean
    share = energy / energy.sum(1, keepdim=True).clamp_min(1e-9)
    time = torch.linspace(-1, 1, n, device=energy.device)
    centre = share @ time
    found["weight_at"] = centre
    found["weight_spread"] = (share * (time - centre[:, None]).square()).sum(1).clamp_min(1e-9).sqrt()
    found["weight_entropy"] = -(share * torch.log(share + 1e-9)).sum(1)
    found["level_mean_db"] = mean
    for at in (0.05, 0.25, 0.5, 0.75):
        found[f"level_q{100 * at:.0f}_db"] = torch.quantile(level_db, at, dim=1)
    high = torch.quantile(level_db, 0.95, dim=1)[:, None]
    found["silent_share"] = torch.sigmoid((high - 40 - level_db) / 3).mean(1)
    found["soft_share"] = torch.sigmoid((high - 15 - level_db) / 2).mean(1)
    return found


def _pulse(flux: Tensor, frame_s: float) -> Found:
    """Onset strength [B, N]: how much of the time something starts, strongly or faintly, and the pulse by range of its period."""
    found = {f"starts_{name}": torch.sigmoid((flux - at) / (0.2 * at)).mean(1) for name, at in (("strong", 0.12), ("faint", 0.04))}
    correlation = autocorrelation(flux - flux.mean(1, keepdim=True))
    n = flux.shape[1]
    for low, high in pairwise(PERIODS_S):
        first, last = round(low / frame_s), min(round(high / frame_s), n // 2)
        lags = correlation[:, first:last]
        found[f"pulse_from_{low:g}s"] = torch.logsumexp(20 * lags, 1) / 20 if last > first else flux.new_zeros(len(flux))
    return found
