"""What the tests share: patience, a server, a network that is cut."""

from __future__ import annotations

import asyncio
import faulthandler
import socket as sockets
from contextlib import asynccontextmanager
from typing import Any, AsyncIterator

import pytest

import udpack

#: Seconds for what must happen, on a slow machine that has other work.
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def no_test_hangs():
    """Says where a test hangs, and ends it."""
    faulthandler.dump_traceback_later(180, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def in_time(awaitable: Any) -> Any:
    """Waits for what must happen."""
    return asyncio.wait_for(awaitable, PATIENCE)


TOKENS = {"secret": "ann", "other": "bob"}


@asynccontextmanager
async def served(server: udpack.Server, **settings: Any) -> AsyncIterator[udpack.Socket]:
    """A running server and a client of it."""
    async with server.listen("127.0.0.1:0"):
        async with client(server, **settings) as socket:
            yield socket


def client(server: udpack.Server, token: str = "secret", **settings: Any) -> udpack.Connecting:
    """A connection to a server."""
    return udpack.connect(address(server), token=token, key=server.key, **settings)


def address(server: udpack.Server) -> str:
    return "%s:%d" % server.address


class Relay(asyncio.DatagramProtocol):
    """A UDP relay that can be cut: what arrives meanwhile is lost."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.server = server
        self.cut = False
        self.ways: dict[tuple[str, int], asyncio.DatagramTransport] = {}

    def connection_made(self, transport: Any) -> None:
        self.front = transport
        transport.get_extra_info("socket").setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 1 << 20)

    def datagram_received(self, data: bytes, client: tuple[str, int]) -> None:
        if self.cut:
            return
        way = self.ways.get(client)
        if way is None:
            asyncio.ensure_future(self._open(client, data))
        else:
            way.sendto(data)

    async def _open(self, client: tuple[str, int], data: bytes) -> None:
        relay = self

        class Back(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, _: Any) -> None:
                if not relay.cut:
                    relay.front.sendto(data, client)

        loop = asyncio.get_running_loop()
        way, _ = await loop.create_datagram_endpoint(Back, remote_addr=self.server)
        self.ways[client] = way
        way.sendto(data)

    @property
    def address(self) -> str:
        return "%s:%d" % self.front.get_extra_info("sockname")[:2]

    def close(self) -> None:
        for way in self.ways.values():
            way.close()
        self.front.close()


@asynccontextmanager
async def relay(server: udpack.Server) -> AsyncIterator[Relay]:
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_datagram_endpoint(lambda: Relay(server.address), local_addr=("127.0.0.1", 0))
    try:
        yield protocol
    finally:
        protocol.close()
