"""The tables behind the votes.

    campaign -> pair(clip_x, clip_y) -> assignment(rater, sides as shown, lease) -> vote -> aspects, span marks
    invitation -> rater -> consents        snapshot -> the raters whose votes are in it

Two rules carry the rest. A vote belongs to exactly one assignment (a unique constraint, so a double submit dies in the
database and not in a race). And `pair.n_open` counts leases plus counted votes, so that one conditional UPDATE both
claims a slot and keeps every pair at or below its target. Gold pairs and blind repeats take no slots: they tell of the rater.

Sides are stored as they were shown; `db.export` turns them back. What a vote is asked for stands with its assignment, so that rules
may change while a campaign runs. Audio stays outside: `uri`, `sha256`, `size_bytes`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

LATE = "late"
"""The reason that is stored with a vote whose lease had run out, and whose place on the pair was given to somebody else."""
CHOICES = ("a", "b", "tie", "both_bad")
"""What a vote may say, as shown on the page. A skip is not a vote: it frees the slot."""
ASPECTS = ("prompt_fit", "musicality", "sound_quality")
"""What a vote may judge apart, from -2 (A much better) to 2 (B much better), as shown."""
CHOOSERS = ("least_voted", "random", "informative")
"""How a campaign chooses the next pair: the least voted first, any that waits, or where a vote tells most."""
HAS_ROOM = text("n_open < target_votes and gold is null")
"""The pairs that still want votes have indexes of their own: a campaign of a million votes is searched as fast as a new one."""
IS_GOLD = text("gold is not null")
"""So have those with a known answer, which are few."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime in, an aware UTC datetime out, on every dialect (SQLite forgets the zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "naive datetime"
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        list[str]: JSON(),
        list[list[Any]]: JSON(),
    }


class Setting(Base):
    """Facts about this database itself, such as the salt of the raters' pseudonyms."""

    __tablename__ = "setting"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class Campaign(Base):
    """A named set of pairs with one question and one rule for how often and how long to listen, which later leases follow."""

    __tablename__ = "campaign"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    target_votes: Mapped[int]
    min_listen_ms: Mapped[int]
    status: Mapped[str] = mapped_column(String(8), default="open")
    chooser: Mapped[str] = mapped_column(String(16), default="least_voted", server_default="least_voted")
    random_floor: Mapped[float] = mapped_column(default=0.2, server_default="0.2")
    """Share of `informative` choices that are uniform over what waits, so that every pair keeps a known propensity."""
    gold_rate: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Share of assignments that are pairs with a known answer, once the rater has some left to meet."""
    repeat_rate: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Share of assignments that are one of the rater's own earlier pairs, sides turned."""
    aspects: Mapped[list[str]] = mapped_column(default=list, server_default="[]")
    """Which of ASPECTS the page asks for beside the vote."""
    invited_only: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether only raters with a `Membership` are handed its pairs."""
    practice: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether new raters rehearse first. A rehearsal is played on the page alone and stores no vote."""
    require_screen: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether only raters who passed the headphone check are handed its pairs."""
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("rater.id"))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    __table_args__ = (
        CheckConstraint("target_votes >= 1", name="target"),
        CheckConstraint("min_listen_ms >= 0", name="min_listen"),
        CheckConstraint("status in ('open','paused','closed')", name="status"),
        CheckConstraint("chooser in ('least_voted','random','informative')", name="chooser"),
        CheckConstraint("random_floor > 0 and random_floor <= 1", name="random_floor"),
        CheckConstraint("gold_rate >= 0 and repeat_rate >= 0 and gold_rate + repeat_rate <= 0.5", name="rates"),
    )


class Rater(Base):
    """A person who listens, or who owns campaigns. The access code is stored hashed; `session_epoch` ends old sessions when it
    moves on. `external`: imported with votes from elsewhere, cannot sign in. `erased`: asked to be forgotten."""

    __tablename__ = "rater"
    id: Mapped[int] = mapped_column(primary_key=True)
    handle: Mapped[str] = mapped_column(String(64), unique=True)
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(8), default="rater")
    status: Mapped[str] = mapped_column(String(8), default="active")
    session_epoch: Mapped[int] = mapped_column(default=0)
    screen: Mapped[dict[str, Any] | None]
    """What the headphone and level check found: {passed, right, trials, at}."""
    practised_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    __table_args__ = (
        CheckConstraint("role in ('rater','owner')", name="role"),
        CheckConstraint("status in ('active','blocked','external','erased')", name="status"),
    )


class Invitation(Base):
    """A link that lets `max_uses` people become raters, of one campaign or of all. Stored hashed, like an access code."""

    __tablename__ = "invitation"
    id: Mapped[int] = mapped_column(primary_key=True)
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    campaign_id: Mapped[int | None] = mapped_column(ForeignKey("campaign.id"))
    note: Mapped[str | None] = mapped_column(Text)
    max_uses: Mapped[int]
    n_used: Mapped[int] = mapped_column(default=0)
    expires_at: Mapped[datetime]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    __table_args__ = (CheckConstraint("n_used >= 0 and n_used <= max_uses", name="uses"),)


class Membership(Base):
    """A rater who was invited to a campaign, and by which link."""

    __tablename__ = "membership"
    campaign_id: Mapped[int] = mapped_column(ForeignKey("campaign.id"), primary_key=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"), primary_key=True)
    invitation_id: Mapped[int | None] = mapped_column(ForeignKey("invitation.id"))


class Consent(Base):
    """What a rater answered to one version of the consent page. The newest answer counts; none is ever changed."""

    __tablename__ = "consent"
    id: Mapped[int] = mapped_column(primary_key=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"), index=True)
    version: Mapped[str] = mapped_column(String(32))
    accepted: Mapped[bool]
    at: Mapped[datetime] = mapped_column(default=utc_now)


class Prompt(Base):
    """The text that was asked for. `key` is the manifest's `prompt_id`; long texts are told apart by their hash."""

    __tablename__ = "prompt"
    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(128))
    text: Mapped[str] = mapped_column(Text)
    text_sha256: Mapped[str] = mapped_column(String(64))
    split: Mapped[str] = mapped_column(String(32))
    __table_args__ = (UniqueConstraint("key", "text_sha256"),)


