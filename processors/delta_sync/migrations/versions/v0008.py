"""The version below which a dump met nothing: of documents from several tables, it is no position of the log.

Types are spelled out instead of imported: what a migration does must not change when the code does.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add it, unless a process that was killed has done so already (MariaDB knows no transaction here)."""
    columns = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("delta_dump")}
    if "floor" not in columns:
        op.add_column("delta_dump", sa.Column("floor", sa.BigInteger()))


def downgrade() -> None:
    """Going back is not offered: an older Delta refuses a newer store, and a store can always be made anew."""
    raise NotImplementedError("The state store is not taken back to an older version.")
