"""The tables of the state store, and the types of their columns.

What a store on disk has is made by `migrations/`; a change here needs a migration there, and a test compares the two.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

REVISION = "0013"  # the newest of `migrations/`, which is what these tables are
VERSION_TABLE = "delta_schema_version"  # not Alembic's default: the database may be another application's, too
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)


class Instant(sa.types.TypeDecorator[dt.datetime]):
    """A moment as microseconds since 1970: databases differ in precision and time zones, not in integers."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> int | None:  # noqa: ARG002 -- SQLAlchemy's
        """Return what is stored."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> dt.datetime | None:  # noqa: ARG002 -- SQLAlchemy's
        """Return what was given, in UTC."""
        return None if value is None else _EPOCH + value * _MICROSECOND


def _name(length: int) -> sa.types.TypeEngine[str]:
    """Return a type for names, which differ by case everywhere (MariaDB's default would ignore it)."""
    return sa.String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), "mysql", "mariadb")


def _text() -> sa.types.TypeEngine[str]:
    """Return a type for text of any length (MariaDB's TEXT ends at 64 KiB)."""
    return sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def _blob() -> sa.types.TypeEngine[bytes]:
    """Return a type for bytes of any number."""
    return sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


def _digest() -> sa.types.TypeEngine[bytes]:
    """Return a type for 16 bytes, which every database has an index of."""
    return sa.LargeBinary().with_variant(mysql.BINARY(16), "mysql", "mariadb")


METADATA = sa.MetaData()
_OPTIONS: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"))
}

PIPELINES = sa.Table(
    "delta_pipeline",
    METADATA,
    sa.Column("name", _name(64)),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("system_identifier", _name(64), nullable=False),
    sa.Column("timeline", sa.BigInteger, nullable=False),
    sa.Column("slot_lsn", sa.BigInteger),
    sa.Column("confirmed_most", sa.BigInteger),
    sa.Column("lost_epoch", sa.Integer),  # of which the next is so; that one has another epoch
    sa.Column("lost", _text()),  # why changes may have been lost
    sa.PrimaryKeyConstraint("name", name="pk_delta_pipeline"),
    **_OPTIONS,
)

