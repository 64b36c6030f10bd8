"""Judges that hear the same clips share what they hear: one pass from codes to spectra and embeddings, and one pass back.

    codes [B, K, T], prompts -> Heard (latents, magnitudes, descriptors, embedding: rlhf.reward_features) -> score [B] of every judge
    sum over judges of worth * score -> one backward pass -> slope [B, D, T]

The derivative of a sum is the sum of the derivatives, so a reward of many parts needs one pass back and not one a part. Nothing is
remembered from one call to the next: what was heard lives as long as the clips it was heard of are being judged. Clips may lie on any
device: they are heard where the codec lies, and what is said of them goes back to where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.reward_features import Heard, Hearing

Score = Callable[[Tensor, list[str]], Tensor]
"""codes [B, K, T] and their prompts -> score [B]; the higher the better, non-finite where it cannot tell."""

Slope = Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]
"""codes [B, K, T] and prompts -> d score / d latents of the codec [B, D, T], score [B]."""

CLIPS_AT_ONCE = 4
"""Clips that are heard at once: a clip's spectrum is large, and what a slope keeps of it larger (docs/ppo.md has the step's
memory)."""


@dataclass(frozen=True)
class Judge:
    """A judge of what is heard; called by itself it is a `Score`."""

    base: Hearing
    opinion: Callable[[Heard], Tensor]
    """Clips that it is asked about -> score [B], with a gradient to their latents where it has a slope."""
    asked: Callable[[str], bool] = lambda prompt: True
    """Whether a prompt asks it anything; other clips are NaN, and it does not hear them."""
    compares: bool = False
    """It holds clips of one prompt against each other: they have to be heard together."""

    def __call__(self, codes: Tensor, prompts: list[str]) -> Tensor:
        return scores({"": self}, codes, prompts)[""]


@dataclass(frozen=True)
class SlopeOf:
    """A judge asked for its slope; called by itself it is a `Slope`, which is 0 where the score is not finite."""

    judge: Judge

    def __call__(self, codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        slope, told = weighted_slope({"": self}, {"": 1.0}, codes, prompts)
        return slope, told[""]


@torch.no_grad()
def scores(parts: Mapping[str, Score], codes: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Every part's score [B] of codes [B, K, T]. Those that are `Judge`s hear the clips together; any other is asked by itself."""
    told: dict[str, Tensor] = {}
    judges: dict[str, Judge] = {}
    for name, part in parts.items():
        if isinstance(part, Judge):
            judges[name], told[name] = part, _silence(codes, prompts)
        else:
            told[name] = part(codes, list(prompts))
    for names, rows in _sittings(judges, prompts):
        heard = Heard(judges[names[0]].base, [prompts[row] for row in rows], codes=codes[rows])
        for name in names:
            told[name][rows] = judges[name].opinion(heard).to(told[name])
    return told


def weighted_slope(
    parts: Mapping[str, Slope], worth: Mapping[str, float | Tensor], codes: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum over parts of worth * d score / d latents [B, D, T], and every part's score [B]. worth: a number, or one a clip [B].

    Where a part's slope is not finite (it was not asked, or the clip stands at a cliff) it is 0. Those that are `SlopeOf` a judge hear the
    clips together; any other is asked by itself.
    """
    told: dict[str, Tensor] = {}
    judges: dict[str, Judge] = {}
    found: list[Tensor] = []
    for name, part in parts.items():
        if isinstance(part, SlopeOf):
            judges[name], told[name] = part.judge, _silence(codes, prompts)
        else:
            slope, told[name] = part(codes, list(prompts))
            found.append(
                torch.nan_to_num(slope.to(codes.device), 0.0, 0.0, 0.0) * _by_clip(worth[name], len(codes), codes.device)[:, None, None]
            )
    if judges:
        found.append(torch.zeros_like(next(iter(judges.values())).base.codec.latents(codes), device=codes.device))
    for names, rows in _sittings(judges, prompts):
        base = judges[names[0]].base
        latents = base.codec.latents(codes[rows]).detach().requires_grad_(True)
        with torch.enable_grad():
            heard = Heard(base, [prompts[row] for row in rows], latents=latents)
            opinions = {name: judges[name].opinion(heard) for name in names}
            sums = [
                _worth_of(score.to(latents), _by_clip(worth[name], len(codes), latents.device)[rows].to(latents))
                for name, score in opinions.items()
            ]
        found[-1][rows] += _slope_of_sum(sums, latents).to(codes.device)
        for name, score in opinions.items():
            told[name][rows] = score.detach().to(told[name])
    return sum(found[1:], start=found[0]), told


def _by_clip(worth: float | Tensor, n: int, device: torch.device) -> Tensor:
    """[n]"""
    return torch.as_tensor(worth, dtype=torch.float32, device=device).expand(n)


def _worth_of(score: Tensor, worth: Tensor) -> Tensor:
    """Sum of worth * score over the clips that have a score."""
    there = torch.isfinite(score)
    return (worth[there] * score[there]).sum()


def _silence(codes: Tensor, prompts: Sequence[str]) -> Tensor:
    """What is said of clips of which nobody is asked [B]."""
    if len(prompts) != len(codes):
        raise ValueError(f"{len(codes)} clips and {len(prompts)} prompts")
    return torch.full((len(codes),), float("nan"), device=codes.device)


def _slope_of_sum(sums: Sequence[Tensor], latents: Tensor) -> Tensor:
    """d sum / d latents. One pass back; where that is not finite, one a part, so that a part at a cliff does not take the others along."""
    sums = [part for part in sums if part.requires_grad]
    if not sums:
        return torch.zeros_like(latents)
    (slope,) = torch.autograd.grad(sums, latents, retain_graph=True, allow_unused=True)
    if slope is None or bool(torch.isfinite(slope).all()):
        return torch.zeros_like(latents) if slope is None else slope
    parts = [torch.autograd.grad(part, latents, retain_graph=True, allow_unused=True)[0] for part in sums]
    return torch.stack([torch.nan_to_num(part, 0.0, 0.0, 0.0) for part in parts if part is not None]).sum(0)


def _sittings(judges: Mapping[str, Judge], prompts: Sequence[str]) -> Iterator[tuple[list[str], list[int]]]:
    """(names of judges of one base, rows of clips that all of them and nobody else is asked about), CLIPS_AT_ONCE rows; more only where
    so many clips of one prompt are to be compared."""
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    for base in {id(judge.base): judge.base for judge in judges.values()}.values():
        mine = {name: judge for name, judge in judges.items() if judge.base is base}
        wanted: dict[tuple[str, ...], list[list[int]]] = {}
        for prompt, rows in rows_of.items():
            names = tuple(name for name, judge in mine.items() if judge.asked(prompt))
            whole = any(mine[name].compares for name in names)
            wanted.setdefault(names, []).extend([rows] if whole else [[row] for row in rows])
        for names, groups in wanted.items():
            if not names:
                continue
            sitting: list[int] = []
            for rows in groups:
                if sitting and len(sitting) + len(rows) > CLIPS_AT_ONCE:
                    yield list(names), sitting
                    sitting = []
                sitting = sitting + rows
            yield list(names), sitting
