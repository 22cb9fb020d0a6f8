"""The servers of `servers.py` as containers of the official images, by testcontainers: for where a Docker engine is.

They are the same to a test: the URL and the data stay over kills and restarts. Each container is removed, with its
data, by `close`, and by testcontainers' own Ryuk when this program ends in another way.

The engine has to be on this machine, for the servers' ports are published on 127.0.0.1 only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar
from urllib.parse import quote

import psycopg
import pymongo
import redis
import requests
from docker.errors import DockerException, NotFound
from docker.models.containers import Container
from redis.backoff import NoBackoff
from redis.retry import Retry
from testcontainers.core.container import DockerContainer

from delta_sync.testing.processes import ServerError, free_port
from delta_sync.testing.servers import ANSWER_TIMEOUT_S, LOG_TAIL_BYTES, STOP_TIMEOUT_S, OneServer

__all__ = [
    "IMAGES",
    "ApicurioContainer",
    "ContainerServer",
    "KafkaContainer",
    "MariaDBContainer",
    "MongoDBContainer",
    "OpenSearchContainer",
    "PostgreSQLContainer",
    "RedisContainer",
]

# As in compose/full, which has no MariaDB.
IMAGES = {
    "postgresql": "postgres:17.6-bookworm",
    "mariadb": "mariadb:11.8.3",
    "redis": "redis:7.4.6-alpine",
    "mongodb": "mongo:8.0.15",
    "opensearch": "opensearchproject/opensearch:2.19.3",
    "apicurio": "apicurio/apicurio-registry:3.1.4",
    "kafka": "apache/kafka:4.1.1",
}


class ContainerServer(OneServer):
    """A server in a container, with its data in it. A kill or a restart keeps both the container and its port."""

    inner_port: ClassVar[int]

    def __init__(self, image: str | None = None, *, port: int | None = None) -> None:
        """Use `image`, or the one of IMAGES; it is pulled unless the engine has it."""
        self.image = image or IMAGES[self.name]
        self.port = port or free_port()
        self._made: DockerContainer | None = None

    def _ports(self) -> Mapping[int, int]:
        """Return the ports of 127.0.0.1 by those of the container."""
        return {self.inner_port: self.port}

    def _environment(self) -> Mapping[str, str]:
        return {}

    def _command(self) -> Sequence[str] | None:
        """Return what the image's entry point is given, None for what it has by itself."""
        return None

    def _container(self) -> Container:
        assert self._made is not None, f"{self.name} was not started"
        return self._made.get_wrapped_container()

    def _status(self) -> str:
        """Return Docker's word for it: running, paused, exited …; `absent` before the first start."""
        if self._made is None:
            return "absent"
        container = self._container()
        container.reload()
        return str(container.status)

    @property
    def alive(self) -> bool:
        return self._status() in ("running", "paused")

    def start(self) -> None:
        status = self._status()
        if status == "running":
            return
        if status == "paused":
            self.thaw()
            return
        try:
            if status == "absent":
                self._made = self._make()
            else:
                self._container().start()
            self._wait_until_ready()
        except DockerException as error:
            self._remove()
            raise ServerError(f"{self.name} cannot be started from image {self.image}: {error}") from error
        except BaseException:  # an interrupted start must not leave half a server behind
            self._remove()
            raise

    def _make(self) -> DockerContainer:
        made = DockerContainer(self.image).with_envs(**self._environment())
        # Only for this machine: their passwords are anybody's.
        made.ports = {f"{inner}/tcp": ("127.0.0.1", outer) for inner, outer in self._ports().items()}  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue] -- its own type knows no address, the engine does
        command = self._command()
        if command is not None:
            made.with_command(list(command))
        return made.start()

    def tail(self) -> str:
        return self._container().logs()[-LOG_TAIL_BYTES:].decode(errors="replace") or "(empty)"

    def stop(self) -> None:
        if self.alive:
            self.thaw()
            self._container().stop(timeout=int(STOP_TIMEOUT_S))

    def kill(self) -> None:
        if self.alive:
            self._container().kill()  # a frozen one, too
            self._container().wait(timeout=STOP_TIMEOUT_S)

    def freeze(self) -> None:
        if self._status() == "running":
            self._container().pause()

    def thaw(self) -> None:
        if self._status() == "paused":
            self._container().unpause()

    def close(self) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._made is not None:
            with suppress(NotFound):
                self._made.stop(force=True, delete_volume=True)
            self._made = None


