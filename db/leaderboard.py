"""What the votes say about the systems: strengths with intervals, who beat whom, and how many votes are still wanted.

    tally -> rules by rater -> Davidson's model -> standings          votes by pair -> alpha, agreement, ceiling

First answers that count are ranked; gold pairs and repeats tell of raters only. "Both bad" orders nothing and is counted apart.
A board may be narrowed to one tag of the pairs (`genre:jazz`, `split:heldout`) or ask one aspect instead of the vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db import davidson, quality
from db.quality import Rules, clip_x
from db.schema import Assignment, Campaign, Pair, Prompt, Vote

if TYPE_CHECKING:
    from db.store import Store


@dataclass(frozen=True)
class Standing:
    """One system on the board. Strengths are in nats of Davidson's model, mean 0: a gap of 1 is e : 1 among decided votes."""

    system: str
    strength: float
    ci: tuple[float, float] | None
    """95 %, clustered by rater; None with a single rater."""
    n_votes: int
    wins: int
    losses: int
    ties: int
    both_bad: int
    separate: bool | None
    """Whether the 95 % interval of the gap to the next system leaves out 0; None for the last."""
    votes_needed: int | None
    """Votes still needed to tell it from the next one (davidson.votes_needed); None for the last, or when no number would do."""


@dataclass(frozen=True)
class Leaderboard:
    """Systems, strongest first, and what stands behind the order."""

    campaign: str
    aspect: str | None
    tag: str | None
    standings: tuple[Standing, ...]
    wins: tuple[tuple[int, ...], ...]
    """wins[i][j]: votes for standing i over standing j."""
    ties: tuple[tuple[int, ...], ...]
    """Symmetric, each tie counted once in [i][j] and once in [j][i]."""
    n_votes: int
    """Votes that rank: for a side, or a tie, between different systems."""
    n_both_bad: int
    n_raters: int
    """Whose votes rank."""
    excluded: dict[str, int]
    """Votes that do not count, by reason; gold pairs and repeats among them."""
    tie: float | None
    """Davidson's nu: of votes between equals, nu / (2 + nu) are ties; None without votes."""
    side_bias: float | None
    """Advantage of side A, nats; None without votes."""
    connected: bool
    """Whether all systems can be compared, if only by way of third ones."""
    votes_by_day: tuple[tuple[str, int], ...]
    """(UTC day, votes that were given, whether they count or not)."""
    agreement: quality.Agreement | None
    alpha: float | None
    """Krippendorff's alpha over x, y, tie and both bad."""


def leaderboard(
    store: Store, campaign: str, aspect: str | None = None, tag: str | None = None, rules: Rules = quality.DEFAULT
) -> Leaderboard:
    """The board of a campaign, as of now.

    Args: aspect: rank by this aspect's sign, 0 being a tie. tag: `genre:NAME` or `split:NAME`, see `tags`. rules: which votes count;
        raters are judged by all their votes in the campaign, whatever the tag.
    Raises: NotFoundError for an unknown campaign; StoreError for an unknown aspect or kind of tag.
    """
    with store.read() as session:
        found = quality.find_campaign(session, campaign)
        whole = quality.tally(session, found, rules)
        out = quality.doubted(quality.measure(session, found, whole), rules)
        cells = whole if aspect is None and tag is None else quality.tally(session, found, rules, aspect, tag)
        answers = list(quality.answers_by_pair(session, found, rules, out, aspect, tag).values())
        days = _votes_by_day(session, found)
    reasons = Counter[str]()
    both_bad = Counter[str]()
    n_both_bad = 0
    for cell in cells:
        reason = cell.reason or out.get(cell.rater_id)
        if reason is not None:
            reasons[reason] += cell.n
        elif cell.kind == "normal" and cell.choice == "both_bad":
            n_both_bad += cell.n
            both_bad.update(dict.fromkeys({cell.a, cell.b}, cell.n))
    counts = quality.ordering(cell for cell in cells if cell.rater_id not in out)
    model, covariance = davidson.fit_with_covariance(counts) if counts.n.sum() else (None, None)
    order = sorted(model.strengths, key=lambda system: -model.strengths[system]) if model else []
    wins, ties = _matrices(counts, order)
    return Leaderboard(
        campaign=campaign,
        aspect=aspect,
        tag=tag,
        standings=_standings(counts, model, covariance, order, wins, ties, both_bad),
        wins=tuple(tuple(map(int, row)) for row in wins),
        ties=tuple(tuple(map(int, row)) for row in ties),
        n_votes=int(counts.n.sum()),
        n_both_bad=n_both_bad,
        n_raters=len(counts.raters),
        excluded=dict(sorted(reasons.items())),
        tie=model.tie if model else None,
        side_bias=model.side_bias if model else None,
        connected=counts.connected(),
        votes_by_day=days,
        agreement=quality.agreement((said[0], said[1]) for said in answers),
        alpha=quality.alpha(answers) if answers else None,
    )


