"""Versions: the one number by which every write to a derived store is compared.

A version is a signed 64-bit integer, `epoch << 52 | position`. The position is the change's place in the source's log
(PostgreSQL: its LSN), which rises with every change of a key. The epoch rises whenever positions may start again.
Epochs start at 1, so a version is always above 0 and every change beats a row without any.
"""

from __future__ import annotations

POSITION_BITS = 52
MAX_POSITION = (1 << POSITION_BITS) - 1  # 4 PiB of WAL
MAX_EPOCH = (1 << (63 - POSITION_BITS)) - 1  # 2047 failovers
VERSION_DIGITS = 19  # decimal digits of the largest version: what fixed-width text needs to sort like the number


def version_of(epoch: int, position: int) -> int:
    """Return the version of a change at `position` of the log in `epoch`."""
    assert 0 < epoch <= MAX_EPOCH, f"epoch {epoch} is out of range"
    assert 0 <= position <= MAX_POSITION, f"position {position} is out of range"
    return epoch << POSITION_BITS | position


def dump_version(epoch: int, claim: int) -> int:
    """Return the version of a row read with a claim: below all changes that the claim leaves to the log.

    Two below, which leaves room for `reread_version`: a claim is where a record of the log ends; none is that short.
    """
    return version_of(epoch, claim - 2)


def reread_version(epoch: int, claim: int) -> int:
    """Return the version of a row read by its key, because of a change, with a claim above that change.

    It beats a row of a chunk with the same claim, which was read before: chunks wait for the log to come past them.
    """
    return version_of(epoch, claim - 1)


TERM_BITS = 12  # 4,096 terms in an epoch; then another one begins
OFFSET_BITS = POSITION_BITS - TERM_BITS  # 1.1 * 10**12 records of a table
MAX_OFFSET = (1 << OFFSET_BITS) - 1


def position_in_topic(term: int, offset: int) -> int:
    """Return the position of a change that has none to compare but its place in the topic of its table.

    `term` counts the sidecars that have led (modulo 4,096: see `epoch_of_term`). One that was frozen may send what it
    still had in its hands behind newer changes; these are then of a newer term, and outrank it.
    """
    assert 0 <= offset <= MAX_OFFSET, f"offset {offset} is out of range"
    return (term & ((1 << TERM_BITS) - 1)) << OFFSET_BITS | offset


def epoch_of_term(term: int) -> int:
    """Return the lowest epoch that a term may be of, because terms count from 0 again."""
    return 1 + (term >> TERM_BITS)


def epoch_of(version: int) -> int:
    """Return the epoch of a version."""
    return version >> POSITION_BITS


def position_of(version: int) -> int:
    """Return the position of a version."""
    return version & MAX_POSITION


def epoch_floor(epoch: int) -> int:
    """Return the lowest version of `epoch`: everything below it was written in an older one."""
    return epoch << POSITION_BITS


def parse_lsn(text: str) -> int:
    """Return PostgreSQL's `16/B374D848` as an integer."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def format_lsn(position: int) -> str:
    """Return an integer as PostgreSQL writes an LSN."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"
