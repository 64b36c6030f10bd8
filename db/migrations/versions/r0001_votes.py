"""Campaigns, raters, clips, pairs, assignments and votes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "campaign",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("target_votes", sa.Integer(), nullable=False),
        sa.Column("min_listen_ms", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=8), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("status in ('open','closed')", name=op.f("ck_campaign_status")),
        sa.CheckConstraint("min_listen_ms >= 0", name=op.f("ck_campaign_min_listen")),
        sa.CheckConstraint("target_votes >= 1", name=op.f("ck_campaign_target")),
        sa.PrimaryKeyConstraint("id", name="pk_campaign"),
        sa.UniqueConstraint("name", name="uq_campaign_name"),
    )
    op.create_table(
        "prompt",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("text_sha256", sa.String(length=64), nullable=False),
        sa.Column("split", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_prompt"),
        sa.UniqueConstraint("key", "text_sha256", name="uq_prompt_key_text_sha256"),
    )
    op.create_table(
        "rater",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("handle", sa.String(length=64), nullable=False),
        sa.Column("token_sha256", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=8), nullable=False),
        sa.Column("status", sa.String(length=8), nullable=False),
        sa.Column("session_epoch", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("role in ('rater','admin')", name=op.f("ck_rater_role")),
        sa.CheckConstraint("status in ('active','blocked')", name=op.f("ck_rater_status")),
        sa.PrimaryKeyConstraint("id", name="pk_rater"),
        sa.UniqueConstraint("handle", name="uq_rater_handle"),
        sa.UniqueConstraint("token_sha256", name="uq_rater_token_sha256"),
    )
    op.create_table(
        "setting",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_setting"),
    )
    op.create_table(
        "clip",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("codes_uri", sa.Text(), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("duration_ms", sa.Integer(), nullable=False),
        sa.Column("sample_rate", sa.Integer(), nullable=False),
        sa.Column("lufs", sa.Double(), nullable=True),
        sa.Column("true_peak_dbfs", sa.Double(), nullable=True),
        sa.Column("system", sa.String(length=128), nullable=False),
        sa.Column("policy_sha256", sa.String(length=64), nullable=True),
        sa.Column("adapters", sa.JSON(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("tempo_bpm", sa.Double(), nullable=True),
        sa.Column("genre", sa.String(length=64), nullable=True),
        sa.Column("gen", sa.JSON(), nullable=False),
        sa.Column("licence", sa.String(length=128), nullable=True),
        sa.Column("consent", sa.String(length=128), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("duration_ms > 0", name=op.f("ck_clip_duration")),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompt.id"], name="fk_clip_prompt_id"),
        sa.PrimaryKeyConstraint("id", name="pk_clip"),
        sa.UniqueConstraint("prompt_id", "sha256", name="uq_clip_prompt_id_sha256"),
    )
    op.create_index("ix_clip_system", "clip", ["system"], unique=False)
    op.create_table(
        "pair",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.Integer(), nullable=False),
        sa.Column("clip_x_id", sa.Integer(), nullable=False),
        sa.Column("clip_y_id", sa.Integer(), nullable=False),
        sa.Column("gain_x_db", sa.Double(), nullable=False),
        sa.Column("gain_y_db", sa.Double(), nullable=False),
        sa.Column("gold", sa.String(length=1), nullable=True),
        sa.Column("target_votes", sa.Integer(), nullable=False),
        sa.Column("n_open", sa.Integer(), nullable=False),
        sa.CheckConstraint("gold in ('x','y')", name=op.f("ck_pair_gold")),
        sa.CheckConstraint("clip_x_id < clip_y_id", name=op.f("ck_pair_ordered")),
        sa.CheckConstraint("n_open >= 0 and n_open <= target_votes", name=op.f("ck_pair_target")),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name="fk_pair_campaign_id"),
        sa.ForeignKeyConstraint(["clip_x_id"], ["clip.id"], name="fk_pair_clip_x_id"),
        sa.ForeignKeyConstraint(["clip_y_id"], ["clip.id"], name="fk_pair_clip_y_id"),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompt.id"], name="fk_pair_prompt_id"),
        sa.PrimaryKeyConstraint("id", name="pk_pair"),
        sa.UniqueConstraint("campaign_id", "clip_x_id", "clip_y_id", name="uq_pair_campaign_id_clip_x_id_clip_y_id"),
    )
    op.create_index("ix_pair_next", "pair", ["campaign_id", "n_open", "id"], unique=False)
    op.create_table(
        "assignment",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("pair_id", sa.Integer(), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=False),
        sa.Column("rep", sa.Integer(), nullable=False),
        sa.Column("swapped", sa.Boolean(), nullable=False),
        sa.Column("policy", sa.String(length=32), nullable=False),
        sa.Column("propensity", sa.Double(), nullable=False),
        sa.Column("status", sa.String(length=8), nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("issued_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("status in ('leased','voted','skipped','expired')", name=op.f("ck_assignment_status")),
        sa.ForeignKeyConstraint(["pair_id"], ["pair.id"], name="fk_assignment_pair_id"),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name="fk_assignment_rater_id"),
        sa.PrimaryKeyConstraint("id", name="pk_assignment"),
        sa.UniqueConstraint("pair_id", "rater_id", "rep", name="uq_assignment_pair_id_rater_id_rep"),
    )
    op.create_index("ix_assignment_lease", "assignment", ["status", "expires_at"], unique=False)
    op.create_index("ix_assignment_rater", "assignment", ["rater_id", "status"], unique=False)
    op.create_table(
        "vote",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("assignment_id", sa.String(length=32), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=False),
        sa.Column("idempotency_key", sa.String(length=128), nullable=False),
        sa.Column("choice", sa.String(length=8), nullable=False),
        sa.Column("confidence", sa.Integer(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("listen_a_ms", sa.Integer(), nullable=False),
        sa.Column("listen_b_ms", sa.Integer(), nullable=False),
        sa.Column("events", sa.JSON(), nullable=False),
        sa.Column("excluded_reason", sa.String(length=32), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("choice in ('a','b','tie','both_bad')", name=op.f("ck_vote_choice")),
        sa.CheckConstraint("confidence between 1 and 3", name=op.f("ck_vote_confidence")),
        sa.CheckConstraint("listen_a_ms >= 0 and listen_b_ms >= 0", name=op.f("ck_vote_listen")),
        sa.ForeignKeyConstraint(["assignment_id"], ["assignment.id"], name="fk_vote_assignment_id"),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name="fk_vote_rater_id"),
        sa.PrimaryKeyConstraint("id", name="pk_vote"),
        sa.UniqueConstraint("assignment_id", name="uq_vote_assignment_id"),
        sa.UniqueConstraint("rater_id", "idempotency_key", name="uq_vote_rater_id_idempotency_key"),
    )


def downgrade() -> None:
    op.drop_table("vote")
    op.drop_index("ix_assignment_rater", table_name="assignment")
    op.drop_index("ix_assignment_lease", table_name="assignment")
    op.drop_table("assignment")
    op.drop_index("ix_pair_next", table_name="pair")
    op.drop_table("pair")
    op.drop_index("ix_clip_system", table_name="clip")
    op.drop_table("clip")
    op.drop_table("setting")
    op.drop_table("rater")
    op.drop_table("prompt")
    op.drop_table("campaign")
