"""Shaping without code: masks wherever a row is read, then filters, columns, constants and computed fields."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pytest

from delta_sync.changes import Change
from delta_sync.decoding import Undecodable
from delta_sync.delta_event import DeltaEvent, encode_event
from delta_sync.errors import ProcessorError, UndecodableChange, UsageError
from delta_sync.expressions import parse_expression
from delta_sync.masking import Mask
from delta_sync.pipeline import load_processor
from delta_sync.shaping import compiled, fingerprint, masked, masked_again, shaped_table, without_values
from delta_sync.sinks import target_for
from delta_sync.sinks.memory import MemorySink
from delta_sync.sources import open_reader
from delta_sync.sources.mysql import codec as mysql_codec
from delta_sync.sources.postgresql import codec as postgresql_codec
from delta_sync.spec import MaskSpec, PipelineSpec, ShapeSpec, dump_spec, load_spec, parse_spec
from delta_sync.state import DeadLetter
from delta_sync.tables import Column, Kind, Table
from delta_sync.testing.harness import Harness
from delta_sync.used_keys import UsedKeyStore
from delta_sync.values import Interval

SECRET = "0123456789abcdef-secret"
COLUMNS = {"id": Kind.INTEGER, "email": Kind.TEXT, "price": Kind.DECIMAL, "tags": Kind.JSON}
PERSON = Table("public", "person", tuple(Column(name, "x", kind) for name, kind in COLUMNS.items()), ("id",))


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASK_SECRET", SECRET)


def shape(**options: Any) -> ShapeSpec:
    return ShapeSpec.model_validate(options)


# ── expressions ──────────────────────────────────────────────────────────────────────────────────────────────────

ROW = {
    "n": 7,
    "price": Decimal("10.50"),
    "title": "Nine Lanterns",
    "gone": None,
    "at": dt.datetime(2024, 2, 3, 4, 5, tzinfo=dt.UTC),
    "tags": ["a", "b"],
    "data": {"deep": {"er": 1}},
    "odd name": "found",
    "ok": True,
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("n + 1", 8),
        ("-n * 2 // 3", -5),
        ("price * 1.1", Decimal("11.550")),
        ("1.1 * price", Decimal("11.550")),
        ("gone + 1", None),
        ("gone < 3 or gone > 3", False),
        ("gone == None", True),
        ("gone is None and n is not None", True),
        ("not ok", False),
        ("1 < n < 10", True),
        ("1 < n < 5", False),
        ("title in ['x', 'Nine Lanterns']", True),
        ("'c' in tags", False),
        ("upper(title[:4])", "NINE"),
        ("f'{title} ({year(at)}){gone}'", "Nine Lanterns (2024)"),
        ("data['deep']['er']", 1),
        ("data['none']['er']", None),
        ("tags[5]", None),
        ("row['odd name']", "found"),
        ("coalesce(gone, title)", "Nine Lanterns"),
        ("lower(gone)", None),
        ("'many' if n > 5 else 'few'", "many"),
        ("join('-', split(title, ' '))", "Nine-Lanterns"),
        ("text(price)", "10.5"),
        ("date(at)", dt.date(2024, 2, 3)),
        ("round(price, 1)", Decimal("10.5")),
        ("[n, title]", [7, "Nine Lanterns"]),
    ],
)
def test_what_an_expression_gives(text: str, wanted: object) -> None:
    assert parse_expression(text).evaluate(ROW) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "open('/etc/passwd')",
        "title.upper()",
        "().__class__",
        "[x for x in tags]",
        "lambda: 1",
        "2 ** 9999999",
        "1 << 99999",
        "f'{n:>99999999}'",
        "f'{title!r}'",
        "upper(*tags)",
        "round(price, ndigits=2)",
        "n := 1",
        "title[::2]",
        "b'bytes'",
        "n +",
        "",
        "(" * 5000,
        "-" * 3000 + "1",
    ],
)
def test_what_an_expression_may_not_hold(text: str) -> None:
    with pytest.raises(ValueError, match=r"expression|function|nested|braces|characters"):
        parse_expression(text)


@pytest.mark.parametrize("text", ["title * 99999999", "'%999999999d' % n", "n / 0", "int(title)", "n < title"])
def test_what_fails_for_a_row_is_that_rows_error(text: str) -> None:
    with pytest.raises(ProcessorError):
        parse_expression(text).evaluate(ROW)


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mask", "value", "wanted"),
    [
        (Mask("redact", "***"), "a@b", "***"),
        (Mask("redact", "***"), 17, "***"),
        (Mask("truncate", 4), dt.date(1985, 3, 1), "1985"),
        (Mask("truncate", 4), "abcdefgh", "abcd"),
        (
            Mask("hash", "${env:MASK_SECRET}"),
            "a@b",
            "hmac:" + hmac.new(SECRET.encode(), b"a@b", hashlib.sha256).hexdigest(),
        ),
    ],
)
def test_what_masks_make(mask: Mask, value: object, wanted: str) -> None:
    function = mask.function()
    assert function(value) == wanted
    assert function(function(value)) == wanted, "a change that is replayed is masked again"


def test_equal_values_have_equal_hashes_however_they_are_spelt() -> None:
    function = Mask("hash", "${env:MASK_SECRET}").function()
    assert function(Decimal("1.0")) == function(Decimal("1.00"))
    assert function({"a": 1, "b": [Decimal(1)]}) == function({"b": [Decimal(1)], "a": 1})
    assert function(Interval(1, 2, 3)) != function("\ud800") != function("a")


def test_a_secret_that_could_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASK_SECRET", "short")
    with pytest.raises(UsageError, match="fewer than 16") as caught:
        Mask("hash", "${env:MASK_SECRET}").function()
    assert "short" not in str(caught.value).replace("shorter", "")


def test_the_codecs_of_both_sources_mask_what_they_read() -> None:
    table = masked(PERSON, shape(mask={"email": "redact", "price": {"truncate": 1}}))
    for row_of in (postgresql_codec.table_codec(table).row, mysql_codec.table_codec(table).row):
        image = {"id": 1, "email": "a@b", "price": "10.50", "tags": None}
        assert row_of(image) == {"id": 1, "email": "***", "price": "1", "tags": None}
        assert row_of({**image, "email": None, "price": None})["email"] is None, "whether there is a value is no secret"
    key, row = mysql_codec.row_maker(table)(["1", "a@b", "10.50", None])
    assert (key, row["email"], row["price"]) == ((1,), "***", "1")


def test_masks_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match=r"mask: id is of the key, and a key cannot be masked"):
        masked(PERSON, shape(mask={"id": "redact"}))
    with pytest.raises(UsageError, match=r"mask: public.person has no column mail; it has id, email"):
        masked(PERSON, shape(mask={"mail": "redact"}))
    for wrong in ({"hash": "plain"}, {"hash": "x${env:A}"}, {}, {"redact": "", "truncate": 1}, "hash"):
        with pytest.raises(ValueError, match=r"reference|one of|valid dictionary"):
            MaskSpec.model_validate(wrong)


def test_a_change_from_before_there_was_a_mask_is_masked_when_it_is_replayed() -> None:
    kept = Change("public.person", (1,), 7, {"id": 1, "email": "a@b", "price": None})
    table = masked(PERSON, shape(mask={"email": "redact", "price": "redact"}))
    assert masked_again(table, kept).row == {"id": 1, "email": "***", "price": None}
    assert masked_again(PERSON, kept) is kept


def test_a_replay_masks_what_was_kept_in_the_clear(tmp_path: Path) -> None:
    from delta_sync.replaying import _Now as Now  # pyright: ignore[reportPrivateUsage] -- not asked here
    from delta_sync.replaying import _replay  # pyright: ignore[reportPrivateUsage] -- the rest of it opens stores

    folder = folder_of(tmp_path)
    people = load_spec(folder)
    at = dt.datetime(2024, 2, 3, tzinfo=dt.UTC)
    kept = Change("public.person", (1,), 7, {"id": 1, "email": "a@b", "price": Decimal(3), "tags": ["a@b"]})
    event = encode_event(DeltaEvent.of("people", kept, at, "log"))
    letter = DeadLetter(
        table=kept.table,
        key_text="1",
        version=7,
        sink=None,
        stage="process",
        error="",
        trace="",
        event=event,
        created_at=at,
    )
    sink = MemorySink("cache")
    table = masked(PERSON, people.shapes["public.person"])
    failed = _replay(
        letter,
        load_processor(folder, people),
        people,
        {"cache": sink},
        {table.id: table},
        {},
        Now(cast("Any", None), 1),
        UsedKeyStore(cast("Any", None), "people"),
    )
    assert failed is None
    (document,) = sink.documents(target_for(sink, table, people)).values()
    assert (document["email"][:5], document["tags"]) == ("hmac:", "***")


def test_an_event_that_cannot_be_decoded_shows_no_value_of_a_masked_table() -> None:
    from delta_sync.dead_letters import undecodable

    event = {"op": "u", "before": None, "after": {"id": {}, "email": "a@b"}, "source": {"lsn": 5}}
    item = Undecodable("public.person", 5, event, UndecodableChange("the value {'a@b'} is none"))
    table = masked(PERSON, shape(mask={"email": "redact"}))
    shown = undecodable(item, {"public.person": postgresql_codec.table_codec(table)})
    assert "a@b" not in shown.error + shown.trace
    assert "lsn" in shown.error
    assert without_values(PERSON, event) is event


# ── the shape ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"id": 1, "email": "a@b", "price": 3, "tags": []}),
        ({"include": ["email", "id"]}, {"email": "a@b", "id": 1}),
        ({"exclude": ["tags", "id"], "rename": {"price": "cost"}}, {"email": "a@b", "cost": 3}),
        ({"include": ["price"], "rename": {"price": "cost"}}, {"cost": 3}),
        (
            {"include": ["id"], "constant": {"kind": "p"}, "computed": {"x": "price * 2"}},
            {"id": 1, "kind": "p", "x": 6},
        ),
        ({"where": "price > 2", "include": ["id"]}, {"id": 1}),
        ({"where": "price > 5"}, None),
    ],
)
def test_what_a_shape_makes_of_a_row(options: dict[str, Any], wanted: object) -> None:
    row = {"id": 1, "email": "a@b", "price": 3, "tags": []}
    found = compiled(shape(**options))(row)
    assert found == wanted
    if found is not None:
        assert list(found) == list(wanted) if isinstance(wanted, dict) else False  # pyright: ignore[reportUnknownArgumentType] -- of the case
    assert row == {"id": 1, "email": "a@b", "price": 3, "tags": []}, "the row stays, for a dead letter"
    assert found is not row


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": ["colour"]}, "exclude: public.person has no column colour"),
        ({"where": "colour == 1"}, "where: public.person has no column colour"),
        ({"computed": {"a": "colour"}}, "computed.a: public.person has no column colour"),
        ({"rename": {"email": "price"}}, "two fields of a document would be called price"),
        ({"constant": {"email": 1}}, "two fields of a document would be called email"),
    ],
)
def test_shapes_that_do_not_fit_the_table(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        masked(PERSON, shape(**options))


def test_a_sinks_mapping_is_of_the_fields_and_keeps_the_key() -> None:
    found = shaped_table(PERSON, shape(exclude=["id", "tags"], rename={"price": "cost"}, mask={"price": "redact"}))
    assert [(column.name, column.kind) for column in found.columns] == [
        ("id", Kind.INTEGER),
        ("email", Kind.TEXT),
        ("cost", Kind.TEXT),  # what a mask leaves is a text
    ]
    assert found.key == ("id",)
    unknown = shaped_table(PERSON, shape(include=["id", "nothing"]))  # which `masked` tells of
    assert [column.name for column in unknown.columns] == ["id"]


SPEC = """name: people
source: {url: 'postgresql://delta@db/studio'}
tables:
  public.person:
    shape:
      where: price > 1
      mask:
        email: {hash: '${env:MASK_SECRET}'}
        tags: redact
      computed: {double: price * 2}