class Clip(Base):
    """One rendered answer to a prompt: where it lies, what it is, and what made it. Immutable, known by its bytes and prompt.
    `system`: the name it was first registered under; a pair has its own."""

    __tablename__ = "clip"
    id: Mapped[int] = mapped_column(primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompt.id"))
    sha256: Mapped[str] = mapped_column(String(64))
    uri: Mapped[str] = mapped_column(Text)
    codes_uri: Mapped[str | None] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    duration_ms: Mapped[int]
    sample_rate: Mapped[int]
    lufs: Mapped[float | None]
    true_peak_dbfs: Mapped[float | None]
    system: Mapped[str] = mapped_column(String(128), index=True)
    policy_sha256: Mapped[str | None] = mapped_column(String(64))
    adapters: Mapped[list[str]]
    seed: Mapped[int | None] = mapped_column(BigInteger)
    tempo_bpm: Mapped[float | None]
    genre: Mapped[str | None] = mapped_column(String(64))
    gen: Mapped[dict[str, Any]]
    licence: Mapped[str | None] = mapped_column(String(128))
    consent: Mapped[str | None] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    __table_args__ = (UniqueConstraint("prompt_id", "sha256"), CheckConstraint("duration_ms > 0", name="duration"))


class Pair(Base):
    """Two answers to one prompt, with the gains that make them equally loud. `gold`: the known right answer, if any.
    `system_x`, `system_y`: what is compared, by the names that the campaign was given: two systems may play the same bytes, and one
    may go by another name elsewhere."""

    __tablename__ = "pair"
    id: Mapped[int] = mapped_column(primary_key=True)
    campaign_id: Mapped[int] = mapped_column(ForeignKey("campaign.id"))
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompt.id"))
    clip_x_id: Mapped[int] = mapped_column(ForeignKey("clip.id"))
    clip_y_id: Mapped[int] = mapped_column(ForeignKey("clip.id"))
    system_x: Mapped[str] = mapped_column(String(128))
    system_y: Mapped[str] = mapped_column(String(128))
    gain_x_db: Mapped[float]
    gain_y_db: Mapped[float]
    gold: Mapped[str | None] = mapped_column(String(1))
    target_votes: Mapped[int]
    n_open: Mapped[int] = mapped_column(default=0)
    priority: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """How much a vote would tell here, relative to other pairs; renewed from the votes while a campaign runs."""
    __table_args__ = (
        UniqueConstraint("campaign_id", "clip_x_id", "clip_y_id"),
        CheckConstraint("clip_x_id < clip_y_id", name="ordered"),
        CheckConstraint("gold in ('x','y')", name="gold"),
        CheckConstraint("n_open >= 0 and n_open <= target_votes", name="target"),
        Index("ix_pair_room", "campaign_id", "n_open", "id", sqlite_where=HAS_ROOM, postgresql_where=HAS_ROOM),
        Index("ix_pair_waiting", "campaign_id", "id", sqlite_where=HAS_ROOM, postgresql_where=HAS_ROOM),
        Index("ix_pair_gold", "campaign_id", "id", sqlite_where=IS_GOLD, postgresql_where=IS_GOLD),
        Index("ix_pair_priority", "campaign_id", "priority", "id", sqlite_where=HAS_ROOM, postgresql_where=HAS_ROOM),
    )


class Assignment(Base):
    """One pair in front of one rater, with the sides as shown and what a vote is asked for. A lease holds a slot; time or a skip
    frees it."""

    __tablename__ = "assignment"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    pair_id: Mapped[int] = mapped_column(ForeignKey("pair.id"))
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"))
    rep: Mapped[int] = mapped_column(default=0)
    kind: Mapped[str] = mapped_column(String(8), default="normal", server_default="normal")
    """`normal` holds a slot of its pair; `gold` and `repeat` hold none."""
    swapped: Mapped[bool]
    policy: Mapped[str] = mapped_column(String(32))
    propensity: Mapped[float]
    min_listen_ms: Mapped[int]
    """Listening asked for on each side, as far as the clips last: the campaign's rule at the lease. It judges the vote for good."""
    aspects: Mapped[list[str]]
    """Which of ASPECTS the vote may answer: the campaign's rule at the lease."""
    status: Mapped[str] = mapped_column(String(8), default="leased")
    note: Mapped[str | None] = mapped_column(Text)
    issued_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime]
    __table_args__ = (
        UniqueConstraint("pair_id", "rater_id", "rep"),
        CheckConstraint("status in ('leased','voted','skipped','expired')", name="status"),
        CheckConstraint("kind in ('normal','gold','repeat')", name="kind"),
        CheckConstraint("min_listen_ms >= 0", name="min_listen"),
        Index("ix_assignment_rater", "rater_id", "status"),
        Index("ix_assignment_lease", "status", "expires_at"),
    )


