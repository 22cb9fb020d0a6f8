"""Apache Kafka as a server for tests: brokers that are their own controllers (KRaft), one or a few.

with KafkaCluster() as cluster:
    cluster.nodes[0].kill()   # two of three go on
    cluster.nodes[0].start()
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kafka

from delta_sync.testing import jars
from delta_sync.testing.processes import ServerError, ServerProcess, free_port, wait_until
from delta_sync.testing.servers import ANSWER_TIMEOUT_S, JVM_OPTIONS, START_TIMEOUT_S, NativeServer, Server

CLUSTER_ID = base64.urlsafe_b64encode(b"delta test kafka").decode().rstrip("=")  # 16 bytes, as Kafka wants it
CONTROLLER_OFFSET, SASL_OFFSET = 1, 2  # from the port of the clients without credentials
USERS: Mapping[str, str] = {"delta": "delta-password"}

_AdminClient: Any = kafka.KafkaAdminClient  # the stubs that pyright brings are of an older version
_LOGGING = Path(__file__).with_name("java") / "kafka-log4j2.xml"


class Kafka(NativeServer):
    """A Kafka broker. `url` is its bootstrap server; clients there need no credentials and may do everything.

    `sasl_url` is another listener of it, SASL_PLAINTEXT with PLAIN, for `USERS`: they may do whatever no ACL forbids.
    Topics are not made by themselves.
    """

    name = "kafka"

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int | None = None,
        node_id: int = 1,
        voters: Mapping[int, int] | None = None,
        heap_mb: int = 384,
        **settings: object,
    ) -> None:
        """`voters` are the ports of all nodes of its cluster by their ids (see KafkaCluster), without it it is alone.

        `settings` are those of server.properties with `_` for `.`; they can be changed through the attribute, for the
        next start.
        """
        super().__init__(directory, port=port or free_port(CONTROLLER_OFFSET, SASL_OFFSET))
        self.node_id = node_id
        self._voters = dict(voters or {node_id: self.port})
        self._heap_mb = heap_mb
        self.settings: dict[str, object] = {**default_settings(len(self._voters)), **settings}

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def sasl_url(self) -> str:
        return f"127.0.0.1:{self.port + SASL_OFFSET}"

    @property
    def _properties(self) -> Path:
        return self.directory / "server.properties"

    def _prepare(self) -> None:
        self._properties.write_text("".join(f"{key}={text}\n" for key, text in self._texts().items()))
        if not (self.directory / "data" / "meta.properties").exists():
            self._format()

    def _texts(self) -> dict[str, str]:
        """Return server.properties: `settings`, and what the methods here rely on."""
        host, data = "127.0.0.1", self.directory / "data"
        clients, controllers, sasl = (
            f"PLAINTEXT://{host}:{self.port}",
            f"CONTROLLER://{host}:{self.port + CONTROLLER_OFFSET}",
            f"SASL_PLAINTEXT://{host}:{self.port + SASL_OFFSET}",
        )
        voters = [f"{node}@{host}:{port + CONTROLLER_OFFSET}" for node, port in self._voters.items()]
        return broker_settings(self.settings) | {
            "node.id": str(self.node_id),
            "controller.quorum.voters": ",".join(voters),
            "listeners": f"{clients},{controllers},{sasl}",
            "advertised.listeners": f"{clients},{sasl}",
            "log.dirs": str(data),
        }

    def _format(self) -> None:
        options = ["format", "-t", CLUSTER_ID, "-c", str(self._properties)]
        command = [*self._java("kafka.tools.StorageTool"), *options]
        process = ServerProcess.start(command, log=self.log, cwd=self.directory, env=dict(os.environ))
        if not process.terminate(0, START_TIMEOUT_S) or process.exit_status != 0:
            process.kill()
            raise ServerError(f"formatting Kafka's storage failed; the output ends:\n{self.tail()}")

    def _java(self, main_class: str | None = None) -> list[str]:
        logging = [f"-Dlog4j2.configurationFile={_LOGGING}", "-Dlog4j2.disableJmx=true"]
        return jars.java_command(self.name, f"-Xmx{self._heap_mb}m", *JVM_OPTIONS, *logging, main_class=main_class)

    def _command(self) -> list[str]:
        return [*self._java(), str(self._properties)]

    def _answers(self) -> bool:
        return answers(self.port, self.port + SASL_OFFSET, node_id=self.node_id, alone=len(self._voters) == 1)


class KafkaCluster(Server):
    """Some brokers that replicate to each other; each of `nodes` can be killed, frozen and started by itself.

    Methods of the cluster do it to all of them. When `start` returns, every replica is in sync, so that the next node
    may be killed.
    """

    name = "kafka_cluster"

    def __init__(
        self, directory: Path | None = None, *, nodes: int = 3, heap_mb: int = 384, **settings: object
    ) -> None:
        """`settings` as for Kafka, for each of the nodes."""
        self._temporary = directory is None
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix=f"delta-{self.name}-"))
        self.directory = directory.absolute()
        ports_each = SASL_OFFSET + 1
        first = free_port(*range(1, nodes * ports_each))
        voters = {number + 1: first + number * ports_each for number in range(nodes)}
        self.nodes: Sequence[Kafka] = [
            Kafka(self.directory / str(node_id), port=port, node_id=node_id, voters=voters, heap_mb=heap_mb, **settings)
            for node_id, port in voters.items()
        ]
        self._in_sync: list[int] = []  # the processes that were, when they were asked last

    @property
    def url(self) -> str:
        return ",".join(node.url for node in self.nodes)

    @property
    def sasl_url(self) -> str:
        return ",".join(node.sasl_url for node in self.nodes)

    @property
    def alive(self) -> bool:
        return all(node.alive for node in self.nodes)

    def start(self) -> None:
        self._each(Kafka.start)  # at once: one alone has no majority, and answers nobody
        processes = [node.pid for node in self.nodes]
        if processes == self._in_sync:
            return  # so that it costs nothing to call it after each test
        with admin_client(self.url) as admin:
            wait_until(
                lambda: _every_partition(
                    admin, lambda partition: set(partition["isr_nodes"]) == set(partition["replica_nodes"])
                ),
                START_TIMEOUT_S,
                "replication to all nodes",
            )
        self._in_sync = processes

    def stop(self) -> None:
        self._each(Kafka.stop)

    def kill(self) -> None:
        self._each(Kafka.kill)

    def freeze(self) -> None:
        self._in_sync = []
        self._each(Kafka.freeze)

    def thaw(self) -> None:
        self._each(Kafka.thaw)

    def close(self) -> None:
        if not self._temporary:
            self._each(Kafka.close)
            return
        self.kill()  # nobody will read the data again
        shutil.rmtree(self.directory, ignore_errors=True)

    def _each(self, act: Callable[[Kafka], None]) -> None:
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(act, self.nodes))


def default_settings(brokers: int) -> dict[str, object]:
    """Return settings of server.properties, with `_` for `.`, for each of so many brokers. Pure."""
    copies = min(3, brokers)
    return {
        "auto_create_topics_enable": False,  # a misspelt topic must not come to life
        "default_replication_factor": copies,
        "min_insync_replicas": max(1, copies - 1),
        "group_initial_rebalance_delay_ms": 0,  # a test's first member need not wait for others
        "group_min_session_timeout_ms": 100,  # tests wait for members to be declared dead
        # How long a killed broker counts as alive; until then it may not come back (default 9000). Longer with
        # several, which compete for the machine: a slow one is not a dead one.
        "broker_session_timeout_ms": 2000 if copies == 1 else 6000,
        "broker_heartbeat_interval_ms": 500,
        "offsets_topic_replication_factor": copies,
        "offsets_topic_num_partitions": 1,
        "transaction_state_log_replication_factor": copies,
        "transaction_state_log_min_isr": max(1, copies - 1),
        "transaction_state_log_num_partitions": 1,
        "share_coordinator_state_topic_replication_factor": copies,
        "share_coordinator_state_topic_min_isr": max(1, copies - 1),
        "share_coordinator_state_topic_num_partitions": 1,
        "log_cleaner_dedupe_buffer_size": 4 << 20,  # of a heap that its default, 128 MB, would fill
        "num_network_threads": 2,
        "num_io_threads": 4,
        "controlled_shutdown_enable": brokers > 1,  # alone it has nobody to hand over to
    }


def broker_settings(settings: Mapping[str, object]) -> dict[str, str]:
    """Return `settings`, and what no test changes, as server.properties has them: all but names, ports and folders.

    Pure.
    """
    users = " ".join(f'user_{name}="{password}"' for name, password in USERS.items())
    return {key.replace("_", "."): _text(value) for key, value in settings.items()} | {
        "process.roles": "broker,controller",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
            f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
        ),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "allow.everyone.if.no.acl.found": "true",
    }


def answers(port: int, sasl_port: int, *, node_id: int, alone: bool = True) -> bool:
    """Tell whether a broker takes part; alone, whether each partition has a leader, too. Any exception means no."""
    # Its client leaves a thread behind whenever it cannot connect, so it only tries where somebody listens.
    for each in (port, sasl_port):
        socket.create_connection(("127.0.0.1", each), timeout=ANSWER_TIMEOUT_S).close()
    with admin_client(f"127.0.0.1:{port}") as admin:
        brokers = admin.describe_cluster()["brokers"]
        if node_id not in {broker["broker_id"] for broker in brokers if not broker.get("is_fenced")}:
            return False
        # In a cluster it cannot help that the others' partitions have no leader.
        return not alone or _every_partition(admin, lambda partition: partition["leader_id"] >= 0)


def admin_client(url: str) -> Any:
    """Return an administrator's client (kafka-python's), to be closed; it raises when nobody answers."""
    return _AdminClient(
        bootstrap_servers=url.split(","),
        bootstrap_timeout_ms=int(1000 * ANSWER_TIMEOUT_S),
        request_timeout_ms=int(1000 * START_TIMEOUT_S),
    )


def _every_partition(admin: Any, condition: Callable[[dict[str, Any]], bool]) -> bool:
    topics: list[dict[str, Any]] = admin.describe_topics()
    return all(condition(partition) for topic in topics for partition in topic["partitions"])


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
