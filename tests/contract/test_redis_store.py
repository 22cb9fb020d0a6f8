"""What the Redis sink does to a real Redis beyond the contract: layout, expiry, other people's keys, failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import redis

from delta_sync.changes import APPLIED, STALE, Write
from delta_sync.errors import SinkBusy, SinkRefused
from delta_sync.sinks.base import Stored, Target
from delta_sync.sinks.redis import RedisOptions, RedisSink, RedisTargetOptions
from delta_sync.sinks.redis_keys import slot_of, tombstone_key
from delta_sync.sinks.redis_link import READONLY_GRACE_S
from delta_sync.testing.contract import MOVIE, SinkContract, apply, check_end, plan_storm, scanned
from delta_sync.testing.processes import wait_until
from delta_sync.testing.servers import Redis

WAIT_S = 60.0  # nothing here takes a second; a machine may be overloaded


@pytest.fixture
def store(redis_server: Redis) -> Iterator[redis.Redis]:
    """Yield a client of the empty server."""
    with redis.Redis(port=redis_server.port, decode_responses=True) as client:
        client.flushall()
        client.script_flush()
        yield client
        client.flushall()


@pytest.fixture
def open_sink(redis_server: Redis) -> Iterator[Callable[..., RedisSink]]:
    """Yield what opens sinks on the server, which are closed in the end."""
    sinks: list[RedisSink] = []

    def open_sink(url: str = redis_server.url, **options: object) -> RedisSink:
        sinks.append(RedisSink("cache", url, RedisOptions.model_validate(options), 3600))
        return sinks[-1]

    yield open_sink
    for sink in sinks:
        sink.close()


@pytest.fixture
def sink(open_sink: Callable[..., RedisSink]) -> RedisSink:
    return open_sink()


def ask(client: Any, *command: Any) -> Any:
    """Run a command for which redis-py has no method with types."""
    return client.execute_command(*command)


def target_of(sink: RedisSink, **options: object) -> Target:
    return sink.target(MOVIE, RedisTargetOptions.model_validate({"key": "movie:{id}", **options}))


# ── layout ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_layout(store: redis.Redis, sink: RedisSink) -> None:
    target = target_of(sink)
    apply(sink, target, (1,), 5, {"title": "Casablanca"})
    apply(sink, target, (2,), 6, None)
    sink.truncate(target, 4)
    assert store.get("movie:1") == '{"_version":"0000000000000000005","title":"Casablanca"}'
    assert sorted(store.keys()) == ["delta:f:movie:{id}", "delta:t:{movie:2}", "movie:1"]
    assert store.pttl("movie:1") == -1
    assert 3_500_000 < store.pttl("delta:t:{movie:2}") <= 3_600_000
    assert store.pttl("delta:f:movie:{id}") == -1


def test_hash_layout(store: redis.Redis, open_sink: Callable[..., RedisSink]) -> None:
    sink = open_sink(format="hash")
    target = target_of(sink)
    apply(sink, target, (1,), 5, {"title": "Casablanca", "year": 1942, "tags": ["a"], "ok": True, "no": None, "old": 1})
    apply(sink, target, (1,), 6, {"title": "Casablanca", "year": 1942, "tags": ["a"], "ok": True, "no": None})
    expected = {"_version": "0000000000000000006", "title": "Casablanca", "year": "1942", "tags": '["a"]', "ok": "true"}
    assert store.hgetall("movie:1") == expected


def test_an_upsert_removes_the_tombstone(store: redis.Redis, sink: RedisSink) -> None:
    target = target_of(sink)
    apply(sink, target, (1,), 5, None)
    apply(sink, target, (1,), 6, {})
    assert store.keys() == ["movie:1"]


def test_a_hash_of_very_many_fields(store: redis.Redis, open_sink: Callable[..., RedisSink]) -> None:
    """More than Lua's `unpack` takes at once."""
    sink = open_sink(format="hash")
    apply(sink, target_of(sink), (1,), 5, {f"field {n}": n for n in range(20_000)})
    assert store.hlen("movie:1") == 20_001
    assert store.hget("movie:1", "field 19999") == "19999"


