"""The connections to PostgreSQL, or to SQLite's file, and what their errors mean."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, make_url

from delta_sync.errors import SinkBusy, SinkRefused, UsageError
from delta_sync.sinks.base import LoginOptions
from delta_sync.state_database import create_engine, reading_of

BUSY_TIMEOUT_S = 30.0  # for another's lock: a batch, or the creation of a column, takes far less


def parse_url(name: str, url: str, login: LoginOptions) -> URL:
    """Return the URL with its driver, user and password. Raises UsageError."""
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        raise UsageError(
            f"sink {name}: the URL cannot be read; write it like postgresql://host/database or sqlite:////path/file.db."
        ) from None
    if parsed.get_backend_name() == "sqlite":
        path = parsed.database or ":memory:"
        if parsed.host or parsed.query or path == ":memory:" or path.startswith("file:"):
            raise UsageError(
                f"sink {name}: the URL must name a file and nothing else, such as sqlite:////path/file.db."
            )
        return parsed.set(database=str(Path(path).absolute()))
    if not parsed.database:
        raise UsageError(f"sink {name}: the URL must name a database, such as postgresql://host/warehouse.")
    return parsed.set(
        drivername="postgresql+psycopg",
        username=login.username or parsed.username,
        password=login.password or parsed.password,
    )


class Link:
    """The connections to one database. Constructing it connects to nothing."""

    def __init__(self, name: str, url: str, login: LoginOptions) -> None:
        """Raise UsageError when the URL names no database or file."""
        self._url = parse_url(name, url, login)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._where = self._url.database if self.is_sqlite else f"{self._url.host or 'localhost'}"
        self._connecting = threading.Lock()
        self._engine: sa.Engine | None = None

    @property
    def file(self) -> Path | None:
        """SQLite's file; None for PostgreSQL."""
        return Path(cast(str, self._url.database)) if self.is_sqlite else None

    def close(self) -> None:
        """Close the connections. Idempotent."""
        with self._connecting:
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None

    def _connected(self) -> sa.Engine:
        """Return the engine, which keeps its own pool of connections and is safe for threads."""
        with self._connecting:
            if self._engine is None:
                self._engine = create_engine(self._url, BUSY_TIMEOUT_S)
                if not self.is_sqlite:
                    event.listen(self._engine, "connect", _set_up)
            return self._engine

    def reading(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """Return a transaction that only reads."""
        return self._connected().begin()

    def writing(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """Return a transaction that writes: SQLite's takes the lock at its beginning."""
        return self._connected().execution_options(delta_write=True).begin()

    @contextlib.contextmanager
    def typed_errors(self) -> Generator[None]:
        """Raise the database's errors as `SinkBusy` or `SinkRefused`."""
        try:
            yield
        except (exc.DBAPIError, exc.TimeoutError) as error:
            what, said = reading_of(error)
            if what == "busy" or _is_a_race(error):
                raise SinkBusy(f"{self._where} is busy or cannot be reached: {said}.") from error
            raise SinkRefused(f"{self._where} refuses: {said}.") from error


def _set_up(connection: Any, _record: object) -> None:
    """Let moments come back in UTC: in another zone, Python cannot hold the first and last of them.

    Arrays go in binary, which takes a third of the time that escaping their texts does, or less.
    """
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
    connection.commit()
    connection.adapters.register_dumper(list, ListBinaryDumper)


def _sqlstate(error: exc.DBAPIError | exc.TimeoutError) -> str:
    return str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")


def is_about_content(error: exc.DBAPIError) -> bool:
    """Tell whether a row is refused for what it holds. Classes of PostgreSQL: data, constraint, program limit."""
    if _sqlstate(error):
        return _sqlstate(error).startswith(("22", "23", "54"))
    return isinstance(error, exc.DataError | exc.IntegrityError)


def is_about_shape(error: exc.DBAPIError | exc.TimeoutError) -> bool:
    """Tell whether the table is gone, or its columns are not those that are known."""
    if _sqlstate(error):
        return _sqlstate(error) in ("42703", "42P01", "42804")
    said = str(getattr(error, "orig", ""))
    return "no such table" in said or "no such column" in said or "has no column named" in said


def _is_a_race(error: exc.DBAPIError | exc.TimeoutError) -> bool:
    """Tell whether two processes have created the same thing at once: PostgreSQL refuses one of them."""
    return _sqlstate(error) in ("23505", "42P07", "42710", "42701", "XX000") and "INSERT" not in str(
        getattr(error, "statement", "")
    )
