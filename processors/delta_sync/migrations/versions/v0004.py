"""Which of a table's loads is the current one, so that one that was overruled cannot say that it is done.

Types are spelled out instead of imported: what a migration does must not change when the code does.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add it. In MariaDB each statement stands for itself, so a process that was killed may have done so."""
    there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("delta_load")}
    if "revision" not in there:
        op.add_column("delta_load", sa.Column("revision", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Going back is not offered: an older Delta refuses a newer store, and a store can always be made anew."""
    raise NotImplementedError("The state store is not taken back to an older version.")