@pytest.mark.parametrize("format_", ["json", "hash"])
def test_drop_leaves_nothing(store: redis.Redis, open_sink: Callable[..., RedisSink], format_: str) -> None:
    sink = open_sink(format=format_)
    target = sink.target(MOVIE, RedisTargetOptions(key="m{{:{id}}}*"))
    sink.apply(target, [Write((n,), 5, {"n": n}) for n in range(1500)])
    sink.apply(target, [Write((n,), 5, None) for n in range(1200)])
    sink.truncate(target, 5)
    assert sink.drop(target) == 300
    assert store.dbsize() == 0


# ── expiry ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format_", ["json", "hash"])
def test_an_expired_documents_version_keeps_older_writes_out(
    store: redis.Redis, open_sink: Callable[..., RedisSink], format_: str
) -> None:
    sink = open_sink(format=format_, ttl="10m")
    target = target_of(sink)
    apply(sink, target, (1,), 5, {"n": 5})
    assert 500_000 < store.pttl("movie:1") <= 600_000
    store.pexpire("movie:1", 1)
    wait_until(lambda: not store.exists("movie:1"), WAIT_S, "expiry")
    assert sink.read(target, [(1,)]) == [Stored(5, None)]
    assert apply(sink, target, (1,), 4, {"n": 4}) == STALE
    assert apply(sink, target, (1,), 5, {"n": 5}) == APPLIED
    assert store.exists("movie:1")


def test_a_ttl_that_goes_leaves_documents_for_ever(store: redis.Redis, open_sink: Callable[..., RedisSink]) -> None:
    before, after = open_sink(ttl="10m"), open_sink()
    apply(before, target_of(before), (1,), 5, {"n": 5})
    apply(after, target_of(after), (1,), 6, {"n": 6})
    assert store.pttl("movie:1") == -1
    assert apply(after, target_of(after), (1,), 7, None) == APPLIED
    assert after.read(target_of(after), [(1,)]) == [Stored(7, None)]


# ── other people's keys ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format_", ["json", "hash"])
def test_a_key_of_another_type_is_rejected_and_the_others_go_on(
    store: redis.Redis, open_sink: Callable[..., RedisSink], format_: str
) -> None:
    sink = open_sink(format=format_)
    target = target_of(sink)
    store.rpush("movie:2", "theirs")
    outcomes = sink.apply(target, [Write((n,), 5, {"n": n}) for n in (1, 2, 3)])
    assert [outcome.kind for outcome in outcomes] == ["applied", "rejected", "applied"]
    assert "another type" in outcomes[1].reason
    assert apply(sink, target, (2,), 6, None).kind == "rejected"
    assert sink.read(target, [(2,)]) == [None]
    assert scanned(sink, target) == {"movie:1": 5, "movie:3": 5}
    assert sink.truncate(target, 9) == 2
    assert store.lrange("movie:2", 0, -1) == ["theirs"]


@pytest.mark.parametrize("theirs", ["", "text", '{"title":"old"}', '{"_version":"12"}', '{"_version":"x' + "0" * 40])
def test_a_string_without_a_version_is_older_than_every_write(store: redis.Redis, sink: RedisSink, theirs: str) -> None:
    target = target_of(sink)
    store.set("movie:1", theirs)
    store.set("movie:2", theirs)
    store.set("movie:3", theirs)
    assert sink.read(target, [(1,)]) == [None]
    assert scanned(sink, target) == {}
    assert sink.truncate(target, 1) == 0
    assert apply(sink, target, (1,), 1, {"n": 1}) == APPLIED
    assert apply(sink, target, (2,), 1, None) == APPLIED
    assert sink.read(target, [(1,), (2,)]) == [Stored(1, {"n": 1}), Stored(1, None)]
    assert store.get("movie:3") == theirs


