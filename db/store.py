"""The verbs: register a campaign, invite a rater, hand out a pair, take a vote, count.

Every verb is one transaction, and returns after it is committed. Nothing above this module writes SQL.
"""

from __future__ import annotations

import hashlib
import hmac
import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.bulk import add_missing
from db.campaigns import CampaignSummary, Measure, Rules, check_rows, create
from db.errors import ConflictError, NotFoundError, RefusedError, ScreenDueError, StoreError
from db.schema import CHOICES, Assignment, Campaign, Pair, Rater, Setting, Vote, utc_now
from db.session import BUSY_TIMEOUT_S, Transactions, make_engine, parse_url, upgrade
from db.voting import AUDIO_FILE, Mark, Offer, Receipt, expire_leases, next_offer, submit

LEASE_S = 30 * 60
"""How long a rater may think before the slot goes to somebody else."""
EXPIRE_EVERY = timedelta(seconds=1)
"""How often leases that ran out are looked for; and always before a rater is told that nothing is left."""
IN_SESSION = select(Rater.id, Rater.handle, Rater.role, Rater.session_epoch).where(
    Rater.id == bindparam("rater"), Rater.status == "active", Rater.session_epoch == bindparam("epoch")
)


@dataclass(frozen=True)
class RaterIdentity:
    id: int
    handle: str
    role: str
    session_epoch: int


@dataclass(frozen=True)
class AudioFile:
    uri: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class CampaignStats:
    """Gold pairs are no part of `pairs` and `votes_wanted`, and answers to them or to blind repeats no part of `votes`."""

    name: str
    status: str
    pairs: int
    votes: int
    votes_wanted: int
    gold_pairs: int
    gold_votes: int
    repeat_votes: int
    leases: int
    skips: int
    excluded: dict[str, int]


@dataclass(frozen=True)
class Stats:
    """`votes`: all that are stored, controls too."""

    raters: int
    votes: int
    campaigns: list[CampaignStats]


