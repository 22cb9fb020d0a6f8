"""A pipeline from MariaDB, through Debezium Server and Kafka, to a store: load, changes, faults, types."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pymysql
import pytest
from kafka import KafkaConsumer, TopicPartition

from acceptance.harness import Actor, Key, Run
from acceptance.kafka_harness import child_of, dump_by_both
from acceptance.mariadb_harness import BinlogPipeline, MariaPipeline, execute, maria_pipeline
from delta_sync.decoding import Event
from delta_sync.kafka.avro import HEADER_BYTES, AvroDecoder
from delta_sync.kafka.consumer import Partition, Records
from delta_sync.kafka.names import topic_name
from delta_sync.kafka.registry import SchemaRegistry
from delta_sync.kafka.topics import read_cluster, wanted_topics
from delta_sync.sinks import target_for
from delta_sync.sources.mysql.connection import Session
from delta_sync.tables import Table
from delta_sync.testing.kafka import Kafka
from delta_sync.testing.mariadb import MariaDB
from delta_sync.testing.processes import free_port, wait_until
from delta_sync.testing.registry import Apicurio
from delta_sync.testing.servers import Redis
from delta_sync.values import to_json
from mariadb_values import VALUES as ALL_VALUES

ROWS = 400
SOME = 30  # transactions
BEGINS_S, LOADS_S = 240.0, 240.0  # far above what it takes: no test may depend on speed
WRITER_PAUSE_S = 0.1  # the machine has other things to do
VALUES = [value for value in ALL_VALUES if value[0] not in ("inet4", "inet6")]  # which end Debezium

TABLES = {
    "account": "CREATE TABLE account (id int PRIMARY KEY, name varchar(40), balance decimal(12,2), at timestamp(3),"
    " since date NOT NULL)",
    "item": "CREATE TABLE item (region varchar(10), number int, data json, uid uuid, PRIMARY KEY (region, number))",
    "types": "CREATE TABLE types (id int PRIMARY KEY, "
    + ", ".join(f"c{number} {type_}" for number, (type_, *_) in enumerate(VALUES))
    + ")",
}


@pytest.fixture
def pipeline(
    mariadb: MariaDB, redis_server: Redis, kafka: Kafka, registry: Apicurio, tmp_path: Path
) -> Iterator[MariaPipeline]:
    with maria_pipeline(mariadb, redis_server, kafka, registry, tmp_path, TABLES, MariaPipeline) as made:
        yield made


class Writing(Actor):
    """Changes random rows until it is stopped: all kinds of changes, several to a transaction, some rolled back."""

    def __init__(self, pipeline: BinlogPipeline) -> None:
        super().__init__("writer")
        self.transactions = 0
        self._source = pipeline.source
        seed = random.randrange(1 << 30)
        print(f"seed {seed}")
        self._random = random.Random(seed)

    def act(self) -> None:
        with closing(self._source.session()) as session:
            session.autocommit(False)
            while not self.stopping.wait(WRITER_PAUSE_S):
                for _ in range(self._random.choice((1, 1, 3, 20))):
                    with contextlib.suppress(pymysql.IntegrityError):  # a key that is taken
                        execute(session, self._change())
                if self._random.random() < 0.15:
                    session.rollback()
                else:
                    session.commit()
                self.transactions += 1

    def _change(self) -> str:
        id_, other, word = self._random.randrange(ROWS), self._random.randrange(ROWS), self._random.random()
        since = self._random.choice(
            ("'0000-00-00'", "'1970-01-01'", "'2024-02-29'")
        )  # Debezium writes two of them alike
        where = f"region = 'r{id_ % 7}' AND number = {id_}"
        return self._random.choice(
            [
                f"REPLACE INTO account (id, name, balance, at, since) VALUES ({id_}, {word}, {word}, NOW(3), {since})",
                f"UPDATE account SET name = '{word}', balance = balance + 1 WHERE id = {id_}",
                f"UPDATE account SET name = '{word}' WHERE id BETWEEN {id_} AND {id_ + 5}",
                f"DELETE FROM account WHERE id = {id_}",
                f"UPDATE account SET id = {other} WHERE id = {id_}",
                f"INSERT INTO item VALUES ('r{id_ % 7}', {id_}, '[{word}]', UUID())",
                f"UPDATE item SET uid = UUID(), data = '{{\"a\": {word}}}' WHERE {where}",
                f"UPDATE item SET region = 'moved' WHERE {where}",
                f"DELETE FROM item WHERE {where}",
            ]
        )


def fill(session: Session) -> None:
    """Write the rows that are there before the pipeline is."""
    values = ", ".join(text for _, text, *_ in VALUES)
    accounts = ", ".join(f"({n}, 'first', {n}.25, NOW(3), '2024-02-29')" for n in range(ROWS))
    items = ", ".join(f"('r{n % 7}', {n}, '[1]', UUID())" for n in range(ROWS))
    execute(
        session,
        f"INSERT INTO account VALUES {accounts}",
        f"INSERT INTO item VALUES {items}",
        f"INSERT INTO types VALUES (1, {values})",
    )


def test_a_pipeline_from_mariadb(pipeline: MariaPipeline, kafka: Kafka) -> None:
    source = pipeline.source
    with closing(source.session()) as session, contextlib.ExitStack() as exits:

        def start(command: str, *options: str) -> Run:
            run = pipeline.process(command, *options)
            exits.callback(run.kill)
            return run

        fill(session)
        with Writing(pipeline):
            sidecar, worker = start("sidecar"), start("worker")
            wait_until(lambda: bool(worker.events("load_started")) or not worker.running, BEGINS_S, "the load")
            assert worker.running, worker.tail()
            worker.kill()  # both in the midst of it
            child_of(sidecar, "debezium").kill()
            worker = start("worker")
            wait_until(pipeline.loaded, LOADS_S, "the load's end")
        values = ", ".join(text for _, text, *_ in VALUES)
        execute(session, f"INSERT INTO types VALUES (2, {values})")
        pipeline.in_step(sidecar, worker)
        check_types(pipeline)

        # ── columns are added and a table is emptied while the writer goes on ──
        with Writing(pipeline) as writer:
            execute(session, "ALTER TABLE account ADD COLUMN extra varchar(20) DEFAULT 'none'")
            execute(session, "TRUNCATE TABLE item", "INSERT INTO item VALUES ('after', 1, '[2]', UUID())")
            wait_until(lambda: writer.transactions > SOME, LOADS_S, "some transactions")
        pipeline.in_step(sidecar, worker)
        assert pipeline.epoch() == 1
        assert pipeline.dead_letters() == []

        # ── documents get lost: a dump by keys brings one, a repair the other, while the writer goes on ──
        with Writing(pipeline):
            check_dump_and_repair(pipeline)
        pipeline.in_step(sidecar, worker)

        # ── two workers read a table again whose documents are gone, once while the writer goes on ──
        port = free_port()
        second = start("worker", "--port", str(port))
        wait_until(lambda: bool(second.events("partitions_assigned")), BEGINS_S, "its partitions")
        more = ", ".join(f"({n}, 'more', {n}.25, NOW(3), '2024-02-29')" for n in range(ROWS, 4 * ROWS))
        execute(session, f"INSERT INTO account (id, name, balance, at, since) VALUES {more}")
        pipeline.in_step(sidecar, worker, second)
        dump_by_two(pipeline, port)
        pipeline.in_step(sidecar, worker, second)
        assert second.stop() == 0
        check_templates(pipeline, kafka)

        # ── the log begins anew: the epoch rises, and what was deleted meanwhile goes ──
        execute(session, "RESET MASTER", "DELETE FROM account WHERE id % 2 = 0", "UPDATE account SET name = 'reset'")
        with Writing(pipeline):
            wait_until(lambda: pipeline.loaded() and pipeline.epoch() == 2, LOADS_S, "a new epoch")
        (rise,) = sidecar.events("epoch_rises")
        assert "RESET MASTER" in rise["reason"]
        pipeline.in_step(sidecar, worker)
        assert {load.epoch for load in pipeline.loads().values()} == {2}

        assert pipeline.dead_letters() == []
        assert sidecar.stop() == 0
        assert worker.stop() == 0
    check_commands(pipeline)


# ── documents from several tables ────────────────────────────────────────────────────────────────────────────────

MOVIES, STUDIOS = 30, 4
LIBRARY = {
    "studio": "CREATE TABLE studio (id int PRIMARY KEY, rev int NOT NULL DEFAULT 0)",
    "movie": "CREATE TABLE movie (id int PRIMARY KEY, rev int NOT NULL DEFAULT 0, studio_id int,"
    " FOREIGN KEY (studio_id) REFERENCES studio (id))",
    "review": "CREATE TABLE review (id int PRIMARY KEY, rev int NOT NULL DEFAULT 0, movie_id int NOT NULL,"
    " FOREIGN KEY (movie_id) REFERENCES movie (id))",
}
DOCUMENTS = """
from delta_sync import Pipeline, many, one

