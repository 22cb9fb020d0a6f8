"""A value of every type that MariaDB has, as it is inserted and as Delta has it."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal
from typing import Any

UTC = dt.UTC

# (type, what is inserted, the value, whether the log has it faithfully)
VALUES: list[tuple[str, str, Any, bool]] = [
    ("tinyint", "-128", -128, True),
    ("tinyint unsigned", "255", 255, True),
    ("tinyint(1)", "2", True, True),
    ("bool", "0", False, True),
    ("smallint", "-32768", -32768, True),
    ("mediumint", "8388607", 8388607, True),
    ("int(8) zerofill", "42", 42, True),
    ("bigint", "-9223372036854775808", -(2**63), True),
    ("bigint unsigned", "18446744073709551615", 2**64 - 1, True),
    ("year", "2155", 2155, True),
    ("bit(1)", "1", True, True),
    ("bit(9)", "257", 257, True),
    ("bit(64)", "18446744073709551615", 2**64 - 1, True),
    ("decimal(12,3)", "-1.5", Decimal("-1.500"), True),
    ("decimal(65,30)", "1e-30", Decimal(1).scaleb(-30), True),
    ("float", "123456.789", 123456.79, True),
    ("float", "0.1", 0.1, True),
    ("float", "16777217", 16777216.0, True),
    ("double", "0.1", 0.1, True),
    ("double", "1.7976931348623157e308", 1.7976931348623157e308, True),
    ("char(5)", "'ab  '", "ab", True),
    ("varchar(20) character set latin1", "'caf\u00e9'", "caf\u00e9", True),
    ("varchar(20) collate utf8mb4_bin", "'\U0001f600 '", "\U0001f600 ", True),
    ("text", "repeat('x', 1000)", "x" * 1000, True),
    ("binary(4)", "'a'", b"a\0\0\0", True),
    ("varbinary(4)", "x'00ff'", b"\x00\xff", True),
    ("blob", "x'00ff27'", b"\x00\xff'", True),
    ("date", "'9999-12-31'", dt.date(9999, 12, 31), True),
    ("date", "'0000-00-00'", None, True),
    ("date", "'2024-00-15'", None, True),
    ("time", "'12:34:56'", dt.time(12, 34, 56), True),
    ("time(3)", "'00:00:00.5'", dt.time(0, 0, 0, 500_000), True),
    ("time(6)", "'-00:00:00.5'", "-00:00:00.500000", True),
    ("time(1)", "'838:59:58.9'", "838:59:58.9", True),
    ("time", "'24:00:00'", "24:00:00", True),
    ("datetime", "'1000-01-01 00:00:00'", dt.datetime(1000, 1, 1), True),  # noqa: DTZ001 -- without a zone
    ("datetime(6)", "'2024-02-29 23:59:59.999999'", dt.datetime(2024, 2, 29, 23, 59, 59, 999_999), True),  # noqa: DTZ001 -- ditto
    ("datetime(1)", "'2024-02-29 23:59:59.9'", dt.datetime(2024, 2, 29, 23, 59, 59, 900_000), True),  # noqa: DTZ001 -- ditto
    ("datetime", "'0000-00-00 00:00:00'", None, True),
    ("timestamp(3) null", "'2024-02-29 23:59:59.999'", dt.datetime(2024, 2, 29, 23, 59, 59, 999_000, UTC), True),
    ("timestamp null", "'0000-00-00 00:00:00'", None, True),
    ("enum('b','it''s','a,c')", "'it''s'", "it's", True),
    ("set('b','a','c')", "'a,b'", "b,a", True),
    ("json", "'{\"a\": [1, 2.50, null]}'", {"a": [1, 2.5, None]}, True),
    ("uuid", "'123E4567-e89b-12d3-a456-426655440000'", uuid.UUID("123e4567-e89b-12d3-a456-426655440000"), False),
    ("inet4", "'10.0.0.1'", "10.0.0.1", False),
    ("inet6", "'::1'", "::1", False),
    ("point", "point(1, 2)", "POINT(1 2)", False),
    ("int as (1 + 1) virtual", "default", 2, False),
    ("int as (1 + 2) stored", "default", 3, False),
]
