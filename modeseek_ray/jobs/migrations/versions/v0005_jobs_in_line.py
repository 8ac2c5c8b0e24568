"""An index along the queue, so that a pass over it does not depend on its length."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    columns: list[str | sa.TextClause] = ["state", "desired", sa.text("priority DESC"), "number", "tenant_id"]
    op.create_index("jobs_in_line", "jobs", columns)
    op.drop_index("jobs_by_state", table_name="jobs")
