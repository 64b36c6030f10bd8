"""More heads beside the order of clips: one for each aspect that raters judge apart, one for "both bad", one for marked frames.
Each but that of frames is a committee of heads, as the order's is (rlhf.reward_committee).

    aspects of preferences -> soft labels -> a head an aspect, judged on prompts it has not met
    both-bad votes -> their clips lose against clips that won elsewhere -> a head; a level on its scale from the votes -> log-odds
    marked stretches -> a head over frames (rlhf.frame_reward)

"Both bad" orders nothing, but it is the only absolute thing a rater says. Its clips are compared with winners of other pairs,
beside the ordinary comparisons; the level below which the better of two clips is called bad is then fitted to all votes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from base_models.codec import Codec
from rlhf import frame_reward, metrics
from rlhf.preferences import BOTH_BAD, Preference, Snapshot, Vote, clip_marks
from rlhf.reward_committee import Committee
from rlhf.reward_folds import Clips, Folds, ordering, unseen_scores
from rlhf.reward_heads import Pairs, sure_temperature
from rlhf.reward_model import ACCEPTABLE, Extra

MIN_PAIRS = 30
"""An aspect has a head from so many pairs on that it decides, and "both bad" from so many votes on."""
MIN_MARKED = 20
"""Frames have a head from so many marked clips on."""
ABSOLUTE = 0.3
"""What a comparison between a clip called bad and a winner elsewhere weighs beside an ordinary one."""


@dataclass(frozen=True)
class Fitted:
    """A head, and what was measured of it. No head where votes are too few."""

    extra: Extra | None
    figures: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """On what every extra head is judged, and how it is fitted."""

    folds: Folds
    clips: Clips
    chosen: Sequence[Committee]
    """The committees by fold that judge."""
    committee: Committee
    """The one that is kept."""
    members: int
    seed: int

    def unseen(self, pairs: Pairs) -> Tensor:
        """[n_folds, N]: row f by a head that has not met fold f."""
        return unseen_scores(self.folds, pairs, self.chosen, 1, self.seed)

    def kept(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The ensemble on all pairs: members [E, P], offsets [E]."""
        return self.committee.ensemble(self.folds.inputs, pairs, self.members, self.seed, self.folds.share)


def fit_extras(
    bench: Bench, preferences: Sequence[Preference], votes: Sequence[Vote], weights: Mapping[str, float] | None
) -> dict[str, Fitted]:
    """Every aspect that a preference tells, and ACCEPTABLE where anybody said "both bad". weights: rater -> weight."""
    names = sorted({name for pair in preferences for name in pair.aspects})
    found = {name: fit_aspect(bench, preferences, name) for name in names}
    if any(vote.choice == BOTH_BAD and not vote.gold for vote in votes):
        found[ACCEPTABLE] = fit_acceptable(bench, preferences, votes, weights)
    return found


def aspect_pairs(clips: Clips, preferences: Sequence[Preference], name: str) -> Pairs:
    """Comparisons by one aspect: chosen is better at it, p = 1/2 + |score| / 4, so that "much better" is certain."""
    told = [pair for pair in preferences if name in pair.aspects]
    pairs, score = clips.pairs(told), torch.tensor([pair.aspects[name] for pair in told])
    turned = score < 0
    return Pairs(
        torch.where(turned, pairs.rejected, pairs.chosen),
        torch.where(turned, pairs.chosen, pairs.rejected),
        0.5 + score.abs() / 4,
        pairs.weight,
        pairs.prompt,
    )


def fit_aspect(bench: Bench, preferences: Sequence[Preference], name: str) -> Fitted:
    """A head for one aspect, and its accuracy on decided pairs of unseen prompts."""
    pairs = aspect_pairs(bench.clips, preferences, name)
    n = int((pairs.p != 0.5).sum())
    if n < MIN_PAIRS or len(torch.unique(bench.folds.of(pairs))) < bench.folds.n:
        return Fitted(None, {"n": n, "accuracy": None, "ci": None, "asked": MIN_PAIRS})
    margin = bench.folds.margins(bench.unseen(pairs), pairs)
    told = metrics.accuracy(margin.numpy(), pairs.prompt.tolist(), pairs.p.numpy(), bench.seed)
    extra = Extra(*bench.kept(pairs), sure_temperature(margin, pairs)[0])
    return Fitted(extra, {"n": n, "accuracy": told.value, "ci": list(told.ci), "asked": MIN_PAIRS})


