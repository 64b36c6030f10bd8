"""A reward that reads codec tokens on trial: it is kept only where it foretells held-out votes better than frozen features do.

    for each outer fold: pairs of the other folds -> a trunk (rlhf.token_fit) -> scores of the fold's clips
    single votes -> right or wrong by either reward -> the difference, with its interval by prompt -> kept, or not

Each fit is written down as soon as it is done, under a name that hashes all it depends on: a run that was interrupted goes on from
there, and a fit is found again only where it would come out the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from base_models.checkpoint import load_tensors, save_tensors, tensors_sha256
from rlhf import metrics
from rlhf.preferences import TIE, prompt_folds
from rlhf.rater_weights import Weighing
from rlhf.reward_folds import Clips, Folds, margins, ordering
from rlhf.reward_gates import drawn
from rlhf.reward_heads import Pairs, bootstrap, pessimistic
from rlhf.snapshot import Vote
from rlhf.token_fit import Recipe, batches, fit_member, standardise
from rlhf.token_reward import Speaker, TokenTrunk, TrunkShape

INNER = 8
"""One part in so many of the prompts that a trunk may learn from decides when it stops."""
OVERFIT = Recipe(epochs=30, batch=20, window=10**6)
"""How a trunk shows that it can learn 20 pairs by heart."""


@dataclass(frozen=True)
class Trial:
    """On what trunks are fitted, and how."""

    base: Speaker
    sha256: str
    """The base's."""
    clips: Clips
    folds: Folds
    shape: TrunkShape
    recipe: Recipe
    members: int
    lam: float
    seed: int
    memory: Path
    """Folder of the fits that are done."""
    progress: bool = False

    def unseen(self, pairs: Sequence[Pairs]) -> Tensor:
        """[n_folds, N]: row f by trunks that have not met fold f, told for the clips of fold f alone (NaN elsewhere). pairs: by fold."""
        fold = self.folds.fold[self.clips.prompt]

        def job(f: int) -> Tensor:
            training = pairs[f].index(self.folds.of(pairs[f]) != f)

            def fitted() -> Tensor:
                trunk = self.fit(training, self.seed + f + 1, f"fold {f + 1} of {self.folds.n}")
                rows = (fold == f).nonzero()[:, 0]
                scores = torch.full((len(self.clips),), float("nan"))
                scores[rows] = pessimistic(self.scores(trunk, rows), self.lam)
                return scores

            return self.remembered(f"fold {f}", training, fitted)

        return self.folds.share(self.folds.n, job)

    def kept(self, pairs: Pairs) -> TokenTrunk:
        """The trunk from all pairs, the same on every process."""
        fresh = self.fresh(self.seed)
        sizes = {name: tensor.shape for name, tensor in fresh.tensors().items()}

        def job(_: int) -> Tensor:
            def fitted() -> Tensor:
                made = self.fit(pairs, self.seed, "all prompts").tensors()
                return torch.cat([made[name].flatten() for name in sizes])

            return self.remembered("all", pairs, fitted)

        flat = self.folds.share(1, job)[0].split([math.prod(shape) for shape in sizes.values()])
        fresh.fill({name: part.reshape(shape) for (name, shape), part in zip(sizes.items(), flat)})
        return fresh

    def overfit(self, pairs: Pairs) -> float:
        """Accuracy on 20 decided pairs of a trunk that has learnt these alone: whether it can learn at all."""
        few = drawn(pairs, self.seed)
        trunk = self.fresh(self.seed, 1)
        standardise(trunk, self.clips.codes, self.clips.prompts)
        fit_member(trunk, 0, self.clips.codes, self.clips.prompts, few, few, OVERFIT, self.seed)
        scores = torch.zeros(len(self.clips))
        rows = torch.unique(torch.cat([few.chosen, few.rejected]))
        scores[rows] = self.scores(trunk, rows)[0]
        return float(_right(margins(scores.expand(len(few), -1), few)).mean())

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def fresh(self, seed: int, members: int | None = None) -> TokenTrunk:
        return TokenTrunk(self.base, self.shape, self.members if members is None else members, seed)

    def fit(self, pairs: Pairs, seed: int, what: str) -> TokenTrunk:
        """Every member on a bootstrap of the learning prompts (a single one on all), with its own inner prompts."""
        trunk = self.fresh(seed)
        standardise(trunk, self.clips.codes, self.clips.prompts)
        steps = self.members * self.recipe.epochs * math.ceil(len(pairs) * (INNER - 1) / INNER / self.recipe.batch)
        with tqdm(total=steps, desc=f"trunk, {what}", unit="step", disable=not self.progress, dynamic_ncols=True) as bar:
            for index in range(self.members):
                own = seed * 1000 + index
                held = self.inner(pairs, own)
                learn = pairs.index(~held)
                learn = bootstrap(learn, own) if self.members > 1 else learn
                losses = fit_member(
                    trunk, index, self.clips.codes, self.clips.prompts, learn, pairs.index(held), self.recipe, own, lambda: _step(bar)
                )
                bar.set_postfix(inner_loss=f"{min(losses):.4f}", before=f"{losses[0]:.4f}")
        used = torch.unique(torch.cat([pairs.chosen, pairs.rejected]))
        trunk.offsets = self.scores(trunk, used).mean(1).to(trunk.device)
        return trunk

    def inner(self, pairs: Pairs, seed: int) -> Tensor:
        """[pairs] bool: those that decide when to stop; whole groups of prompts."""
        name_of = {number: self.clips.groups[name] for name, number in self.clips.prompt_number.items()}
        groups = [name_of[number] for number in pairs.prompt.tolist()]
        part = prompt_folds(groups, min(INNER, len(set(groups))), seed)
        return torch.tensor([part[group] == 0 for group in groups])

    def scores(self, trunk: TokenTrunk, rows: Tensor) -> Tensor:
        """[E, rows]: the members' scores of whole clips."""
        parts = batches(self.clips.codes, self.clips.prompts, rows, trunk.device)
        return torch.cat([trunk.member_scores(codes, prompts) for codes, prompts in parts], dim=1).cpu()

    def remembered(self, what: str, pairs: Pairs, make: Callable[[], Tensor]) -> Tensor:
        """What was made from these very pairs with these very settings before, or is made now and kept."""
        settings: dict[str, Any] = {"what": what, "base": self.sha256, "shape": asdict(self.shape), "recipe": asdict(self.recipe)}
        settings |= {"members": self.members, "lam": self.lam, "seed": self.seed, "clips": list(self.clips.row)}
        content = json.dumps(settings, sort_keys=True) + tensors_sha256(vars(pairs))
        file = self.memory / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.safetensors"
        if not file.is_file():
            self.memory.mkdir(parents=True, exist_ok=True)
            save_tensors(file, {"made": make()})
        return load_tensors(file)["made"]


