"""Java's properties files, as `java.util.Properties` and SmallRye Config read them."""

from __future__ import annotations

from collections.abc import Mapping

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f"}
_IN_KEYS = frozenset(" :=#!")


def properties_text(entries: Mapping[str, str]) -> str:
    """Return a properties file that `java.util.Properties` reads back as the same entries. ASCII only."""
    return "".join(f"{_key(name)}={_value(value)}\n" for name, value in entries.items())


def expression_literal(text: str) -> str:
    """Return a value that SmallRye Config (Quarkus, Debezium Server) reads as the text, whatever `$` it holds."""
    return text.replace("$", "\\$")


def _key(name: str) -> str:
    return "".join(f"\\{c}" if c in _IN_KEYS else _character(c) for c in name)


def _value(value: str) -> str:
    body = value.lstrip(" ")  # leading blanks would be taken for part of the separator
    return "\\ " * (len(value) - len(body)) + "".join(map(_character, body))


def _character(c: str) -> str:
    if c in _ESCAPES:
        return _ESCAPES[c]
    if " " <= c <= "~":
        return c
    units = c.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
