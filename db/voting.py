"""One pair, one rater, one vote: leases, slots and the order of things inside a transaction.

The statements are built once, at import, and run without the ORM: building them afresh cost three times as much CPU as running them.
`db.choice` says which pair; here it is leased. A gold pair or a blind repeat takes no slot and looks like any other pair.
What the campaign asks for is copied into the lease, and a vote is held to that copy: rules may change while somebody listens.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import BindParameter, Connection, bindparam, case, exists, func, insert, select, update
from sqlalchemy.orm import aliased

from db.choice import REPEAT_GAP, WAITING, AnyRow, draw
from db.errors import NotFoundError, RefusedError, ScreenDueError
from db.schema import LATE, Assignment, Campaign, Clip, Membership, Pair, Prompt, Rater, SpanMark, Vote, VoteAspect

CLOCK_SLACK_MS = 2000
"""How far the listening a player reports may exceed the time since the pair was handed out."""
MARK_SLACK_MS = 100
"""How far a mark may reach past the end of its clip: decoders pad. It is stored as ending there."""
OPEN_COUNT_CAP = 200
"""`Progress.open` is counted no further than this."""


@dataclass(frozen=True)
class Progress:
    """`done`: this rater's votes. `open`: pairs that still wait for this rater (at most OPEN_COUNT_CAP)."""

    done: int
    open: int


@dataclass(frozen=True)
class Mark:
    """A stretch [t0_ms, t1_ms) of side a or b, as shown, and what is wrong there."""

    side: str
    t0_ms: int
    t1_ms: int
    tag: str


@dataclass(frozen=True)
class Offer:
    """A pair in front of a rater. Says nothing of what made the clips.

    `aspects`: what is asked for beside the vote. `practice`: whether it wants new raters to rehearse first.
    """

    assignment_id: str
    campaign: str
    prompt: str
    gain_a_db: float
    gain_b_db: float
    duration_ms: int
    min_listen_ms: int
    expires_at: datetime
    progress: Progress
    aspects: tuple[str, ...] = ()
    practice: bool = False


@dataclass(frozen=True)
class Receipt:
    """A vote that is on disk. `duplicate`: it already was; `choice` is the one that counts. A skip has no `vote_id`."""

    vote_id: int | None
    duplicate: bool
    choice: str
    excluded_reason: str | None = None


_x, _y = aliased(Clip), aliased(Clip)
_rater: BindParameter[int] = bindparam("rater")
_now: BindParameter[datetime] = bindparam("now")
_pair: BindParameter[int] = bindparam("pair")
_assignment: BindParameter[str] = bindparam("assignment")