class Store:
    """The votes database. Safe to share between threads; close it when done."""

    def __init__(self, url: str, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.url = parse_url(url)
        self.engine = make_engine(self.url, busy_timeout_s)
        transactions = Transactions(self.engine, busy_timeout_s)
        self.read, self.write = transactions.read, transactions.write
        self.read_core, self.write_core = transactions.read_core, transactions.write_core
        self._next_expiry = datetime.min.replace(tzinfo=UTC)

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- campaigns

    def create_campaign(
        self,
        name: str,
        manifest_rows: Iterable[Mapping[str, Any]],
        base_dir: str | Path,
        target_votes: int = 3,
        min_listen_ms: int = 3000,
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        measure: Measure | None = None,
    ) -> CampaignSummary:
        """Registers clips and pairs under a name. The same call again adds nothing; more rows add their pairs.

        Args:
            manifest_rows: rows of a samples manifest; `file` and `codes_file` are relative to `base_dir`.
            pairs: which clips meet, as (sha256, sha256). Default: clips of one prompt, each once, in manifest order.
            measure: path -> (LUFS, true peak dBFS); needed where rows lack `lufs` and `true_peak_dbfs`.

        Raises: StoreError for a missing or altered file, a path outside `base_dir`, a pair that cannot be, nothing to
            pair, or a campaign of that name with other rules. Nothing is stored then.
        """
        rules = Rules(target_votes, min_listen_ms)
        return create(self, name, check_rows(manifest_rows, base_dir), rules, pairs=pairs, measure=measure, keep_rules=True)

    # ---------------------------------------------------------------- raters

    def add_rater(self, handle: str, role: str = "rater") -> str:
        """Makes a rater and returns the access code, this once: only its hash is stored. Raises ConflictError if taken."""
        if not 1 <= len(handle) <= 64 or not handle.isprintable() or handle != handle.strip():
            raise StoreError(f"handle {handle!r}", "1 to 64 printable characters", "choose another handle")
        if role not in ("rater", "owner"):
            raise StoreError(f"role {role!r}", "rater or owner", "choose one of them")
        token = secrets.token_urlsafe(16)
        try:
            with self.write() as session:
                session.add(Rater(handle=handle, token_sha256=token_sha256(token), role=role))
        except IntegrityError as error:
            raise ConflictError(f"handle {handle!r}, which is taken", "a new handle", "renew its access code") from error
        return token

    def renew_token(self, handle: str) -> str:
        """A new access code for a rater; the old code and all sessions end. Raises NotFoundError."""
        token = secrets.token_urlsafe(16)
        with self.write() as session:
            rater = self._rater(session, handle)
            rater.token_sha256 = token_sha256(token)
            rater.session_epoch += 1
        return token

    def block_rater(self, handle: str) -> None:
        """Ends a rater's access. The votes stay, and every later export counts them as excluded. Raises NotFoundError."""
        with self.write() as session:
            rater = self._rater(session, handle)
            rater.status = "blocked"
            rater.session_epoch += 1

    @staticmethod
    def _rater(session: Session, handle: str) -> Rater:
        rater = session.scalar(select(Rater).where(Rater.handle == handle))
        if rater is None:
            raise NotFoundError(f"handle {handle!r}", "a known rater", "add the rater first")
        return rater

    def sign_in(self, handle: str, token: str) -> RaterIdentity | None:
        """The active rater with this handle and access code, or None."""
        with self.read() as session:
            rater = session.scalar(select(Rater).where(Rater.handle == handle, Rater.status == "active"))
            stored = rater.token_sha256 if rater else "0" * 64
            matches = hmac.compare_digest(stored, token_sha256(token))
            return _identity(rater) if rater and matches else None

    def rater_in_session(self, rater_id: int, session_epoch: int) -> RaterIdentity | None:
        """The active rater of a session that has not been ended, or None."""
        with self.read_core() as connection:
            row = connection.execute(IN_SESSION, {"rater": rater_id, "epoch": session_epoch}).one_or_none()
            return RaterIdentity(*row) if row else None

    def end_sessions(self, rater_id: int) -> None:
        """Signs a rater out everywhere."""
        with self.write() as session:
            session.execute(update(Rater).where(Rater.id == rater_id).values(session_epoch=Rater.session_epoch + 1))

    # ---------------------------------------------------------------- pairs and votes

    def next_assignment(
        self,
        rater_id: int,
        campaign: str | None = None,
        *,
        lease_s: float = LEASE_S,
        rng: random.Random | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> Offer | None:
        """The pair this rater should hear now, held for `lease_s`; the same one until it is answered. None: all done.

        A pair never has more leases and counted votes than its target. Sides are drawn at random and stored as shown.
        Raises: NotFoundError for an unknown campaign; ScreenDueError when only a headphone check stands between rater and pair.
        """
        lease = timedelta(seconds=lease_s)
        rng, now = rng or random.SystemRandom(), clock()
        if now >= self._next_expiry:
            self._expire(now)
        while True:
            try:
                with self.write_core() as connection:
                    offer = next_offer(connection, rater_id, campaign, now, lease, rng)
            except ScreenDueError:
                if self._expire(now):
                    continue
                raise
            if offer is not None or not self._expire(now):
                return offer

    def _expire(self, now: datetime) -> int:
        self._next_expiry = now + EXPIRE_EVERY
        with self.write_core() as connection:
            return expire_leases(connection, now)

    def audio_file(self, assignment_id: str, side: str, rater_id: int) -> AudioFile:
        """The file behind side a or b of this rater's assignment, as shown. Raises NotFoundError."""
        where = {"assignment": assignment_id, "rater": rater_id, "side_b": side == "b"}
        with self.read_core() as connection:
            row = connection.execute(AUDIO_FILE, where).one_or_none()
        if row is None or side not in ("a", "b"):
            raise NotFoundError("an unknown assignment", "one that was handed to this rater", "ask for the next pair")
        return AudioFile(*row)

    def submit_vote(
        self,
        rater_id: int,
        assignment_id: str,
        choice: str,
        *,
        listen_a_ms: int = 0,
        listen_b_ms: int = 0,
        idempotency_key: str,
        confidence: int | None = None,
        comment: str | None = None,
        events: Sequence[Sequence[Any]] = (),
        aspects: Mapping[str, int] = MappingProxyType({}),
        marks: Sequence[Mark] = (),
        coverage_a: float | None = None,
        coverage_b: float | None = None,
        client_ms: int | None = None,
        ui_version: str | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> Receipt:
        """Stores a vote, once; returns after the commit. Sent again, or from a second tab, the first one stands.

        A vote whose lease ran out takes a free slot if there is one; else it is kept, excluded as `late`.

        Args:
            aspects: score by aspect, -2 (A much better) to 2 (B much better), as shown; only those that the pair was handed out with.
            marks: stretches of a side, as shown, inside its clip.
            coverage_a, coverage_b: share of each side that was heard at least once, 0 to 1.
            client_ms: the client's own clock, Unix ms.

        Raises: NotFoundError for another rater's assignment; RefusedError after too little listening, more than the
            clock allows, or for an aspect, mark or coverage that cannot be; ConflictError for a key that was used for
            another assignment. Nothing is stored then.
        """
        if choice not in (*CHOICES, "skip"):
            raise RefusedError(f"choice {choice!r}", f"one of {(*CHOICES, 'skip')}", "correct it")
        if confidence not in (None, 1, 2, 3):
            raise RefusedError(f"confidence {confidence}", "1, 2, 3 or none", "correct it")
        for coverage in (coverage_a, coverage_b):
            if coverage is not None and not 0 <= coverage <= 1:
                raise RefusedError(f"coverage {coverage}", "a share from 0 to 1", "report what was really heard")
        vote = {
            "assignment_id": assignment_id,
            "rater_id": rater_id,
            "idempotency_key": idempotency_key,
            "choice": choice,
            "confidence": confidence,
            "comment": comment or None,
            "listen_a_ms": listen_a_ms,
            "listen_b_ms": listen_b_ms,
            "coverage_a": coverage_a,
            "coverage_b": coverage_b,
            "events": [list(event) for event in events],
            "client_ms": client_ms,
            "ui_version": ui_version,
        }
        try:
            with self.write_core() as connection:
                return submit(connection, vote, aspects, marks, clock())
        except IntegrityError as error:
            got = f"idempotency key {idempotency_key!r}, used for another pair"
            raise ConflictError(got, "a new key for each pair", "draw a new key and send again") from error

    # ---------------------------------------------------------------- counting

    def ping(self) -> None:
        """Asks the database for a sign of life. Raises UnavailableError."""
        with self.read() as session:
            session.execute(text("select 1"))

    def stats(self) -> Stats:
        """Counts by campaign; excluded votes by reason, so that none leaves unseen."""
        with self.read() as session:
            raters = session.scalar(select(func.count()).select_from(Rater).where(Rater.status == "active")) or 0
            gold = Pair.gold.is_not(None)
            pairs = {
                (campaign_id, bool(known)): (n, int(wanted))
                for campaign_id, known, n, wanted in session.execute(
                    select(Pair.campaign_id, gold, func.count(), func.sum(Pair.target_votes)).group_by(Pair.campaign_id, gold)
                )
            }
            handed = Counter[tuple[int, str]]()
            voted = Counter[tuple[int, str]]()
            for campaign_id, status, kind, n in session.execute(
                select(Pair.campaign_id, Assignment.status, Assignment.kind, func.count())
                .join(Pair, Pair.id == Assignment.pair_id)
                .group_by(Pair.campaign_id, Assignment.status, Assignment.kind)
            ):
                handed[campaign_id, status] += n
                if status == "voted":
                    voted[campaign_id, kind] = n
            excluded: dict[int, dict[str, int]] = {}
            for campaign_id, reason, n in session.execute(
                select(Pair.campaign_id, Vote.excluded_reason, func.count())
                .join(Assignment, Assignment.id == Vote.assignment_id)
                .join(Pair, Pair.id == Assignment.pair_id)
                .where(Vote.excluded_reason.is_not(None))
                .group_by(Pair.campaign_id, Vote.excluded_reason)
            ):
                excluded.setdefault(campaign_id, {})[str(reason)] = n
            campaigns = [
                CampaignStats(
                    name=campaign.name,
                    status=campaign.status,
                    pairs=pairs.get((campaign.id, False), (0, 0))[0],
                    votes=voted[campaign.id, "normal"],
                    votes_wanted=pairs.get((campaign.id, False), (0, 0))[1],
                    gold_pairs=pairs.get((campaign.id, True), (0, 0))[0],
                    gold_votes=voted[campaign.id, "gold"],
                    repeat_votes=voted[campaign.id, "repeat"],
                    leases=handed[campaign.id, "leased"],
                    skips=handed[campaign.id, "skipped"],
                    excluded=excluded.get(campaign.id, {}),
                )
                for campaign in session.scalars(select(Campaign).order_by(Campaign.id))
            ]
        return Stats(raters, voted.total(), campaigns)

    def pseudonym_salt(self) -> str:
        """This database's own salt for pseudonyms: drawn once, never exported."""
        with self.write() as session:
            add_missing(session, Setting, {"key": "pseudonym_salt", "value": secrets.token_hex(16)})
            return session.scalars(select(Setting.value).where(Setting.key == "pseudonym_salt")).one()


def open_store(url: str, busy_timeout_s: float = BUSY_TIMEOUT_S) -> Store:
    """Opens the database at `url`, made or migrated if need be. Raises StoreError."""
    upgrade(url)
    return Store(url, busy_timeout_s)


def token_sha256(token: str) -> str:
    """What is stored of an access code or an invitation: a hash from which it cannot be had back."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _identity(rater: Rater) -> RaterIdentity:
    return RaterIdentity(rater.id, rater.handle, rater.role, rater.session_epoch)
