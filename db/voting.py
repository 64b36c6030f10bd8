"""One pair, one rater, one vote: leases, slots and the order of things inside a transaction.

The statements are built once, at import: building them afresh cost three times as much CPU as running them.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import BindParameter, CursorResult, String, bindparam, case, exists, func, insert, select, update
from sqlalchemy.orm import Session, aliased

from db.errors import NotFoundError, RefusedError
from db.schema import Assignment, Campaign, Clip, Pair, Prompt, Rater, SpanMark, Vote, VoteAspect

WINDOW = 24
"""A pair is drawn from this many of the least-voted ones, so that raters spread out."""
CLOCK_SLACK_MS = 2000
"""How far the listening a player reports may exceed the time since the pair was handed out."""
MARK_SLACK_MS = 100
"""How far a mark may reach past the end of its clip: decoders pad. It is stored as ending there."""
OPEN_COUNT_CAP = 1000
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

    `aspects`: what the campaign asks for beside the vote. `practice`: whether it wants new raters to rehearse first.
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
_campaign: BindParameter[str | None] = bindparam("campaign", type_=String())
_now: BindParameter[datetime] = bindparam("now")
_pair: BindParameter[int] = bindparam("pair")
_assignment: BindParameter[str] = bindparam("assignment")
_in_scope = (_campaign.is_(None) & (Campaign.status == "open")) | (Campaign.name == _campaign)

# PostgreSQL: one rater's requests queue on this row, so two tabs get one lease. SQLite holds its write lock anyway.
LOCK_RATER = select(Rater.id).where(Rater.id == _rater).with_for_update()
CAMPAIGN_EXISTS = select(Campaign.id).where(Campaign.name == _campaign)
HELD_LEASE = (
    select(Assignment.id)
    .join(Pair, Pair.id == Assignment.pair_id)
    .join(Campaign, Campaign.id == Pair.campaign_id)
    .where(Assignment.rater_id == _rater, Assignment.status == "leased", Assignment.expires_at > _now, _in_scope)
    .limit(1)
)
STALE_LEASES = (
    select(Assignment.id, Assignment.pair_id).where(Assignment.status == "leased", Assignment.expires_at <= _now).order_by(Assignment.id)
)
EXPIRE_LEASE = (
    update(Assignment)
    .where(Assignment.id == _assignment, Assignment.status == "leased")
    .values(status="expired")
    .execution_options(synchronize_session=False)
)
# Neither answered nor skipped by this rater; a lease of the rater's own that ran out may come again.
_answered = exists().where(Assignment.pair_id == Pair.id, Assignment.rater_id == _rater, Assignment.status != "expired")
_waiting = (
    select(Pair.id)
    .join(Campaign, Campaign.id == Pair.campaign_id)
    .where(Pair.n_open < Pair.target_votes, Campaign.status == "open", _in_scope, ~_answered)
)
LEAST_VOTED = _waiting.order_by(Pair.campaign_id, Pair.n_open, Pair.id).limit(WINDOW)
COUNT_WAITING = select(func.count()).select_from(_waiting.limit(OPEN_COUNT_CAP).subquery())
COUNT_VOTES = select(func.count()).select_from(Vote).where(Vote.rater_id == _rater)
# One conditional UPDATE checks and claims in a single step, on one row.
TAKE_SLOT = (
    update(Pair)
    .where(Pair.id == _pair, Pair.n_open < Pair.target_votes)
    .values(n_open=Pair.n_open + 1)
    .execution_options(synchronize_session=False)
)
FREE_SLOT = update(Pair).where(Pair.id == _pair).values(n_open=Pair.n_open - 1).execution_options(synchronize_session=False)
OWN_ASSIGNMENT = select(Assignment.id).where(Assignment.pair_id == _pair, Assignment.rater_id == _rater)
RENEW_LEASE = (
    update(Assignment)
    .where(Assignment.id == _assignment)
    .values(status="leased", expires_at=bindparam("until"))
    .execution_options(synchronize_session=False)
)
FINISH = (
    update(Assignment)
    .where(Assignment.id == _assignment)
    .values(status=bindparam("now_status"), note=bindparam("now_note"))
    .execution_options(synchronize_session=False)
)
OFFER = (
    select(
        Assignment.swapped,
        Assignment.expires_at,
        Pair.gain_x_db,
        Pair.gain_y_db,
        Prompt.text,
        Campaign.name,
        Campaign.min_listen_ms,
        Campaign.aspects,
        Campaign.practice,
        _x.duration_ms.label("x_ms"),
        _y.duration_ms.label("y_ms"),
    )
    .join(Pair, Pair.id == Assignment.pair_id)
    .join(Prompt, Prompt.id == Pair.prompt_id)
    .join(Campaign, Campaign.id == Pair.campaign_id)
    .join(_x, _x.id == Pair.clip_x_id)
    .join(_y, _y.id == Pair.clip_y_id)
    .where(Assignment.id == _assignment)
)
ASKED = (
    select(
        Assignment.status,
        Assignment.issued_at,
        Assignment.pair_id,
        Assignment.swapped,
        Campaign.min_listen_ms,
        Campaign.aspects,
        _x.duration_ms.label("x_ms"),
        _y.duration_ms.label("y_ms"),
    )
    .join(Pair, Pair.id == Assignment.pair_id)
    .join(Campaign, Campaign.id == Pair.campaign_id)
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


def next_offer(session: Session, rater_id: int, campaign: str | None, now: datetime, lease: timedelta, rng: random.Random) -> Offer | None:
    """The pair this rater holds or can be given; None when nothing waits. Runs inside a write transaction."""
    scope = {"rater": rater_id, "campaign": campaign, "now": now}
    session.execute(LOCK_RATER, scope)
    if campaign is not None and session.scalar(CAMPAIGN_EXISTS, scope) is None:
        raise NotFoundError(f"campaign {campaign!r}", "a registered campaign", "check its name")
    assignment_id = session.scalar(HELD_LEASE, scope)
    if assignment_id is None:
        for stale_id, pair_id in session.execute(STALE_LEASES, scope).all():
            if _changed(session, EXPIRE_LEASE, assignment=stale_id):
                session.execute(FREE_SLOT, {"pair": pair_id})
        assignment_id = _claim(session, scope, now, lease, rng)
    if assignment_id is None:
        return None
    row = session.execute(OFFER, {"assignment": assignment_id}).one()
    gains = (row.gain_y_db, row.gain_x_db) if row.swapped else (row.gain_x_db, row.gain_y_db)
    return Offer(
        assignment_id=assignment_id,
        campaign=row.name,
        prompt=row.text,
        gain_a_db=round(gains[0], 3),
        gain_b_db=round(gains[1], 3),
        duration_ms=max(row.x_ms, row.y_ms),
        min_listen_ms=min(row.min_listen_ms, row.x_ms, row.y_ms),
        expires_at=row.expires_at,
        progress=Progress(
            done=session.scalar(COUNT_VOTES, scope) or 0,
            open=(session.scalar(COUNT_WAITING, scope) or 0) + 1,  # the one on the table is open too
        ),
        aspects=tuple(row.aspects),
        practice=row.practice,
    )


def _claim(session: Session, scope: dict[str, Any], now: datetime, lease: timedelta, rng: random.Random) -> str | None:
    """Takes a slot of a waiting pair and leases it to the rater; the assignment's id, or None if nothing waits."""
    while candidates := list(session.scalars(LEAST_VOTED, scope)):
        rng.shuffle(candidates)
        for pair_id in candidates:
            if not _changed(session, TAKE_SLOT, pair=pair_id):
                continue  # another rater was faster
            again = session.scalar(OWN_ASSIGNMENT, {"pair": pair_id, "rater": scope["rater"]})
            if again is not None:
                session.execute(RENEW_LEASE, {"assignment": again, "until": now + lease})
                return again
            assignment_id = uuid.uuid4().hex
            row = {
                "id": assignment_id,
                "pair_id": pair_id,
                "rater_id": scope["rater"],
                "rep": 0,
                "swapped": rng.random() < 0.5,
                "policy": f"least-voted-{WINDOW}",
                "propensity": 1 / len(candidates),
                "status": "leased",
                "issued_at": now,
                "expires_at": now + lease,
            }
            session.execute(ADD_ASSIGNMENT, row)
            return assignment_id
    return None


