"""Pairs with room by their place in the line, and gold pairs: a draw looks at few of them, however many there are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

HAS_ROOM = sa.text("n_open < target_votes and gold is null")
IS_GOLD = sa.text("gold is not null")


def upgrade() -> None:
    for name, where in (("ix_pair_waiting", HAS_ROOM), ("ix_pair_gold", IS_GOLD)):
        op.create_index(name, "pair", ["campaign_id", "id"], sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    for name in ("ix_pair_gold", "ix_pair_waiting"):
        op.drop_index(name, "pair")
