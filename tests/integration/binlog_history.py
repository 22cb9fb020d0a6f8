"""A table `item (id, rev)`, and what the binary log says of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar, NamedTuple

from delta_sync.sources.mysql.claims import position_of
from delta_sync.sources.mysql.connection import Session, connect
from delta_sync.sources.mysql.reader import MariaReader
from delta_sync.spec import SourceSpec
from delta_sync.tables import Table
from delta_sync.testing.mariadb import USER, MariaDB
from integration.change_history import History, Logged

IDS = 20


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


STATEMENTS = ("Annotate_rows", "Rows_query")  # the events with statements: MariaDB's, MySQL's
CHANGES = ("_rows_v1", "_rows")  # how those with changes end, likewise
STATEMENT = re.compile(r"(UPDATE|INSERT|DELETE) /\* id=(\d+) rev=(\d+) \*/")


class Read(NamedTuple):
    """Rows as a reader saw them (None: absent), and what they would claim, by way."""

    rows: dict[int, int | None]
    claims: dict[str, int | None]


def execute(session: Session, statement: str) -> None:
    with session.cursor() as cursor:
        cursor.execute(statement)


def rows_of(rows: Sequence[tuple[object, dict[str, int]]]) -> dict[int, int | None]:
    found: dict[int, int | None] = dict.fromkeys(range(IDS))
    found.update({row["id"]: row["rev"] for _, row in rows})
    return found


class Source:
    """A server with the table."""

    reader_class: ClassVar[type[MariaReader]] = MariaReader

    def __init__(self, server: MariaDB, exits: ExitStack) -> None:
        self.server = server
        self._exits = exits
        self.revs = itertools.count(1)
        self.admin = self.connect()
        self.create()
        self.reader = self.new_reader()
        self.table: Table = self.reader.tables(["delta.item"])["delta.item"]
        self.began_at = self.reader.log_end()

    def create(self) -> None:
        """Have the table there, and empty."""
        execute(self.admin, "CREATE OR REPLACE TABLE item (id int PRIMARY KEY, rev bigint NOT NULL)")

    def connect(self) -> Session:
        session = connect(self.spec)
        self._exits.callback(session.shut)
        return session

    @property
    def spec(self) -> SourceSpec:
        url = f"{self.server.name}://{USER}@127.0.0.1:{self.server.port}/delta"
        return SourceSpec(url=url, password="${env:DELTA_TEST_P}")

    def new_reader(self, clock: Clock | None = None) -> MariaReader:
        kind, spec = self.reader_class, self.spec
        reader = kind(spec, "claims") if clock is None else kind(spec, "claims", clock=clock)
        self._exits.callback(reader.close)
        return reader

    def put(self, session: Session, id_: int) -> int:
        """Write a row; the log has the statement with its comment before the change."""
        rev = next(self.revs)
        with session.cursor() as cursor:
            if not cursor.execute(f"UPDATE /* id={id_} rev={rev} */ item SET rev = {rev} WHERE id = {id_}"):
                execute(session, f"INSERT /* id={id_} rev={rev} */ INTO item VALUES ({id_}, {rev})")
        return rev

    def history(self) -> History:
        """Return the changes of the table since this source began, from all files of the log."""
        found: list[Logged] = []
        with self.admin.cursor() as cursor:
            cursor.execute("SHOW BINARY LOGS")
            for file, *_ in cursor.fetchall():
                if position_of(file, 2**32 - 1) < self.began_at:
                    continue
                cursor.execute(f"SHOW BINLOG EVENTS IN '{file}'")
                statement: re.Match[str] | None = None
                for _, offset, kind, _, _, info in cursor.fetchall():
                    if kind in STATEMENTS:
                        statement = STATEMENT.search(info)
                    elif kind.endswith(CHANGES) and statement is not None:
                        id_, rev = int(statement[2]), int(statement[3])
                        position = position_of(file, int(offset))
                        if position >= self.began_at:
                            found.append(Logged(position, id_, None if statement[1] == "DELETE" else rev))
        return History(found)
