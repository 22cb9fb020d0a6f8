"""What a pipeline does beside copying rows, on Kafka with two workers: handlers, masks, look-ups that are refreshed,
documents of several tables.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from acceptance.harness import Run, Source, Stores
from acceptance.kafka_harness import KafkaPipeline
from delta_sync.kafka.names import topic_name
from delta_sync.state import DeadLetter, StateStore
from delta_sync.testing.kafka import Kafka, admin_client
from delta_sync.testing.processes import wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import PostgreSQL, Redis

SEED = random.SystemRandom().randrange(1_000_000)
ROWS = 30
CARTS, LINES, PRODUCTS = 6, 12, 3
ALL_CARTS = CARTS + 4  # with those that change once
WRITES = 60  # by each of two writers, twice
PLACES = 3
REFUSED = 3  # the row that the processor refuses in the end
WAIT_S = 240.0
HIDDEN = "hidden7f3a"  # a part of every value that is masked
BUS_PARTITIONS = 3

SETUP = f"""
CREATE TABLE customer (id int PRIMARY KEY, name text, email text, phone text, rev int NOT NULL);
ALTER TABLE customer REPLICA IDENTITY FULL;
INSERT INTO customer SELECT i, 'first', '{HIDDEN}@example.org', '{HIDDEN}', 0 FROM generate_series(1, {ROWS}) i;
CREATE TABLE product (id int PRIMARY KEY, rev int NOT NULL DEFAULT 0);
CREATE TABLE cart (id int PRIMARY KEY, rev int NOT NULL DEFAULT 0);
CREATE TABLE line (
    id int PRIMARY KEY, rev int NOT NULL DEFAULT 0,
    cart_id int NOT NULL REFERENCES cart ON DELETE CASCADE, product_id int REFERENCES product);
CREATE INDEX ON line (cart_id); CREATE INDEX ON line (product_id);
ALTER TABLE line REPLICA IDENTITY FULL;
INSERT INTO product SELECT i FROM generate_series(1, {PRODUCTS}) i;
INSERT INTO cart SELECT i FROM generate_series(1, {CARTS}) i;
INSERT INTO line SELECT i, 0, 1 + i % {CARTS}, 1 + i % {PRODUCTS} FROM generate_series(1, {LINES}) i;
INSERT INTO cart SELECT i FROM generate_series({CARTS + 1}, {ALL_CARTS}) i;
INSERT INTO line VALUES ({LINES + 1}, 0, {CARTS + 1}, 1);
"""
# From one cart to the next and on, which nothing else changes: whoever reads the last event alone forgets the first.
TWICE_AT_ONCE = "".join(
    f"UPDATE line SET cart_id = {cart} WHERE id = {LINES + 1};" for cart in range(CARTS + 2, ALL_CARTS + 1)
)
CARTS_EXPECTED = """
SELECT c.id, to_jsonb(c) || jsonb_build_object('lines', coalesce((
    SELECT jsonb_agg(to_jsonb(l) || jsonb_build_object('product',
        (SELECT to_jsonb(p) FROM product p WHERE p.id = l.product_id)) ORDER BY l.id)
    FROM line l WHERE l.cart_id = c.id), '[]'))
FROM cart c
"""
PROCESSOR = """
import json

from delta_sync import Pipeline, lookup, many, one
from delta_sync.handlers.topic import Topic
from delta_sync.handlers.webhook import Webhook

pipeline = Pipeline({name!r})
label = pipeline.lookup(ttl="1h")(lookup.http("label", "{url}/label", key="id"))
place = pipeline.lookup(ttl="1h", keys="kept")(lookup.http("place", "{url}/place", key="id"))


def place_of(row):
    return row["rev"] % {PLACES} + 1


@pipeline.table({table!r}, enrich={{"label": label.by("id"), "place": place.by(place_of)}})
def customer(row, label, place):
    if row["name"] == "the processor refuses":
        raise ValueError(f"I cannot take {{row!r}}")
    return {{**row, "label": label["value"], "place": place["value"]}}


@pipeline.document("public.cart", parts={{"lines": many("public.line", parts={{"product": one("public.product")}})}})
def cart(row):
    return row