class PostgreSQLContainer(ContainerServer):
    """PostgreSQL with `wal_level=logical`; user and password `postgres`, database `postgres`."""

    name = "postgresql"
    inner_port = 5432

    @property
    def url(self) -> str:
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return f"postgresql://postgres:postgres@127.0.0.1:{self.port}/{quote(database, safe='')}"

    def _environment(self) -> Mapping[str, str]:
        return {"POSTGRES_PASSWORD": "postgres"}

    def _command(self) -> Sequence[str]:
        return ["postgres", "-c", "wal_level=logical", "-c", "fsync=off"]  # a crash of the machine is not ours

    def _answers(self) -> bool:
        psycopg.connect(self.url, connect_timeout=int(ANSWER_TIMEOUT_S)).close()
        return True


class MariaDBContainer(ContainerServer):
    """MariaDB with a row-based binary log; user `delta`, with every privilege, and database `delta`."""

    name = "mariadb"
    inner_port = 3306

    @property
    def url(self) -> str:
        return self.url_of("delta")

    def url_of(self, database: str) -> str:
        """Return the URL of one of its databases."""
        from delta_sync.testing.mariadb import PASSWORD, USER

        return f"mariadb://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{quote(database, safe='')}"

    def _environment(self) -> Mapping[str, str]:
        from delta_sync.testing.mariadb import PASSWORD, USER

        user = {"MARIADB_USER": USER, "MARIADB_PASSWORD": PASSWORD, "MARIADB_DATABASE": USER}
        return {**user, "MARIADB_ROOT_PASSWORD": PASSWORD}

    def _command(self) -> Sequence[str]:
        log = ["--server-id=1", "--log-bin=binlog", "--binlog-format=ROW", "--binlog-row-image=FULL"]
        return [*log, "--character-set-server=utf8mb4", "--innodb-flush-log-at-trx-commit=2"]

    def _answers(self) -> bool:
        import pymysql

        from delta_sync.testing.mariadb import PASSWORD, USER

        timeout_s = int(ANSWER_TIMEOUT_S)
        with pymysql.connect(
            host="127.0.0.1", port=self.port, user="root", password=PASSWORD, connect_timeout=timeout_s
        ) as connection:
            connection.cursor().execute(f"GRANT ALL ON *.* TO {USER}@'%' WITH GRANT OPTION")
        return True


class RedisContainer(ContainerServer):
    """Redis with an append-only file."""

    name = "redis"
    inner_port = 6379
    cluster = False  # as servers.Redis says of itself

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _command(self) -> Sequence[str]:
        # With appendfsync no a kill loses nothing, as each write is in the file before its reply.
        return ["redis-server", "--appendonly", "yes", "--appendfsync", "no", "--save", ""]

    def _answers(self) -> bool:
        once = Retry(NoBackoff(), 0)  # or the client itself tries for seconds
        with redis.Redis(port=self.port, socket_timeout=ANSWER_TIMEOUT_S, retry=once) as client:
            ask: Any = client.execute_command  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] -- redis-py leaves it untyped
            return bool(ask("PING"))  # raises while it loads its data


class MongoDBContainer(ContainerServer):
    """MongoDB itself, alone: no replica set."""

    name = "mongodb"
    inner_port = 27017

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def _answers(self) -> bool:
        timeout_ms = int(ANSWER_TIMEOUT_S * 1000)
        with pymongo.MongoClient[dict[str, object]](self.url, serverSelectionTimeoutMS=timeout_ms) as client:
            client.admin.command("ping")
        return True