LOADS = sa.Table(
    "delta_load",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("table_name", _name(255)),
    sa.Column("state", _name(16), nullable=False),
    sa.Column("after_key", _blob()),
    sa.Column("row_count", sa.BigInteger, nullable=False),
    sa.Column("covered_from", sa.BigInteger),
    sa.Column("fingerprint", _text(), nullable=False),
    sa.Column("reason", _text(), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("started_at", Instant),
    sa.Column("finished_at", Instant),
    sa.Column("revision", sa.Integer, nullable=False, server_default="0"),  # rises whenever it begins anew
    sa.PrimaryKeyConstraint("pipeline", "table_name", name="pk_delta_load"),
    **_OPTIONS,
)

DEAD_LETTERS = sa.Table(
    "delta_dead_letter",
    METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True),
    sa.Column("pipeline", _name(64), nullable=False),
    sa.Column("identity", _name(64), nullable=False),  # a digest, because no index takes a key of any length
    sa.Column("table_name", _name(255), nullable=False),
    sa.Column("key_text", _text(), nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("sink", _name(255)),
    sa.Column("stage", _name(16), nullable=False),
    sa.Column("error", _text(), nullable=False),
    sa.Column("trace", _text(), nullable=False),
    sa.Column("event", _blob(), nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.PrimaryKeyConstraint("id", name="pk_delta_dead_letter"),
    sa.UniqueConstraint("pipeline", "identity", name="uq_delta_dead_letter"),
    sa.Index("ix_delta_dead_letter_created_at", "pipeline", "created_at"),
    sqlite_autoincrement=True,  # an id is never given twice, so that discarding an old list hits nothing new
    **_OPTIONS,
)

STATUSES = sa.Table(
    "delta_status",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("status", _text(), nullable=False),
    sa.Column("saved_at", Instant, nullable=False),
    sa.PrimaryKeyConstraint("pipeline", name="pk_delta_status"),
    **_OPTIONS,
)

LEASES = sa.Table(
    "delta_lease",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("name", _name(64)),
    sa.Column("owner", _name(255), nullable=False),  # "": nobody's
    sa.Column("token", sa.BigInteger, nullable=False),  # of the last holder; the row stays, so that it only rises
    sa.Column("expires_at", Instant, nullable=False),  # by the database's clock
    sa.PrimaryKeyConstraint("pipeline", "name", name="pk_delta_lease"),
    **_OPTIONS,
)

MEMBERS = sa.Table(
    "delta_member",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("member", _name(255)),
    sa.Column("status", _text(), nullable=False),
    sa.Column("saved_at", Instant, nullable=False),  # by the database's clock
    sa.PrimaryKeyConstraint("pipeline", "member", name="pk_delta_member"),
    **_OPTIONS,
)

DUMPS = sa.Table(
    "delta_dump",
    METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True),
    sa.Column("pipeline", _name(64), nullable=False),
    sa.Column("table_name", _name(255), nullable=False),
    sa.Column("kind", _name(16), nullable=False),
    sa.Column("state", _name(16), nullable=False),
    sa.Column("reason", _text(), nullable=False),
    sa.Column("waits", _text()),
    sa.Column("condition_text", _text()),
    sa.Column("sinks", _text()),  # JSON; NULL: all
    sa.Column("rows_per_s", sa.Integer),
    sa.Column("parallel", sa.Integer),
    sa.Column("timeout_ms", sa.BigInteger),
    sa.Column("allowed_at", Instant, nullable=False),  # by the database's clock: no chunk is given out before
    sa.Column("epoch", sa.Integer),
    sa.Column("fingerprint", _text()),
    sa.Column("covered_from", sa.BigInteger),
    sa.Column("floor", sa.BigInteger),  # a version; NULL: an older Delta began it
    sa.Column("planned_to", _blob()),
    sa.Column("planned", sa.Integer, nullable=False),  # 1: to the end of the table
    sa.Column("next_chunk", sa.BigInteger, nullable=False),  # numbers are never given twice
    sa.Column("row_count", sa.BigInteger, nullable=False),
    sa.Column("estimate", sa.BigInteger),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("started_at", Instant),
    sa.Column("finished_at", Instant),
    sa.PrimaryKeyConstraint("id", name="pk_delta_dump"),
    sa.Index("ix_delta_dump_state", "pipeline", "state"),
    sqlite_autoincrement=True,  # an id is never given twice, so that an old command pauses nothing new
    **_OPTIONS,
)

CHUNKS = sa.Table(
    "delta_chunk",
    METADATA,
    sa.Column("dump", sa.BigInteger, autoincrement=False),
    sa.Column("number", sa.BigInteger, autoincrement=False),
    sa.Column("pipeline", _name(64), nullable=False),
    sa.Column("after_key", _blob()),  # NULL: from the beginning
    sa.Column("to_key", _blob()),  # NULL: to the end
    sa.Column("chunk_keys", _blob()),  # in place of a range
    sa.Column("owner", _name(255), nullable=False),  # "": nobody's
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("expires_at", Instant, nullable=False),  # by the database's clock
    sa.PrimaryKeyConstraint("dump", "number", name="pk_delta_chunk"),
    sa.Index("ix_delta_chunk_pipeline", "pipeline", "owner"),
    **_OPTIONS,
)

GENERATIONS = sa.Table(
    "delta_generation",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("sink", _name(255)),
    sa.Column("serving", sa.Integer, nullable=False),  # what readers are led to
    sa.Column("other", sa.Integer),  # what is beside it
    sa.Column("state", _name(16), nullable=False),  # of the other; "": there is none
    sa.Column("newest", sa.Integer, nullable=False),  # numbers are never given twice
    sa.PrimaryKeyConstraint("pipeline", "sink", name="pk_delta_generation"),
    **_OPTIONS,
)

NOTICES = sa.Table(
    "delta_notice",
    METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True),
    sa.Column("pipeline", _name(64), nullable=False),
    sa.Column("lookup", _name(255), nullable=False),
    sa.Column("notice_keys", _blob(), nullable=False),
    sa.Column("created_at", Instant, nullable=False),  # by the database's clock
    sa.Column("pending", sa.Integer, nullable=False, server_default="0"),  # 1: its rows are still to be looked for
    sa.PrimaryKeyConstraint("id", name="pk_delta_notice"),
    sqlite_autoincrement=True,  # an id is never given twice: processes know by it what they have heeded
    **_OPTIONS,
)

