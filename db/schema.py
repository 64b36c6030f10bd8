"""The tables behind the votes.

    campaign -> pair(clip_x, clip_y) -> assignment(rater, sides as shown, lease) -> vote

Two rules carry the rest. A vote belongs to exactly one assignment (a unique constraint, so a double submit dies in the
database and not in a race). And `pair.n_open` counts leases plus counted votes, so that one conditional UPDATE both
claims a slot and keeps every pair at or below its target.

Sides are stored as they were shown; `db.export` turns them back. Audio stays outside: `uri`, `sha256`, `size_bytes`.
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
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

CHOICES = ("a", "b", "tie", "both_bad")
"""What a vote may say, as shown on the page. A skip is not a vote: it frees the slot."""


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
    """A named set of pairs with one question and one rule for how often and how long to listen."""

    __tablename__ = "campaign"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    target_votes: Mapped[int]
    min_listen_ms: Mapped[int]
    status: Mapped[str] = mapped_column(String(8), default="open")
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    __table_args__ = (
        CheckConstraint("target_votes >= 1", name="target"),
        CheckConstraint("min_listen_ms >= 0", name="min_listen"),
        CheckConstraint("status in ('open','closed')", name="status"),
    )


class Rater(Base):
    """A person who listens. The access code is stored hashed; `session_epoch` ends old sessions when it moves on."""

    __tablename__ = "rater"
    id: Mapped[int] = mapped_column(primary_key=True)
    handle: Mapped[str] = mapped_column(String(64), unique=True)
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(8), default="rater")
    status: Mapped[str] = mapped_column(String(8), default="active")
    session_epoch: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    __table_args__ = (
        CheckConstraint("role in ('rater','admin')", name="role"),
        CheckConstraint("status in ('active','blocked')", name="status"),
    )


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
    """One rendered answer to a prompt: where it lies, what it is, and what made it. Immutable, known by its bytes and prompt."""

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
    """Two answers to one prompt, with the gains that make them equally loud. `gold`: the known right answer, if any."""

    __tablename__ = "pair"
    id: Mapped[int] = mapped_column(primary_key=True)
    campaign_id: Mapped[int] = mapped_column(ForeignKey("campaign.id"))
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompt.id"))
    clip_x_id: Mapped[int] = mapped_column(ForeignKey("clip.id"))
    clip_y_id: Mapped[int] = mapped_column(ForeignKey("clip.id"))
    gain_x_db: Mapped[float]
    gain_y_db: Mapped[float]
    gold: Mapped[str | None] = mapped_column(String(1))
    target_votes: Mapped[int]
    n_open: Mapped[int] = mapped_column(default=0)
    __table_args__ = (
        UniqueConstraint("campaign_id", "clip_x_id", "clip_y_id"),
        CheckConstraint("clip_x_id < clip_y_id", name="ordered"),
        CheckConstraint("gold in ('x','y')", name="gold"),
        CheckConstraint("n_open >= 0 and n_open <= target_votes", name="target"),
        Index("ix_pair_next", "campaign_id", "n_open", "id"),
    )


class Assignment(Base):
    """One pair in front of one rater, with the sides as shown. A lease holds a slot; time or a skip frees it."""

    __tablename__ = "assignment"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    pair_id: Mapped[int] = mapped_column(ForeignKey("pair.id"))
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"))
    rep: Mapped[int] = mapped_column(default=0)
    swapped: Mapped[bool]
    policy: Mapped[str] = mapped_column(String(32))
    propensity: Mapped[float]
    status: Mapped[str] = mapped_column(String(8), default="leased")
    note: Mapped[str | None] = mapped_column(Text)
    issued_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime]
    __table_args__ = (
        UniqueConstraint("pair_id", "rater_id", "rep"),
        CheckConstraint("status in ('leased','voted','skipped','expired')", name="status"),
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
    events: Mapped[list[list[Any]]]
    excluded_reason: Mapped[str | None] = mapped_column(String(32))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    __table_args__ = (
        UniqueConstraint("rater_id", "idempotency_key"),
        CheckConstraint("choice in ('a','b','tie','both_bad')", name="choice"),
        CheckConstraint("confidence between 1 and 3", name="confidence"),
        CheckConstraint("listen_a_ms >= 0 and listen_b_ms >= 0", name="listen"),
    )
