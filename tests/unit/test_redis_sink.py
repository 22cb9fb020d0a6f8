"""What of the Redis sink needs no Redis: URLs, options, errors, what check says, how batches are cut into calls."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

import pytest
from redis import exceptions as errors

from delta_sync.changes import APPLIED, Write
from delta_sync.errors import UsageError
from delta_sync.sinks.base import Target
from delta_sync.sinks.redis import RedisOptions, RedisSink, RedisTargetOptions
from delta_sync.sinks.redis_calls import CALL_BYTES, CALL_KEYS, Encoded, encoded
from delta_sync.sinks.redis_link import Call, Facts, explain, judge
from delta_sync.sinks.redis_scripts import ZERO
from delta_sync.testing.contract import ACTOR, MOVIE

SECRET = "hunter2"


def sink_of(**options: object) -> RedisSink:
    """Return a sink that knows that it is none of a cluster, and has no server."""
    return RedisSink("cache", "redis://127.0.0.1:1/0", RedisOptions.model_validate({"cluster": False, **options}), 3600)


def sent_by(sink: RedisSink, target: Target, writes: Sequence[Write]) -> tuple[Encoded, list[Call]]:
    """Return writes as they are sent."""
    some = encoded(target.settings.template, sink._encode, writes)
    return some, sink._calls(target, some, ZERO)


@pytest.mark.parametrize(
    "url", [f"redis://user:{SECRET}@host:port/0", f"redis://user:{SECRET}@host/name", f"redis://{SECRET}:/x@[host"]
)
def test_a_url_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(UsageError, match="sink cache: the ") as caught:
        RedisSink("cache", url, RedisOptions(), 3600)
    assert SECRET not in str(caught.value)


def missing_file_error() -> Exception:
    """Return what redis-py raises when `ca_file` names no file."""
    error = errors.ConnectionError("Error 2 connecting")
    error.__context__ = FileNotFoundError(2, "No such file or directory")
    return error


def certificate_error() -> Exception:
    """Return what redis-py raises when it does not trust a server."""
    cause = ssl.SSLCertVerificationError(1, "certificate verify failed")
    cause.verify_message = "self-signed certificate"
    error = errors.ConnectionError("Error 1 connecting")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes", "says"),
    [
        (errors.ConnectionError("Error 111 connecting to host:6379. Connection refused."), True, "cannot be reached"),
        (errors.ConnectionError("max number of clients reached"), True, "max number of clients"),
        (errors.TimeoutError("Timeout reading from socket"), True, "did not answer in time"),
        (errors.BusyLoadingError("Redis is loading the dataset in memory"), True, "loading"),
        (errors.ResponseError("BUSY Redis is busy running a script."), True, "busy running"),
        (errors.ClusterDownError("The cluster is down"), True, "slots"),
        (errors.MasterDownError("Link with MASTER is down"), True, "lost its primary"),
        (errors.TryAgainError("TRYAGAIN"), True, "moving slots"),
        (errors.MovedError("1 127.0.0.1:1"), True, "moving slots"),
        (errors.SlotNotCoveredError('Slot "1" is not covered'), True, "cannot be reached"),
        (errors.RedisClusterException("Redis Cluster cannot be connected."), True, "cannot be reached"),
        (errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), True, "raise maxmemory"),
        (errors.ResponseError("Error running script (call to f_1): @user_script:9: -OOM command"), True, "maxmemory"),
        (errors.ResponseError("MISCONF Redis is configured to save RDB snapshots"), True, "cannot save to disk"),
        (errors.ResponseError("NOREPLICAS Not enough good replicas to write."), True, "too few replicas"),
        (OSError("network is unreachable"), True, "cannot be reached"),
        (errors.ReadOnlyError("You can't write against a read only replica."), False, "URL of the primary"),
        (errors.AuthenticationError("Authentication required."), False, "wants a user name"),
        (errors.AuthenticationError("invalid username-password pair"), False, "does not accept"),
        (errors.NoPermissionError("this user has no permissions to run the 'evalsha' command"), False, "ACL"),
        (errors.ResponseError("The user executing the script can't run this command or subcommand"), False, "ACL"),
        (errors.ResponseError("ACL failure in script: User a has no permissions"), False, "ACL"),
        (missing_file_error(), False, "ca_file"),
        (certificate_error(), False, "not trusted (self-signed certificate)"),
        (errors.ResponseError("something new"), False, "answered: something new"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, Exception) else None,
)
def test_errors_are_sorted_by_whether_they_pass(error: Exception, passes: bool, says: str) -> None:
    trouble = explain(error)
    assert (trouble.passes, says in trouble.what) == (passes, True), trouble


def test_a_long_error_is_cut() -> None:
    assert len(explain(errors.ResponseError("x" * 5000)).what) < 300


GOOD = Facts("host:6379", (7, 2, 4), "master", 0, "noeviction", aof=True, save="")


@pytest.mark.parametrize(
    ("facts", "fatal", "says"),
    [
        (GOOD._replace(version=(6, 0, 16)), True, "6.0.16; use 6.2 or newer"),
        (GOOD._replace(role="slave"), True, "the primary"),
        (GOOD._replace(maxmemory=1 << 20, policy="allkeys-lru"), False, "noeviction"),
        (GOOD._replace(maxmemory=1 << 20, policy="volatile-ttl"), False, "the versions of deletes"),
        (GOOD._replace(aof=False), False, "keeps nothing on disk"),
    ],
)
def test_check_judges(facts: Facts, fatal: bool, says: str) -> None:
    (problem,) = judge("sink cache", [GOOD, facts])
    assert problem.fatal == fatal
    assert says in str(problem)


def test_check_is_content() -> None:
    full = GOOD._replace(maxmemory=1 << 20)
    assert judge("sink cache", [GOOD, full, GOOD._replace(aof=False, save="60 1"), GOOD._replace(save=None)]) == []


def test_overlapping_targets_are_found_before_anything_connects() -> None:
    sink = sink_of()
    movie = sink.target(MOVIE, RedisTargetOptions(key="m:{id}"))
    actor = sink.target(ACTOR, RedisTargetOptions(key="m:a:{id}"))
    assert RedisSink.overlapping([movie, actor]) == [(movie, actor)]
    assert "could be the same" in str(sink.check([movie, actor])[0])
    assert RedisSink.overlapping([movie, sink.target(ACTOR, RedisTargetOptions())]) == []


def test_small_writes_share_a_call_up_to_a_number() -> None:
    sink = sink_of()
    target = sink.target(MOVIE, RedisTargetOptions())
    some, calls = sent_by(sink, target, [Write((n,), 1, {"n": n}) for n in range(CALL_KEYS * 2 + 1)])
    assert [len(call.keys) // 2 for call in calls] == [CALL_KEYS, CALL_KEYS, 1]
    assert list(some.places) == list(range(CALL_KEYS * 2 + 1))


def test_a_large_write_is_alone_in_its_call() -> None:
    sink = sink_of()
    target = sink.target(MOVIE, RedisTargetOptions())
    sizes = (10, 10, CALL_BYTES * 5, 10, CALL_BYTES // 2, CALL_BYTES // 2, 10)
    _, calls = sent_by(sink, target, [Write((n,), 1, {"t": "x" * size}) for n, size in enumerate(sizes)])
    assert [len(call.keys) // 2 for call in calls] == [2, 1, 2, 2]


def test_what_is_sent() -> None:
    sink = sink_of(ttl="1m")
    target = sink.target(MOVIE, RedisTargetOptions(key="movie:{id}"))
    writes = [Write((1,), 5, {"a": 1}), Write((2,), 6, {}), Write((3,), 7, {"_version": 1}), Write((4,), 8, None)]
    some, calls = sent_by(sink, target, writes)
    assert [outcome.kind for outcome in some.outcomes] == ["applied", "applied", "rejected", "applied"]
    assert some.outcomes[0] is APPLIED
    assert some.places == [0, 1, 3]
    (call,) = calls
    assert call.keys == [
        b"delta:f:movie:{id}",
        *(b"movie:1", b"delta:t:{movie:1}"),
        *(b"movie:2", b"delta:t:{movie:2}"),
        *(b"movie:4", b"delta:t:{movie:4}"),
    ]
    assert call.args == [
        *(b"3600000", b"60000", b"1", ZERO),
        b'{"_version":"0000000000000000005","a":1}',
        b'{"_version":"0000000000000000006"}',
        b"0000000000000000008",
    ]


@pytest.mark.parametrize(("ttl", "kept"), [(None, b"0"), ("59m", b"1"), ("60m", b"0"), ("2h", b"0")])
def test_a_version_is_kept_beside_documents_that_do_not_outlive_it(ttl: str | None, kept: bytes) -> None:
    sink = sink_of(ttl=ttl)
    _, (call,) = sent_by(sink, sink.target(MOVIE, RedisTargetOptions()), [Write((1,), 5, {})])
    assert call.args[2] == kept


def test_a_tables_ttl_wins() -> None:
    sink = sink_of(ttl="1m")
    _, (call,) = sent_by(sink, sink.target(MOVIE, RedisTargetOptions(ttl=2)), [Write((1,), 5, {})])
    assert call.args[1] == b"2000"
