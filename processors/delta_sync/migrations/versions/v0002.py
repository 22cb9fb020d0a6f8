"""For several processes on several machines: leases and the members of a pipeline.

Types are spelled out instead of imported: what a migration does must not change when the code does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"
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


def _text() -> sa.types.TypeEngine[str]:
    return sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def upgrade() -> None:
    """Create them. In MariaDB each statement stands for itself, so a process that was killed may have made one."""
    op.create_table(
        "delta_lease",
        sa.Column("pipeline", _name(64), nullable=False),
        sa.Column("name", _name(64), nullable=False),
        sa.Column("owner", _name(255), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("pipeline", "name", name="pk_delta_lease"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )
    op.create_table(
        "delta_member",
        sa.Column("pipeline", _name(64), nullable=False),
        sa.Column("member", _name(255), nullable=False),
        sa.Column("status", _text(), nullable=False),
        sa.Column("saved_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("pipeline", "member", name="pk_delta_member"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )


def downgrade() -> None:
    """Going back is not offered: an older Delta refuses a newer store, and a store can always be made anew."""
    raise NotImplementedError("The state store is not taken back to an older version.")
