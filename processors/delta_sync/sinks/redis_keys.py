"""What Redis keys are called: a document's, its tombstone's, a target's floor. All of it is pure."""

from __future__ import annotations

import re
from binascii import crc_hqx
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote

from delta_sync.changes import Key
from delta_sync.errors import UsageError
from delta_sync.tables import Table
from delta_sync.values import scalar_text

OWN_PREFIX = "delta:"  # of the keys that are no documents
TOMBSTONES = b"delta:t:"
FLOORS = b"delta:f:"
RAISED = b"delta:r:"
POINTERS = b"delta:g:"
SLOTS = 16384  # Redis Cluster's

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_GLOB = re.compile(rb"[\\*?\[\]^]")


class KeyTemplate(NamedTuple):
    """How a document's Redis key is made: `literals[0]`, a key column, `literals[1]`, … , `literals[-1]`.

    Keys of one template are injective: with several columns, `%` and the first character of each separator are
    percent-encoded in the values, so that the separators can be told from them.
    """

    literals: tuple[str, ...]
    columns: tuple[int, ...]  # places in the table's key

    def render(self, key: Key) -> str:
        """Return the Redis key of a document."""
        if len(self.columns) == 1:
            value = key[self.columns[0]]
            text = value if type(value) is str else str(value) if type(value) is int else scalar_text(value)
            return f"{self.literals[0]}{text}{self.literals[1]}"
        escapes = _escapes(self.literals[1:-1])
        texts = [self.literals[0]]
        for column, literal in zip(self.columns, self.literals[1:], strict=True):
            texts += (scalar_text(key[column]).translate(escapes), literal)
        return "".join(texts)

    def render_all(self, keys: Iterable[Key]) -> list[bytes]:
        """Return the Redis keys of documents. Raises UnicodeEncodeError."""
        if len(self.columns) != 1:
            return [self.render(key).encode() for key in keys]
        column, (begin, end) = self.columns[0], self.literals
        return [
            f"{begin}{value if type(value) is int or type(value) is str else scalar_text(value)}{end}".encode()
            for key in keys
            for value in (key[column],)
        ]

    def own(self, redis_keys: Iterable[bytes]) -> list[bytes]:
        """Return the keys that could be of this template; those that are not UTF-8 are somebody else's."""
        matches = _pattern(self.literals).fullmatch
        return [key for key in redis_keys if matches(key) and (key.isascii() or _is_text(key))]

    def parse(self, redis_key: str) -> list[str] | None:
        """Return the texts of the columns, in the order of the table's key; None if the key is not of this template."""
        begin, *between, end = self.literals
        if not redis_key.startswith(begin) or not redis_key[len(begin) :].endswith(end):
            return None
        rest = redis_key[len(begin) : len(redis_key) - len(end)]
        texts: list[str] = []
        for literal in between:
            text, found, rest = rest.partition(literal)
            if not found:
                return None
            texts.append(unquote(text))
        texts.append(unquote(rest) if between else rest)
        parts = [""] * len(texts)
        for column, text in zip(self.columns, texts, strict=True):
            parts[column] = text
        return parts

    def glob(self) -> bytes:
        """Return a pattern for SCAN that all of the template's keys match."""
        return glob_escape(self.literals[0].encode()) + b"*"

    def overlaps(self, other: KeyTemplate) -> bool:
        """Tell whether both could give the same key: one's beginning begins the other's, and so for their ends."""
        begin, end = (self.literals[0], other.literals[0]), (self.literals[-1], other.literals[-1])
        return (begin[0].startswith(begin[1]) or begin[1].startswith(begin[0])) and (
            end[0].endswith(end[1]) or end[1].endswith(end[0])
        )

    def text(self, table: Table) -> str:
        """Return the template as a user would write it."""
        names = [f"{{{table.key[column]}}}" for column in self.columns]
        literals = [literal.replace("{", "{{").replace("}", "}}") for literal in self.literals]
        return literals[0] + "".join(name + literal for name, literal in zip(names, literals[1:], strict=True))


@lru_cache(maxsize=1000)  # templates in one process: more than anybody has
def _pattern(literals: tuple[str, ...]) -> re.Pattern[bytes]:
    """Return what all keys with these literals match. A scan asks it about every key of the store."""
    return re.compile(b"(?s:.*)".join(re.escape(literal.encode()) for literal in literals))


def _is_text(key: bytes) -> bool:
    try:
        key.decode()
    except UnicodeDecodeError:
        return False
    return True


@lru_cache(maxsize=1000)
def _escapes(separators: tuple[str, ...]) -> Mapping[int, str]:
    """Return what `str.translate` needs to percent-encode `%` and the separators' first characters."""
    special = {"%", *(separator[0] for separator in separators)}
    return {ord(c): "".join(f"%{byte:02X}" for byte in c.encode()) for c in special}


