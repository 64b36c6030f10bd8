"""Which pair a rater hears next, and with what probability. `db.voting` leases what is drawn here.

    least_voted   one of the WINDOW least voted pairs that wait, each as likely
    random        any pair that waits: one of the SPREAD that follow a random place in the line of pairs, around its end
    informative   `random_floor` of the draws as `random`; the others among the POOL pairs of highest priority, in proportion to it

A share of `gold_rate` and `repeat_rate` of the draws are controls instead: a gold pair new to the rater, or one of the rater's
own pairs of at least REPEAT_GAP votes ago with its sides turned. Controls come only while an ordinary pair waits as well, so
that they neither prolong the work nor show themselves by standing at its end.

The propensity of a draw is the probability with which this pair came to this rater at this moment, given what then waited. A
draw asks the database a few questions, each about at most SPREAD pairs, so that it costs the same in a campaign of any size.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import BindParameter, Connection, Integer, Row, and_, bindparam, func, or_, select, update
from sqlalchemy.orm import aliased

from db.errors import NotFoundError, StoreError
from db.schema import Assignment, Campaign, Pair, Vote

if TYPE_CHECKING:
    from db.store import Store

logger = logging.getLogger(__name__)

WINDOW = 24
"""A pair is drawn from this many of the least-voted ones, so that raters spread out."""
POOL = 256
"""How many pairs of high priority an informative draw chooses from."""
REPEAT_GAP = 5
"""So many votes lie at least between a pair and its repeat."""
REPEAT_POOL = 200
"""A repeat is one of the rater's last votes, this many of them."""
SPREAD = 128
"""A random draw is among this many pairs; while fewer wait, each of them is as likely."""

AnyRow = Row[*tuple[Any, ...]]


class Candidate(NamedTuple):
    """A pair that waits for a rater. `own_id`, `own_swapped`: the rater's own lease of it that ran out, if there is one."""

    pair_id: int
    own_id: str | None
    own_swapped: bool | None


@dataclass(frozen=True)
class Draw:
    """What to put in front of a rater. `own_id`: the assignment to renew instead of making one."""

    pair_id: int
    own_id: str | None
    kind: str
    swapped: bool
    policy: str
    propensity: float


_rater: BindParameter[int] = bindparam("rater")
_campaign: BindParameter[int] = bindparam("campaign")
_own = aliased(Assignment)

HAS_ROOM = and_(Pair.campaign_id == _campaign, Pair.n_open < Pair.target_votes, Pair.gold.is_(None))
"""Pairs that still want votes; both databases keep exactly these in an index of their own."""
_unanswered = or_(_own.id.is_(None), _own.status == "expired")


def _of_rater(rep: int) -> Any:
    return and_(_own.pair_id == Pair.id, _own.rater_id == _rater, _own.rep == rep)


_candidates = select(Pair.id, _own.id, _own.swapped).outerjoin(_own, _of_rater(0))
WAITING = _candidates.where(HAS_ROOM, _unanswered)
LEAST_VOTED = WAITING.order_by(Pair.n_open, Pair.id).limit(WINDOW)
_place, _limit = bindparam("place", type_=Integer), bindparam("limit", type_=Integer)
HIGHEST_PRIORITY = WAITING.add_columns(Pair.priority).order_by(Pair.priority.desc(), Pair.id.desc()).limit(_limit)
FOLLOWING = WAITING.add_columns(Pair.priority).where(Pair.id >= _place).order_by(Pair.id).limit(_limit)
PRECEDING = WAITING.with_only_columns(Pair.id).where(Pair.id < _place).order_by(Pair.id.desc()).limit(_limit)
_with_room = select(Pair.id).where(HAS_ROOM).limit(1)
LINE = select(_with_room.order_by(Pair.id).scalar_subquery(), _with_room.order_by(Pair.id.desc()).scalar_subquery())
"""The first and the last pair with room."""
NEW_GOLD = _candidates.where(Pair.campaign_id == _campaign, Pair.gold.is_not(None), _unanswered).order_by(Pair.id)
_first = aliased(Assignment)
_recent = (
    select(Vote.assignment_id, Vote.id)
    .where(Vote.rater_id == _rater)
    .order_by(Vote.id.desc())
    .limit(REPEAT_POOL)
    .offset(REPEAT_GAP)
    .subquery()
)
REPEATABLE = (
    select(Pair.id, _own.id, _first.swapped)
    .select_from(_recent)
    .join(_first, _first.id == _recent.c.assignment_id)
    .join(Pair, Pair.id == _first.pair_id)
    .outerjoin(_own, _of_rater(1))
    .where(Pair.campaign_id == _campaign, _first.kind == "normal", _unanswered)
    .order_by(_recent.c.id)
)