def test_a_tombstone_counts_where_somebody_has_put_a_string(store: redis.Redis, sink: RedisSink) -> None:
    target = target_of(sink)
    apply(sink, target, (1,), 5, None)
    store.set("movie:1", "theirs")
    assert apply(sink, target, (1,), 4, {"n": 4}) == STALE


def test_keys_that_are_no_text(store: redis.Redis, redis_server: Redis, sink: RedisSink) -> None:
    target = target_of(sink)
    apply(sink, target, (1,), 5, {"n": 1})
    ask(store, "COPY", "movie:1", b"movie:\xff")
    assert scanned(sink, target) == {"movie:1": 5}


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_script_cache_that_is_emptied(store: redis.Redis, sink: RedisSink) -> None:
    target = target_of(sink)
    apply(sink, target, (1,), 5, {"n": 5})
    store.script_flush()
    assert sink.apply(target, [Write((n,), 5, {"n": n}) for n in range(2000)]) == [APPLIED] * 2000


@pytest.fixture
def durable() -> Iterator[Redis]:
    """Yield a server that has written what it acknowledged.

    With `appendfsync everysec` it may not have: while an fsync takes long, Redis holds its writes back for two seconds,
    and a kill then loses them. Without any fsync of its own it never waits, and the kernel outlives the kill.
    """
    with Redis(appendfsync="no") as server:
        yield server


def test_a_server_that_is_killed_and_comes_back(durable: Redis, open_sink: Callable[..., RedisSink]) -> None:
    """Tombstones, floors and versions are on disk; connections and the script cache are gone."""
    sink = open_sink(durable.url)
    target = target_of(sink)
    sink.apply(target, [Write((1,), 5, {"n": 5}), Write((2,), 6, None)])
    sink.truncate(target, 4)
    durable.kill()
    with pytest.raises(SinkBusy, match=f"sink cache: Redis at 127.0.0.1:{durable.port} cannot be reached"):
        apply(sink, target, (1,), 7, {"n": 7})
    durable.start()
    assert sink.read(target, [(1,), (2,)]) == [Stored(5, {"n": 5}), Stored(6, None)]
    assert apply(sink, target, (1,), 4, {"n": 4}) == STALE
    assert apply(sink, target, (2,), 5, {"n": 5}) == STALE
    assert apply(sink, target, (3,), 3, {"n": 3}) == STALE
    assert apply(sink, target, (3,), 4, {"n": 4}) == APPLIED


