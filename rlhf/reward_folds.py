"""Held-out votes as judges: which heads, which weights of raters, and how right, each told by heads that never met the prompt.

    snapshot -> Clips: rows of a feature table; votes and preferences as pairs of rows
    pairs, folds of prompts -> scores [n_folds, N]: row f by heads that have not seen fold f
                            -> margins of any pairs, each from the row of its own fold

Prompts are joined into one group where clips of one artist, or a clip, link them (`prompt_groups`), so that none stands on both sides
of a fold. Raters are split as well, in a grid: `unseen_raters` tells votes of raters who are new, on prompts that are new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rlhf.preferences import BOTH_BAD, TIE, Codes, Preference, Snapshot, Vote, X, checked_codes, prompt_folds, prompt_groups
from rlhf.reward_committee import Committee
from rlhf.reward_features import Base, Table, features, loudness_and_length
from rlhf.reward_heads import Head, Pairs, Share, alone, expand, fit, log_loss, make_lens, pessimistic, sure_temperature


class Clips:
    """The clips that votes are about (gold questions left out), as rows of a table in the order of their hashes."""

    def __init__(self, snapshot: Snapshot, n_q: int, card: int) -> None:
        votes = snapshot.judged
        named = sorted({clip for vote in votes for clip in (vote.clip_x, vote.clip_y)})
        self.row = {sha256: index for index, sha256 in enumerate(named)}
        self.known: dict[str, Codes] = {sha256: checked_codes(snapshot, sha256, n_q, card) for sha256 in named}
        self.codes = [torch.from_numpy(self.known[sha256])[None] for sha256 in named]
        self.prompts = [snapshot.clips[sha256].prompt for sha256 in named]
        prompt_of = [snapshot.clips[sha256].prompt_id for sha256 in named]
        self.prompt_number = {name: index for index, name in enumerate(sorted({*prompt_of, *(vote.prompt_id for vote in votes)}))}
        self.prompt = torch.tensor([self.prompt_number[name] for name in prompt_of])
        self.groups = prompt_groups(snapshot)
        self.voted = sorted({vote.prompt_id for vote in ordering(votes)})
        self.n_artists = len({snapshot.clips[sha256].artist for sha256 in named} - {""})

    def __len__(self) -> int:
        return len(self.codes)

    def table(self, base: Base, blocks: Sequence[str], share: Share, progress: bool) -> Table:
        """The frozen features of all clips: blocks [N, F]."""
        bar = tqdm(total=len(self.codes), desc="features", unit="clip", disable=not progress, dynamic_ncols=True)
        width: dict[str, int] = {}

        def job(index: int) -> Tensor:
            bar.update()
            made = features(base, self.codes[index], [self.prompts[index]], blocks)
            width.update({block: rows.shape[1] for block, rows in made.items()})
            return torch.cat([rows[0] for rows in made.values()])

        with bar:
            whole = share(len(self.codes), job)
        return dict(zip(width, whole.split(list(width.values()), dim=1)))

    def pairs(self, preferences: Sequence[Preference]) -> Pairs:
        return Pairs(
            chosen=torch.tensor([self.row[p.chosen_sha256] for p in preferences]),
            rejected=torch.tensor([self.row[p.rejected_sha256] for p in preferences]),
            p=torch.tensor([p.p for p in preferences], dtype=torch.float32),
            weight=torch.tensor([p.weight for p in preferences], dtype=torch.float32),
            prompt=torch.tensor([self.prompt_number[p.prompt_id] for p in preferences]),
        )

    def single(self, votes: Sequence[Vote]) -> Pairs:
        """Votes one by one, all alike: chosen is what was named (of a tie, x), p is 1, of a tie 1/2."""
        sides = [(vote.clip_x, vote.clip_y) if vote.choice in (X, TIE) else (vote.clip_y, vote.clip_x) for vote in votes]
        return Pairs(
            chosen=torch.tensor([self.row[chosen] for chosen, _ in sides], dtype=torch.long),
            rejected=torch.tensor([self.row[rejected] for _, rejected in sides], dtype=torch.long),
            p=torch.tensor([0.5 if vote.choice == TIE else 1.0 for vote in votes]),
            weight=torch.ones(len(votes)),
            prompt=torch.tensor([self.prompt_number[vote.prompt_id] for vote in votes], dtype=torch.long),
        )

    def fold_of_prompt(self, n_folds: int, seed: int) -> Tensor:
        """[prompts] long: the fold of each prompt; prompts that share an artist share a fold.

        Raises: NothingToLearnError when votes order clips of fewer groups than folds.
        """
        fold = prompt_folds({self.groups[name] for name in self.voted}, n_folds, seed)
        return torch.tensor([fold.get(self.groups[name], 0) for name in self.prompt_number])


def ordering(votes: Sequence[Vote]) -> list[Vote]:
    """The votes that order two clips, gold questions left out."""
    return [vote for vote in votes if vote.choice != BOTH_BAD and not vote.gold]


@dataclass(frozen=True)
class Folds:
    """What every judgement shares: what heads are linear in, by head [N, P]; the fold of each prompt; how jobs are spread."""

    inputs: Mapping[Head, Tensor]
    fold: Tensor
    n: int
    share: Share = alone

    def of(self, pairs: Pairs) -> Tensor:
        """[pairs]: each one's fold."""
        return self.fold[pairs.prompt]

    def margins(self, scores: Tensor, pairs: Pairs) -> Tensor:
        """score(chosen) - score(rejected) [pairs], from the row of each pair's own fold. scores [n, N]."""
        return margins(scores[self.of(pairs)], pairs)