class Vote(Base):
    """What one rater said about one assignment, once, in the order in which the sides were shown."""

    __tablename__ = "vote"
    id: Mapped[int] = mapped_column(primary_key=True)
    assignment_id: Mapped[str] = mapped_column(ForeignKey("assignment.id"), unique=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"))
    idempotency_key: Mapped[str] = mapped_column(String(128))
    choice: Mapped[str] = mapped_column(String(8))
    confidence: Mapped[int | None]
    comment: Mapped[str | None] = mapped_column(Text)
    listen_a_ms: Mapped[int]
    listen_b_ms: Mapped[int]
    coverage_a: Mapped[float | None]
    """Share of side A that was heard at least once, 0 to 1, by the player's clock."""
    coverage_b: Mapped[float | None]
    events: Mapped[list[list[Any]]]
    client_ms: Mapped[int | None] = mapped_column(BigInteger)
    """The client's own clock at the vote (Unix ms), to tell skewed clocks from short listening."""
    ui_version: Mapped[str | None] = mapped_column(String(32))
    source: Mapped[str | None] = mapped_column(String(64))
    """Where an imported vote came from; none for our own page and API."""
    excluded_reason: Mapped[str | None] = mapped_column(String(32))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    __table_args__ = (
        UniqueConstraint("rater_id", "idempotency_key"),
        Index("ix_vote_rater", "rater_id", "id"),
        CheckConstraint("choice in ('a','b','tie','both_bad')", name="choice"),
        CheckConstraint("confidence between 1 and 3", name="confidence"),
        CheckConstraint("listen_a_ms >= 0 and listen_b_ms >= 0", name="listen"),
        CheckConstraint("coverage_a between 0 and 1 and coverage_b between 0 and 1", name="coverage"),
    )


class VoteAspect(Base):
    """One aspect of a vote, as shown: -2 A is much better, 0 alike, 2 B is much better."""

    __tablename__ = "vote_aspect"
    vote_id: Mapped[int] = mapped_column(ForeignKey("vote.id"), primary_key=True)
    aspect: Mapped[str] = mapped_column(String(32), primary_key=True)
    score: Mapped[int]
    __table_args__ = (CheckConstraint("score between -2 and 2", name="score"),)


class SpanMark(Base):
    """A stretch of one side, as shown, that a rater marked: "bad here"."""

    __tablename__ = "span_mark"
    id: Mapped[int] = mapped_column(primary_key=True)
    vote_id: Mapped[int] = mapped_column(ForeignKey("vote.id"), index=True)
    side: Mapped[str] = mapped_column(String(1))
    t0_ms: Mapped[int]
    t1_ms: Mapped[int]
    tag: Mapped[str] = mapped_column(String(32))
    __table_args__ = (
        CheckConstraint("side in ('a','b')", name="side"),
        CheckConstraint("t0_ms >= 0 and t1_ms > t0_ms", name="span"),
    )


class Snapshot(Base):
    """An export that was made of a campaign's votes, so that what was trained on whose votes can be told."""

    __tablename__ = "snapshot"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    campaign_id: Mapped[int] = mapped_column(ForeignKey("campaign.id"))
    n_votes: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class SnapshotRater(Base):
    """A rater whose votes stand in a snapshot; n_votes: of those that count, 0 where all are excluded."""

    __tablename__ = "snapshot_rater"
    snapshot_id: Mapped[int] = mapped_column(ForeignKey("snapshot.id"), primary_key=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"), primary_key=True)
    n_votes: Mapped[int]


class Audit(Base):
    """What an owner did, and when. Rows are only ever added."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(default=utc_now, index=True)
    actor_id: Mapped[int | None] = mapped_column(ForeignKey("rater.id"))
    """None: the command line on the server itself."""
    action: Mapped[str] = mapped_column(String(64))
    detail: Mapped[dict[str, Any]]