def tags(store: Store, campaign: str) -> list[str]:
    """The tags a board of this campaign can be narrowed to, in order. Raises NotFoundError."""
    with store.read() as session:
        found = quality.find_campaign(session, campaign)
        genres = select(clip_x.genre).join(Pair, Pair.clip_x_id == clip_x.id).where(Pair.campaign_id == found.id).distinct()
        splits = select(Prompt.split).join(Pair, Pair.prompt_id == Prompt.id).where(Pair.campaign_id == found.id).distinct()
        return sorted(
            [f"genre:{genre}" for genre in session.scalars(genres) if genre] + [f"split:{split}" for split in session.scalars(splits)]
        )


def _standings(
    counts: davidson.Counts,
    model: davidson.Davidson | None,
    covariance: davidson.Array | None,
    order: list[str],
    wins: davidson.Array,
    ties: davidson.Array,
    both_bad: Mapping[str, int],
) -> tuple[Standing, ...]:
    if model is None:
        return ()
    number = {system: i for i, system in enumerate(counts.systems)}
    n_raters, n_votes, group = len(counts.raters), int(counts.n.sum()), counts.groups()
    half = None if covariance is None else davidson.half_widths(covariance, n_raters)
    standings = []
    for place, system in enumerate(order):
        strength = model.strengths[system]
        separate, needed = None, None
        if covariance is not None and place + 1 < len(order):
            i, j = number[system], number[order[place + 1]]
            if group[i] == group[j]:  # strengths of two groups say nothing of each other, and no more votes of the same would
                needed = davidson.votes_needed(strength - model.strengths[order[place + 1]], covariance, i, j, n_votes, n_raters)
            separate = needed == 0
        won, lost, tied = int(wins[place].sum()), int(wins[:, place].sum()), int(ties[place].sum())
        standings.append(
            Standing(
                system=system,
                strength=strength,
                ci=None if half is None else (strength - float(half[number[system]]), strength + float(half[number[system]])),
                n_votes=won + lost + tied,
                wins=won,
                losses=lost,
                ties=tied,
                both_bad=both_bad.get(system, 0),
                separate=separate,
                votes_needed=needed,
            )
        )
    return tuple(standings)


def _matrices(counts: davidson.Counts, order: list[str]) -> tuple[davidson.Array, davidson.Array]:
    """Wins and ties [P, P], systems in this order."""
    size = len(order)
    place = np.array([order.index(system) for system in counts.systems], dtype=np.int64)
    wins, ties = np.zeros((size, size)), np.zeros((size, size))
    if size:
        a, b = place[counts.a], place[counts.b]
        np.add.at(wins, (a, b), counts.n[:, 0])
        np.add.at(wins, (b, a), counts.n[:, 1])
        np.add.at(ties, (a, b), counts.n[:, 2])
        np.add.at(ties, (b, a), counts.n[:, 2])
    return wins, ties


def _votes_by_day(session: Session, campaign: Campaign) -> tuple[tuple[str, int], ...]:
    utc = Vote.created_at if session.get_bind().dialect.name == "sqlite" else func.timezone("UTC", Vote.created_at)
    day = func.date(utc)
    statement = (
        select(day, func.count())
        .select_from(Vote)
        .join(Assignment, Assignment.id == Vote.assignment_id)
        .join(Pair, Pair.id == Assignment.pair_id)
        .where(Pair.campaign_id == campaign.id)
        .group_by(day)
        .order_by(day)
    )
    return tuple((str(at), n) for at, n in session.execute(statement))