def test_a_server_that_hangs(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delta_sync.sinks.redis_link.REPLY_TIMEOUT_S", 0.1)
    sink = RedisSink("cache", redis_server.url, RedisOptions(), 3600)
    redis_server.freeze()
    with pytest.raises(SinkBusy, match="did not answer in time"):
        apply(sink, target_of(sink), (1,), 5, {"n": 5})
    (problem,) = sink.check([target_of(sink)])
    assert "did not answer in time" in str(problem)
    sink.close()


def test_a_hash_to_which_somebody_added_a_field(store: redis.Redis, open_sink: Callable[..., RedisSink]) -> None:
    sink = open_sink(format="hash")
    apply(sink, target_of(sink), (1,), 5, {"n": 5})
    ask(store, "HSET", "movie:1", "theirs", b"\xff")
    assert sink.read(target_of(sink), [(1,)]) == [Stored(5, {"n": "5", "theirs": "\\xff"})]


def test_a_storm_with_kills_between(durable: Redis, open_sink: Callable[..., RedisSink]) -> None:
    """Batches that failed are sent again, as the worker does, and it ends as if nothing had happened."""
    sink = open_sink(durable.url)
    target = target_of(sink)
    plan = plan_storm(7, 300, threads=1)
    kills = 0
    for number, batch in enumerate(plan.deliveries[0]):
        if number % 8 == 3:
            durable.kill()
        try:
            sink.apply(target, batch)
        except SinkBusy:
            kills += 1
            durable.start()
            sink.apply(target, batch)
    assert kills > 2
    check_end(SinkContract(), sink, target, plan, "with kills")


def test_a_full_server_is_busy(store: redis.Redis, sink: RedisSink) -> None:
    target = target_of(sink)
    apply(sink, target, (1,), 5, {"n": 5})
    store.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(SinkBusy, match="maxmemory") as caught:
            sink.apply(target, [Write((n,), 6, {"text": "x" * 1000}) for n in range(5000)])
    finally:
        store.config_set("maxmemory", "0")
    assert caught.value.retry_after_s
    assert sink.apply(target, [Write((n,), 6, {"n": n}) for n in range(5000)]) == [APPLIED] * 5000


def test_eviction_is_a_problem_that_is_not_fatal(store: redis.Redis, sink: RedisSink) -> None:
    store.config_set("maxmemory", "100mb")
    store.config_set("maxmemory-policy", "allkeys-lru")
    try:
        problems = sink.check([target_of(sink)])
    finally:
        store.config_set("maxmemory", "0")
        store.config_set("maxmemory-policy", "noeviction")
    assert [(problem.fatal, "allkeys-lru" in problem.what) for problem in problems] == [(False, True)]


def test_a_replica_is_refused_after_a_while(store: redis.Redis, redis_server: Redis) -> None:
    """At first it may be an old primary after a failover."""
    now_s = 0.0
    sink = RedisSink("cache", redis_server.url, RedisOptions(), 3600, now=lambda: now_s)
    target = target_of(sink)
    apply(sink, target, (1,), 5, {"n": 5})
    store.replicaof("127.0.0.1", "1")
    try:
        assert [problem for problem in sink.check([target]) if problem.fatal and "primary" in str(problem)]
        with pytest.raises(SinkBusy, match="read-only replica"):
            apply(sink, target, (1,), 6, {"n": 6})
        now_s += READONLY_GRACE_S - 1
        with pytest.raises(SinkBusy, match="read-only replica"):
            apply(sink, target, (1,), 6, {"n": 6})
        now_s += 1
        with pytest.raises(SinkRefused, match="read-only replica"):
            apply(sink, target, (1,), 6, {"n": 6})
    finally:
        store.replicaof("NO", "ONE")
    assert apply(sink, target, (1,), 6, {"n": 6}) == APPLIED
    sink.close()


# ── generations ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_generations_share_nothing_but_the_readers_pointer(
    store: redis.Redis, open_sink: Callable[..., RedisSink]
) -> None:
    sink, first, second = open_sink(), open_sink(), open_sink(prefix="")
    first.number, second.number = 1, 2
    old, new = target_of(first), target_of(second)
    assert target_of(sink)[1:] == old[1:], "the first is where it always was"
    apply(sink, target_of(sink), (1,), 5, {"n": "old"})
    second.prepare(new)
    assert apply(second, new, (1,), 3, {"n": "new"}) == APPLIED
    second.truncate(new, 2)
    assert second.newest_version(new) == 3
    assert [scanned(one, of) for one, of in ((first, old), (second, new))] == [{"movie:1": 5}, {"g2:movie:1": 3}]
    assert store.get("delta:g:movie:{id}") is None
    second.lead_readers([new])
    assert store.get("delta:g:movie:{id}") == "g2:"
    with pytest.raises(SinkRefused, match="leads readers to keys that begin with 'g2:'"):
        sink.prepare(target_of(sink))  # it lost its state, and would write where nobody looks
    first.prepare(old)
    first.lead_readers([old])
    assert store.get("delta:g:movie:{id}") == ""
    second.lead_readers([new])
    assert first.drop(old) == 1
    assert store.get("delta:g:movie:{id}") == "g2:"
    assert second.drop(new) == 1
    assert store.dbsize() == 0


