"""Dumps, and the chunks in which they are read. A load that is under way gets its dump from the process that loads.

Types are spelled out instead of imported: what a migration does must not change when the code does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"
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


def _blob() -> sa.types.TypeEngine[bytes]:
    return sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


def upgrade() -> None:
    """Create them. In MariaDB each statement stands for itself, so a process that was killed may have made one."""
    op.create_table(
        "delta_dump",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("pipeline", _name(64), nullable=False),
        sa.Column("table_name", _name(255), nullable=False),
        sa.Column("kind", _name(16), nullable=False),
        sa.Column("state", _name(16), nullable=False),
        sa.Column("reason", _text(), nullable=False),
        sa.Column("waits", _text()),
        sa.Column("condition_text", _text()),
        sa.Column("sinks", _text()),
        sa.Column("rows_per_s", sa.Integer()),
        sa.Column("parallel", sa.Integer()),
        sa.Column("timeout_ms", sa.BigInteger()),
        sa.Column("allowed_at", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.Integer()),
        sa.Column("fingerprint", _text()),
        sa.Column("covered_from", sa.BigInteger()),
        sa.Column("planned_to", _blob()),
        sa.Column("planned", sa.Integer(), nullable=False),
        sa.Column("next_chunk", sa.BigInteger(), nullable=False),
        sa.Column("row_count", sa.BigInteger(), nullable=False),
        sa.Column("estimate", sa.BigInteger()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger()),
        sa.Column("finished_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_delta_dump"),
        if_not_exists=True,
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    op.create_index("ix_delta_dump_state", "delta_dump", ["pipeline", "state"], if_not_exists=True)
    op.create_table(
        "delta_chunk",
        sa.Column("dump", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("pipeline", _name(64), nullable=False),
        sa.Column("after_key", _blob()),
        sa.Column("to_key", _blob()),
        sa.Column("chunk_keys", _blob()),
        sa.Column("owner", _name(255), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("dump", "number", name="pk_delta_chunk"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )
    op.create_index("ix_delta_chunk_pipeline", "delta_chunk", ["pipeline", "owner"], if_not_exists=True)


def downgrade() -> None:
    """Going back is not offered: an older Delta refuses a newer store, and a store can always be made anew."""
    raise NotImplementedError("The state store is not taken back to an older version.")
