"""Several heads asked together: the mean of their scores.

    committee of heads, what each is linear in [N, P_h] -> every head fitted by itself -> members [E, sum of P_h] / number of heads

Every head is wrong in a way of its own: what one makes of chance the others contradict. With a few thousand noisy votes the mean
foretells unseen ones better than the head that held-out votes would choose, and chance has less to choose from
(docs/reward-model.md has the figures). The mean of such scores, without weights, is the combination that votes need not
teach (Clemen 1989, "Combining forecasts", International Journal of Forecasting 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.reward_features import DESCRIPTORS, DETAILS, Table
from rlhf.reward_heads import Head, Lens, Pairs, Share, alone, candidates, expand, fit, fit_ensemble


@dataclass(frozen=True)
class Committee:
    """Heads whose scores are averaged; one head is a committee of its own."""

    heads: tuple[Head, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """What it reads, each block once."""
        return tuple(dict.fromkeys(block for head in self.heads for block in head.blocks))

    def inputs(self, of: Mapping[Head, Tensor]) -> Tensor:
        """What each head is linear in [N, P_h] -> side by side [N, P], as `members` weigh it."""
        return torch.cat([of[head] for head in self.heads], dim=1)

    def expand(self, lenses: Sequence[Lens], table: Table) -> Tensor:
        """Blocks [B, F] -> the same of any clips [B, P]."""
        return torch.cat([expand(lens, head, table) for head, lens in zip(self.heads, lenses, strict=True)], dim=1)

    def scores(self, of: Mapping[Head, Tensor], pairs: Pairs) -> Tensor:
        """The score of every row [N] by heads that are fitted on `pairs`."""
        return torch.stack([of[head] @ fit(head, of[head], pairs) for head in self.heads]).mean(0)

    def ensemble(self, of: Mapping[Head, Tensor], pairs: Pairs, n_members: int, seed: int, share: Share = alone) -> tuple[Tensor, Tensor]:
        """Members [E, P] fitted on bootstraps of the prompts, each a committee on the same draw, and their offsets [E]."""
        found = [fit_ensemble(head, of[head], pairs, n_members, seed, share) for head in self.heads]
        members = torch.cat([members for members, _ in found], dim=1) / len(self.heads)
        return members, torch.stack([offsets for _, offsets in found]).mean(0)

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(head) for head in self.heads]


def read_committee(told: Sequence[Mapping[str, Any]]) -> Committee:
    """What `as_json` told."""
    return Committee(tuple(Head(**{**head, "blocks": tuple(head["blocks"])}) for head in told))


def committees(blocks: Sequence[str]) -> tuple[Committee, ...]:
    """Which held-out votes choose among, for a base that gives these blocks: heads that hear what has a name (tempo, brightness ...),
    heads that hear details of it as well, both, heads that hear statistics of the codec and the audio-text space, or all of them."""
    heads = candidates(blocks)
    few = tuple(head for head in heads if DESCRIPTORS in head.blocks and DETAILS not in head.blocks)
    many = tuple(head for head in heads if DETAILS in head.blocks)
    plain = tuple(head for head in heads if DESCRIPTORS not in head.blocks)
    asked = (few, many, few + many, plain, heads)
    return tuple(Committee(group) for group in dict.fromkeys(asked) if group)