# ── who may do what ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def user_url(store: redis.Redis, redis_server: Redis) -> Iterator[Callable[[str], str]]:
    """Yield what creates a user with rules and returns the URL to log in by."""

    def create(rules: str) -> str:
        ask(store, "ACL", "SETUSER", "delta", "reset", "on", ">s3cr:t", *rules.split())
        return f"redis://delta:s3cr%3At@127.0.0.1:{redis_server.port}/0"

    yield create
    ask(store, "ACL", "DELUSER", "delta")


ENOUGH = (  # docs/howto/redis.md names them
    "~movie:* ~delta:* +info +evalsha +script|load +scan +exists +get +set +mset +getrange +hget +hgetall +hset"
    " +pexpire +unlink"
)


@pytest.mark.parametrize("format_", ["json", "hash"])
def test_the_privileges_that_suffice(
    store: redis.Redis, open_sink: Callable[..., RedisSink], user_url: Callable[[str], str], format_: str
) -> None:
    sink = open_sink(user_url(ENOUGH), format=format_, ttl="1h")
    target = target_of(sink)
    assert sink.check([target]) == []
    assert store.dbsize() == 0
    assert apply(sink, target, (1,), 5, {"n": 5}) == APPLIED
    assert apply(sink, target, (2,), 5, None) == APPLIED
    assert sink.read(target, [(1,)]) != [None]
    assert sink.truncate(target, 6) == 1
    assert sink.drop(target) == 0


@pytest.mark.parametrize(
    "missing",
    [
        *("+info", "+evalsha", "+script|load", "+exists", "+get", "+set", "+mset", "+getrange", "+unlink", "+scan"),
        "~movie:*",
        "~delta:*",
    ],
)
def test_check_finds_a_privilege_that_is_missing(
    store: redis.Redis, open_sink: Callable[..., RedisSink], user_url: Callable[[str], str], missing: str
) -> None:
    sink = open_sink(user_url(" ".join(rule for rule in ENOUGH.split() if rule != missing)))
    (problem,) = sink.check([target_of(sink)])
    assert problem.fatal
    assert "ACL SETUSER" in str(problem)


def test_a_missing_privilege_stops_the_pipeline(
    store: redis.Redis, open_sink: Callable[..., RedisSink], user_url: Callable[[str], str]
) -> None:
    sink = open_sink(user_url(ENOUGH.replace(" +mset", "")))
    with pytest.raises(SinkRefused, match="ACL"):
        apply(sink, target_of(sink), (1,), 5, {"n": 5})


def test_a_refused_write_leaves_the_tombstone_that_it_outranks(
    store: redis.Redis, open_sink: Callable[..., RedisSink], user_url: Callable[[str], str]
) -> None:
    may_all = open_sink(user_url("~* +@all"))
    target = target_of(may_all)
    assert apply(may_all, target, (1,), 9, None) == APPLIED
    with pytest.raises(SinkRefused, match="ACL"):
        apply(open_sink(user_url("~* +@all -mset")), target, (1,), 10, {"n": 10})
    assert apply(open_sink(user_url("~* +@all")), target, (1,), 3, {"n": 3}) == STALE


def test_a_key_that_comes_twice_ends_as_its_newest_write(
    store: redis.Redis, open_sink: Callable[..., RedisSink]
) -> None:
    sink = open_sink()
    target = target_of(sink)
    writes = [Write((1,), 10, {"n": 10}), Write((2,), 10, {"n": 2}), Write((1,), 11, None), Write((2,), 9, {"n": 9})]
    assert sink.apply(target, writes) == [APPLIED, APPLIED, APPLIED, STALE]
    assert sink.read(target, [(1,), (2,)]) == [Stored(11, None), Stored(10, {"n": 2})]


def test_a_wrong_password_stops_the_pipeline(
    store: redis.Redis, open_sink: Callable[..., RedisSink], user_url: Callable[[str], str]
) -> None:
    url = user_url(ENOUGH).replace("s3cr%3At", "h3nter2")
    sink = open_sink(url)
    with pytest.raises(SinkRefused, match="does not accept the user name or password") as caught:
        apply(sink, target_of(sink), (1,), 5, {"n": 5})
    assert "h3nter2" not in str(caught.value)
    (problem,) = open_sink(url).check([target_of(sink)])
    assert "does not accept the user name or password" in str(problem)


# ── cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_slots_are_the_clusters(redis_cluster: Redis) -> None:
    with redis.Redis(port=redis_cluster.port) as client:
        for key in (b"movie:5", b"a{b}c", b"a{}b", b"}{", b"{{a}}", "é{ü}".encode(), b"a}b"):
            for name in (key, tombstone_key(key)):
                assert ask(client, "CLUSTER KEYSLOT", name) == slot_of(key)


class TruncatedMeanwhile(RedisSink):
    """A sink to which a truncate happens just after it has read the floor."""

    def _floor(self, target: Target) -> bytes:
        floor = super()._floor(target)
        self.truncate(target, 9)
        return floor


def test_in_a_cluster_a_write_obeys_a_floor_that_rises_meanwhile(redis_cluster: Redis) -> None:
    sink = TruncatedMeanwhile("cache", redis_cluster.url, RedisOptions(), 3600)
    target = target_of(sink)
    writes = [Write((1,), 8, {"n": 8}), Write((2,), 9, {"n": 9}), Write((3,), 8, None), Write((4,), 10, None)]
    assert sink.apply(target, writes) == [STALE, APPLIED, STALE, APPLIED]
    assert scanned(sink, target) == {"movie:2": 9}
    assert sink.read(target, [(1,), (4,)]) == [None, Stored(10, None)]
    sink.drop(target)
    sink.close()


def test_in_a_cluster_a_sweep_looks_below_a_floor_until_it_has_settled(redis_cluster: Redis) -> None:
    """A start must not cost a look at all keys for ever, because a table was truncated once."""
    now_s = 1_700_000_000.0
    sink = RedisSink("cache", redis_cluster.url, RedisOptions(), 3600, wall_clock=lambda: now_s)
    target = target_of(sink)
    with redis.Redis(port=redis_cluster.port) as client:

        def late() -> None:
            """Write below the floor, as a process that stood still for long would."""
            client.set("movie:1", b'{"_version":"%019d"}' % 5)

        late()
        assert sink.sweep(target) == 0  # there is no floor
        sink.truncate(target, 6)
        late()
        now_s += 100
        assert sink.sweep(target, recent_s=99) == 0
        assert sink.sweep(target, recent_s=101) == 1
        late()
        assert sink.sweep(target) == 1
        late()
        now_s += 86_400
        assert sink.sweep(target, recent_s=101) == 0
        assert sink.sweep(target) == 1
        assert client.keys("delta:*") == [b"delta:f:movie:{id}"]
        late()
        assert sink.sweep(target) == 0
        sink.truncate(target, 4)  # does not lower it
        late()
        assert sink.sweep(target) == 1
        assert sink.drop(target) == 0
        assert client.keys("*") == []
    sink.close()


class TruncatedDuringSweep(RedisSink):
    """A sink whose floor rises while a sweep looks."""

    other: RedisSink

    def _scan_keys(self, target: Target) -> Iterator[list[bytes]]:
        yield from super()._scan_keys(target)
        self.other.truncate(target, 9)


def test_in_a_cluster_a_floor_that_rises_during_a_sweep_has_not_settled(redis_cluster: Redis) -> None:
    now_s = 1_700_000_000.0
    sink, other = (
        cls("cache", redis_cluster.url, RedisOptions(), 3600, wall_clock=lambda: now_s)
        for cls in (TruncatedDuringSweep, RedisSink)
    )
    assert isinstance(sink, TruncatedDuringSweep)
    sink.other = other
    target = target_of(other)
    other.truncate(target, 6)
    now_s += 90_000
    assert sink.sweep(target) == 0
    with redis.Redis(port=redis_cluster.port) as client:
        client.set("movie:1", b'{"_version":"%019d"}' % 8)
    assert other.sweep(target) == 1
    other.drop(target)
    other.close()
    sink.close()


