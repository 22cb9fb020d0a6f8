"""The network part of kafka-python, made to tell when a login or a certificate is refused: for all of its clients."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from delta_sync.kafka import refusals

# Imported by name: it has no types, and the stubs that pyright brings are of an older version.
_compat: Any = import_module("kafka.net.compat")
_errors: Any = import_module("kafka.errors")

LOGIN_ERRORS: tuple[type[Exception], ...] = (
    _errors.SaslAuthenticationFailedError,
    _errors.UnsupportedSaslMechanismError,
)


def network(**options: Any) -> Any:
    """Make the client's network part, so that what is refused is an error and not a connection that fails for ever.

    It is the client's option `kafka_client`. The client remembers what was refused and raises it at the next attempt,
    but in 3.0.12 nothing tells it; and it forgets the answer of a broker that closes the connection behind it.
    """
    made = _compat.KafkaNetClient(**options)
    manager = made._manager
    connect, build_transport = manager._connect, manager._build_transport

    async def connect_and_tell(node: Any, connection: Any, **how: Any) -> None:
        await connect(node, connection, **how)
        error = connection.init_future.exception
        if isinstance(error, LOGIN_ERRORS) or refusals.is_about_certificates(str(error)):
            manager._auth_failures[node.node_id] = error

    async def build_transport_that_reads_to_the_end(*args: Any, **how: Any) -> Any:
        transport = await build_transport(*args, **how)
        receive = transport._sock_recv

        def data_before_errors() -> tuple[bytes, Any]:
            data, error = receive()
            return data, None if data else error  # the error will be there when it reads again

        transport._sock_recv = data_before_errors
        return transport

    manager._connect = connect_and_tell
    manager._build_transport = build_transport_that_reads_to_the_end
    return made