def draw(connection: Connection, campaign: AnyRow, rater_id: int, rng: random.Random) -> Draw | None:
    """What this rater should hear next in a campaign (a row with its id, chooser and rates), or None if nothing waits."""
    scope = {"campaign": campaign.id, "rater": rater_id}
    chosen = CHOOSE[campaign.chooser](connection, scope, campaign.random_floor, rng)
    if chosen is None:
        return None
    share = 1.0
    if campaign.gold_rate or campaign.repeat_rate:
        gold = _rows(connection, NEW_GOLD, scope) if campaign.gold_rate else []
        repeats = _rows(connection, REPEATABLE, scope) if campaign.repeat_rate else []
        p_gold = campaign.gold_rate if gold else 0.0
        p_repeat = campaign.repeat_rate if repeats else 0.0
        share = 1.0 - p_gold - p_repeat
        at = rng.random()
        if at < p_gold:
            return _draw(rng.choice(gold), "gold", rng.random() < 0.5, "gold", p_gold / len(gold))
        if at < p_gold + p_repeat:
            repeat = rng.choice(repeats)
            return Draw(repeat.pair_id, repeat.own_id, "repeat", not repeat.own_swapped, "repeat", p_repeat / len(repeats))
    candidate, policy, propensity = chosen
    return _draw(candidate, "normal", rng.random() < 0.5, policy, share * propensity)


def _draw(candidate: Candidate, kind: str, swapped: bool, policy: str, propensity: float) -> Draw:
    if candidate.own_swapped is not None:
        swapped = candidate.own_swapped  # it was drawn when the pair first came to this rater
    return Draw(candidate.pair_id, candidate.own_id, kind, swapped, policy, propensity)


def _rows(connection: Connection, statement: Any, scope: Mapping[str, Any]) -> list[Candidate]:
    return [Candidate(*row[:3]) for row in connection.execute(statement, scope)]


Chosen = tuple[Candidate, str, float]
"""A candidate, the policy that chose it, and the probability of that."""


def least_voted(connection: Connection, scope: Mapping[str, Any], floor: float, rng: random.Random) -> Chosen | None:
    candidates = _rows(connection, LEAST_VOTED, scope)
    return (rng.choice(candidates), f"least-voted-{WINDOW}", 1 / len(candidates)) if candidates else None


def at_random(connection: Connection, scope: Mapping[str, Any], floor: float, rng: random.Random) -> Chosen | None:
    line = _line(connection, scope)
    rows = _from_a_random_place(connection, scope, line, rng) if line else []
    if not rows or not line:
        return None
    row = rng.choice(rows)
    p = 1 / len(rows) if len(rows) < SPREAD else _chance_of_place(connection, scope, line, row.id)
    return Candidate(*row[:3]), f"random-{SPREAD}", p


def informative(connection: Connection, scope: Mapping[str, Any], floor: float, rng: random.Random) -> Chosen | None:
    pool = connection.execute(HIGHEST_PRIORITY, {**scope, "limit": POOL}).all()
    if not pool:
        return None
    whole, line = len(pool) < POOL, _line(connection, scope)
    row = rng.choices(pool, [row.priority for row in pool])[0]
    if rng.random() < floor:
        row = rng.choice(pool if whole or not line else _from_a_random_place(connection, scope, line, rng) or pool)
    uniform = 1 / len(pool) if whole or not line else _chance_of_place(connection, scope, line, row.id)
    directed = row.priority / sum(one.priority for one in pool) if any(one.id == row.id for one in pool) else 0.0
    return Candidate(*row[:3]), f"informative-{POOL}", floor * uniform + (1 - floor) * directed