def margins(scores: Tensor, pairs: Pairs) -> Tensor:
    """Row i of scores [pairs, N] -> its margin of pair i [pairs]."""
    each = torch.arange(len(pairs))
    return scores[each, pairs.chosen] - scores[each, pairs.rejected]


@dataclass(frozen=True)
class Choice:
    """Which committee of heads, by held-out votes."""

    losses: dict[Committee, float]
    """Held-out loss of every candidate over all folds."""
    chosen: list[Committee]
    """For each fold the committee that is best on the *others*: the fold has no say in its own."""
    inner: list[Tensor]
    """For each fold f, scores [n, N] by its committee: row g from a fit that has seen neither f nor g."""

    @property
    def best(self) -> Committee:
        return min(self.losses, key=lambda committee: self.losses[committee])


def choose_committee(folds: Folds, pairs: Pairs, among: Sequence[Committee]) -> Choice:
    """Compare committees. For fold f they are compared on folds g != f with fits that have seen neither f nor g; a head that sits in
    several is fitted once."""
    heads, fold = list(dict.fromkeys(head for committee in among for head in committee.heads)), folds.of(pairs)
    outs: list[tuple[int, ...]] = [(f,) for f in range(folds.n)] + list(combinations(range(folds.n), 2))
    jobs = [(head, out) for head in heads for out in outs]

    def job(index: int) -> Tensor:
        head, out = jobs[index]
        seen = ~torch.isin(fold, torch.tensor(out))
        return folds.inputs[head] @ fit(head, folds.inputs[head], pairs.index(seen))

    found = dict(zip(jobs, folds.share(len(jobs), job)))
    size = [float(pairs.weight[fold == f].sum()) for f in range(folds.n)]

    def scores(committee: Committee, out: tuple[int, ...]) -> Tensor:
        return torch.stack([found[head, out] for head in committee.heads]).mean(0)

    def loss(committee: Committee, out: tuple[int, ...], on: int) -> float:
        rows = pairs.index(fold == on)
        if not (len(rows) and size[on]):
            return 0.0
        told = scores(committee, out)
        return log_loss(told[rows.chosen] - told[rows.rejected], rows)

    total = {committee: sum(size[f] * loss(committee, (f,), f) for f in range(folds.n)) / sum(size) for committee in among}
    chosen, inner = [], []
    for f in range(folds.n):
        both = {g: (min(f, g), max(f, g)) if g != f else (f,) for g in range(folds.n)}
        without = {committee: sum(size[g] * loss(committee, both[g], g) for g in range(folds.n) if g != f) for committee in among}
        chosen.append(min(without, key=lambda committee: without[committee]))
        inner.append(torch.stack([scores(chosen[f], both[g]) for g in range(folds.n)]))
    return Choice(total, chosen, inner)


