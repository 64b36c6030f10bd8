"""Several judges, one reward: named parts, each measured in the base's own spread, added with weights that are written down.

    codes [B, K, T], prompts -> marks [B, P] (raw) -> z = (mark - mean) / sd of the base's clips of one prompt -> total = sum of w * z [B]

What listeners like and what a prompt asks for are judged in different units; divided by how far the base's clips of one prompt differ, a
weight says how much one spread of the one is worth in spreads of the other. What prompts differ by whatever is played is left out of it:
no policy can change it, and it is two thirds of some tastes' spread and nothing of a genre's, so that a taste would have a third of its say
(measured: docs/experiments.md). Mean and sd are measured once, on clips of the base (at the first look at held-out prompts where there are
any, else on the first round: a fresh adapter is the identity), and then stand still: a running scale would move the goal under the policy.
A part of weight 0 is judged and shown and never trained on.

What a prompt asks for is seldom to be won at the listeners' expense, and not to be lost either. A part that is *held* has a weight that
moves: it grows while the policy's clips are worse at it than the base's, and shrinks while they are better, as the Lagrange multiplier
of the constraint "not worse than the base" (constrained RLHF: Moskovitz et al. 2023, arXiv:2310.04373). A part that asks for different
things by prompt (a genre) has one such weight for each of them: what drives a taste away from ambient music is lost on ambient prompts
alone, and folk that gains as much would pay for it in the mean (measured: docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from base_models.errors import UserError
from rlhf.asked import asked_genre
from rlhf.judges import Score, Slope, scores, weighted_slope
from rlhf.losses import from_group_means

HOLD_MOST = 2.0
"""A held weight stays between what it began with and this (or what it began with, where that is more)."""

KINDS: Mapping[str, Callable[[str], str | None]] = {"genre": asked_genre}
"""Parts that ask for different things by prompt, and what. (Leads are too many for the prompts of a look, and moods are seldom held.)"""
HUMAN = "human"
"""The part that listeners' votes taught (a reward model)."""
WATCHED = "watched"
"""The part that is only looked at: another judge's opinion of held-out clips, which nothing is trained on or braked by."""
LEAST_LOGITS = 0.25
"""A calibrated reward's least spread over clips of the base that is taken for one: below, most pairs would be decided 57 to 43 or closer,
and to blow that up to a full spread would be to train on what the votes have not said. Measured on the demo base, among clips of one
prompt: .43 to .95 from 2,000 votes of a taste; from shuffled votes .002 and .023 among clips of all prompts, which is more."""


@dataclass(frozen=True)
class Part:
    """One judge and what a spread of its marks weighs."""

    score: Score
    weight: float = 1.0
    asked: bool = False
    """It judges what a prompt asks for, and gives NaN where a prompt asks nothing of the kind: that counts as the base's mean. A
    part that is not `asked` always has an opinion; where it gives none, the clip is left out."""
    least: float = 0.0
    """The least spread of its raw marks that counts as one; smaller differences stay small."""
    kind: Callable[[str], str | None] | None = None
    """What a prompt asks this part for, by name; where it is held, each kind has a weight and a level of its own."""


@dataclass(frozen=True)
class Judgement:
    """total [B], non-finite where a clip is to be left out; parts: name -> z [B], for plots."""

    total: Tensor
    parts: dict[str, Tensor]


