"""Logs are events with fields: readable where a person looks, JSON lines where a program does; never with a secret."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

from delta_sync.secrets import redact

if TYPE_CHECKING:
    import structlog

LogFormat = Literal["auto", "console", "json"]


class _Logger:
    """A module's logger, which is made when it first says something.

    structlog takes a fifth of the time of a short command, which says nothing: it imports rich and asyncio.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        import structlog

        return getattr(structlog.get_logger(self._name), method)


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of the module `name`."""
    return cast("structlog.stdlib.BoundLogger", _Logger(name))


def configure(log_format: LogFormat = "auto", level: str = "info", stream: TextIO | None = None) -> None:
    """Send all logs to `stream` (standard error). `auto` is `console` on a terminal, else `json`."""
    import structlog

    out = stream or sys.stderr
    as_json = log_format == "json" or (log_format == "auto" and not out.isatty())
    renderer: Any = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _redact_values,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(out),
        cache_logger_on_first_use=True,
    )


def _redact_values(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = redact(value)
        elif isinstance(value, list | tuple):
            event[key] = [redact(item) if isinstance(item, str) else item for item in value]  # pyright: ignore[reportUnknownVariableType] -- fields hold anything
    return event
