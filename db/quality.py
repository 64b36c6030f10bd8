"""Who can be relied on: what the votes of a campaign say about each rater, and which votes count by rule.

    votes -> tally (alike ones counted, each with the reason that excludes it) -> a Quality for each rater -> Rules -> reasons

Nothing is deleted: a vote that does not count keeps its row, and every export and leaderboard tells how many fell to which
reason. The rules doubt a rater only when chance alone cannot explain what was seen: each share is taken at the far end of its
Wilson interval (Wilson, 1927), and over fewer than `min_controls` questions it says nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import krippendorff
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, String, and_, case, cast, func, literal, null, or_, select
from sqlalchemy.orm import Session, aliased

from db import davidson
from db.errors import NotFoundError, StoreError
from db.schema import ASPECTS, Assignment, Campaign, Clip, Pair, Prompt, Rater, Vote, VoteAspect

if TYPE_CHECKING:
    from db.store import Store

Array = NDArray[np.float64]
Z95 = 1.959964

# Reasons beside those that are stored with a vote, such as `late`.
BLOCKED = "rater_blocked"
LISTENED_TOO_LITTLE = "listened_too_little"
HEARD_TOO_LITTLE = "heard_too_little"
GOLD_MISSED = "gold_missed"
INCONSISTENT = "inconsistent"
ONE_SIDED = "one_sided"
UNRELIABLE = "unreliable"


@dataclass(frozen=True)
class Rules:
    """Which votes count. Raises StoreError for shares outside [0, 1]."""

    min_gold_accuracy: float = 0.6
    """A rater is out when even the upper end of the interval of right answers to gold pairs lies below this."""
    min_repeat_agreement: float = 0.4
    """Likewise for answers that stayed the same when the sides were turned; three keys at random agree in a third."""
    max_side_share: float = 0.85
    """A rater is out when even the lower end of the interval of decided votes for one side lies above this."""
    min_controls: int = 3
    """Gold pairs, or repeats, before they are held against anybody."""
    min_coverage: float = 0.0
    """A vote is out when less than this share of a side was heard, where the player told it."""
    min_reliability: float = 0.0
    """A rater is out whose scale in Davidson's model is below this."""

    def __post_init__(self) -> None:
        for name in ("min_gold_accuracy", "min_repeat_agreement", "max_side_share", "min_coverage"):
            if not 0 <= getattr(self, name) <= 1:
                raise StoreError(f"{name}={getattr(self, name)}", "a share from 0 to 1", "correct it")
        if self.min_controls < 1 or self.min_reliability < 0:
            got = f"min_controls={self.min_controls}, min_reliability={self.min_reliability}"
            raise StoreError(got, "min_controls of 1 or more and min_reliability of 0 or more", "correct them")

    def reason(self, quality: Quality) -> str | None:
        """Why this rater's votes do not count, or None."""
        if quality.n_gold >= self.min_controls and wilson(quality.n_gold_right, quality.n_gold)[1] < self.min_gold_accuracy:
            return GOLD_MISSED
        if quality.n_repeat >= self.min_controls and wilson(quality.n_repeat_same, quality.n_repeat)[1] < self.min_repeat_agreement:
            return INCONSISTENT
        if (
            quality.n_decided
            and wilson(max(quality.n_left, quality.n_decided - quality.n_left), quality.n_decided)[0] > self.max_side_share
        ):
            return ONE_SIDED
        if quality.reliability is not None and quality.reliability < self.min_reliability:
            return UNRELIABLE
        return None


DEFAULT = Rules()
EVERYTHING = Rules(min_gold_accuracy=0.0, min_repeat_agreement=0.0, max_side_share=1.0)
"""Rules that doubt no rater."""


@dataclass(frozen=True)
class Quality:
    """What a campaign's votes say about one rater. Votes that are excluded for themselves (late, unheard) are not in it."""

    rater_id: int
    handle: str
    status: str
    n_votes: int
    n_gold: int
    n_gold_right: int
    n_repeat: int
    n_repeat_same: int
    n_decided: int
    """Votes for a side, gold pairs and repeats included."""
    n_left: int
    """Of these, for side A."""
    coverage: float | None
    """Mean share of both sides that was heard, over votes that tell it."""
    reliability: float | None
    """Scale in Davidson's model, 1 for the mean rater; None where no vote orders two systems."""

    @property
    def gold_accuracy(self) -> float | None:
        return self.n_gold_right / self.n_gold if self.n_gold else None

    @property
    def repeat_agreement(self) -> float | None:
        return self.n_repeat_same / self.n_repeat if self.n_repeat else None

    @property
    def left_share(self) -> float | None:
        return self.n_left / self.n_decided if self.n_decided else None