def default_template(table: Table, prefix: str) -> KeyTemplate:
    """Return `public.movie:{id}` for the table `public.movie` with the key `id`, after the prefix."""
    columns = tuple(range(len(table.key)))
    return _not_our_own(KeyTemplate((f"{prefix}{table.id}:", *(":" for _ in columns[1:]), ""), columns), table)


def parse_template(text: str, table: Table, prefix: str) -> KeyTemplate:
    """Return the template that a user wrote, after the prefix. `{{` and `}}` stand for braces.

    Raises UsageError: a column that is not of the table's key, or one of those left out; text before the first column
    or between two that is missing, or that could not be told from their values.
    """
    where = f"The key {text!r} of table {table.id}"
    literals, columns = [prefix], list[int]()
    for match in _PIECE.finditer(text):
        piece, name = match.group(), match.group(1)
        if piece in ("{{", "}}"):
            literals[-1] += piece[0]
        elif name is not None:
            if name not in table.key:
                raise UsageError(f"{where} names {{{name}}}; only key columns may be in it: {_braced(table.key)}.")
            columns.append(table.key.index(name))
            literals.append("")
        elif piece in "{}":
            raise UsageError(f"{where} has a single {piece}; write {piece * 2} for the character itself.")
        else:
            literals[-1] += piece
    missing = [name for place, name in enumerate(table.key) if place not in columns]
    if missing:
        raise UsageError(f"{where} leaves out {_braced(missing)}, so two rows could have one key; add it.")
    if not literals[0]:
        raise UsageError(f"{where} begins with a column; begin it with text, such as {table.name}:{text}.")
    for literal in literals[1:-1]:
        if not literal or literal[0].isalnum() or literal[0] == "%":
            raise UsageError(
                f"{where} needs a character between two columns that is no letter, digit or %, such as a :"
            )
    return _not_our_own(KeyTemplate(tuple(literals), tuple(columns)), table)


def _not_our_own(template: KeyTemplate, table: Table) -> KeyTemplate:
    begin = template.literals[0]
    if begin.startswith(OWN_PREFIX) or OWN_PREFIX.startswith(begin):
        raise UsageError(
            f"The keys {template.text(table)} of table {table.id} could begin with {OWN_PREFIX}, which Delta keeps for"
            f" itself; begin them otherwise."
        )
    return template


def _braced(names: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


def glob_escape(text: bytes) -> bytes:
    """Return a pattern for SCAN that only this text matches."""
    return _GLOB.sub(lambda match: b"\\" + match.group(), text)


def floor_key(place: str) -> bytes:
    """Return the key that holds a target's floor."""
    return FLOORS + place.encode()


def raised_key(place: str) -> bytes:
    """Return the key that holds when a target's floor was raised: in the floor's slot, for both have a hash tag."""
    return RAISED + place.encode()


def pointer_key(place: str) -> bytes:
    """Return the key that holds what the keys of the generation that readers are to see begin with.

    `place` is the template without a generation's prefix, as `pipeline.yaml` or the default has it.
    """
    return POINTERS + place.encode()


def generation_prefix(number: int | None) -> str:
    """Return what the keys of a generation begin with, before the sink's own prefix; nothing for the first."""
    return "" if number is None or number == 1 else f"g{number}:"


def hash_tag(key: bytes) -> bytes:
    """Return what Redis Cluster hashes of a key: the text in its first braces if there is any, else all of it."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            return key[start + 1 : end]
    return key


def slot_of(key: bytes) -> int:
    """Return a key's slot in Redis Cluster."""
    return crc_hqx(hash_tag(key), 0) % SLOTS


@lru_cache(maxsize=SLOTS)
def tag_of_slot(slot: int) -> bytes:
    """Return a text that Redis Cluster hashes to this slot."""
    number = 0
    while slot_of(b"%d" % number) != slot:
        number += 1
    return b"%d" % number


def tombstone_key(key: bytes) -> bytes:
    """Return the key of a document's tombstone: in the document's slot, and injective.

    The three forms differ in their ninth byte. `{key}` does for a key without braces; one with a hash tag of its own
    must keep that one the first; and where neither works (`a{}b`, `a}b`), a number stands in that has the slot.
    """
    if b"}" not in key:
        return b"delta:t:{%b}" % key
    if hash_tag(key) != key:
        return b"delta:t::%b" % key
    return b"delta:t:.{%b}%b" % (tag_of_slot(slot_of(key)), key)


def with_tombstones(keys: list[bytes]) -> list[bytes]:
    """Return documents' keys, each with its tombstone's behind it."""
    both = keys * 2
    both[::2] = keys
    if b"}" in b"".join(keys):
        both[1::2] = map(tombstone_key, keys)
    else:
        both[1::2] = [b"delta:t:{%b}" % key for key in keys]
    return both


def key_of_tombstone(tombstone: bytes) -> bytes:
    """Return the key of the document that a tombstone is for."""
    form = tombstone[8:9]
    if form == b"{":
        return tombstone[9:-1]
    if form == b":":
        return tombstone[9:]
    return tombstone[tombstone.index(b"}") + 1 :]