sinks:
  cache: {url: 'redis://cache/0'}
"""


def spec(text: str = SPEC) -> PipelineSpec:
    return parse_spec(text, "it")


def test_a_change_of_the_shape_is_one_of_the_tables_columns() -> None:
    reader = open_reader(spec(), "test")
    (before,) = reader.fingerprinted({"public.person": "columns"}).values()
    assert before != "columns"
    assert SECRET not in before
    for old, new in (("> 1", "> 2"), ("redact", "{truncate: 1}"), ("double: ", "twice: ")):
        (after,) = (
            open_reader(spec(SPEC.replace(old, new)), "test").fingerprinted({"public.person": "columns"}).values()
        )
        assert after != before
    assert fingerprint(None) == ""
    assert reader.fingerprinted({"public.other": "columns"}) == {"public.other": "columns"}
    (person,) = reader.assembled([PERSON.id], lambda _: {PERSON.id: PERSON}, lambda _: []).values()
    assert person.column("tags").mask == Mask("redact", "***")
    assert spec(dump_spec(spec())) == spec()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("price > 1", "price.x > 1", "line 6: .*`price.x` is not allowed in an expression"),
        ("price * 2", "exec(price)", "there is no function exec"),
        ("{hash: '${env:MASK_SECRET}'}", "{hash: plain}", "hash must be a reference"),
        ("      where", "      exclude: [a]\n      include: [b]\n      where", "give include or exclude, not both"),
    ],
)
def test_mistakes_in_the_specification(old: str, new: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        spec(SPEC.replace(old, new))


# ── with a processor, and without one ────────────────────────────────────────────────────────────────────────────


def folder_of(tmp_path: Path, processor: str | None = None) -> Path:
    folder = tmp_path / "people"
    folder.mkdir()
    (folder / "pipeline.yaml").write_text(SPEC)
    if processor is not None:
        (folder / "processor.py").write_text(
            f"from delta_sync import Pipeline\npeople = Pipeline('people')\n{processor}"
        )
    return folder


def test_shaping_alone_is_a_pipeline(tmp_path: Path) -> None:
    people = Harness(folder_of(tmp_path))
    people.insert("public.person", id=1, email="a@b", price=3, tags=["x"])
    people.insert("public.person", id=2, email="a@b", price=1, tags=None)
    people.insert("public.person", id=3, email="a@b", price=5, tags=None)
    people.update("public.person", id=3, price=0)  # its document goes
    hashed = Mask("hash", "${env:MASK_SECRET}").function()("a@b")
    assert people.documents("cache") == {"1": {"id": 1, "email": hashed, "price": 3, "tags": "***", "double": 6}}
    people.load("public.person")
    people.stir()
    people.check()
    assert people.documents("cache")["1"]["email"] == hashed


def test_a_processor_gets_what_is_left_of_the_row_and_keeps_the_rest_out_of_its_dead_letters(tmp_path: Path) -> None:
    people = Harness(
        folder_of(tmp_path, "@people.table('public.person')\ndef person(row):\n    raise KeyError(repr(row))\n")
    )
    people.insert("public.person", id=1, email="planted", price=3, tags=["planted"])
    (letter,) = people.dead_letters
    assert "'double': 6" in letter.error
    assert "planted" not in repr(letter)


def test_a_table_without_a_shape_needs_a_function(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "")
    load_processor(folder, load_spec(folder))
    file = folder / "pipeline.yaml"
    file.write_text(SPEC.replace("sinks:", "  public.other:\nsinks:", 1))
    with pytest.raises(
        UsageError, match=r"has table public.other, but processor.py has no function for it; declare one, or"
    ):
        load_processor(folder, load_spec(folder))
