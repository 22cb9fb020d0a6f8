"""What an embedded connector keeps when its source keeps nothing for it: where it goes on, and the schema's history.

And a loss that was seen once, for whoever acts upon it: what showed it may be gone by then.

Types are spelled out instead of imported: what a migration does must not change when the code does.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0013"
down_revision = "0012"
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
    there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("delta_pipeline")}
    if "lost_epoch" not in there:
        op.add_column("delta_pipeline", sa.Column("lost_epoch", sa.Integer()))
    if "lost" not in there:
        op.add_column("delta_pipeline", sa.Column("lost", sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")))
    op.create_table(
        "delta_connector",
        sa.Column("pipeline", _name(64)),
        sa.Column("run", _name(64), nullable=False),
        sa.Column("place", sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")),
        sa.PrimaryKeyConstraint("pipeline", name="pk_delta_connector"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )
    op.create_table(
        "delta_connector_history",
        sa.Column("pipeline", _name(64)),
        sa.Column("number", sa.Integer(), autoincrement=False),
        sa.Column("piece", sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb"), nullable=False),
        sa.PrimaryKeyConstraint("pipeline", "number", name="pk_delta_connector_history"),
        if_not_exists=True,
        **TABLE_OPTIONS,
    )


def downgrade() -> None:
    """Going back is not offered: an older Delta refuses a newer store, and a store can always be made anew."""
    raise NotImplementedError("The state store is not taken back to an older version.")
