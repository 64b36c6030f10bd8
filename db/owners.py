"""What an owner does: settings, pause and close, invitations, blocking, and a rater's right to a copy or to be forgotten.

Every change and its audit entry are one transaction. The audit names people by number, never by handle, so that erasing
somebody need not touch it. `actor_id` is None for the command line on the server itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import case, delete, func, inspect, select, update
from sqlalchemy.orm import Session

from db.campaigns import Rules, check_text, rules_of
from db.errors import NotFoundError, RefusedError
from db.quality import BLOCKED, Quality, find_campaign, of_rater
from db.schema import (
    LATE,
    Assignment,
    Audit,
    Base,
    Campaign,
    Consent,
    Invitation,
    Membership,
    Pair,
    Rater,
    Snapshot,
    SnapshotRater,
    SpanMark,
    Vote,
    VoteAspect,
    utc_now,
)
from db.store import Store, token_sha256

MAX_INVITED = 10_000
MAX_INVITATION_DAYS = 365


@dataclass(frozen=True)
class CampaignRow:
    """A campaign as its owner sees it. `votes` leaves out gold pairs and repeats; `excluded`: votes kept but not counted, by reason."""

    id: int
    name: str
    status: str
    rules: Rules
    created_at: datetime
    n_pairs: int
    n_gold: int
    votes: int
    votes_wanted: int
    leases: int
    skips: int
    excluded: dict[str, int]


@dataclass(frozen=True)
class RaterRow:
    id: int
    handle: str
    role: str
    status: str
    votes: int
    created_at: datetime


@dataclass(frozen=True)
class InvitationRow:
    id: int
    campaign: str | None
    note: str | None
    n_used: int
    max_uses: int
    expires_at: datetime


@dataclass(frozen=True)
class AuditRow:
    at: datetime
    actor: str | None
    action: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class TrainedOn:
    """A frozen snapshot that holds votes of a person; `encore lineage` tells which adapters came of it."""

    name: str
    sha256: str
    n_votes: int


def record(session: Session, actor_id: int | None, action: str, **detail: Any) -> None:
    """Adds an audit entry to a transaction."""
    session.add(Audit(actor_id=actor_id, action=action, detail=detail))


# -------------------------------------------------------------------- campaigns


def campaigns(store: Store) -> list[CampaignRow]:
    """All campaigns, oldest first."""
    counted = {stats.name: stats for stats in store.stats().campaigns}
    with store.read() as session:
        return [
            CampaignRow(
                id=campaign.id,
                name=campaign.name,
                status=campaign.status,
                rules=rules_of(campaign),
                created_at=campaign.created_at,
                n_pairs=stats.pairs,
                n_gold=stats.gold_pairs,
                votes=stats.votes,
                votes_wanted=stats.votes_wanted,
                leases=stats.leases,
                skips=stats.skips,
                excluded=stats.excluded,
            )
            for campaign in session.scalars(select(Campaign).order_by(Campaign.id))
            if (stats := counted.get(campaign.name))  # one that was made between the two looks is there next time
        ]


def campaign_id_of(store: Store, name: str) -> int:
    """Raises NotFoundError."""
    with store.read() as session:
        return find_campaign(session, name).id


def set_status(store: Store, actor_id: int | None, campaign_id: int, status: str) -> None:
    """Opens, pauses or closes a campaign. Nobody is handed its pairs then; votes on pairs already handed out still count.

    Raises: NotFoundError; RefusedError for another status.
    """
    if status not in ("open", "paused", "closed"):
        raise RefusedError(f"status {status!r}", "open, paused or closed", "choose one of them")
    with store.write() as session:
        campaign = _campaign(session, campaign_id, lock=True)
        if campaign.status != status:
            record(session, actor_id, "campaign.status", campaign_id=campaign_id, was=campaign.status, status=status)
            campaign.status = status


def change_rules(store: Store, actor_id: int | None, campaign_id: int, **changes: Any) -> Rules:
    """Changes some of a campaign's rules and returns all of them.

    They hold for pairs handed out from now on: a vote that is being given, or counts, is judged by what it was asked for. A lower
    target takes no vote or lease back: a pair that has more already is simply full.
    Raises: NotFoundError; StoreError for rules that cannot be.
    """
    with store.write() as session:
        campaign = _campaign(session, campaign_id, lock=True)
        was = rules_of(campaign)
        rules = replace(was, **changes)
        for column, value in rules.columns().items():
            setattr(campaign, column, value)
        if rules.target_votes != was.target_votes:
            in_order = select(Pair.id).where(Pair.campaign_id == campaign_id).order_by(Pair.id)
            session.execute(in_order.with_for_update(key_share=True))  # one order for all: no deadlock
            kept = case((Pair.n_open > rules.target_votes, Pair.n_open), else_=rules.target_votes)
            session.execute(update(Pair).where(Pair.campaign_id == campaign_id).values(target_votes=kept))
        changed = {key: value for key, value in rules.columns().items() if was.columns()[key] != value}
        if changed:
            record(session, actor_id, "campaign.rules", campaign_id=campaign_id, **changed)
        return rules


# -------------------------------------------------------------------- invitations


def invite(
    store: Store,
    actor_id: int | None,
    campaign_id: int | None,
    *,
    max_uses: int = 1,
    expires_in: timedelta = timedelta(days=14),
    note: str | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> str:
    """Makes an invitation, to one campaign or to all, and returns its token, this once: only its hash is stored.

    Raises: NotFoundError; RefusedError for a number of uses or an expiry out of bounds.
    """
    if not 1 <= max_uses <= MAX_INVITED:
        raise RefusedError(f"max_uses={max_uses}", f"1 to {MAX_INVITED}", "correct it")
    if not timedelta() < expires_in <= timedelta(days=MAX_INVITATION_DAYS):
        raise RefusedError(f"an invitation for {expires_in}", f"more than 0 and at most {MAX_INVITATION_DAYS} days", "correct it")
    check_text(note, "the note", 500)
    token = secrets.token_urlsafe(18)
    with store.write() as session:
        if campaign_id is not None:
            _campaign(session, campaign_id)
        invitation = Invitation(
            token_sha256=token_sha256(token), campaign_id=campaign_id, note=note or None, max_uses=max_uses, expires_at=clock() + expires_in
        )
        session.add(invitation)
        session.flush()
        record(session, actor_id, "invitation.create", invitation_id=invitation.id, campaign_id=campaign_id, max_uses=max_uses)
    return token


def invitations(store: Store) -> list[InvitationRow]:
    """All invitations, newest first."""
    with store.read() as session:
        rows = select(Invitation, Campaign.name).outerjoin(Campaign, Campaign.id == Invitation.campaign_id).order_by(Invitation.id.desc())
        return [InvitationRow(i.id, name, i.note, i.n_used, i.max_uses, i.expires_at) for i, name in session.execute(rows)]


def end_invitation(store: Store, actor_id: int | None, invitation_id: int, clock: Callable[[], datetime] = utc_now) -> None:
    """Lets nobody else in by this link. Raises NotFoundError."""
    with store.write() as session:
        invitation = session.get(Invitation, invitation_id)
        if invitation is None:
            raise NotFoundError(f"invitation {invitation_id}", "one that was made", "look at the list of invitations")
        invitation.expires_at = min(invitation.expires_at, clock())
        record(session, actor_id, "invitation.end", invitation_id=invitation_id)


# -------------------------------------------------------------------- people


def raters(store: Store) -> list[RaterRow]:
    """Everybody, with how many votes are stored of each."""
    n_votes = select(Vote.rater_id, func.count().label("n")).group_by(Vote.rater_id).subquery()
    with store.read() as session:
        rows = select(Rater, n_votes.c.n).outerjoin(n_votes, n_votes.c.rater_id == Rater.id).order_by(Rater.id)
        return [RaterRow(r.id, r.handle, r.role, r.status, n or 0, r.created_at) for r, n in session.execute(rows)]


def set_blocked(store: Store, actor_id: int | None, rater_id: int, blocked: bool) -> None:
    """Ends or restores a person's access. Votes of a blocked rater stay, and are excluded by that reason.

    Raises: NotFoundError; RefusedError for oneself, and for who is neither active nor blocked.
    """
    with store.write() as session:
        rater = _rater(session, rater_id)
        if rater_id == actor_id:
            raise RefusedError("oneself", "another person", "ask another owner")
        if rater.status not in ("active", "blocked"):
            raise RefusedError(f"a rater who is {rater.status}", "one who is active or blocked", "leave this one as it is")
        wanted = "blocked" if blocked else "active"
        if rater.status != wanted:
            rater.status = wanted
            rater.session_epoch += 1
            record(session, actor_id, "rater.block" if blocked else "rater.unblock", rater_id=rater_id)


def export_rater(store: Store, actor_id: int | None, rater_id: int) -> dict[str, Any]:
    """Everything held about a person, ready for JSON. The hash of the access code is left out: it says nothing, and is a key.

    Raises: NotFoundError.
    """
    as_of, quality = utc_now(), of_rater(store, rater_id)
    with store.write() as session:
        rater = _rater(session, rater_id)
        votes = session.scalars(select(Vote).where(Vote.rater_id == rater_id).order_by(Vote.id)).all()
        mine = select(Vote.id).where(Vote.rater_id == rater_id)
        record(session, actor_id, "rater.export", rater_id=rater_id)
        return {
            "rater": _plain(rater, leave_out=("token_sha256", "session_epoch")),
            "consents": _all(session, select(Consent).where(Consent.rater_id == rater_id).order_by(Consent.id)),
            "memberships": _all(session, select(Membership).where(Membership.rater_id == rater_id)),
            "assignments": _all(session, select(Assignment).where(Assignment.rater_id == rater_id).order_by(Assignment.issued_at)),
            "votes": [_plain(vote) for vote in votes],
            "aspects": _all(session, select(VoteAspect).where(VoteAspect.vote_id.in_(mine))),
            "marks": _all(session, select(SpanMark).where(SpanMark.vote_id.in_(mine)).order_by(SpanMark.id)),
            "quality": [_quality(campaign_id, as_of, found) for campaign_id, found in quality],
            "snapshots": [vars(snapshot) for snapshot in _trained_on(session, rater_id)],
            "actions": _all(session, select(Audit).where(Audit.actor_id == rater_id).order_by(Audit.id)),
        }


def erase_rater(store: Store, actor_id: int | None, rater_id: int, votes: Literal["anonymise", "remove"] = "anonymise") -> list[TrainedOn]:
    """Forgets a person, for good. Returns the frozen snapshots that hold their votes: those cannot be taken back.

    The handle, the access code, the headphone check, comments, notes and links to invitations go. `anonymise` keeps the votes
    and the bare yes or no to the consent page under a nameless rater; `remove` deletes them and frees the slots they held.
    Raises: NotFoundError; RefusedError for an owner, for oneself, or for another policy.
    """
    if votes not in ("anonymise", "remove"):
        raise RefusedError(f"votes={votes!r}", "anonymise or remove", "choose one of them")
    with store.write() as session:
        rater = _rater(session, rater_id)
        if rater.role == "owner":
            raise RefusedError("an owner", "a rater", "owners' actions are on record; make another owner first, then block this one")
        if rater.status == "blocked":  # what the block kept out must not count again under a nameless rater
            uncounted = update(Vote).where(Vote.rater_id == rater_id, Vote.excluded_reason.is_(None))
            session.execute(uncounted.values(excluded_reason=BLOCKED))
        rater.handle = f"erased-{secrets.token_hex(8)}"
        rater.token_sha256 = token_sha256(secrets.token_urlsafe(32))
        rater.status = "erased"
        rater.session_epoch += 1
        rater.screen = rater.practised_at = None
        session.execute(delete(Membership).where(Membership.rater_id == rater_id))
        held = _held_slots(session, rater_id, with_votes=votes == "remove")
        for pair_id, n in sorted(held.items()):  # one order for all: no deadlock
            session.execute(update(Pair).where(Pair.id == pair_id).values(n_open=Pair.n_open - n))
        if votes == "remove":
            mine = select(Vote.id).where(Vote.rater_id == rater_id)
            for table in (VoteAspect, SpanMark):
                session.execute(delete(table).where(table.vote_id.in_(mine)).execution_options(synchronize_session=False))
            for owned in (Vote, Assignment, Consent):
                session.execute(delete(owned).where(owned.rater_id == rater_id).execution_options(synchronize_session=False))
        else:
            session.execute(update(Vote).where(Vote.rater_id == rater_id).values(comment=None, client_ms=None, events=[]))
            session.execute(update(Assignment).where(Assignment.rater_id == rater_id).values(note=None))
            leased = (Assignment.rater_id == rater_id) & (Assignment.status == "leased")
            session.execute(update(Assignment).where(leased).values(status="expired"))
        record(session, actor_id, "rater.erase", rater_id=rater_id, votes=votes)
        return _trained_on(session, rater_id)


def trained_on(store: Store, handle: str) -> list[TrainedOn]:
    """The frozen snapshots that hold a rater's votes, oldest first. Raises NotFoundError."""
    rater_id = rater_id_of(store, handle)
    with store.read() as session:
        return [held for held in _trained_on(session, rater_id) if held.n_votes]