def unseen_scores(
    folds: Folds, pairs: Pairs | Sequence[Pairs], chosen: Sequence[Committee], n_members: int, seed: int, lam: float = 0.0
) -> Tensor:
    """[n, N]: row f by an ensemble of committee chosen[f] that has not seen fold f. pairs: one set for all folds, or one for each."""
    rows = []
    for f, committee in enumerate(chosen):
        training = pairs if isinstance(pairs, Pairs) else pairs[f]
        seen = training.index(folds.of(training) != f)
        members, offsets = committee.ensemble(folds.inputs, seen, n_members, seed + f + 1, folds.share)
        rows.append(pessimistic(members @ committee.inputs(folds.inputs).T - offsets[:, None], lam))
    return torch.stack(rows)


def baseline_scores(base: Base, clips: Clips, folds: Folds, pairs: Pairs) -> Tensor:
    """[n, N]: the same by a Gaussian process over loudness and length alone: what needs no ear."""
    table = {"loudness": folds.share(len(clips), lambda index: loudness_and_length(base, clips.codes[index])[0])}
    head = Head("kernel", ("loudness",), 1.0)
    inputs = expand(make_lens(head, table, clips.prompt), head, table)
    plain = Folds({head: inputs}, folds.fold, folds.n, folds.share)
    return unseen_scores(plain, pairs, [Committee((head,))] * folds.n, 1, 0)


def cross_calibrated(margin: Tensor, pairs: Pairs, folds: Folds) -> Tensor:
    """Margins divided by a temperature from the other folds [pairs], so that the calibration error is not told on its own fit."""
    result, fold = margin.clone(), folds.of(pairs)
    for f in range(folds.n):
        held = fold == f
        if bool((~held).any()) and float(pairs.weight[~held].sum()) > 0:
            result[held] = margin[held] / sure_temperature(margin[~held], pairs.index(~held))[0]
    return result


def loss_by_fold(margin: Tensor, pairs: Pairs, folds: Folds) -> np.ndarray:
    """[n]: summed loss of calibrated margins over the pairs of each fold; nats."""
    fold = folds.of(pairs)
    return np.array(
        [
            log_loss(margin[fold == f], pairs.index(fold == f)) * float(pairs.weight[fold == f].sum()) if bool((fold == f).any()) else 0.0
            for f in range(folds.n)
        ]
    )


def unseen_raters(
    folds: Folds,
    clips: Clips,
    votes: Sequence[Vote],
    pairs_of: Callable[[Sequence[Vote]], Sequence[Preference]],
    chosen: Sequence[Committee],
    seed: int,
) -> Tensor | None:
    """Margins [votes] of single votes by fits that have met neither the vote's prompt nor its rater. None with fewer than two raters.

    A grid of folds of prompts and folds of raters, each cell by a fit on all votes outside of both. The committees are `chosen`,
    by prompts alone. pairs_of: votes -> preferences.
    """
    names = sorted({vote.rater for vote in votes})
    n_groups = min(folds.n, len(names))
    if n_groups < 2:
        return None
    group = prompt_folds(names, n_groups, seed)
    known = [clips.pairs(pairs_of([vote for vote in votes if group[vote.rater] != g])) for g in range(n_groups)]
    cells = [(f, g) for f in range(folds.n) for g in range(n_groups)]

    def job(index: int) -> Tensor:
        f, g = cells[index]
        return chosen[f].scores(folds.inputs, known[g].index(folds.of(known[g]) != f))

    scores = folds.share(len(cells), job)
    single = clips.single(votes)
    cell = folds.of(single) * n_groups + torch.tensor([group[vote.rater] for vote in votes])
    return margins(scores[cell], single)