# PostgreSQL: one rater's requests queue on this row, so two tabs get one lease. SQLite holds its write lock anyway.
LOCK_RATER = select(Rater.id).where(Rater.id == _rater).with_for_update(key_share=True)
_admits = ~Campaign.invited_only | exists().where(Membership.campaign_id == Campaign.id, Membership.rater_id == _rater)
_campaigns = select(
    Campaign.id,
    Campaign.name,
    Campaign.status,
    Campaign.chooser,
    Campaign.random_floor,
    Campaign.gold_rate,
    Campaign.repeat_rate,
    Campaign.min_listen_ms,
    Campaign.aspects,
    Campaign.practice,
    Campaign.require_screen,
).where(_admits)
SCREEN = select(Rater.screen).where(Rater.id == _rater)
OPEN_CAMPAIGNS = _campaigns.where(Campaign.status == "open").order_by(Campaign.id)
NAMED_CAMPAIGN = _campaigns.where(Campaign.name == bindparam("name"))
_offers = (
    select(
        Assignment.id,
        Assignment.swapped,
        Assignment.kind,
        Assignment.expires_at,
        Assignment.min_listen_ms,
        Assignment.aspects,
        Pair.campaign_id,
        Pair.gain_x_db,
        Pair.gain_y_db,
        Prompt.text,
        _x.duration_ms.label("x_ms"),
        _y.duration_ms.label("y_ms"),
    )
    .join(Pair, Pair.id == Assignment.pair_id)
    .join(Prompt, Prompt.id == Pair.prompt_id)
    .join(_x, _x.id == Pair.clip_x_id)
    .join(_y, _y.id == Pair.clip_y_id)
)
OFFER = _offers.where(Assignment.id == _assignment)
HELD = _offers.where(Assignment.rater_id == _rater, Assignment.status == "leased", Assignment.expires_at > _now)
# A lease that a vote holds right now is left to that vote; waiting for it could end in a deadlock.
STALE_LEASES = (
    select(Assignment.id, Assignment.pair_id, Assignment.kind)
    .where(Assignment.status == "leased", Assignment.expires_at <= _now)
    .with_for_update(skip_locked=True)
)
EXPIRE_LEASE = update(Assignment).where(Assignment.id == _assignment).values(status="expired")
# One conditional UPDATE checks and claims in a single step, on one row.
TAKE_SLOT = update(Pair).where(Pair.id == _pair, Pair.n_open < Pair.target_votes).values(n_open=Pair.n_open + 1)
FREE_SLOT = update(Pair).where(Pair.id == _pair).values(n_open=Pair.n_open - 1)
RENEW_LEASE = (
    update(Assignment)
    .where(Assignment.id == _assignment, Assignment.status == "expired")
    .values(
        status="leased",
        expires_at=bindparam("until"),
        policy=bindparam("by"),
        propensity=bindparam("p"),
        min_listen_ms=bindparam("listen_ms"),
        aspects=bindparam("asked"),
    )
)
FINISH = update(Assignment).where(Assignment.id == _assignment).values(status=bindparam("now_status"), note=bindparam("now_note"))
COUNT_VOTES = select(func.count()).select_from(Vote).where(Vote.rater_id == _rater)
COUNTS = select(
    COUNT_VOTES.scalar_subquery().label("done"),
    select(func.count()).select_from(WAITING.limit(OPEN_COUNT_CAP).subquery()).scalar_subquery().label("waiting"),
)
COUNT_GOLD = select(func.count()).select_from(Pair).where(Pair.campaign_id == bindparam("campaign"), Pair.gold.is_not(None))
COUNT_SEEN = (
    select(Assignment.kind, func.count())
    .join(Pair, Pair.id == Assignment.pair_id)
    .where(Assignment.rater_id == _rater, Assignment.status.in_(("voted", "skipped")), Pair.campaign_id == bindparam("campaign"))
    .group_by(Assignment.kind)
)
ASKED = (
    select(
        Assignment.status,
        Assignment.issued_at,
        Assignment.pair_id,
        Assignment.swapped,
        Assignment.kind,
        Assignment.min_listen_ms,
        Assignment.aspects,
        _x.duration_ms.label("x_ms"),
        _y.duration_ms.label("y_ms"),
    )
    .join(Pair, Pair.id == Assignment.pair_id)
    .join(_x, _x.id == Pair.clip_x_id)
    .join(_y, _y.id == Pair.clip_y_id)
    .where(Assignment.id == _assignment, Assignment.rater_id == _rater)
    .with_for_update(of=Assignment)
)
STORED_VOTE = select(Vote.id, Vote.choice, Vote.excluded_reason).where(Vote.assignment_id == _assignment)
ADD_ASSIGNMENT = insert(Assignment)
ADD_VOTE = insert(Vote).returning(Vote.id)
ADD_ASPECTS = insert(VoteAspect)
ADD_MARKS = insert(SpanMark)
AUDIO_FILE = (
    select(Clip.uri, Clip.sha256, Clip.size_bytes)
    .select_from(Assignment)
    .join(Pair, Pair.id == Assignment.pair_id)
    .join(
        Clip,
        Clip.id == case((Assignment.swapped == bindparam("side_b"), Pair.clip_x_id), else_=Pair.clip_y_id),
    )
    .where(Assignment.id == _assignment, Assignment.rater_id == _rater)
)


def expire_leases(connection: Connection, now: datetime) -> int:
    """Ends the leases that ran out and frees their slots; how many. Runs inside a write transaction of its own."""
    stale = connection.execute(STALE_LEASES, {"now": now}).all()
    for row in sorted(stale, key=lambda row: row.pair_id):  # one order for all: no deadlock
        connection.execute(EXPIRE_LEASE, {"assignment": row.id})
        if row.kind == "normal":
            connection.execute(FREE_SLOT, {"pair": row.pair_id})
    return len(stale)