@pipeline.on({table!r}, attempts=1)
def note(event):
    if event.after and event.after["name"] == "the handler refuses":
        raise ValueError(f"I cannot take {{event!r}}")
    with open({noted!r}, "a") as file:
        print(json.dumps([event.id, event.op, event.before, event.after]), file=file)


pipeline.on({table!r}, name="hook")(Webhook("{url}/hook", secret="a secret of the webhook"))
bus = Topic({topic!r}, bootstrap_servers={brokers!r}, pipeline={name!r}, registry={registry!r})
pipeline.on({table!r}, name="bus", batch=100)(bus)
"""


class Service(BaseHTTPRequestHandler):
    """Answers the look-ups, and takes what the webhook sends."""

    shift: ClassVar[dict[str, int]] = {}  # of answers, by the path
    got: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply: Any = None
        if self.path == "/hook":
            self.got.append(asked)
        else:
            reply = [{"id": id_, "value": 10 * id_ + self.shift.get(self.path, 0)} for id_ in asked]
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's signature
        """A call is no event."""


@pytest.fixture
def service() -> Iterator[str]:
    """Run the service, and return its URL."""
    Service.shift, Service.got = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def pipeline(
    postgresql: PostgreSQL,
    redis_server: Redis,
    kafka: Kafka,
    registry: Apicurio,
    service: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> KafkaPipeline:
    monkeypatch.setenv("MASK_SECRET", "a secret that makes hashes")
    name = f"shop_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    source = Source(postgresql.url_of(name), "public")
    source.execute(SETUP)
    mask = {"email": "redact", "phone": {"hash": "${env:MASK_SECRET}"}}
    made = KafkaPipeline(
        source,
        tmp_path,
        {"cache": redis_server.url},
        name,
        ["customer", "cart", "line", "product"],
        bootstrap_servers=kafka.url,
        registry=registry.url,
        tables_options={"public.customer": {"shape": {"mask": mask}}},
    )
    made.parts = {"public.line", "public.product"}
    with admin_client(kafka.url) as admin:
        admin.create_topics({f"{name}-bus": {"num_partitions": BUS_PARTITIONS}}, wait_for_metadata=True)
    text = PROCESSOR.format(
        name=name,
        url=service,
        PLACES=PLACES,
        table="public.customer",
        noted=str(noted(made)),
        topic=f"{name}-bus",
        brokers=kafka.url,
        registry=registry.url,
    )
    (made.home / "processor.py").write_text(text)
    return made


def noted(pipeline: KafkaPipeline) -> Path:
    return pipeline.folder / "noted.jsonl"


@pytest.mark.long
def test_handlers_masks_and_refreshing_on_kafka(pipeline: KafkaPipeline, kafka: Kafka) -> None:
    with contextlib.ExitStack() as exits:

        def start(command: str) -> Run:
            run = pipeline.process(command)
            exits.callback(run.kill)
            return run

        sidecar, *workers = start("sidecar"), start("worker"), start("worker")
        pipeline.wait_until_applied(pipeline.shop.insert_lsn(), [sidecar, *workers])
        wait_until(lambda: all(run.events("partitions_assigned") for run in workers), WAIT_S, "two that share")
        stores = Stores(pipeline)
        exits.callback(stores.close)
        assert all(documents(stores).values()), "each row has its document"
        assert (noted(pipeline).exists(), Service.got) == (False, []), "a load calls no handler"

        change(pipeline)
        topic = topic_name(pipeline.name, "public.customer")
        with contextlib.closing(KafkaProducer(bootstrap_servers=kafka.url)) as producer:
            producer.send(topic, f"no Avro: {HIDDEN}".encode(), key=b"9", headers=[("delta.epoch", b"1")]).get(60)
        pipeline.wait_until_applied(pipeline.shop.insert_lsn(), [sidecar, *workers])
        stages = {"decode", "process", "handle"}
        wait_until(lambda: {letter.stage for letter in letters(pipeline)} == stages, WAIT_S, "dead letters")
        check_documents(stores, labels={})
        on_bus, in_source = values(kafka, f"{pipeline.name}-bus"), values(kafka, topic)
        check_handlers(pipeline, on_bus)

        Service.shift = {"/label": 1000}
        refresh = ("refresh", pipeline.name, "--lookup", "label", "--keys", "1,2", "--wait")
        refreshed = pipeline.deltactl(*refresh)
        assert refreshed.returncode == 0, refreshed.stdout + refreshed.stderr
        check_documents(stores, labels={1: 1010, 2: 1020})
        refreshed_by_what_is_kept(pipeline, stores)

        print(f"seed {SEED}")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(change_carts, 2 * [pipeline], (1, 2)))
            workers.pop(0).kill()
            workers.append(start("worker"))
            list(pool.map(change_carts, 2 * [pipeline], (3, 4)))
        pipeline.shop.execute(TWICE_AT_ONCE)
        pipeline.wait_until_applied(pipeline.shop.insert_lsn(), [sidecar, *workers])
        with pipeline.shop.connect() as connection:
            carts: dict[int, dict[str, Any]] = dict(connection.execute(CARTS_EXPECTED.encode()).fetchall())
        assert {id_: stores.document("cache", "cart", (id_,)) for id_ in range(1, ALL_CARTS + 1)} == {
            id_: carts.get(id_) for id_ in range(1, ALL_CARTS + 1)
        }

        said = [
            pipeline.deltactl("status", pipeline.name).stdout,
            pipeline.deltactl("dead", "list", pipeline.name).stdout,
        ]
        ids = [str(letter.id) for letter in letters(pipeline)]
        said += [pipeline.deltactl("dead", "show", pipeline.name, id_).stdout for id_ in ids]
        assert [run.stop() for run in (sidecar, *workers)] == [0, 0, 0]
    assert "I cannot take" in "".join(said), "errors quote rows"
    assert any(HIDDEN.encode() in value for _, value in in_source), "the transport has what the source has"
    shown = {
        "commands": "".join(said).encode(),
        "the webhook": json.dumps(Service.got).encode(),
        "the topic": b"".join(value for _, value in on_bus),
        "the sink": json.dumps(documents(stores := Stores(pipeline))).encode(),
    }
    stores.close()
    shown |= {str(file): file.read_bytes() for file in pipeline.folder.rglob("*") if file.is_file()}
    assert [where for where, data in shown.items() if HIDDEN.encode() in data] == []


def place_of(rev: int) -> int:
    """Return by which key `place` is asked, as the processor does."""
    return rev % PLACES + 1


def refreshed_by_what_is_kept(pipeline: KafkaPipeline, stores: Stores) -> None:
    """No column has the key by which `place` was asked: the rows are found that used it last, by changes of the log."""
    key = place_of(2)
    Service.shift["/place"] = 5000
    refresh = ("refresh", pipeline.name, "--lookup", "place", "--keys", f"{key},nowhere", "--wait", "--json")
    done = pipeline.deltactl(*refresh)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {id_: one for id_, one in documents(stores).items() if one is not None and id_ != REFUSED}
    new = stores.document("cache", "customer", (ROWS + 1,))
    assert new is not None
    found[ROWS + 1] = new
    users = [id_ for id_, one in found.items() if place_of(one["rev"]) == key]
    assert 0 < len(users) < len(found)
    assert list(json.loads(done.stdout)["rows"].values()) == [len(users)]
    wanted = {id_: 10 * place_of(one["rev"]) + 5000 * (id_ in users) for id_, one in found.items()}
    assert {id_: one["place"] for id_, one in found.items()} == wanted


def letters(pipeline: KafkaPipeline) -> list[DeadLetter]:
    with StateStore.open("sqlite:///state.db", pipeline.home) as store:
        return store.dead_letters(pipeline.name)


def change(pipeline: KafkaPipeline) -> None:
    """Two changes of each row, the last of them deleted, and one of each kind that somebody refuses."""
    for rev in (1, 2):
        pipeline.shop.execute(f"UPDATE customer SET rev = {rev}, email = '{HIDDEN} {rev}', name = 'rev {rev}'")
    pipeline.shop.execute(
        f"DELETE FROM customer WHERE id = {ROWS}",
        f"UPDATE customer SET rev = 3, name = 'the processor refuses' WHERE id = {REFUSED}",
        "UPDATE customer SET rev = 3, name = 'the handler refuses' WHERE id = 4",
        f"INSERT INTO customer VALUES ({ROWS + 1}, 'new', '{HIDDEN}', NULL, 1)",
    )


def change_carts(pipeline: KafkaPipeline, number: int) -> None:
    """Change rows of all three tables at random; above all move lines to another cart, and on at once."""
    rng = random.Random(f"{SEED} {number}")

    def one_of(most: int) -> int:
        return rng.randrange(1, most + 1)

    with pipeline.shop.connect() as connection:
        for _ in range(WRITES):
            moved = f"UPDATE line SET rev = rev + 1, cart_id = {{}} WHERE id = {one_of(LINES)}"
            some = rng.choice(
                (
                    [moved.format(one_of(CARTS))],
                    [moved.format(one_of(CARTS)), moved.format(one_of(CARTS))],
                    [f"UPDATE product SET rev = rev + 1 WHERE id = {one_of(PRODUCTS)}"],
                    [f"UPDATE line SET product_id = {one_of(PRODUCTS)} WHERE id = {one_of(LINES)}"],
                    [f"UPDATE cart SET rev = rev + 1 WHERE id = {one_of(CARTS)}"],
                    [f"DELETE FROM line WHERE id = {one_of(LINES)}"],
                    [f"INSERT INTO line VALUES ({one_of(LINES)}, 0, {one_of(CARTS)}, {one_of(PRODUCTS)})"],
                    [f"DELETE FROM cart WHERE id = {CARTS}", f"INSERT INTO cart VALUES ({CARTS})"],
                )
            )
            for statement in some:
                with contextlib.suppress(psycopg.errors.IntegrityError, psycopg.errors.DeadlockDetected):
                    connection.execute(statement.encode())


def documents(stores: Stores) -> dict[int, dict[str, Any] | None]:
    return {id_: stores.document("cache", "customer", (id_,)) for id_ in range(1, ROWS + 1)}


def check_documents(stores: Stores, labels: dict[int, int]) -> None:
    found = documents(stores)
    assert found.pop(ROWS) is None
    for id_, document in found.items():
        assert document is not None, id_
        # Of a batch only the newest change of a row is processed: of row 3 that is the one which is refused.
        assert document["rev"] in ((0, 1, 2) if id_ == REFUSED else (3,) if id_ == 4 else (2,)), document
        assert document["label"] == labels.get(id_, 10 * id_), document
        assert document["email"] == "***"
        assert document["phone"].startswith("hmac:")


def check_handlers(pipeline: KafkaPipeline, on_bus: list[tuple[str, bytes]]) -> None:
    """Each change at least once, in the order of each row; once more only after what came before once more."""
    lines = [json.loads(line) for line in noted(pipeline).read_text().splitlines()]
    assert {letter.key_text for letter in letters(pipeline) if letter.stage == "handle"} == {"4"}
    of_row: dict[int, list[int]] = {}
    for _, op, before, after in lines:
        assert (before is None) == (op == "insert")
        image = after or before
        assert image["email"] == "***"
        of_row.setdefault(image["id"], []).append(3 if after is None else image["rev"])
    for id_ in range(1, ROWS + 2):
        wanted = [1, 2, *[3] * (id_ in (REFUSED, ROWS))] if id_ <= ROWS else [1]
        assert list(dict.fromkeys(of_row[id_])) == wanted, (id_, of_row[id_])
    ids = {line[0] for line in lines}
    hooked = [one["id"] for one in Service.got]
    bussed = [id_ for id_, _ in on_bus]
    assert ids < set(hooked) == set(bussed), "these two took row 4's, too"
    for got in (hooked, bussed):
        for row in {id_.rpartition("/")[2] for id_ in ids}:
            versions = [int(id_.split("/")[1]) for id_ in dict.fromkeys(got) if id_.rpartition("/")[2] == row]
            assert versions == sorted(versions), (row, versions)


def values(kafka: Kafka, topic: str) -> list[tuple[str, bytes]]:
    """Return the header `delta-id` and the value of all records that are in a topic now."""
    found: list[tuple[str, bytes]] = []
    with contextlib.closing(KafkaConsumer(bootstrap_servers=kafka.url)) as consumer:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)

        def read() -> bool:
            for records in consumer.poll(100).values():
                ids = [dict(record.headers).get("delta-id", b"").decode() for record in records]
                found.extend(zip(ids, (record.value or b"" for record in records), strict=True))
            return all(consumer.position(at) >= ends[at] for at in partitions)

        wait_until(read, WAIT_S, f"all of {topic}")
    return found