pipeline = Pipeline("{name}")


@pipeline.document("{schema}.movie", parts={{"studio": one("{schema}.studio"), "reviews": many("{schema}.review")}})
def movie(row):
    return row
"""


class WritingLibrary(Writing):
    """Changes movies, what they refer to and what refers to them: both sides of what is moved, too."""

    def _change(self) -> str:
        movie, other = self._random.randrange(MOVIES), self._random.randrange(MOVIES)
        review, studio = self._random.randrange(5 * MOVIES), self._random.randrange(STUDIOS)
        return self._random.choice(
            [
                f"UPDATE studio SET rev = rev + 1 WHERE id = {studio}",
                f"UPDATE movie SET rev = rev + 1, studio_id = {studio} WHERE id = {movie}",
                f"UPDATE movie SET studio_id = NULL WHERE id = {movie}",
                f"INSERT IGNORE INTO movie VALUES ({movie}, 0, {studio})",
                f"DELETE FROM movie WHERE id = {movie} AND id NOT IN (SELECT movie_id FROM review)",
                f"INSERT IGNORE INTO review VALUES ({review}, 0, {movie})",
                f"UPDATE IGNORE review SET rev = rev + 1, movie_id = {movie} WHERE id = {review}",
                f"UPDATE review SET rev = rev + 1 WHERE movie_id = {movie}",
                f"DELETE FROM review WHERE movie_id = {other}",
            ]
        )


class Library(MariaPipeline):
    """A pipeline of movies with their studio and their reviews."""

    def expected(self, table: Table) -> dict[Key, dict[str, Any]]:
        """Join the rows of the three tables; one snapshot each, for when writers rest."""
        tables = self.source.reader.tables(self.tables)
        movies, studios, reviews = (
            self.source.rows(tables[f"{self.source.schema}.{name}"]) for name in ("movie", "studio", "review")
        )
        return {
            key: {
                **movie,
                "studio": studios.get((movie["studio_id"],)),
                "reviews": [one for _, one in sorted(reviews.items()) if one["movie_id"] == movie["id"]],
            }
            for key, movie in movies.items()
        }


@pytest.mark.long
def test_documents_of_several_tables(
    mariadb: MariaDB, redis_server: Redis, kafka: Kafka, registry: Apicurio, tmp_path: Path
) -> None:
    """Workers are killed and dumps run while the tables change; at the end each document is the join of the source."""
    with maria_pipeline(mariadb, redis_server, kafka, registry, tmp_path, LIBRARY, Library) as pipeline:
        schema = pipeline.source.schema
        (pipeline.home / "processor.py").write_text(DOCUMENTS.format(name=pipeline.name, schema=schema))
        pipeline.parts = {f"{schema}.{name}" for name in ("studio", "review")}
        checked = pipeline.deltactl("pipeline", "check", pipeline.name)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        with closing(pipeline.source.session()) as session, contextlib.ExitStack() as exits:

            def start(command: str, *options: str) -> Run:
                run = pipeline.process(command, *options)
                exits.callback(run.kill)
                return run

            execute(
                session,
                f"INSERT INTO studio SELECT seq, 0 FROM seq_0_to_{STUDIOS - 1}",
                f"INSERT INTO movie SELECT seq, 0, seq % {STUDIOS} FROM seq_0_to_{MOVIES - 1}",
                f"INSERT INTO review SELECT seq, 0, seq % {MOVIES} FROM seq_0_to_{3 * MOVIES}",
            )
            with WritingLibrary(pipeline) as writer:
                sidecar, worker = start("sidecar"), start("worker")
                wait_until(lambda: pipeline.loaded() or not worker.running, BEGINS_S, "the load")
                assert worker.running, worker.tail()
                second = start("worker", "--port", str(free_port()))
                wait_until(lambda: bool(second.events("partitions_assigned")), BEGINS_S, "its partitions")
                started = pipeline.deltactl("dump", "start", pipeline.name, "--table", f"{schema}.movie")
                assert started.returncode == 0, started.stderr
                before = writer.transactions
                wait_until(lambda: writer.transactions > before + SOME, LOADS_S, "some transactions")
                worker.kill()
                execute(session, "FLUSH BINARY LOGS")
                before = writer.transactions
                wait_until(lambda: writer.transactions > before + SOME, LOADS_S, "some more")
            pipeline.in_step(sidecar, second)
            wait_until(pipeline.dumped, LOADS_S, "the dump's end")
            check_documents(pipeline)
            assert pipeline.dead_letters() == []
            assert sidecar.stop() == 0
            assert second.stop() == 0


def check_documents(pipeline: Library) -> None:
    """What was damaged is found and mended, and a trial shows what there is."""
    movie = f"{pipeline.source.schema}.movie"
    table = pipeline.source.reader.tables([movie])[movie]
    cache = pipeline.sinks["cache"]
    target = target_for(cache, table, pipeline.spec)
    lost = next(iter(pipeline.source.rows(table)))
    (stored,) = cache.read(target, [lost])
    assert stored is not None
    cache.discard(target, [(lost, stored.version)])
    repaired = pipeline.deltactl("verify", pipeline.name, "--repair", "--yes", "--json")
    lines = [json.loads(line) for line in repaired.stdout.splitlines()]
    found = [(line["finding"]["table"], line["finding"]["key"]) for line in lines if "finding" in line]
    assert (repaired.returncode, found) == (0, [(movie, str(lost[0]))]), repaired.stdout + repaired.stderr
    assert pipeline.differences() == []
    tried = pipeline.deltactl("pipeline", "test", pipeline.name, "--table", movie, "--keys", f"{lost[0]},888", "--json")
    assert tried.returncode == 0, tried.stderr
    assert [one["effect"] for one in json.loads(tried.stdout)] == ["same", "absent"]


def check_commands(pipeline: MariaPipeline) -> None:
    """What is not a run: looking at it, and deleting all that it made."""
    checked = pipeline.deltactl("pipeline", "check", pipeline.name, "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert all(not problem["fatal"] for problem in json.loads(checked.stdout)["problems"])
    assert "slot" not in json.loads(pipeline.deltactl("pipeline", "show", pipeline.name, "--json").stdout)
    topics = [topic.name for topic in wanted_topics(pipeline.spec)]
    assert read_cluster(pipeline.kafka, topics).topics.keys() == set(topics)
    deleted = pipeline.deltactl("pipeline", "delete", pipeline.name, "--documents", "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert read_cluster(pipeline.kafka, topics).topics == {}


def check_dump_and_repair(pipeline: MariaPipeline) -> None:
    """Of two documents that are gone a dump brings one, so verify finds the other, and nothing that is on its way."""
    types = pipeline.tables[-1]
    table = pipeline.source.reader.tables([types])[types]
    cache = pipeline.sinks["cache"]
    target = target_for(cache, table, pipeline.spec)
    lost = [(1,), (2,)]
    versions = [one.version for one in cache.read(target, lost) if one is not None]
    cache.discard(target, list(zip(lost, versions, strict=True)))
    dumped = pipeline.deltactl("dump", "start", pipeline.name, "--table", types, "--keys", "1", "--wait", "--json")
    assert dumped.returncode == 0, dumped.stdout + dumped.stderr
    repaired = pipeline.deltactl("verify", pipeline.name, "--repair", "--yes", "--json")
    lines = [json.loads(line) for line in repaired.stdout.splitlines()]
    found = [(line["finding"]["table"], line["finding"]["key"]) for line in lines if "finding" in line]
    assert found == [(types, "2")], repaired.stdout + repaired.stderr
    assert (repaired.returncode, lines[-1]["repaired"], lines[-1]["pipeline_runs"]) == (0, 1, True), lines
    check_types(pipeline)


def dump_by_two(pipeline: MariaPipeline, port_of_second: int) -> None:
    """A dump brings back all that a store has lost."""
    account = pipeline.tables[0]
    table = pipeline.source.reader.tables([account])[account]
    cache = pipeline.sinks["cache"]
    target = target_for(cache, table, pipeline.spec)

    def lose() -> None:
        keys = list(pipeline.source.rows(table))
        found = zip(keys, cache.read(target, keys), strict=True)
        cache.discard(target, [(key, one.version) for key, one in found if one is not None])

    lose()
    dump_by_both(pipeline, account, port_of_second)
    lose()
    with Writing(pipeline):
        done = pipeline.deltactl("dump", "start", pipeline.name, "--table", account, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr


def check_templates(pipeline: MariaPipeline, kafka: Kafka) -> None:
    """Debezium's records are read by templates, but for the first of a schema, and as they are read as a whole."""
    topic = topic_name(pipeline.name, pipeline.tables[0])
    values: list[bytes] = []
    with closing(KafkaConsumer(bootstrap_servers=kafka.url)) as consumer:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)

        def read() -> bool:
            values.extend(one.value for records in consumer.poll(100).values() for one in records if one.value)
            return all(consumer.position(at) >= ends[at] for at in partitions)

        wait_until(read, BEGINS_S, f"all of {topic}")
    decoder = AvroDecoder(SchemaRegistry(pipeline.kafka.registry))

    def decoded(some: list[bytes]) -> list[Event]:
        found = decoder.decode([Records(Partition(topic, 0), [None] * len(some), some, [b"1"] * len(some), [0], 0)])
        return [event for stretch in found.stretches for event in stretch.events]

    events = decoded(values)
    assert len(events) == len(values) > SOME
    schemas = {value[:HEADER_BYTES] for value in values}
    assert sum("ts_ns" in event for event in events) == len(schemas), "those that are read as a whole have more"
    for value, event in list(zip(values, events, strict=True))[:: len(values) // SOME]:
        decoder.use([])  # forgets its templates
        (whole,) = decoded([value])
        assert all(whole[name] == event[name] for name in ("before", "after", "op", "source")), (whole, event)


def check_types(pipeline: MariaPipeline) -> None:
    """Row 1 came by a load and row 2 by the log: both documents have every value as it is."""
    table = pipeline.source.reader.tables([pipeline.tables[-1]])[pipeline.tables[-1]]
    expected = json.loads(to_json({f"c{n}": value for n, (_, _, value, _) in enumerate(VALUES)}))
    for id_ in (1, 2):
        assert pipeline.document(table, (id_,)) == {"id": id_, **expected}
