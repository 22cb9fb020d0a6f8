"""A gate before a server: clients connect to it, and a test opens it, closes it, or lets nothing pass either way.

To its clients a closed gate is a server that was ended: connections break, new ones are refused. A silent one is a
cable that was cut, or a server that is frozen: connections stay, and no answer comes; what was sent meanwhile arrives
when it is opened again, as TCP sends it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from delta_sync.testing.processes import free_port

PIECE_BYTES = 64 << 10
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset at once, as the kernel does for a killed process


class Gate:
    """Forwards connections of a port of its own to one of 127.0.0.1; open when it is made."""

    def __init__(self, to_port: int) -> None:
        self.port = free_port()
        self._to_port = to_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gate", daemon=True)
        self._thread.start()
        self._server: asyncio.Server | None = None
        self._passes = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self.open()

    def open(self) -> None:
        """Let everything pass, and what waits, too."""
        self._do(self._open())

    def close(self) -> None:
        """Break all connections, and refuse new ones."""
        self._do(self._close())

    def silence(self) -> None:
        """Let nothing pass, either way, and break nothing."""
        self._do(self._silence())

    def end(self) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.end()

    def _do(self, step: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(step, self._loop).result()

    async def _open(self) -> None:
        self._passes.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def _silence(self) -> None:
        self._passes.clear()

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            _reset(writer)
        self._passes.set()  # or those who wait would never see that their connection is gone

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._passes.wait()
            there = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:
            _reset(writer)
        else:
            self._writers.add(there[1])
            await asyncio.gather(self._forward(reader, there[1]), self._forward(there[0], writer))
            self._writers.discard(there[1])
        finally:
            self._writers.discard(writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                await self._passes.wait()
                writer.write(piece)
                await writer.drain()
            await self._passes.wait()
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # it is closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