def submit(session: Session, vote: dict[str, Any], aspects: Mapping[str, int], marks: Sequence[Mark], now: datetime) -> Receipt:
    """Stores `vote` (columns of `Vote`, or choice `skip`) unless one stands already. Inside a write transaction."""
    assignment = {"assignment": vote["assignment_id"]}
    asked = session.execute(ASKED, assignment | {"rater": vote["rater_id"]}).one_or_none()
    if asked is None:
        raise NotFoundError("an unknown assignment", "one that was handed to this rater", "ask for the next pair")
    if asked.status == "voted":
        first = session.execute(STORED_VOTE, assignment).one()
        return Receipt(first.id, True, first.choice, first.excluded_reason)
    if asked.status == "skipped":
        return Receipt(None, True, "skip")
    if vote["choice"] == "skip":
        session.execute(FINISH, assignment | {"now_status": "skipped", "now_note": vote["comment"]})
        if asked.status == "leased":
            session.execute(FREE_SLOT, {"pair": asked.pair_id})
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
    late = asked.status == "expired" and not _changed(session, TAKE_SLOT, pair=asked.pair_id)
    reason = "late" if late else None
    vote_id = session.scalars(ADD_VOTE, [vote | {"excluded_reason": reason, "created_at": now}]).one()
    if aspects:
        session.execute(ADD_ASPECTS, [{"vote_id": vote_id, "aspect": aspect, "score": score} for aspect, score in aspects.items()])
    if marks:
        rows = [
            {"vote_id": vote_id, "side": mark.side, "t0_ms": mark.t0_ms, "t1_ms": end_ms, "tag": mark.tag}
            for mark, end_ms in zip(marks, ends_ms, strict=True)
        ]
        session.execute(ADD_MARKS, rows)
    session.execute(FINISH, assignment | {"now_status": "voted", "now_note": None})
    return Receipt(vote_id, False, vote["choice"], reason)


def check_aspects(aspects: Mapping[str, int], asked_for: Sequence[str]) -> None:
    """Raises RefusedError for an aspect the campaign does not ask for, or a score outside -2 to 2."""
    for aspect, score in aspects.items():
        if aspect not in asked_for:
            expected = f"only {', '.join(asked_for)}" if asked_for else "none in this campaign"
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


def _changed(session: Session, statement: Any, **parameters: Any) -> bool:
    result = session.execute(statement, parameters)
    assert isinstance(result, CursorResult)
    return result.rowcount == 1
