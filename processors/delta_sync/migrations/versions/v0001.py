"""The first tables: pipelines, their loads, dead letters, the last status.

Types are spelled out instead of imported: what a migration does must not change when the code does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
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
    """Create them. In MariaDB each statement stands for itself, so a process that was killed may have made some."""
    op.create_table(
        "delta_pipeline",
        sa.Column("name", _name(64), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("system_identifier", _name(64), nullable=False),
        sa.Column("timeline", sa.BigInteger(), nullable=False),
        sa.Column("slot_lsn", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_delta_pipeline"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )
    op.create_table(
        "delta_load",
        sa.Column("pipeline", _name(64), nullable=False),
        sa.Column("table_name", _name(255), nullable=False),
        sa.Column("state", _name(16), nullable=False),
        sa.Column("after_key", _blob(), nullable=True),
        sa.Column("row_count", sa.BigInteger(), nullable=False),
        sa.Column("covered_from", sa.BigInteger(), nullable=True),
        sa.Column("fingerprint", _text(), nullable=False),
        sa.Column("reason", _text(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("pipeline", "table_name", name="pk_delta_load"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )
    op.create_table(
        "delta_dead_letter",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("pipeline", _name(64), nullable=False),
        sa.Column("identity", _name(64), nullable=False),
        sa.Column("table_name", _name(255), nullable=False),
        sa.Column("key_text", _text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("sink", _name(255), nullable=True),
        sa.Column("stage", _name(16), nullable=False),
        sa.Column("error", _text(), nullable=False),
        sa.Column("trace", _text(), nullable=False),
        sa.Column("event", _blob(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_delta_dead_letter"),
        sa.UniqueConstraint("pipeline", "identity", name="uq_delta_dead_letter"),
        sqlite_autoincrement=True,
        if_not_exists=True,
        **TABLE_OPTIONS,
    )
    op.create_index(
        "ix_delta_dead_letter_created_at", "delta_dead_letter", ["pipeline", "created_at"], if_not_exists=True
    )
    op.create_table(
        "delta_status",
        sa.Column("pipeline", _name(64), nullable=False),
        sa.Column("status", _text(), nullable=False),
        sa.Column("saved_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("pipeline", name="pk_delta_status"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )


def downgrade() -> None:
    """Going back is not offered: an older Delta refuses a newer store, and a store can always be made anew."""
    raise NotImplementedError("The state store is not taken back to an older version.")
