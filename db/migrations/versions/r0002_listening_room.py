"""Owners, invitations, consent, gold pairs and repeats, aspects, span marks, raters' quality, snapshots and an audit log."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _new_tables()
    _alter(
        "campaign",
        add=[
            sa.Column("chooser", sa.String(length=16), server_default="least_voted", nullable=False),
            sa.Column("random_floor", sa.Double(), server_default="0.2", nullable=False),
            sa.Column("gold_rate", sa.Double(), server_default="0", nullable=False),
            sa.Column("repeat_rate", sa.Double(), server_default="0", nullable=False),
            sa.Column("aspects", sa.JSON(), server_default="[]", nullable=False),
            sa.Column("invited_only", sa.Boolean(), server_default=sa.false(), nullable=False),
            sa.Column("practice", sa.Boolean(), server_default=sa.false(), nullable=False),
            sa.Column("owner_id", sa.Integer(), nullable=True),
        ],
        replaced=["ck_campaign_status"],
        new={
            "ck_campaign_status": "status in ('open','paused','closed')",
            "ck_campaign_chooser": "chooser in ('least_voted','random','informative')",
            "ck_campaign_random_floor": "random_floor > 0 and random_floor <= 1",
            "ck_campaign_rates": "gold_rate >= 0 and repeat_rate >= 0 and gold_rate + repeat_rate <= 0.5",
        },
        foreign={"fk_campaign_owner_id": ("owner_id", "rater")},
    )
    _alter(
        "rater",
        add=[sa.Column("screen", sa.JSON(), nullable=True), sa.Column("practised_at", sa.DateTime(timezone=True), nullable=True)],
        new={"ck_rater_status": "status in ('active','blocked','external','erased')"},
        replaced=["ck_rater_role", "ck_rater_status"],
    )
    op.execute("update rater set role = 'owner' where role = 'admin'")
    _alter("rater", add=[], new={"ck_rater_role": "role in ('rater','owner')"})
    op.add_column("pair", sa.Column("priority", sa.Double(), server_default="1", nullable=False))
    _alter(
        "assignment",
        add=[sa.Column("kind", sa.String(length=8), server_default="normal", nullable=False)],
        new={"ck_assignment_kind": "kind in ('normal','gold','repeat')"},
    )
    _alter(
        "vote",
        add=[
            sa.Column("coverage_a", sa.Double(), nullable=True),
            sa.Column("coverage_b", sa.Double(), nullable=True),
            sa.Column("client_ms", sa.BigInteger(), nullable=True),
            sa.Column("ui_version", sa.String(length=32), nullable=True),
            sa.Column("source", sa.String(length=64), nullable=True),
        ],
        new={"ck_vote_coverage": "coverage_a between 0 and 1 and coverage_b between 0 and 1"},
    )


def _alter(
    table: str,
    *,
    add: list[sa.Column[Any]],
    new: dict[str, str],
    replaced: list[str] = [],  # noqa: B006
    foreign: dict[str, tuple[str, str]] | None = None,
) -> None:
    """Add columns, foreign keys name -> (column, table) and checks name -> condition, in place of those in `replaced`.

    PostgreSQL alters in place, SQLite makes the table anew.
    """
    with op.batch_alter_table(table) as batch:
        for name in replaced:
            batch.drop_constraint(op.f(name), type_="check")
        for column in add:
            batch.add_column(column)
        for name, (column_name, to) in (foreign or {}).items():
            batch.create_foreign_key(op.f(name), to, [column_name], ["id"])
        for name, condition in new.items():
            batch.create_check_constraint(op.f(name), condition)


def _new_tables() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "invitation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("token_sha256", sa.String(length=64), nullable=False),
        sa.Column("campaign_id", sa.Integer(), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("max_uses", sa.Integer(), nullable=False),
        sa.Column("n_used", sa.Integer(), nullable=False),
        sa.Column("expires_at", moment, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.CheckConstraint("n_used >= 0 and n_used <= max_uses", name=op.f("ck_invitation_uses")),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name="fk_invitation_campaign_id"),
        sa.PrimaryKeyConstraint("id", name="pk_invitation"),
        sa.UniqueConstraint("token_sha256", name="uq_invitation_token_sha256"),
    )
    op.create_table(
        "membership",
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=False),
        sa.Column("invitation_id", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name="fk_membership_campaign_id"),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name="fk_membership_rater_id"),
        sa.ForeignKeyConstraint(["invitation_id"], ["invitation.id"], name="fk_membership_invitation_id"),
        sa.PrimaryKeyConstraint("campaign_id", "rater_id", name="pk_membership"),
    )
    op.create_table(
        "consent",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(length=32), nullable=False),
        sa.Column("accepted", sa.Boolean(), nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name="fk_consent_rater_id"),
        sa.PrimaryKeyConstraint("id", name="pk_consent"),
    )
    op.create_index("ix_consent_rater_id", "consent", ["rater_id"])
    op.create_table(
        "vote_aspect",
        sa.Column("vote_id", sa.Integer(), nullable=False),
        sa.Column("aspect", sa.String(length=32), nullable=False),
        sa.Column("score", sa.Integer(), nullable=False),
        sa.CheckConstraint("score between -2 and 2", name=op.f("ck_vote_aspect_score")),
        sa.ForeignKeyConstraint(["vote_id"], ["vote.id"], name="fk_vote_aspect_vote_id"),
        sa.PrimaryKeyConstraint("vote_id", "aspect", name="pk_vote_aspect"),
    )
    op.create_table(
        "span_mark",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("vote_id", sa.Integer(), nullable=False),
        sa.Column("side", sa.String(length=1), nullable=False),
        sa.Column("t0_ms", sa.Integer(), nullable=False),
        sa.Column("t1_ms", sa.Integer(), nullable=False),
        sa.Column("tag", sa.String(length=32), nullable=False),
        sa.CheckConstraint("side in ('a','b')", name=op.f("ck_span_mark_side")),
        sa.CheckConstraint("t0_ms >= 0 and t1_ms > t0_ms", name=op.f("ck_span_mark_span")),
        sa.ForeignKeyConstraint(["vote_id"], ["vote.id"], name="fk_span_mark_vote_id"),
        sa.PrimaryKeyConstraint("id", name="pk_span_mark"),
    )
    op.create_index("ix_span_mark_vote_id", "span_mark", ["vote_id"])
    op.create_table(
        "rater_quality",
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=False),
        sa.Column("as_of", moment, nullable=False),
        sa.Column("n_votes", sa.Integer(), nullable=False),
        sa.Column("n_gold", sa.Integer(), nullable=False),
        sa.Column("gold_accuracy", sa.Double(), nullable=True),
        sa.Column("n_repeat", sa.Integer(), nullable=False),
        sa.Column("repeat_agreement", sa.Double(), nullable=True),
        sa.Column("left_share", sa.Double(), nullable=True),
        sa.Column("coverage", sa.Double(), nullable=True),
        sa.Column("reliability", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name="fk_rater_quality_campaign_id"),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name="fk_rater_quality_rater_id"),
        sa.PrimaryKeyConstraint("campaign_id", "rater_id", name="pk_rater_quality"),
    )
    op.create_table(
        "snapshot",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("n_votes", sa.Integer(), nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name="fk_snapshot_campaign_id"),
        sa.PrimaryKeyConstraint("id", name="pk_snapshot"),
        sa.UniqueConstraint("sha256", name="uq_snapshot_sha256"),
    )
    op.create_table(
        "snapshot_rater",
        sa.Column("snapshot_id", sa.Integer(), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=False),
        sa.Column("n_votes", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name="fk_snapshot_rater_rater_id"),
        sa.ForeignKeyConstraint(["snapshot_id"], ["snapshot.id"], name="fk_snapshot_rater_snapshot_id"),
        sa.PrimaryKeyConstraint("snapshot_id", "rater_id", name="pk_snapshot_rater"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.Column("actor_id", sa.Integer(), nullable=True),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["actor_id"], ["rater.id"], name="fk_audit_actor_id"),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_at", "audit", ["at"])


def downgrade() -> None:
    raise NotImplementedError("votes with aspects and marks do not fit the older tables: restore a backup instead")
