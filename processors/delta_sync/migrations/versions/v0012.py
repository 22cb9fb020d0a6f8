"""By which keys of look-ups rows were enriched, where that is kept, and since when it is.

Types are spelled out instead of imported: what a migration does must not change when the code does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0012"
down_revision = "0011"
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
    """Create them, unless a process that was killed has made them already (MariaDB knows no transaction here)."""
    op.create_table(
        "delta_keeping",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True),
        sa.Column("pipeline", _name(64), nullable=False),
        sa.Column("table_name", _name(255), nullable=False),
        sa.Column("lookup", _name(255), nullable=False),
        sa.Column("made_of", _name(16), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("complete", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_delta_keeping"),
        sa.UniqueConstraint("pipeline", "table_name", "lookup", name="uq_delta_keeping"),
        if_not_exists=True,
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    op.create_table(
        "delta_used_key",
        sa.Column("keeping", sa.BigInteger(), autoincrement=False),
        sa.Column("row_digest", sa.LargeBinary().with_variant(mysql.BINARY(16), "mysql", "mariadb")),
        sa.Column("slot", sa.BigInteger(), autoincrement=False),
        sa.Column("key_digest", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("row_key", sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb"), nullable=False),
        sa.PrimaryKeyConstraint("keeping", "row_digest", "slot", name="pk_delta_used_key"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )
    op.create_index("ix_delta_used_key", "delta_used_key", ["keeping", "key_digest"], if_not_exists=True)


def downgrade() -> None:
    """Going back is not offered: an older Delta refuses a newer store, and a store can always be made anew."""
    raise NotImplementedError("The state store is not taken back to an older version.")
