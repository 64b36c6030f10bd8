"""Indexes over the pairs that still want votes, and over each rater's votes in order."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

HAS_ROOM = sa.text("n_open < target_votes and gold is null")


def upgrade() -> None:
    op.drop_index("ix_pair_next", table_name="pair")
    op.create_index("ix_pair_room", "pair", ["campaign_id", "n_open", "id"], sqlite_where=HAS_ROOM, postgresql_where=HAS_ROOM)
    op.create_index("ix_pair_priority", "pair", ["campaign_id", "priority", "id"], sqlite_where=HAS_ROOM, postgresql_where=HAS_ROOM)
    op.create_index("ix_vote_rater", "vote", ["rater_id", "id"])


def downgrade() -> None:
    op.drop_index("ix_vote_rater", table_name="vote")
    op.drop_index("ix_pair_priority", table_name="pair")
    op.drop_index("ix_pair_room", table_name="pair")
    op.create_index("ix_pair_next", "pair", ["campaign_id", "n_open", "id"])
