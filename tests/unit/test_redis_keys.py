"""Redis keys: templates are injective and checked, tombstones are in their document's slot."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_sync.errors import UsageError
from delta_sync.sinks.redis_keys import (
    SLOTS,
    default_template,
    glob_escape,
    hash_tag,
    key_of_tombstone,
    parse_template,
    slot_of,
    tag_of_slot,
    tombstone_key,
)
from delta_sync.tables import Kind
from delta_sync.testing.contract import MOVIE, PART, SEAT


@pytest.mark.parametrize(
    ("template", "table", "prefix", "key", "expected"),
    [
        ("movie:{id}", MOVIE, "", (5,), "movie:5"),
        ("movie:{id}", MOVIE, "app:", (5,), "app:movie:5"),
        ("{id}", MOVIE, "movie:", (5,), "movie:5"),
        ("movie:{id}:body", MOVIE, "", (-5,), "movie:-5:body"),
        ("movie:{{{id}}}", MOVIE, "", (5,), "movie:{5}"),
        ("seat:{row}:{hall}:{day}", SEAT, "", (1, "a:b%", "2024-02-29"), "seat:a%3Ab%25:1:2024-02-29"),
        ("part/{film}-{reel}", PART, "", ("a-b", "c/d:e"), "part/a%2Db-c/d:e"),
        ("part:{film}→{reel}", PART, "", ("a→b", "c"), "part:a%E2%86%92b→c"),
    ],
)
def test_render(template: str, table: object, prefix: str, key: tuple[object, ...], expected: str) -> None:
    parsed = parse_template(template, table, prefix)  # type: ignore[arg-type]  # parametrize has no types
    assert parsed.render(key) == expected
    assert parsed.own([expected.encode()]) == [expected.encode()]
    assert parsed.text(table) == prefix + template  # type: ignore[arg-type]  # as above


def test_the_default_is_the_table_and_the_key() -> None:
    assert default_template(MOVIE, "app:").render((5,)) == "app:delta_contract.movie:5"
    assert default_template(PART, "").render(("a:b", "c%")) == "delta_contract.part:a%3Ab:c%25"
    assert default_template(PART, "").text(PART) == "delta_contract.part:{film}:{reel}"


@pytest.mark.parametrize(
    ("template", "table", "prefix", "says"),
    [
        ("movie:{title}", MOVIE, "", r"only key columns may be in it: \{id\}"),
        ("movie", MOVIE, "", r"leaves out \{id\}"),
        ("part:{film}", PART, "", r"leaves out \{reel\}"),
        ("{id}", MOVIE, "", "begins with a column"),
        ("movie:{id", MOVIE, "", "single {; write {{"),
        ("movie:}{id}", MOVIE, "", "single }; write }}"),
        ("part:{film}{reel}", PART, "", "needs a character between"),
        ("part:{film}2{reel}", PART, "", "needs a character between"),
        ("part:{film}%{reel}", PART, "", "needs a character between"),
        ("delta:{id}", MOVIE, "", "Delta keeps for itself"),
        ("ta:{id}", MOVIE, "del", "Delta keeps for itself"),
        ("d{id}", MOVIE, "", "Delta keeps for itself"),
    ],
)
def test_templates_that_cannot_be_meant(template: str, table: object, prefix: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_template(template, table, prefix)  # type: ignore[arg-type]  # parametrize has no types


@pytest.mark.parametrize("template", ["p:{film}:{reel}", "p:{film}::{reel}", "p:{film}-{reel}}}", "p:{reel}→{film}:x"])
def test_templates_of_several_columns_are_injective(template: str) -> None:
    """All pairs of the shortest texts of the characters that could be taken for separators or escapes."""
    parsed = parse_template(template, PART, "")
    texts = ["".join(text) for size in range(4) for text in itertools.product(":%-→2", repeat=size)]
    assert len({parsed.render((one, two)) for one in texts for two in texts}) == len(texts) ** 2


@pytest.mark.parametrize(
    ("one", "two", "overlap"),
    [
        ("movie:{id}", "actor:{id}", False),
        ("movie:{id}", "movie:{id}", True),
        ("movie:{id}", "movie_x:{id}", False),
        ("movie:{id}", "movie:x:{id}", True),
        ("movie:{id}", "movie:{id}:cast", True),
        ("movie:{id}:plot", "movie:{id}:cast", False),
        ("m{id}", "movie:{id}", True),
    ],
)
def test_overlaps(one: str, two: str, overlap: bool) -> None:
    first, second = parse_template(one, MOVIE, ""), parse_template(two, MOVIE, "")
    assert first.overlaps(second) == second.overlaps(first) == overlap


@given(st.text(st.sampled_from("a{}b"), min_size=1, max_size=8).map(str.encode))
def test_a_tombstone_is_in_its_documents_slot_and_names_it(key: bytes) -> None:
    assert slot_of(tombstone_key(key)) == slot_of(key)
    assert key_of_tombstone(tombstone_key(key)) == key


@given(*[st.text(st.sampled_from("a{}b:."), min_size=1, max_size=6).map(str.encode)] * 2)
def test_tombstones_are_injective(one: bytes, two: bytes) -> None:
    assert (tombstone_key(one) == tombstone_key(two)) == (one == two)


def test_a_plain_keys_tombstone() -> None:
    assert tombstone_key(b"movie:5") == b"delta:t:{movie:5}"


@pytest.mark.parametrize("slot", [0, 1, 5000, SLOTS - 1])
def test_every_slot_has_a_tag(slot: int) -> None:
    assert slot_of(tag_of_slot(slot)) == slot


@pytest.mark.parametrize(
    ("key", "tag"),
    [(b"a", b"a"), (b"{a}b", b"a"), (b"x{a}{b}", b"a"), (b"{}a", b"{}a"), (b"{{a}}", b"{a"), (b"a}b{c", b"a}b{c")],
)
def test_hash_tags_are_rediss(key: bytes, tag: bytes) -> None:
    assert hash_tag(key) == tag


def test_slots_are_rediss() -> None:
    assert slot_of(b"123456789") == 0x31C3  # from the specification of Redis Cluster


def test_glob_escape() -> None:
    assert glob_escape(rb"a*b?[c]\d") == rb"a\*b\?\[c\]\\d"


def test_kinds_of_the_contracts_tables() -> None:
    """The templates above rely on them."""
    assert [MOVIE.column(name).kind for name in MOVIE.key] == [Kind.INTEGER]
    assert SEAT.key == ("hall", "row", "day")