@dataclass(frozen=True)
class Cell:
    """`n` votes that are alike. `a` and `b`: the systems as shown. `right`: of a gold pair, whether it was found."""

    rater_id: int
    a: str
    b: str
    kind: str
    choice: str
    right: bool | None
    reason: str | None
    n: int
    n_heard: int
    """Votes that tell how much was heard."""
    heard: float
    """Sum over these of the mean share of both sides."""


@dataclass(frozen=True)
class Agreement:
    """Two raters on the same pair: how often do they name the same side?"""

    rate: float
    """Of the couples of decided votes on one pair, by different raters."""
    n: int
    """Such couples."""
    ceiling: float
    """The best accuracy against a single rater's votes (see `ceiling`)."""
    ci: tuple[float, float]
    """95 % interval of the ceiling, pairs resampled."""


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The 95 % interval of a share, hits of n.   Wilson 1927, doi:10.1080/01621459.1927.10502953."""
    share, spread = hits / n, z * z / n
    middle = share + spread / 2
    half = z * float(np.sqrt(share * (1 - share) / n + spread / (4 * n)))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def ceiling(agreement: float) -> float:
    """(1 + sqrt(2 a - 1)) / 2: the most that any model can agree with one rater, when two raters agree in a share a of
    pairs.

    If a rater hears the better clip with probability q, two agree with a = q^2 + (1 - q)^2; solved for q. With a q that
    differs from pair to pair this is an upper bound (Jensen). An agreement of 1/2 or less leaves nothing to be learnt:
    1/2."""
    return (1 + float(np.sqrt(max(0.0, 2 * agreement - 1)))) / 2


def agreement(sides: Iterable[tuple[int, int]], n_boot: int = 1000, seed: int = 0) -> Agreement | None:
    """Agreement over pairs, each with its votes for one side and for the other; None when no pair has two of them."""
    alike = Counter((x * (x - 1) + y * (y - 1), (x + y) * (x + y - 1)) for x, y in sides if x + y > 1)
    if not alike:
        return None
    rows = sorted(alike)
    same, total = np.array(rows, dtype=np.float64).T / 2
    n = np.array([alike[row] for row in rows])
    draws = np.random.default_rng(seed).multinomial(n.sum(), n / n.sum(), n_boot)  # pairs alike are drawn together
    ceilings = [ceiling(rate) for rate in (draws @ same) / (draws @ total)]
    rate = float(n @ same / (n @ total))
    low, high = np.percentile(ceilings, [2.5, 97.5])
    return Agreement(rate, int(n @ total), ceiling(rate), (float(low), float(high)))


def alpha(answers: Sequence[Sequence[int]]) -> float | None:
    """Krippendorff's alpha for nominal answers; row i counts pair i's votes by answer. None where nothing can be compared.

    Krippendorff 2019, Content Analysis, 4th ed., ch. 12: 1 is full agreement, 0 is chance.
    """
    counts = np.array(answers, dtype=np.int64).reshape(len(answers), -1)
    counts = counts[counts.sum(1) > 1]
    if (counts.sum(0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


# ---- reading ---------------------------------------------------------------------------------------------------------

clip_x, clip_y = aliased(Clip), aliased(Clip)


def vote_reason(rules: Rules) -> ColumnElement[str | None]:
    """SQL for the reason that excludes a vote by itself, whoever gave it: stored, blocked, or too little heard.

    The listening is what the vote was asked for at its lease, whatever the campaign asks for by now."""

    def short_of(heard: Any) -> ColumnElement[bool]:
        return and_(heard < Assignment.min_listen_ms, heard < clip_x.duration_ms, heard < clip_y.duration_ms)

    return case(
        (Vote.excluded_reason.is_not(None), Vote.excluded_reason),
        (Rater.status == "blocked", literal(BLOCKED)),
        (or_(short_of(Vote.listen_a_ms), short_of(Vote.listen_b_ms)), literal(LISTENED_TOO_LITTLE)),
        (or_(Vote.coverage_a < rules.min_coverage, Vote.coverage_b < rules.min_coverage), literal(HEARD_TOO_LITTLE)),
        else_=null(),
    )


def of_campaign(statement: Any, campaign: Campaign) -> Any:
    """The statement from votes of this campaign, with all that `vote_reason` speaks of."""
    return (
        statement.select_from(Vote)
        .join(Assignment, Assignment.id == Vote.assignment_id)
        .join(Pair, Pair.id == Assignment.pair_id)
        .join(Rater, Rater.id == Vote.rater_id)
        .join(clip_x, clip_x.id == Pair.clip_x_id)
        .join(clip_y, clip_y.id == Pair.clip_y_id)
        .where(Pair.campaign_id == campaign.id)
    )


def find_campaign(session: Session, name: str) -> Campaign:
    """Raises NotFoundError."""
    found = session.scalar(select(Campaign).where(Campaign.name == name))
    if found is None:
        raise NotFoundError(f"campaign {name!r}", "a registered campaign", "check its name")
    return found


def stored_choice(swapped: Any = Assignment.swapped, choice: Any = Vote.choice) -> ColumnElement[str]:
    """SQL for a choice with its side turned back: x, y, tie, both_bad."""
    return case(
        (or_(and_(choice == "a", ~swapped), and_(choice == "b", swapped)), literal("x")),
        (choice.in_(("a", "b")), literal("y")),
        else_=cast(choice, String),
    )


def about(statement: Any, campaign: Campaign, aspect: str | None, tag: str | None) -> tuple[Any, ColumnElement[str]]:
    """The statement narrowed to a tag (`genre:jazz`, `split:train`), and the choice as shown: the vote's, or an aspect's sign.

    Raises: StoreError for another kind of tag or an unknown aspect."""
    narrowed = of_campaign(statement, campaign)
    choice: ColumnElement[str] = cast(Vote.choice, String)
    if aspect is not None:
        if aspect not in ASPECTS:
            raise StoreError(f"aspect {aspect!r}", f"one of {', '.join(ASPECTS)}", "choose one of them")
        narrowed = narrowed.join(VoteAspect, and_(VoteAspect.vote_id == Vote.id, VoteAspect.aspect == aspect))
        choice = case((VoteAspect.score < 0, literal("a")), (VoteAspect.score > 0, literal("b")), else_=literal("tie"))
    if tag is not None:
        kind, _, value = tag.partition(":")
        if kind == "genre":
            narrowed = narrowed.where(clip_x.genre == value)
        elif kind == "split":
            narrowed = narrowed.join(Prompt, Prompt.id == Pair.prompt_id).where(Prompt.split == value)
        else:
            raise StoreError(f"tag {tag!r}", "genre:NAME or split:NAME", "correct it")
    return narrowed, choice


def tally(session: Session, campaign: Campaign, rules: Rules, aspect: str | None = None, tag: str | None = None) -> list[Cell]:
    """All votes of a campaign, those alike counted in the database: (raters x systems^2) cells, not votes, come out."""
    heard = (Vote.coverage_a + Vote.coverage_b) / 2
    _, choice = about(select(), campaign, aspect, tag)
    swapped = Assignment.swapped
    a, b = case((swapped, Pair.system_y), else_=Pair.system_x), case((swapped, Pair.system_x), else_=Pair.system_y)
    right = case((Pair.gold.is_(None), null()), else_=stored_choice(choice=choice) == Pair.gold)
    keys = [Vote.rater_id, a, b, Assignment.kind, choice, right, vote_reason(rules)]
    labelled: Any = select(*(key.label(f"k{i}") for i, key in enumerate(keys)), heard.label("heard"))
    votes = about(labelled, campaign, aspect, tag)[0].subquery()
    groups = [votes.c[f"k{i}"] for i in range(len(keys))]
    statement = select(*groups, func.count(), func.count(votes.c.heard), func.coalesce(func.sum(votes.c.heard), 0.0)).group_by(*groups)
    return [
        Cell(rater, a, b, kind, choice, None if right is None else bool(right), reason, n, n_heard, float(heard))
        for rater, a, b, kind, choice, right, reason, n, n_heard, heard in session.execute(statement)
    ]


def answers_by_pair(
    session: Session, campaign: Campaign, rules: Rules, out: Mapping[int, str], aspect: str | None = None, tag: str | None = None
) -> dict[int, list[int]]:
    """pair -> how many first answers that count said x, y, tie, both bad. `out`: raters who do not count. Gold pairs are left out."""
    _, choice = about(select(), campaign, aspect, tag)
    said = stored_choice(choice=choice).label("said")
    statement, _ = about(select(Pair.id.label("pair"), vote_reason(rules).label("reason"), said), campaign, aspect, tag)
    votes = statement.where(Assignment.kind == "normal", Pair.gold.is_(None), Vote.rater_id.not_in(list(out))).subquery()
    counted = select(votes.c.pair, votes.c.said, func.count()).where(votes.c.reason.is_(None)).group_by(votes.c.pair, votes.c.said)
    by_pair: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for pair, answer, n in session.execute(counted):
        by_pair[pair][("x", "y", "tie", "both_bad").index(answer)] = n
    return dict(by_pair)


def _repeats(session: Session, campaign: Campaign) -> dict[int, tuple[int, int]]:
    """rater -> (repeats answered, answered alike)."""
    first, said = aliased(Assignment), aliased(Vote)
    alike = case((stored_choice() == stored_choice(first.swapped, said.choice), 1), else_=0)
    statement = (
        select(Vote.rater_id, func.count(), func.sum(alike))
        .join(Assignment, Assignment.id == Vote.assignment_id)
        .join(Pair, Pair.id == Assignment.pair_id)
        .join(first, and_(first.pair_id == Assignment.pair_id, first.rater_id == Assignment.rater_id, first.rep == 0))
        .join(said, said.assignment_id == first.id)
        .where(Pair.campaign_id == campaign.id, Assignment.kind == "repeat", Vote.excluded_reason.is_(None), said.excluded_reason.is_(None))
        .group_by(Vote.rater_id)
    )
    return {rater: (int(n), int(same)) for rater, n, same in session.execute(statement)}


def ordering(cells: Iterable[Cell]) -> davidson.Counts:
    """What ranks systems: first answers that count, gold pairs left out."""
    return davidson.Counts.of((c.rater_id, c.a, c.b, c.choice, c.n) for c in cells if c.reason is None and c.kind == "normal")


def measure(session: Session, campaign: Campaign, cells: Sequence[Cell]) -> dict[int, Quality]:
    """rater -> quality, for everybody who voted in the campaign."""
    counts = ordering(cells)
    scales = davidson.fit(counts).scales if counts.n.sum() else {}
    repeats = _repeats(session, campaign)
    by_rater: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_rater[cell.rater_id].append(cell)
    people = {row.id: row for row in session.execute(select(Rater.id, Rater.handle, Rater.status))}
    found = {}
    for rater_id, said in sorted(by_rater.items()):
        own = [cell for cell in said if cell.reason in (None, BLOCKED, HEARD_TOO_LITTLE)]
        n_heard = sum(cell.n_heard for cell in own)
        n_repeat, n_same = repeats.get(rater_id, (0, 0))
        found[rater_id] = Quality(
            rater_id=rater_id,
            handle=people[rater_id].handle,
            status=people[rater_id].status,
            n_votes=sum(cell.n for cell in own),
            n_gold=sum(cell.n for cell in own if cell.right is not None),
            n_gold_right=sum(cell.n for cell in own if cell.right),
            n_repeat=n_repeat,
            n_repeat_same=n_same,
            n_decided=sum(cell.n for cell in own if cell.choice in ("a", "b")),
            n_left=sum(cell.n for cell in own if cell.choice == "a"),
            coverage=sum(cell.heard for cell in own) / n_heard if n_heard else None,
            reliability=scales.get(rater_id),
        )
    return found


def doubted(qualities: Mapping[int, Quality], rules: Rules) -> dict[int, str]:
    """rater -> the rule that excludes all votes of this rater."""
    return {rater: reason for rater, quality in qualities.items() if (reason := rules.reason(quality)) is not None}


def qualities(store: Store, campaign: str) -> dict[int, Quality]:
    """rater -> how far this rater can be relied on in a campaign, as of now. Raises NotFoundError."""
    with store.read() as session:
        found = find_campaign(session, campaign)
        return measure(session, found, tally(session, found, EVERYTHING))


def of_rater(store: Store, rater_id: int) -> list[tuple[int, Quality]]:
    """(campaign's id, quality) in each campaign in which a rater voted, in order, as of now."""
    voted = select(Pair.campaign_id).join(Assignment, Assignment.pair_id == Pair.id).join(Vote, Vote.assignment_id == Assignment.id)
    with store.read() as session:
        campaigns = session.scalars(select(Campaign).where(Campaign.id.in_(voted.where(Vote.rater_id == rater_id))).order_by(Campaign.id))
        measured = [(found.id, measure(session, found, tally(session, found, EVERYTHING))) for found in campaigns.all()]
    return [(campaign_id, found[rater_id]) for campaign_id, found in measured if rater_id in found]