def next_offer(
    connection: Connection, rater_id: int, campaign: str | None, now: datetime, lease: timedelta, rng: random.Random
) -> Offer | None:
    """The pair this rater holds or can be given; None when nothing waits. Runs inside a write transaction.

    Raises: ScreenDueError when all that waits is in campaigns that want a headphone check which this rater has not passed.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(LOCK_RATER, {"rater": rater_id})
    campaigns = _campaigns_in_scope(connection, rater_id, campaign)
    held = connection.execute(HELD, {"rater": rater_id, "now": now}).all()
    for row in held:
        if row.campaign_id in campaigns:
            return _offer(connection, campaigns[row.campaign_id], rater_id, row)
    locked = _locked(connection, rater_id, campaigns)
    for rules in campaigns.values():
        if rules.id in locked:
            continue
        assignment_id = _lease(connection, rules, rater_id, now, lease, rng)
        if assignment_id is not None:
            row = connection.execute(OFFER, {"assignment": assignment_id}).one()
            return _offer(connection, rules, rater_id, row)
    if any(draw(connection, campaigns[campaign_id], rater_id, rng) for campaign_id in locked):
        got = "no passed headphone check" if campaign is None else f"no passed headphone check for campaign {campaign!r}"
        raise ScreenDueError(got, "one, for the pairs that wait", "take the check, with headphones on")
    return None


def _locked(connection: Connection, rater_id: int, campaigns: Mapping[int, AnyRow]) -> set[int]:
    """The campaigns that want a headphone check of a rater who has not passed one. The newest check counts."""
    strict = {campaign_id for campaign_id, rules in campaigns.items() if rules.require_screen}
    if strict and (connection.scalar(SCREEN, {"rater": rater_id}) or {}).get("passed"):
        return set()
    return strict


def _campaigns_in_scope(connection: Connection, rater_id: int, name: str | None) -> dict[int, AnyRow]:
    if name is None:
        return {row.id: row for row in connection.execute(OPEN_CAMPAIGNS, {"rater": rater_id})}
    named = connection.execute(NAMED_CAMPAIGN, {"rater": rater_id, "name": name}).one_or_none()
    if named is None:
        raise NotFoundError(f"campaign {name!r}", "a registered campaign to which this rater is admitted", "check its name")
    return {named.id: named} if named.status == "open" else {}


def _lease(connection: Connection, campaign: AnyRow, rater_id: int, now: datetime, lease: timedelta, rng: random.Random) -> str | None:
    """Draws a pair and leases it to the rater under the campaign's rules of now; the assignment's id, or None if nothing waits."""
    while drawn := draw(connection, campaign, rater_id, rng):
        if drawn.kind == "normal" and not _changed(connection, TAKE_SLOT, pair=drawn.pair_id):
            continue  # another rater was faster
        if drawn.own_id is not None:
            renewed = {"assignment": drawn.own_id, "until": now + lease, "by": drawn.policy, "p": drawn.propensity}
            renewed |= {"listen_ms": campaign.min_listen_ms, "asked": campaign.aspects}
            if connection.execute(RENEW_LEASE, renewed).rowcount:
                return drawn.own_id
            if drawn.kind == "normal":
                connection.execute(FREE_SLOT, {"pair": drawn.pair_id})
            continue  # a vote for it has come meanwhile, from another tab
        assignment_id = uuid.uuid4().hex
        row = {
            "id": assignment_id,
            "pair_id": drawn.pair_id,
            "rater_id": rater_id,
            "rep": int(drawn.kind == "repeat"),
            "kind": drawn.kind,
            "swapped": drawn.swapped,
            "policy": drawn.policy,
            "propensity": drawn.propensity,
            "min_listen_ms": campaign.min_listen_ms,
            "aspects": campaign.aspects,
            "status": "leased",
            "issued_at": now,
            "expires_at": now + lease,
        }
        connection.execute(ADD_ASSIGNMENT, row)
        return assignment_id
    return None


def _offer(connection: Connection, campaign: AnyRow, rater_id: int, row: AnyRow) -> Offer:
    gains = (row.gain_y_db, row.gain_x_db) if row.swapped else (row.gain_x_db, row.gain_y_db)
    return Offer(
        assignment_id=row.id,
        campaign=campaign.name,
        prompt=row.text,
        gain_a_db=round(gains[0], 3),
        gain_b_db=round(gains[1], 3),
        duration_ms=max(row.x_ms, row.y_ms),
        min_listen_ms=min(row.min_listen_ms, row.x_ms, row.y_ms),
        expires_at=row.expires_at,
        progress=_progress(connection, campaign, rater_id, row.kind == "normal"),
        aspects=tuple(row.aspects),
        practice=campaign.practice,
    )


def _progress(connection: Connection, campaign: AnyRow, rater_id: int, normal: bool) -> Progress:
    """What is done and open, the pair on the table among the open ones.

    Where controls are mixed in, those still to be expected count as open: else a number that stands still at a vote would tell
    that the pair was a control.
    """
    scope = {"rater": rater_id, "campaign": campaign.id}
    done, waiting = connection.execute(COUNTS, scope).one()
    waiting += normal
    rate = campaign.gold_rate + campaign.repeat_rate
    if not rate or waiting >= OPEN_COUNT_CAP:
        return Progress(done, max(1, min(waiting, OPEN_COUNT_CAP)))
    seen = dict(connection.execute(COUNT_SEEN, scope).all())
    n_controls = seen.get("gold", 0) + seen.get("repeat", 0)
    ordinary = seen.get("normal", 0) + waiting
    gold = min(connection.scalar(COUNT_GOLD, scope) or 0, ordinary * campaign.gold_rate / (1 - rate))
    repeats = min(max(0, ordinary - REPEAT_GAP), ordinary * campaign.repeat_rate / (1 - rate))
    expected = math.ceil(round(gold + repeats, 6)) - n_controls
    return Progress(done, waiting + max(int(not normal), expected))


def submit(connection: Connection, vote: dict[str, Any], aspects: Mapping[str, int], marks: Sequence[Mark], now: datetime) -> Receipt:
    """Stores `vote` (columns of `Vote`, or choice `skip`) unless one stands already. Inside a write transaction."""
    assignment = {"assignment": vote["assignment_id"]}
    asked = connection.execute(ASKED, assignment | {"rater": vote["rater_id"]}).one_or_none()
    if asked is None:
        raise NotFoundError("an unknown assignment", "one that was handed to this rater", "ask for the next pair")
    if asked.status == "voted":
        first = connection.execute(STORED_VOTE, assignment).one()
        return Receipt(first.id, True, first.choice, first.excluded_reason)
    if asked.status == "skipped":
        return Receipt(None, True, "skip")
    if vote["choice"] == "skip":
        connection.execute(FINISH, assignment | {"now_status": "skipped", "now_note": vote["comment"]})
        if asked.status == "leased" and asked.kind == "normal":
            connection.execute(FREE_SLOT, {"pair": asked.pair_id})
        return Receipt(None, False, "skip")

    heard_ms = (vote["listen_a_ms"], vote["listen_b_ms"])
    needed_ms = min(asked.min_listen_ms, asked.x_ms, asked.y_ms)
    if min(heard_ms) < needed_ms:
        got = f"{min(heard_ms)} ms of listening to one side"
        raise RefusedError(got, f"at least {needed_ms} ms of each", "listen on, then vote")
    elapsed_ms = max(0.0, (now - asked.issued_at) / timedelta(milliseconds=1))
    if sum(heard_ms) > elapsed_ms + CLOCK_SLACK_MS:
        expected = f"at most the {elapsed_ms:.0f} ms since the pair was handed out"
        raise RefusedError(f"{sum(heard_ms)} ms of listening", expected, "report what was really heard")
    check_aspects(aspects, asked.aspects)
    lengths_ms = (asked.y_ms, asked.x_ms) if asked.swapped else (asked.x_ms, asked.y_ms)
    ends_ms = [check_mark(mark, dict(zip("ab", lengths_ms, strict=True))) for mark in marks]
    late = asked.status == "expired" and asked.kind == "normal" and not _changed(connection, TAKE_SLOT, pair=asked.pair_id)
    reason = LATE if late else None
    vote_id = connection.execute(ADD_VOTE, vote | {"excluded_reason": reason, "created_at": now}).scalar_one()
    if aspects:
        connection.execute(ADD_ASPECTS, [{"vote_id": vote_id, "aspect": aspect, "score": score} for aspect, score in aspects.items()])
    if marks:
        rows = [
            {"vote_id": vote_id, "side": mark.side, "t0_ms": mark.t0_ms, "t1_ms": end_ms, "tag": mark.tag}
            for mark, end_ms in zip(marks, ends_ms, strict=True)
        ]
        connection.execute(ADD_MARKS, rows)
    connection.execute(FINISH, assignment | {"now_status": "voted", "now_note": None})
    return Receipt(vote_id, False, vote["choice"], reason)


def check_aspects(aspects: Mapping[str, int], asked_for: Sequence[str]) -> None:
    """Raises RefusedError for an aspect that is not asked for, or a score outside -2 to 2."""
    for aspect, score in aspects.items():
        if aspect not in asked_for:
            expected = f"only {', '.join(asked_for)}" if asked_for else "none with this pair"
            raise RefusedError(f"aspect {aspect!r}", expected, "leave it out")
        if not -2 <= score <= 2:
            raise RefusedError(f"{aspect} {score}", "a whole number from -2 (A is better) to 2 (B is better)", "correct it")


def check_mark(mark: Mark, lengths_ms: Mapping[str, int]) -> int:
    """Where a mark on side a or b of these lengths ends, ms. Raises RefusedError for one outside its clip or without a tag."""
    if mark.side not in lengths_ms:
        raise RefusedError(f"a mark on side {mark.side!r}", "side a or b", "correct it")
    if not mark.tag or len(mark.tag) > 32 or not mark.tag.isprintable():
        raise RefusedError(f"a mark with tag {mark.tag!r}", "1 to 32 printable characters", "correct it")
    end_ms = min(mark.t1_ms, lengths_ms[mark.side])
    if not 0 <= mark.t0_ms < end_ms or mark.t1_ms > end_ms + MARK_SLACK_MS:
        got = f"a mark from {mark.t0_ms} to {mark.t1_ms} ms on side {mark.side}"
        raise RefusedError(got, f"a stretch inside its {lengths_ms[mark.side]} ms", "mark what can be heard")
    return end_ms


def _changed(connection: Connection, statement: Any, **parameters: Any) -> bool:
    return connection.execute(statement, parameters).rowcount == 1