VERIFIED = sa.Table(
    "delta_verified",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("table_name", _name(255)),
    sa.Column("made_for", _name(64), nullable=False),  # a digest: another one begins anew
    sa.Column("began_at", Instant),  # the verification under way, by the database's clock; NULL: none
    sa.Column("after_key", _blob()),  # up to which it has come
    sa.Column("looked_at", Instant),  # when the last one began that came to the end
    sa.Column("row_count", sa.BigInteger, nullable=False),
    sa.Column("differences", sa.BigInteger, nullable=False),
    sa.Column("repaired", sa.BigInteger, nullable=False),
    sa.PrimaryKeyConstraint("pipeline", "table_name", name="pk_delta_verified"),
    **_OPTIONS,
)

TOPICS = sa.Table(
    "delta_topic",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("topic", _name(255)),
    sa.Column("number", sa.Integer, autoincrement=False),  # of the partition
    sa.Column("topic_id", _name(64), nullable=False),  # of the topic that the committed position is of
    sa.PrimaryKeyConstraint("pipeline", "topic", "number", name="pk_delta_topic"),
    **_OPTIONS,
)

KEEPINGS = sa.Table(  # of which table and look-up it is kept by which keys rows were enriched
    "delta_keeping",
    METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True),
    sa.Column("pipeline", _name(64), nullable=False),
    sa.Column("table_name", _name(255), nullable=False),
    sa.Column("lookup", _name(255), nullable=False),
    sa.Column("made_of", _name(16), nullable=False),  # what versions are: positions, or clocks of snapshots
    sa.Column("since", Instant, nullable=False),  # by the database's clock
    sa.Column("complete", sa.Integer, nullable=False),  # 1: every row has been enriched since then
    sa.PrimaryKeyConstraint("id", name="pk_delta_keeping"),
    sa.UniqueConstraint("pipeline", "table_name", "lookup", name="uq_delta_keeping"),
    sqlite_autoincrement=True,  # an id is never given twice: rows of one that is gone are deleted later
    **_OPTIONS,
)

USED_KEYS = sa.Table(
    "delta_used_key",
    METADATA,
    sa.Column("keeping", sa.BigInteger, autoincrement=False),
    sa.Column("row_digest", _digest()),
    sa.Column("slot", sa.BigInteger, autoincrement=False),  # of the processor's argument: a row may use several keys
    sa.Column("key_digest", sa.BigInteger, nullable=False),  # of the look-up's key
    sa.Column("version", sa.BigInteger, nullable=False),  # of the change that used it
    sa.Column("row_key", _blob(), nullable=False),
    sa.PrimaryKeyConstraint("keeping", "row_digest", "slot", name="pk_delta_used_key"),
    sa.Index("ix_delta_used_key", "keeping", "key_digest"),
    **_OPTIONS,
)

CONNECTORS = sa.Table(  # what an embedded connector keeps when its source keeps nothing for it
    "delta_connector",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("run", _name(64), nullable=False),  # of whose connector it is; another run's saves nothing
    sa.Column("place", _text()),  # where it goes on, in the connector's own words; NULL: it has not begun
    sa.PrimaryKeyConstraint("pipeline", name="pk_delta_connector"),
    **_OPTIONS,
)

CONNECTOR_HISTORY = sa.Table(  # the history of the schema that belongs to the place, in pieces
    "delta_connector_history",
    METADATA,
    sa.Column("pipeline", _name(64)),
    sa.Column("number", sa.Integer, autoincrement=False),
    sa.Column("piece", _blob(), nullable=False),
    sa.PrimaryKeyConstraint("pipeline", "number", name="pk_delta_connector_history"),
    **_OPTIONS,
)