def acceptable_pairs(clips: Clips, folds: Folds, pairs: Pairs, bad: Sequence[Vote], decided: Pairs, seed: int) -> Pairs:
    """`pairs`, and each clip of a both-bad vote against a winner drawn from `decided` votes on prompts of the same fold."""
    winners = {f: decided.chosen[folds.of(decided) == f] for f in range(folds.n)}
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, prompt = [], [], []
    for vote in bad:
        number = clips.prompt_number[vote.prompt_id]
        there = winners[int(folds.fold[number])]
        for clip in (vote.clip_x, vote.clip_y):
            if len(there):
                chosen.append(int(there[torch.randint(len(there), (1,), generator=generator)]))
                rejected.append(clips.row[clip])
                prompt.append(number)
    more = len(chosen)
    return Pairs(
        torch.cat([pairs.chosen, torch.tensor(chosen, dtype=torch.long)]),
        torch.cat([pairs.rejected, torch.tensor(rejected, dtype=torch.long)]),
        torch.cat([pairs.p, torch.ones(more)]),
        torch.cat([pairs.weight, torch.full((more,), ABSOLUTE)]),
        torch.cat([pairs.prompt, torch.tensor(prompt, dtype=torch.long)]),
    )


def fit_acceptable(bench: Bench, preferences: Sequence[Preference], votes: Sequence[Vote], weights: Mapping[str, float] | None) -> Fitted:
    """A head whose score is the log-odds that the better of two such clips is not called bad, and how it ranks unseen votes."""
    folds, clips = bench.folds, bench.clips
    trusted = [vote for vote in votes if not vote.gold and (weights is None or weights.get(vote.rater, 0.0) > 0)]
    bad = [vote for vote in trusted if vote.choice == BOTH_BAD]
    if len(bad) < MIN_PAIRS:
        return Fitted(None, {"n": len(bad), "auc": None, "asked": MIN_PAIRS})
    fine = clips.single(ordering(trusted))
    pairs = acceptable_pairs(clips, folds, clips.pairs(preferences), bad, fine.index(fine.p != 0.5), bench.seed)
    scores = bench.unseen(pairs)
    better = _better(scores, clips.single(bad), folds), _better(scores, fine, folds)
    level, slope = level_of(*better)
    members, offsets = bench.kept(pairs)
    figures = {"n": len(bad), "auc": auc(*better), "level": level, "asked": MIN_PAIRS}
    return Fitted(Extra(members, offsets + level, 1 / slope), figures)


def _better(scores: Tensor, pairs: Pairs, folds: Folds) -> np.ndarray:
    """[pairs]: the score of the better clip, by heads that have not met the prompt."""
    rows = scores[folds.of(pairs)]
    return torch.stack([rows.gather(1, side[:, None])[:, 0] for side in (pairs.chosen, pairs.rejected)]).amax(0).double().numpy()


def auc(low: np.ndarray, high: np.ndarray) -> float:
    """How often a value of `high` is above one of `low`; ties count half."""
    gap = high[:, None] - low[None]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def level_of(bad: np.ndarray, fine: np.ndarray) -> tuple[float, float]:
    """Scores of the better clip of both-bad votes, and of others -> level c, slope k > 0 of P(both bad) = sigmoid(k (c - s))."""
    s, y = np.concatenate([bad, fine]), np.concatenate([np.ones(len(bad)), np.zeros(len(fine))])

    def loss(at: np.ndarray) -> float:
        z = np.exp(at[1]) * (at[0] - s)
        return float(np.mean(np.logaddexp(0, -z) * y + np.logaddexp(0, z) * (1 - y)) + 1e-3 * at[1] ** 2)

    found = minimize(loss, np.array([float(np.median(bad)), 0.0]), method="Nelder-Mead", options={"maxiter": 2000})
    return float(found.x[0]), float(np.exp(found.x[1]))


def fit_frame_head(
    bench: Bench, codec: Codec, snapshot: Snapshot, weights: Mapping[str, float] | None
) -> tuple[frame_reward.FrameHead | None, dict[str, Any]]:
    """The head of frames where enough clips are marked, and how well it finds marks in clips of unseen prompts."""
    clips, seed = bench.clips, bench.seed
    prompt_of = {sha256: snapshot.clips[sha256].prompt_id for sha256 in clips.row}
    found = frame_reward.marked_clips(codec, clips.known, clip_marks(snapshot, weights), prompt_of)
    n = len(found.tables)
    if n < MIN_MARKED:
        return None, {"n": n, "auc": None, "ci": None, "asked": MIN_MARKED}
    fold = {name: int(bench.folds.fold[number]) for name, number in clips.prompt_number.items()}
    told = metrics.mean_ci(frame_reward.held_out_auc(found, fold, seed), found.prompt_ids, seed=seed)
    head = frame_reward.fit_frames(found.tables, found.marked, seed)
    return head, {"n": n, "auc": told.value, "ci": list(told.ci), "asked": MIN_MARKED}
