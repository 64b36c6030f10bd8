"""A snapshot's votes as a trainer of policies takes them: whom to believe, what is left to learn, which prompts stand together.

    snapshot -> raters' reliability (rlhf.raters) -> weights -> pairs, or a refusal where no vote tells which clip is better

Without this a careless rater would count in DPO, KTO and fine-tuning like a careful one, and an adversary against everybody else.
Agreement is all that is known without a reward model: where no pair was answered by two raters, all weigh alike, and only
`train_reward.py`, which hears the clips, can tell who does not listen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf import raters
from rlhf.preferences import BOTH_BAD, Preference, Snapshot, demand_decided, pairs_sha256, prompt_groups, training_pairs
from rlhf.snapshot import NothingToLearnError

WeightsBy = Literal["agreement", "nothing"]


@dataclass(frozen=True)
class Voted:
    """What was voted, by those who can be relied on."""

    pairs: list[Preference]
    weights: Mapping[str, float] | None
    """rater -> weight; None: all alike."""
    groups: dict[str, str]
    """prompt_id -> the group it is held out with."""
    figures: dict[str, Any] = field(default_factory=dict)
    """For the manifest. It travels with the adapter, so it counts raters and names none."""
    notes: tuple[str, ...] = ()
    """What the user should know, one line each."""


def demand_raters(who: Sequence[str], one_rater: bool) -> None:
    """Raises: NothingToLearnError where all votes that order are one rater's, and nobody said that this is meant."""
    if len(who) == 1 and not one_rater:
        raise NothingToLearnError(
            f"votes of one rater alone ({who[0]})",
            "at least two raters, else nobody can tell how right a model of them can be",
            "invite a second rater, or pass --one-rater to learn this one person's taste",
        )


def trusted(snapshot: Snapshot, weights_by: WeightsBy, n_q: int, card: int, one_rater: bool = False) -> Voted:
    """The pairs of a snapshot with its raters weighed as `train_reward.py` weighs them by agreement; adversaries are silent.

    Raises: NothingToLearnError when no pair is ordered by raters who are trusted, or all are ties; for the votes of a single rater, but
        with `one_rater`. UserError when codes are not of n_q books of `card` entries.
    """
    who = sorted({vote.rater for vote in snapshot.votes if vote.choice != BOTH_BAD and not vote.gold})
    demand_raters(who, one_rater)
    weights = None if weights_by == "nothing" else raters.weights(raters.reliability(snapshot.votes))
    pairs = demand_decided(training_pairs(snapshot, weights, n_q=n_q, card=card))
    silent = [name for name in who if weights is not None and weights[name] == 0]
    figures = {"raters": len(who), "raters_silent": len(silent), "weights_by": weights_by, "pairs_sha256": pairs_sha256(pairs)}
    notes = []
    if len(who) == 1:
        notes.append(f"votes of one rater alone ({who[0]}): this learns one person's taste, and nobody can tell how right it can be")
    if silent:
        notes.append(f"raters who answer no better than a coin, and count for nothing: {', '.join(silent)}")
    return Voted(pairs, weights, prompt_groups(snapshot), figures, tuple(notes))
