"""A pair names the systems it compares. Old pairs are given the names of their clips, by which they were ranked so far."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

NAMES = ("system_x", "system_y")


def upgrade() -> None:
    for name in NAMES:
        op.add_column("pair", sa.Column(name, sa.String(length=128), nullable=True))
    of_clips = [f"system_{side} = (select clip.system from clip where clip.id = pair.clip_{side}_id)" for side in "xy"]
    op.execute(f"update pair set {', '.join(of_clips)}")
    with op.batch_alter_table("pair") as batch:
        for name in NAMES:
            batch.alter_column(name, existing_type=sa.String(length=128), nullable=False)


def downgrade() -> None:
    with op.batch_alter_table("pair") as batch:
        for name in NAMES:
            batch.drop_column(name)
