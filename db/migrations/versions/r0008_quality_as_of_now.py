"""How far raters can be relied on is measured whenever somebody asks. What the last look had found is kept no longer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_table("rater_quality")


def downgrade() -> None:
    op.create_table(
        "rater_quality",
        sa.Column("campaign_id", sa.Integer(), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=False),
        sa.Column("as_of", sa.DateTime(timezone=True), nullable=False),
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