class OpenSearchContainer(ContainerServer):
    """OpenSearch, one node without security."""

    name = "opensearch"
    inner_port = 9200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _environment(self) -> Mapping[str, str]:
        return {
            "discovery.type": "single-node",
            "DISABLE_SECURITY_PLUGIN": "true",
            "DISABLE_INSTALL_DEMO_CONFIG": "true",
            "OPENSEARCH_JAVA_OPTS": "-Xms512m -Xmx512m",
            # A test machine's disk may be nearly full, which must not turn indices read-only.
            "cluster.routing.allocation.disk.threshold_enabled": "false",
        }

    def _answers(self) -> bool:
        question = f"{self.url}/_cluster/health?wait_for_status=yellow&timeout={ANSWER_TIMEOUT_S:.0f}s"
        reply = requests.get(question, timeout=2 * ANSWER_TIMEOUT_S)
        return reply.ok and not reply.json()["timed_out"]


class ApicurioContainer(ContainerServer):
    """Apicurio Registry, its schemas in a file of H2; without authentication."""

    name = "apicurio"
    inner_port = 8080

    @property
    def url(self) -> str:
        """Return the API that Confluent's registry has as well: `kafka.registry.url`."""
        return f"http://127.0.0.1:{self.port}/apis/ccompat/v7"

    def _environment(self) -> Mapping[str, str]:
        return {
            "APICURIO_STORAGE_KIND": "sql",
            "APICURIO_STORAGE_SQL_KIND": "h2",
            "APICURIO_DATASOURCE_URL": "jdbc:h2:file:/tmp/registry;WRITE_DELAY=0",
        }

    def _answers(self) -> bool:
        return requests.get(f"{self.url}/subjects", timeout=ANSWER_TIMEOUT_S).ok


class KafkaContainer(ContainerServer):
    """A Kafka broker, as `kafka.Kafka` has it: without credentials at `url`, with those of its USERS at `sasl_url`."""

    name = "kafka"
    inner_port = 9092

    def __init__(self, image: str | None = None, *, port: int | None = None, **settings: object) -> None:
        """`settings` as for `kafka.Kafka`."""
        from delta_sync.testing.kafka import SASL_OFFSET, default_settings

        super().__init__(image, port=port or free_port(SASL_OFFSET))
        self.settings: dict[str, object] = {**default_settings(1), **settings}
        self._sasl_port = self.port + SASL_OFFSET

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def sasl_url(self) -> str:
        return f"127.0.0.1:{self._sasl_port}"

    def _ports(self) -> Mapping[int, int]:
        return {9092: self.port, 9094: self._sasl_port}

    def _environment(self) -> Mapping[str, str]:
        from delta_sync.testing.kafka import CLUSTER_ID, broker_settings

        settings = {
            **broker_settings(self.settings),
            "node.id": "1",
            "controller.quorum.voters": "1@localhost:9093",
            "listeners": "PLAINTEXT://:9092,CONTROLLER://:9093,SASL_PLAINTEXT://:9094",
            "advertised.listeners": f"PLAINTEXT://{self.url},SASL_PLAINTEXT://{self.sasl_url}",
            "log.dirs": "/var/lib/kafka/data",
        }
        # The image's way of writing `listener.name.sasl_plaintext…` as a variable.
        variables = {
            f"KAFKA_{key.replace('_', '__').replace('.', '_').upper()}": text for key, text in settings.items()
        }
        return {**variables, "CLUSTER_ID": CLUSTER_ID, "KAFKA_HEAP_OPTS": "-Xmx384m"}

    def _answers(self) -> bool:
        from delta_sync.testing.kafka import answers

        return answers(self.port, self._sasl_port, node_id=1)