class Reward:
    """Parts in a fixed order, with the scale that each was measured to have on the base."""

    def __init__(self, parts: Mapping[str, Part], every_round: Sequence[str] | None = None) -> None:
        self.parts = dict(parts)
        self.every_round = self.names if every_round is None else tuple(every_round)
        """The parts that are judged in every round; the others only where `marks` is asked for everything."""
        self.scales: dict[str, tuple[float, float]] = {}
        """Name -> mean of the base's marks and their sd within a prompt (`spread_within`), at least the part's `least`; empty until
        `measure`. name/kind -> mean of these prompts, and that same sd."""
        self.now = {name: part.weight for name, part in self.parts.items()}
        """The weights as they stand; those of held parts move. name/kind -> the weight for prompts of this kind, once it was held."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def least(self) -> float:
        """The least spread of a total that counts as one: of a part alone, its own; of several, half of what it would be if each spread
        as the base did at first and none went with another."""
        parts = [self.parts[name] for name in self.trained]
        if len(parts) == 1:
            return abs(parts[0].weight) * parts[0].least
        return 0.5 * math.sqrt(sum(part.weight**2 for part in parts))

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that have a weight."""
        return tuple(name for name, part in self.parts.items() if part.weight)

    def marks(self, codes: Tensor, prompts: list[str], everything: bool = False, known: Mapping[str, Tensor] | None = None) -> Tensor:
        """Raw marks [B, P] of codes [B, K, T], in the order of `names`, without gradient, in float32; NaN for a part that was
        not asked. known: marks [B] that have been computed already, by name."""
        known = known or {}
        wanted = [name for name in self.parts if name not in known and (everything or name in self.every_round)]
        found = {**known, **scores({name: self.parts[name].score for name in wanted}, codes, prompts)}
        for name, column in found.items():
            if column.shape != (len(codes),):
                raise ValueError(f"part {name!r} gave {tuple(column.shape)} for {len(codes)} clips")
        nothing = torch.full((len(codes),), float("nan"), device=codes.device)
        return torch.stack([found.get(name, nothing).detach().to(codes.device, torch.float32) for name in self.parts], 1)

    def measure(self, marks: Tensor, prompts: Sequence[str], places: Sequence[Hashable] | None = None) -> None:
        """Take the scales from clips of the base: raw marks [B, P] over all ranks, and the prompt of each; places: which prompt it is,
        where two may have the same words (and another tempo). sd is that of clips of one prompt, or of all clips where none has two.
        A scale that was taken stands; where all marks are equal sd is 1 (a part's `least`, where it is more); a part without a finite
        mark has no scale yet (mean 0, sd 1)."""
        places = prompts if places is None else places
        for name, column in zip(self.names, marks.unbind(1)):
            there = torch.isfinite(column)
            if name in self.scales or not bool(there.any()):
                continue
            finite = column[there].double()
            mean, sd = float(finite.mean()), spread_within(finite, [place for place, use in zip(places, there.tolist()) if use])
            varied = sd > 1e-6 * max(1.0, abs(mean))
            self.scales[name] = (mean, max(sd if varied else 1.0, self.parts[name].least))
            for key, rows in self._kinds(name, prompts).items():
                if bool(there[rows].any()):
                    self.scales[key] = (float(column[rows][there[rows]].double().mean()), self.scales[name][1])

    def _kinds(self, name: str, prompts: Sequence[str]) -> dict[str, list[int]]:
        """name/kind -> rows of the clips whose prompts ask a part for it."""
        kind, found = self.parts[name].kind, dict[str, list[int]]()
        for row, prompt in enumerate(prompts if kind else ()):
            assert kind is not None
            asks = kind(prompt)
            if asks is not None:
                found.setdefault(key_of(name, asks), []).append(row)
        return found

    def hold(self, names: Sequence[str], marks: Tensor, prompts: Sequence[str], rate: float = 1.0, slack: float = 0.0) -> None:
        """Move the weights of held parts (`now`, in place) by what clips of the policy, raw marks [B, P] and B prompts, miss of the base's
        level: w - rate * (mean z + slack / sqrt(n)), within bounds, over the n clips that have a mark; for each kind of prompt by its own
        clips, and for kinds that are not among these by all.

        slack: standard errors of the mean z by which clips may fall short and nothing moves (n clips that differ as the base's clips of a
        prompt do). Without it chance alone drives weights up: they fall no lower than they began, so ups and downs do not cancel.

        None falls below what it began with: a part whose weight went to nothing was kept on the prompts of the looks, and lost by a tenth
        of the clips on prompts of new combinations (measured: docs/experiments.md).

        They must be of the prompts and seeds by which the scales were measured: prompts differ in how well they can be fitted, and a mean
        over others is off by a fifth of a spread (measured), more than there is to hold.
        """
        for name in names:
            column, before = marks[:, self.names.index(name)], self.now[name]
            for key, rows in ({name: list(range(len(column)))} | self._kinds(name, prompts)).items():
                mean, sd = self.scales.get(key, self._scale(name))
                there = column[rows][torch.isfinite(column[rows])].double()
                if len(there):
                    least = self.parts[name].weight
                    missed = rate * ((mean - float(there.mean())) / sd - slack / math.sqrt(len(there)))
                    self.now[key] = min(max(self.now.get(key, before) + missed, least), max(least, HOLD_MOST))

    def held(self, names: Sequence[str]) -> dict[str, float]:
        """The weights of these parts as they stand, by name and name/kind."""
        return {key: weight for key, weight in self.now.items() if part_of(key) in names}

    def begin(self, names: Sequence[str], weights: Mapping[str, float] | None = None) -> None:
        """Put the weights of these parts to what `held` gave once, or to those that they began with."""
        self.now = {key: weight for key, weight in self.now.items() if part_of(key) not in names}
        self.now |= {name: self.parts[name].weight for name in names} if weights is None else weights

    def weight(self, name: str, prompts: Sequence[str]) -> float | Tensor:
        """What a spread of a part weighs now: one number, or one a prompt [B] where kinds of prompts have weights of their own."""
        if list(self.held((name,))) == [name]:
            return self.now[name]
        kind = self.parts[name].kind
        assert kind is not None
        return torch.tensor([self.now.get(key_of(name, kind(prompt)), self.now[name]) for prompt in prompts])

    def judge(self, marks: Tensor, prompts: Sequence[str], stated: bool = False) -> Judgement:
        """marks [B, P] of clips of these prompts -> total = sum of w * z [B], and each part's z. stated: by the weights of the start, so
        that marks of different rounds can be compared.

        A part that alone has a weight is taken as it is, w * mark: there is nothing to weigh it against, and PPO's own
        normaliser brings it to unit scale.
        """
        parts = self.in_spreads(marks)
        if len(self.trained) == 1:
            (name,) = self.trained
            return Judgement(self.parts[name].weight * marks[:, self.names.index(name)], parts)
        return Judgement(self.weighed(parts, prompts, stated), parts)

    def in_spreads(self, marks: Tensor) -> dict[str, Tensor]:
        """marks [B, P] -> each part's z [B]; a part without a scale as it is, which nothing weighs."""
        return {name: (column - self._scale(name)[0]) / self._scale(name)[1] for name, column in zip(self.names, marks.unbind(1))}

    def _scale(self, name: str) -> tuple[float, float]:
        return self.scales.get(name, (0.0, 1.0))

    def weighed(self, z: Mapping[str, Tensor], prompts: Sequence[str], stated: bool = False) -> Tensor:
        """sum of w * z [B] over the trained parts; what a prompt does not ask for counts as the base's mean, and so does a part without a
        scale: nobody knows how much of it is much."""
        total = torch.zeros_like(next(iter(z.values())))
        for name in self.trained:
            if name not in self.scales:
                continue
            part, own = self.parts[name], z[name]
            weight = part.weight if stated else self.weight(name, prompts)
            weight = weight.to(own) if isinstance(weight, Tensor) else weight
            total = total + weight * (torch.where(torch.isnan(own), torch.zeros_like(own), own) if part.asked else own)
        return total

    @property
    def measured(self) -> bool:
        """Whether all scales are known that the worth of a trained part depends on."""
        return not self.without_scale

    def worth(self, prompts: Sequence[str]) -> dict[str, float | Tensor]:
        """d total / d mark of each trained part, as the weights stand: one number, or one a prompt [B]; 0 of a part without a scale beside
        others."""
        if len(self.trained) == 1:
            return {name: self.weight(name, prompts) for name in self.trained}
        return {name: self.weight(name, prompts) / self.scales[name][1] if name in self.scales else 0.0 for name in self.trained}

    @property
    def without_scale(self) -> tuple[str, ...]:
        """Trained parts of which no clip of the base told anything: they are not trained on, beside others."""
        return tuple(name for name in self.trained if name not in self.scales) if len(self.trained) > 1 else ()

    def not_held(self, names: Sequence[str]) -> str | None:
        """What to say of held parts without a scale, whose weights never move; None where all have one."""
        idle = ", ".join(name for name in names if name not in self.scales)
        return f"not held: {idle}, of which no clip of the held-out prompts tells anything" if idle else None

    def figures(self, marks: Tensor) -> dict[str, float]:
        """For plots, of marks [B, P]: mean raw mark of each part that was judged, its mean z, and the share of clips that an `asked`
        part passed over."""
        told: dict[str, float] = {}
        for (name, z), column in zip(self.in_spreads(marks).items(), marks.unbind(1)):
            if name not in self.every_round and bool(torch.isnan(column).all()):
                continue
            there = torch.isfinite(column)
            told[f"reward_{name}"] = float(column[there].mean()) if there.any() else float("nan")
            if name in self.scales:
                told[f"reward_{name}_z"] = float(z[there].mean()) if there.any() else float("nan")
            if self.parts[name].asked:
                told[f"reward_{name}_not_asked"] = float(1 - there.float().mean())
            for key, weight in self.held((name,)).items():
                if weight != self.parts[name].weight:
                    told[f"reward_{key.replace('/', '_')}_weight"] = weight
        return told

    def state_dict(self) -> dict[str, Any]:
        """{weights: name -> as told, scales: name or name/kind -> [mean, sd], now: the same of trained parts -> weight}: what checkpoints
        and the manifests of adapters keep."""
        weights = {name: self.parts[name].weight for name in self.trained}
        scales = {name: list(scale) for name, scale in self.scales.items()}
        return {"weights": weights, "scales": scales, "now": self.held(self.trained)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError where the parts or their weights are not those of the run that is to go on."""
        mine = self.state_dict()["weights"]
        if state["weights"] != mine:
            raise UserError(
                f"a run of the reward {state['weights']}, now {mine}", "the same parts and weights", "resume with its --weights"
            )
        self.scales = {name: (float(mean), float(sd)) for name, (mean, sd) in state["scales"].items()}
        self.now.update(state["now"])


def key_of(name: str, kind: str | None) -> str:
    """Under which the weight and the level of a part stand for prompts of one kind: genre/ambient."""
    return f"{name}/{kind}"


def part_of(key: str) -> str:
    """genre/ambient, or genre -> genre"""
    return key.partition("/")[0]


def spread_within(marks: Tensor, prompts: Sequence[Hashable]) -> float:
    """Standard deviation of marks [N] around the mean of their prompt, unbiased in its square; where no prompt has two marks, or those of a
    prompt never differ, around the mean of all."""
    kinds = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([kinds[prompt] for prompt in prompts], device=marks.device)
    free = len(marks) - len(kinds)
    within = math.sqrt(float(from_group_means(marks[:, None], group).square().sum()) / free) if free else 0.0
    return within if within > 1e-6 * max(1.0, abs(float(marks.mean()))) else float(marks.std(correction=0))


class Mixed:
    """A reward as one judge with one slope: total(codes, prompts) [B], once `reward.measure` has seen clips of the base."""

    def __init__(self, reward: Reward, slopes: Mapping[str, Slope], codebooks: Tensor) -> None:
        """slopes: of the trained parts, those that have one. codebooks [K, V, D]: what each code adds to the latents."""
        self.reward, self.slopes, self.codebooks = reward, slopes, codebooks

    def __call__(self, codes: Tensor, prompts: list[str]) -> Tensor:
        return self.reward.judge(self.reward.marks(codes, prompts), prompts).total

    def slope(self, codes: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """d total / d latents [B, D, T], total [B]. UserError where a trained part has no slope."""
        flat = [name for name in self.reward.trained if name not in self.slopes]
        if flat:
            raise UserError(f"the part {', '.join(flat)}, without a slope", f"parts among {sorted(self.slopes)}", "leave it out")
        slopes = {name: self.slopes[name] for name in self.reward.trained}
        slope, told = weighted_slope(slopes, self.reward.worth(prompts), codes, prompts)
        return slope, self.reward.judge(self.reward.marks(codes, prompts, known=told), prompts).total


def parse_weights(text: str) -> dict[str, float]:
    """'human=1.0,similarity=0.3' -> {"human": 1.0, "similarity": 0.3}. Raises UserError for anything else, or without a weight."""
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, number = (piece.strip() for piece in item.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not equals or not math.isfinite(weight) or name in weights:
            raise UserError(
                f"{item.strip()!r} in the weights {text!r}", "name=number, each name once", "write e.g. human=1.0,similarity=0.3"
            )
        weights[name] = weight
    if not any(weights.values()):
        raise UserError(f"weights {text!r}, all zero", "a part that is trained on", "give at least one of them a weight")
    return weights


def check_groups(weights: Mapping[str, float], clips: int, a_prompt: int) -> None:
    """Refuse a weight of diversity where one process, which plays `clips` a round, would have a part of a prompt's `a_prompt` clips."""
    if weights.get("diversity") and clips % max(a_prompt, 1):
        raise UserError(
            f"a weight of diversity with {a_prompt} clips a prompt, {clips} clips a process",
            "whole groups on each process: clips of one prompt are compared where they are played",
            "set --batch-size to a multiple of the processes times --samples-per-prompt",
        )


def check_hold(hold: str, weights: Mapping[str, float], rate: float, slack: float) -> None:
    """UserError for what --hold, --hold-rate and --hold-slack cannot mean."""
    held_parts(hold, weights)
    for name, value in (("--hold-rate", rate), ("--hold-slack", slack)):
        if not 0 <= value < math.inf:
            raise UserError(f"{name} {value:g}", "0 or more", "0.5 is slow, 1 fast" if name == "--hold-rate" else "0 is strict, 1 lenient")


def held_parts(text: str, weights: Mapping[str, float]) -> tuple[str, ...]:
    """'similarity,tempo' -> ("similarity", "tempo"). UserError for one without a weight to begin with, or where nothing else is trained."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    idle = [name for name in names if weights.get(name, 0) <= 0]
    if idle:
        raise UserError(
            f"--hold {text} without a weight of {', '.join(idle)}", "a weight to begin with", f"add {idle[0]}=0.35 to --weights"
        )
    if names and not [name for name, weight in weights.items() if weight and name not in names]:
        raise UserError(f"--hold {text}, all that is trained on", "a part that is to rise", "hold fewer parts")
    return names


def weighted(
    weights: Mapping[str, float],
    human: Score | None,
    checks: Mapping[str, Score],
    least: float = 0.0,
    watched: Score | None = None,
    voted: Collection[str] = (),
) -> Reward:
    """The listeners' part and the checks (verifiable parts, `asked`) under these weights: those that are named are judged every round,
    those that are not have weight 0. UserError for an unknown name. human: None where no listener is asked; `human=0` may be said then.
    least: the listeners' least spread that counts as one (LEAST_LOGITS for a reward model), which holds for the `voted` of the checks as
    well: those that votes taught too (aspects). watched: a judge that can have no weight."""
    if human is None and not weights.get(HUMAN):
        weights = {name: weight for name, weight in weights.items() if name != HUMAN}
    parts = {name: Part(score, asked=True, least=least if name in voted else 0.0, kind=KINDS.get(name)) for name, score in checks.items()}
    known = ({} if human is None else {HUMAN: Part(human, least=least)}) | parts
    unknown = sorted(set(weights) - set(known))
    if unknown:
        raise UserError(f"weights for {unknown}", f"some of {list(known)}", "correct --weights")
    parts = {name: replace(part, weight=weights.get(name, 0.0)) for name, part in known.items()}
    return Reward(parts | ({} if watched is None else {WATCHED: Part(watched, 0.0)}), tuple(weights))
