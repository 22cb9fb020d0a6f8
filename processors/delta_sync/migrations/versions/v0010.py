"""Notices whose rows have not been looked for yet, so that none is forgotten whatever dies.

Types are spelled out instead of imported: what a migration does must not change when the code does.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add it. In MariaDB each statement stands for itself, so a process that was killed may have done so."""
    there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("delta_notice")}
    if "pending" not in there:
        op.add_column("delta_notice", sa.Column("pending", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Going back is not offered: an older Delta refuses a newer store, and a store can always be made anew."""
    raise NotImplementedError("The state store is not taken back to an older version.")
