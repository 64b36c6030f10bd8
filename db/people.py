"""A person's way to the first pair: an invitation, consent, the headphone check, practice; and what the votes did since.

    token -> invitation -> rater + membership + consent (one transaction)      rater -> screen, practised_at

Whoever turns the consent page down before joining leaves no trace: nothing is written until `join`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.errors import ConflictError, NotFoundError, RefusedError
from db.schema import Consent, Invitation, Membership, Rater, SnapshotRater, Vote, utc_now
from db.store import RaterIdentity, Store, token_sha256

PASS_SHARE = 5 / 6
"""Right answers that pass the headphone check: 5 of 6.   Woods et al. 2017, doi:10.3758/s13414-017-1361-2."""


@dataclass(frozen=True)
class Newcomer:
    """A rater who has just joined, and the access code, this once."""

    rater: RaterIdentity
    access_code: str


@dataclass(frozen=True)
class Standing:
    """Where a rater stands on the way to the first pair, and what came of the votes.

    `screen`: what the headphone check found, {passed, right, trials, tries, at}, or None. `snapshots`: how many frozen
    snapshots, which models learn from, hold votes of this rater.
    """

    consent_due: bool
    screen: dict[str, Any] | None
    practised: bool
    votes: int
    snapshots: int


def check_invitation(store: Store, token: str, clock: Callable[[], datetime] = utc_now) -> None:
    """Returns if this link still lets somebody in. Raises NotFoundError; RefusedError when it has expired or is used up."""
    with store.read() as session:
        _open_invitation(session, token, clock())


def join(
    store: Store,
    token: str,
    handle: str,
    consent_version: str,
    access_code: str | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> Newcomer:
    """Makes a rater from an invitation and an accepted consent page, all or nothing.

    Args: access_code: a code that only this newcomer's call can bring about. Whoever has joined with it already is handed out again,
        under the first name, and no use of the link is spent: the first answer was lost. Default: a new one.
    Raises: NotFoundError, RefusedError (link expired or used up, name that cannot be), ConflictError (name taken). No use of
        the link is spent then.
    """
    if not 1 <= len(handle) <= 64 or not handle.isprintable() or handle != handle.strip():
        raise RefusedError(f"name {handle!r}", "1 to 64 printable characters", "choose another name")
    repeatable, now = access_code is not None, clock()
    access_code = access_code or secrets.token_urlsafe(16)
    if repeatable and (joined := _joined_with(store, access_code)):
        return joined
    try:
        with store.write() as session:
            invitation = _open_invitation(session, token, now)
            rater = Rater(handle=handle, token_sha256=token_sha256(access_code), created_at=now)
            session.add(rater)
            session.flush()
            _use(session, invitation, rater.id)
            session.add(Consent(rater_id=rater.id, version=consent_version, accepted=True, at=now))
            newcomer = RaterIdentity(rater.id, rater.handle, rater.role, rater.session_epoch)
    except (IntegrityError, RefusedError) as error:
        if repeatable and (joined := _joined_with(store, access_code)):  # the same call, a moment earlier
            return joined
        if isinstance(error, RefusedError):
            raise
        raise ConflictError(f"name {handle!r}, which is taken", "a name of your own", "choose another name") from error
    return Newcomer(newcomer, access_code)


def _joined_with(store: Store, access_code: str) -> Newcomer | None:
    with store.read() as session:
        rater = session.scalar(select(Rater).where(Rater.token_sha256 == token_sha256(access_code), Rater.status == "active"))
        return Newcomer(RaterIdentity(rater.id, rater.handle, rater.role, rater.session_epoch), access_code) if rater else None


def join_as(store: Store, token: str, rater_id: int, clock: Callable[[], datetime] = utc_now) -> None:
    """Lets a rater into the campaign of one more invitation; a member already spends no use. Raises as `join`."""
    with store.write() as session:
        session.execute(select(Rater.id).where(Rater.id == rater_id).with_for_update())
        invitation = session.scalar(select(Invitation).where(Invitation.token_sha256 == token_sha256(token)))
        if invitation is not None and invitation.campaign_id is not None:
            if session.get(Membership, (invitation.campaign_id, rater_id)) is None:
                _use(session, _open_invitation(session, token, clock()), rater_id)
        else:
            _open_invitation(session, token, clock())


def consent_due(store: Store, rater_id: int, version: str, everyone: bool) -> bool:
    """Whether this rater must still accept the consent page of `version` before the next pair.

    Due for those who came by invitation, and for those whose newest answer is a no or is about other words. Raters whom
    the owner added by hand were asked elsewhere: due for them only with `everyone`.
    """
    with store.read() as session:
        return _consent_due(session, rater_id, version, everyone)


def record_consent(store: Store, rater_id: int, version: str, accepted: bool, clock: Callable[[], datetime] = utc_now) -> None:
    """Stores an answer to the consent page. A no ends all sessions of the rater; the votes given so far stay."""
    with store.write() as session:
        session.add(Consent(rater_id=rater_id, version=version, accepted=accepted, at=clock()))
        if not accepted:
            session.execute(update(Rater).where(Rater.id == rater_id).values(session_epoch=Rater.session_epoch + 1))


def screens_taken(store: Store, rater_id: int) -> int:
    """How many headphone checks this rater has behind them: the number of the next one."""
    with store.read() as session:
        return _tries(session.scalars(select(Rater.screen).where(Rater.id == rater_id)).one())


def record_screen(
    store: Store, rater_id: int, right: int, trials: int, number: int | None = None, clock: Callable[[], datetime] = utc_now
) -> bool:
    """Stores the newest headphone check and how many there were; returns whether it was passed. 0 trials: not taken.

    Args: number: which check it was, counted from 0. What was found of the last one stands, whatever comes for it again.
    Raises: RefusedError when more answers are right than were asked; ConflictError for a check that is not this rater's next one.
    """
    if not 0 <= right <= trials:
        raise RefusedError(f"{right} right answers in {trials} trials", "no more than were asked", "report what was answered")
    passed = trials > 0 and right >= PASS_SHARE * trials
    with store.write() as session:
        rater = session.scalars(select(Rater).where(Rater.id == rater_id).with_for_update()).one()
        tries = _tries(rater.screen)
        if number is not None and rater.screen is not None and number == tries - 1:
            return bool(rater.screen["passed"])
        if number not in (None, tries):
            raise ConflictError(f"answers to headphone check {number}", f"answers to check {tries}", "begin the check anew")
        rater.screen = {"passed": passed, "right": right, "trials": trials, "tries": tries + 1, "at": clock().isoformat()}
    return passed


def _tries(screen: dict[str, Any] | None) -> int:
    return int((screen or {}).get("tries", 0))


def record_practice(store: Store, rater_id: int, clock: Callable[[], datetime] = utc_now) -> None:
    """Notes that a rater has rehearsed; the first time counts."""
    with store.write() as session:
        first = Rater.id == rater_id, Rater.practised_at.is_(None)
        session.execute(update(Rater).where(*first).values(practised_at=clock()))


def standing(store: Store, rater_id: int, version: str, everyone: bool) -> Standing:
    """Where a rater stands; `version` and `everyone` as in `consent_due`."""
    with store.read() as session:
        screen, practised_at = session.execute(select(Rater.screen, Rater.practised_at).where(Rater.id == rater_id)).one()
        return Standing(
            consent_due=_consent_due(session, rater_id, version, everyone),
            screen=screen,
            practised=practised_at is not None,
            votes=session.scalar(select(func.count()).select_from(Vote).where(Vote.rater_id == rater_id)) or 0,
            snapshots=session.scalar(
                select(func.count()).select_from(SnapshotRater).where(SnapshotRater.rater_id == rater_id, SnapshotRater.n_votes > 0)
            )
            or 0,
        )


def _consent_due(session: Session, rater_id: int, version: str, everyone: bool) -> bool:
    answers = select(Consent.version, Consent.accepted).where(Consent.rater_id == rater_id).order_by(Consent.id.desc()).limit(1)
    newest = session.execute(answers).one_or_none()
    if newest is not None:
        return not (newest.accepted and newest.version == version)
    by_link = select(Membership.rater_id).where(Membership.rater_id == rater_id, Membership.invitation_id.is_not(None)).limit(1)
    return everyone or session.scalar(by_link) is not None


def _open_invitation(session: Session, token: str, now: datetime) -> Invitation:
    invitation = session.scalar(select(Invitation).where(Invitation.token_sha256 == token_sha256(token)))
    if invitation is None:
        raise NotFoundError("an unknown invitation", "a link as it was sent", "open the whole link, or ask for a new one")
    if invitation.expires_at <= now:
        raise RefusedError("an invitation that has expired", "one that is still open", "ask for a new link")
    if invitation.n_used >= invitation.max_uses:
        raise RefusedError("an invitation that is used up", "one with a place left", "ask for a new link")
    return invitation


def _use(session: Session, invitation: Invitation, rater_id: int) -> None:
    """Takes one of the link's places in a single conditional UPDATE, so that two who come at once cannot share the last."""
    place = update(Invitation).where(Invitation.id == invitation.id, Invitation.n_used < Invitation.max_uses)
    taken = place.values(n_used=Invitation.n_used + 1).returning(Invitation.id).execution_options(synchronize_session=False)
    if session.scalar(taken) is None:
        raise RefusedError("an invitation that is used up", "one with a place left", "ask for a new link")
    if invitation.campaign_id is not None:
        session.add(Membership(campaign_id=invitation.campaign_id, rater_id=rater_id, invitation_id=invitation.id))
