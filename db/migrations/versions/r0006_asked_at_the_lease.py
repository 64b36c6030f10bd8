"""What a vote is asked for stands with its assignment, where the campaign's rule had judged votes that were given before it changed.

Every vote was held to the rule of its day before it was stored. That rule is not on record where it changed since, so such a vote is
given what it was heard for: no more can have been asked, and it counts again. Votes from elsewhere were asked for nothing.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

OF_CAMPAIGN = "select campaign.{} from pair join campaign on campaign.id = pair.campaign_id where pair.id = assignment.pair_id"
OF_VOTE = """
    select case when vote.source is not null then 0 when listen_a_ms < listen_b_ms then listen_a_ms else listen_b_ms end
    from vote where vote.assignment_id = assignment.id
    and (vote.source is not null or listen_a_ms < assignment.min_listen_ms or listen_b_ms < assignment.min_listen_ms)
"""


def upgrade() -> None:
    op.add_column("assignment", sa.Column("min_listen_ms", sa.Integer(), nullable=True))
    op.add_column("assignment", sa.Column("aspects", sa.JSON(), nullable=True))
    asked = [f"{name} = ({OF_CAMPAIGN.format(name)})" for name in ("min_listen_ms", "aspects")]
    op.execute(f"update assignment set {', '.join(asked)}")
    op.execute(f"update assignment set min_listen_ms = coalesce(({OF_VOTE}), min_listen_ms) where status = 'voted'")
    with op.batch_alter_table("assignment") as batch:
        batch.alter_column("min_listen_ms", existing_type=sa.Integer(), nullable=False)
        batch.alter_column("aspects", existing_type=sa.JSON(), nullable=False)
        batch.create_check_constraint(op.f("ck_assignment_min_listen"), "min_listen_ms >= 0")


def downgrade() -> None:
    with op.batch_alter_table("assignment") as batch:
        batch.drop_constraint(op.f("ck_assignment_min_listen"), type_="check")
        batch.drop_column("aspects")
        batch.drop_column("min_listen_ms")
