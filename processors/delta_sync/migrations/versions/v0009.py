"""Of each partition, the id of the topic that the committed position is of: one that was made anew has another.

Types are spelled out instead of imported: what a migration does must not change when the code does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

TABLE_OPTIONS: dict[str, Any] = {
    "mysql_charset": "utf8mb4",
    "mariadb_charset": "utf8mb4",
    "mysql_engine": "InnoDB",
    "mariadb_engine": "InnoDB",
}


def _name(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), "mysql", "mariadb")


def upgrade() -> None:
    """Create it, unless a process that was killed has made it already (MariaDB knows no transaction here)."""
    op.create_table(
        "delta_topic",
        sa.Column("pipeline", _name(64)),
        sa.Column("topic", _name(255)),
        sa.Column("number", sa.Integer(), autoincrement=False),
        sa.Column("topic_id", _name(64), nullable=False),
        sa.PrimaryKeyConstraint("pipeline", "topic", "number", name="pk_delta_topic"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )


def downgrade() -> None:
    """Going back is not offered: an older Delta refuses a newer store, and a store can always be made anew."""
    raise NotImplementedError("The state store is not taken back to an older version.")