def rater_id_of(store: Store, handle: str) -> int:
    """Raises NotFoundError."""
    with store.read() as session:
        rater_id = session.scalar(select(Rater.id).where(Rater.handle == handle))
    if rater_id is None:
        raise NotFoundError(f"handle {handle!r}", "a known rater", "check the name")
    return rater_id


def audit(store: Store, limit: int = 200) -> list[AuditRow]:
    """The newest entries first. `actor` is None for the command line."""
    with store.read() as session:
        rows = select(Audit, Rater.handle).outerjoin(Rater, Rater.id == Audit.actor_id).order_by(Audit.id.desc()).limit(limit)
        return [AuditRow(entry.at, handle, entry.action, entry.detail) for entry, handle in session.execute(rows)]


def _held_slots(session: Session, rater_id: int, with_votes: bool) -> Mapping[int, int]:
    """Slots by pair that this rater's leases, and votes too if asked, hold. A vote that came too late never took one."""
    statuses = ("leased", "voted") if with_votes else ("leased",)
    rows = (
        select(Assignment.pair_id, func.count())
        .outerjoin(Vote, Vote.assignment_id == Assignment.id)
        .where(Assignment.rater_id == rater_id, Assignment.kind == "normal", Assignment.status.in_(statuses))
        .where(func.coalesce(Vote.excluded_reason, "") != LATE)
        .where(func.coalesce(Vote.source, "") == "")
        .group_by(Assignment.pair_id)
    )
    return {pair_id: int(n) for pair_id, n in session.execute(rows)}