CHOOSE: dict[str, Callable[[Connection, Mapping[str, Any], float, random.Random], Chosen | None]] = {
    "least_voted": least_voted,
    "random": at_random,
    "informative": informative,
}


def _line(connection: Connection, scope: Mapping[str, Any]) -> tuple[int, int] | None:
    first, last = connection.execute(LINE, scope).one()
    return None if first is None else (first, last)


def _from_a_random_place(connection: Connection, scope: Mapping[str, Any], line: tuple[int, int], rng: random.Random) -> list[AnyRow]:
    """The SPREAD waiting pairs that follow a random id between the first and the last, around the end; all, if there are fewer."""
    place = rng.randint(*line)
    rows = list(connection.execute(FOLLOWING, {**scope, "place": place, "limit": SPREAD}))
    if len(rows) < SPREAD:
        around = connection.execute(FOLLOWING, {**scope, "place": line[0], "limit": SPREAD - len(rows)})
        rows += [row for row in around if row.id < place]
    return rows


def _chance_of_place(connection: Connection, scope: Mapping[str, Any], line: tuple[int, int], pair_id: int) -> float:
    """The probability of one pair among SPREAD or more: 1 / SPREAD of the places from which it is among the SPREAD that follow.

    These are the ids after its SPREAD-th waiting predecessor up to itself: p_i = (id_i - id_(i - SPREAD)) / (SPREAD n_places), which
    adds up to 1 over all that wait, and is even but for how densely the waiting pairs lie there.
    """
    n_places = line[1] - line[0] + 1
    before = connection.scalars(PRECEDING, {**scope, "place": pair_id, "limit": SPREAD}).all()
    if len(before) == SPREAD:
        reach = pair_id - before[-1]
    else:
        n_behind = SPREAD - len(before)
        behind = connection.scalars(PRECEDING, {**scope, "place": line[1] + 1, "limit": n_behind}).all()
        if len(behind) < n_behind:  # others took some since the draw; all that still wait are listed now
            return 1 / max(1, len(behind))
        reach = pair_id - behind[-1] + n_places
    return reach / (SPREAD * n_places)


# ---------------------------------------------------------------- where a vote tells most

PRIOR_VOTES = 2.0
"""How many votes the systems' strengths count for in a pair nobody has rated."""
STRENGTH_STEPS = 50
BATCH = 500
"""Pairs a transaction renews, so that no rater waits long for the write lock."""

_counted = (
    select(Assignment.pair_id, Assignment.swapped, Vote.choice, func.count().label("n"))
    .join(Vote, Vote.assignment_id == Assignment.id)
    .join(Pair, Pair.id == Assignment.pair_id)
    .where(Pair.campaign_id == _campaign, Assignment.kind == "normal", Vote.excluded_reason.is_(None), Vote.choice != "both_bad")
    .group_by(Assignment.pair_id, Assignment.swapped, Vote.choice)
)
_systems = (
    select(Pair.id, Pair.priority, Pair.system_x, Pair.system_y, Pair.n_open < Pair.target_votes)
    .where(Pair.campaign_id == _campaign, Pair.gold.is_(None))
    .order_by(Pair.id)  # one order for all who write: no deadlock
)
_newest = select(func.max(Vote.id)).scalar_subquery()
NEWEST_VOTES = select(Campaign.name, _newest).where(Campaign.status == "open", Campaign.chooser == "informative")
SET_PRIORITY = update(Pair).where(Pair.id == bindparam("pair")).values(priority=bindparam("telling"))