def give_slots(to: str, nodes: list[Any]) -> None:
    """Tell nodes, the new owner first, that every other slot is its own. The slots must be empty."""
    ask(nodes[0], "CLUSTER BUMPEPOCH")  # or the old owner's gossip, arriving between the two, would take them back
    for node in nodes:
        with node.pipeline(transaction=False) as pipeline:
            for slot in range(0, 16384, 2):
                pipeline.execute_command("CLUSTER SETSLOT", slot, "NODE", to)
            pipeline.execute()


def test_slots_that_move_to_another_node(redis_cluster: Redis) -> None:
    """The client learns of it by MOVED, and that the other node does not know the scripts by NOSCRIPT."""
    sink = RedisSink("cache", redis_cluster.url, RedisOptions(), 3600)
    target = target_of(sink)
    assert sink.apply(target, [Write((n,), 5, {"n": n}) for n in range(10)]) == [APPLIED] * 10
    sink.drop(target)
    watcher = RedisSink("cache", redis_cluster.url, RedisOptions(), 3600)  # scans first of all
    assert scanned(watcher, target) == {}
    with Redis(cluster=True) as second:
        nodes = [redis.Redis(port=server.port, decode_responses=True) for server in (redis_cluster, second)]
        one, two = nodes
        ids = [ask(node, "CLUSTER MYID") for node in nodes]
        ask(two, "CLUSTER FLUSHSLOTS")
        ask(two, "CLUSTER MEET", "127.0.0.1", redis_cluster.port)
        for node, other in ((one, ids[1]), (two, ids[0])):
            wait_until(partial(knows, node, other), WAIT_S, "CLUSTER MEET")
        writes = [Write((n,), 5, {"n": n}) for n in range(300)]
        try:
            give_slots(ids[1], [two, one])
            for node in nodes:
                wait_until(partial(is_up, node), WAIT_S, "two nodes")
            assert sink.apply(target, writes) == [APPLIED] * 300
            assert min(node.dbsize() for node in nodes) > 50
            assert sink.apply(target, [write._replace(version=4) for write in writes]) == [STALE] * 300
            assert len(scanned(sink, target)) == len(scanned(watcher, target)) == 300
            assert sink.read(target, [(n,) for n in range(300)]) == [Stored(5, {"n": n}) for n in range(300)]
            assert sink.truncate(target, 6) == 300
            assert sink.drop(target) == 0
            assert [node.dbsize() for node in nodes] == [0, 0]
        finally:
            give_slots(ids[0], [one])  # the other one ends with this test
            ask(one, "CLUSTER FORGET", ids[1])
            for node in nodes:
                node.close()
    watcher.close()
    sink.close()


def knows(node: Any, other: str) -> bool:
    """Tell whether a node of a cluster has heard of another one."""
    return other in str(ask(node, "CLUSTER NODES"))


def is_up(node: Any) -> bool:
    """Tell whether all slots are served, as far as a node knows."""
    return bool(ask(node, "CLUSTER INFO")["cluster_state"] == "ok")


@pytest.mark.parametrize("told", [None, True])
def test_a_cluster_has_one_database(redis_cluster: Redis, told: bool | None) -> None:
    sink = RedisSink("cache", redis_cluster.url.replace("/0", "/1"), RedisOptions(cluster=told), 3600)
    with pytest.raises(SinkRefused, match="database 0 only"):
        apply(sink, target_of(sink), (1,), 5, {"n": 5})
    assert "database 0 only" in str(sink.check([target_of(sink)]))
    sink.close()


def test_a_cluster_that_is_none(store: redis.Redis, open_sink: Callable[..., RedisSink]) -> None:
    sink = open_sink(cluster=True)
    with pytest.raises(SinkRefused, match="is no cluster"):
        apply(sink, target_of(sink), (1,), 5, {"n": 5})