def _trained_on(session: Session, rater_id: int) -> list[TrainedOn]:
    rows = select(Snapshot.name, Snapshot.sha256, SnapshotRater.n_votes).join(SnapshotRater, SnapshotRater.snapshot_id == Snapshot.id)
    return [TrainedOn(*row) for row in session.execute(rows.where(SnapshotRater.rater_id == rater_id).order_by(Snapshot.id))]


def _campaign(session: Session, campaign_id: int, lock: bool = False) -> Campaign:
    campaign = session.get(Campaign, campaign_id, with_for_update={"key_share": True} if lock else None)
    if campaign is None:
        raise NotFoundError(f"campaign {campaign_id}", "a registered campaign", "look at the list of campaigns")
    return campaign


def _rater(session: Session, rater_id: int) -> Rater:
    rater = session.get(Rater, rater_id)
    if rater is None:
        raise NotFoundError(f"rater {rater_id}", "a known rater", "look at the list of raters")
    return rater


def _all(session: Session, rows: Any) -> list[dict[str, Any]]:
    return [_plain(row) for row in session.scalars(rows)]


def _quality(campaign_id: int, as_of: datetime, quality: Quality) -> dict[str, Any]:
    """What owners see of a rater in a campaign, but for name and status."""
    shown = ("n_votes", "n_gold", "gold_accuracy", "n_repeat", "repeat_agreement", "left_share", "coverage", "reliability")
    where = {"campaign_id": campaign_id, "rater_id": quality.rater_id, "as_of": as_of.isoformat()}
    return where | {name: getattr(quality, name) for name in shown}


def _plain(row: Base, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """A row's columns, times as ISO 8601."""
    columns = {column.key: getattr(row, column.key) for column in inspect(row).mapper.column_attrs if column.key not in leave_out}
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in columns.items()}