def refresh_priorities(store: Store, campaign: str) -> int:
    """Renews the priority of a campaign's pairs from its votes; how many changed. Raises NotFoundError.

    The rule: 12 times the variance of Beta(2 p + wins of x, 2 (1 - p) + wins of y), a tie half a win to each, where p is the chance
    that x's system beats y's by Bradley and Terry's model, fitted to all votes by Hunter's steps (2004, doi:10.1214/aos/1079120141,
    eq. 3) with one drawn game of each system against a middling one. It is 1 for an unvoted pair of equal systems, and falls with
    votes, with their agreement, and with the distance of the systems. One pass over the votes; safe beside voting.
    """
    with store.read_core() as connection:
        found = connection.scalar(select(Campaign.id).where(Campaign.name == campaign))
        if found is None:
            raise NotFoundError(f"campaign {campaign!r}", "a registered campaign", "check its name")
        scope = {"campaign": found}
        wins: dict[int, list[float]] = {}
        for pair_id, swapped, choice, n in connection.execute(_counted, scope):
            of_pair = wins.setdefault(pair_id, [0.0, 0.0])
            if choice == "tie":
                of_pair[0] += n / 2
                of_pair[1] += n / 2
            else:
                of_pair[(choice == "b") != swapped] += n
        pairs = connection.execute(_systems, scope).all()
    games: dict[tuple[str, str], list[float]] = {}
    for pair_id, _, x, y, _ in pairs:
        if pair_id in wins and x != y:
            met = games.setdefault((x, y), [0.0, 0.0])
            met[0] += wins[pair_id][0]
            met[1] += wins[pair_id][1]
    strength = strengths(games)
    changed = []
    for pair_id, old, x, y, has_room in pairs:
        p = strength.get(x, 1.0) / (strength.get(x, 1.0) + strength.get(y, 1.0))
        won_x, won_y = wins.get(pair_id, (0.0, 0.0))
        telling = 12 * beta_variance(PRIOR_VOTES * p + won_x, PRIOR_VOTES * (1 - p) + won_y)
        if has_room and abs(telling - old) > 0.01 * old:
            changed.append({"pair": pair_id, "telling": telling})
    for at in range(0, len(changed), BATCH):
        with store.write_core() as connection:
            connection.execute(SET_PRIORITY, changed[at : at + BATCH])
    return len(changed)


@contextmanager
def renewed_priorities(store: Store, every_s: float = 30.0) -> Iterator[None]:
    """While the block lasts, a thread renews the priorities of open `informative` campaigns that have new votes.

    It rests for `every_s` and at least 20 times as long as it worked, so that a large campaign costs it a twentieth of a core.
    """
    over = threading.Event()

    def work() -> None:
        seen: dict[str, int] = {}
        rest_s = every_s
        while not over.wait(rest_s):
            began = time.monotonic()
            try:
                with store.read_core() as connection:
                    votes = {name: newest for name, newest in connection.execute(NEWEST_VOTES) if newest}
                for name in [name for name, newest in votes.items() if seen.get(name) != newest]:
                    refresh_priorities(store, name)
                    seen[name] = votes[name]
            except StoreError as error:  # a database that is away for a while: the next round does it
                logger.warning("priorities stay as they were: %s", error)
            rest_s = max(every_s, 20 * (time.monotonic() - began))

    worker = threading.Thread(target=work, name="renewed-priorities", daemon=True)
    worker.start()
    try:
        yield
    finally:
        over.set()
        worker.join()


def strengths(games: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, float]:
    """Bradley and Terry's strength of each system, relative to a middling one of 1. Args: games: (x, y) -> wins of x, wins of y."""
    won: dict[str, float] = {}
    met: dict[str, dict[str, float]] = {}
    for (x, y), (won_x, won_y) in games.items():
        for one, other, n in ((x, y, won_x), (y, x, won_y)):
            won[one] = won.get(one, 0.5) + n
            rivals = met.setdefault(one, {})
            rivals[other] = rivals.get(other, 0.0) + won_x + won_y
    strength = dict.fromkeys(won, 1.0)
    for _ in range(STRENGTH_STEPS):
        strength = {
            s: won[s] / (1 / (strength[s] + 1) + sum(n / (strength[s] + strength[rival]) for rival, n in met[s].items())) for s in strength
        }
    return strength


def beta_variance(a: float, b: float) -> float:
    return a * b / ((a + b) ** 2 * (a + b + 1))