def _step(bar: tqdm[Any]) -> None:
    bar.update()


@dataclass(frozen=True)
class Verdict:
    """What held-out votes say of a trunk beside frozen features."""

    scores: Tensor
    """[n_folds, N]: the trunk's, told for each fold's own clips."""
    kept: bool
    figures: dict[str, Any]


def verdict(trial: Trial, weighing: Weighing, votes: Sequence[Vote], forced: bool) -> Verdict:
    """Vote by vote on unseen prompts: the trunk's accuracy, that of frozen features, and the difference with its interval by prompt.

    Args: weighing: the scores by frozen features, and the pairs that they were fitted on, which are the trunk's as well.
        forced: keep the trunk whatever the votes say.
    """
    scores = trial.unseen(weighing.training)
    told = [vote for vote in ordering(votes) if vote.choice != TIE]
    single, prompts = trial.clips.single(told), [vote.prompt_id for vote in told]
    right = {name: _right(trial.folds.margins(rows, single)).numpy() for name, rows in (("tokens", scores), ("frozen", weighing.scores))}
    gain = metrics.mean_ci(right["tokens"] - right["frozen"], prompts, seed=trial.seed)
    each = {name: metrics.mean_ci(values, prompts, seed=trial.seed).as_json() for name, values in right.items()}
    kept = forced or gain.ci[0] > 0
    figures = {**each, "gain": gain.as_json(), "kept": kept, "forced": forced, "members": trial.members, **asdict(trial.shape)}
    return Verdict(scores, kept, figures)


def _right(margin: Tensor) -> Tensor:
    assert bool(torch.isfinite(margin).all()), "a vote on a clip of another fold than its prompt's"
    return (margin > 0).double() + 0.5 * (margin == 0)
