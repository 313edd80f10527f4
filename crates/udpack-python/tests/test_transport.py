"""Networks that let no UDP pass: sessions over TCP, against the program `udpack-server`."""

from __future__ import annotations

import asyncio
import json
import os
import socket as sockets
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

import udpack
from conftest import client, in_time, relay
from test_life import echo
from udpack import sync

REPOSITORY = Path(__file__).parents[3]
PROGRAM = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")) / "debug" / "udpack-server"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """A server's URL, its host and port, and where it stores files."""
    if not PROGRAM.exists():
        pytest.skip(f"SKIPPED: there is no {PROGRAM}: cargo build -p udpack-cli")
    # An address of its own, so that the number of the UDP port is free for TCP.
    line = [PROGRAM, "--quiet", "--listen", "127.3.2.1:0", "--json", "--allow-read"]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as program:
        at = ""
        for text in program.stdout:
            said = json.loads(text)
            at = said.get("listening", at)
            if "send" in said:
                break
        url = subprocess.run([PROGRAM, "url"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
        yield url, at, tmp_path / "uploads"
        program.kill()


class TcpOnly:
    """An address where TCP goes on to a server, and UDP goes nowhere."""

    def __init__(self, to: str) -> None:
        self.host, _, port = to.rpartition(":")
        self.port = int(port)
        self.connections = 0

    async def __aenter__(self) -> str:
        self.listener = await asyncio.start_server(self.carry, "127.3.2.2", 0)
        self.at = self.listener.sockets[0].getsockname()
        # Takes what comes and says nothing.
        self.hole = sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM)
        self.hole.bind(self.at)
        return "%s:%d" % self.at

    async def __aexit__(self, *_: object) -> None:
        self.hole.close()
        self.listener.close()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        back_reader, back_writer = await asyncio.open_connection(self.host, self.port)

        async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(1 << 16):
                    sink.write(data)
                    await sink.drain()
            except ConnectionError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pipe(reader, back_writer), pipe(back_reader, writer))


async def test_a_file_goes_over_tcp(server, tmp_path):
    url, _, stored = server
    data = os.urandom(3 << 20)
    async with udpack.connect(url, transport="wss") as socket:
        assert socket.transport == "wss"
        [outcome] = await in_time(udpack.upload(socket, data, remote="over-tcp.bin"))
        assert outcome.size == len(data)
    assert (stored / "over-tcp.bin").read_bytes() == data
    assert await in_time(udpack.download(url, "over-tcp.bin", transport="wss")) == data


async def test_quic_is_taken_where_udp_passes(server):
    url, _, _ = server
    async with udpack.connect(url, transport="quic") as socket:
        assert socket.transport == "quic"


async def test_auto_takes_tcp_where_udp_does_not_pass(server):
    url, at, _ = server
    blocked = TcpOnly(at)
    async with blocked as address:
        here = url.replace(at, address)
        assert here != url
        async with udpack.connect(here) as socket:
            assert socket.transport == "wss"
        assert blocked.connections > 0
        with pytest.raises(udpack.ConnectError):
            await in_time(udpack.connect(here, transport="quic", timeouts={"handshake": 0.5})._connect())


def test_without_an_event_loop(server):
    url, _, _ = server
    with sync.connect(url, transport="wss") as socket:
        assert socket.transport == "wss"


async def test_a_transport_that_there_is_not():
    with pytest.raises(ValueError, match="auto, quic, wss"):
        await udpack.connect("127.0.0.1:1", token="x", transport="tcp")


async def test_a_server_that_takes_no_tcp_is_reached_by_auto():
    server = echo()
    async with server.listen("127.0.0.1:0", tcp=False):
        assert server.tcp_address is None
        async with relay(server) as way:
            async with udpack.connect(way.address, token="secret", key=server.key, transport="auto") as socket:
                assert socket.transport == "quic"
        async with client(server) as socket:
            assert socket.transport == "quic"


async def test_a_server_takes_sessions_over_tcp():
    server = echo()
    # An address of its own, so that the number of the UDP port is free for TCP.
    async with server.listen("127.3.2.3:0", tcp=True):
        assert server.tcp_address == server.address
        async with udpack.connect("%s:%d" % server.address, token="secret", key=server.key, transport="wss") as socket:
            assert socket.transport == "wss"
            channel = await in_time(socket.open("echo"))
            for number in range(1000):
                await channel.send("n", number)
            assert [(await in_time(channel.recv()))[1] for _ in range(1000)] == list(range(1000))
        async with TcpOnly("%s:%d" % server.address) as blocked:
            async with udpack.connect(blocked, token="secret", key=server.key) as socket:
                assert socket.transport == "wss"


async def test_the_end_of_a_server_ends_its_sessions_over_tcp_and_frees_the_port():
    server = echo()
    async with server.listen("127.3.2.3:0", tcp=True):
        address = "%s:%d" % server.address
        socket = await udpack.connect(address, token="secret", key=server.key, transport="wss", reconnect=False)
    with pytest.raises(udpack.ClosedError):
        await in_time(socket.open("echo"))
    async with server.listen(address, tcp=True):
        assert server.tcp_address is not None


async def test_a_taken_tcp_port(caplog):
    server = echo()
    with sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM) as taken:
        taken.bind(("127.3.2.3", 0))
        taken.listen()
        address = "%s:%d" % taken.getsockname()
        with pytest.raises(udpack.BindError, match="TCP"):
            async with server.listen(address, tcp=True):
                pass
        async with server.listen(address):
            assert server.tcp_address is None
            assert "not listening on TCP" in caplog.text
            async with client(server) as socket:
                assert socket.transport == "quic"


class Proxy:
    """An HTTP proxy that takes `CONNECT`, and remembers for whom."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    async def __aenter__(self) -> str:
        self.listener = await asyncio.start_server(self.carry, "127.3.2.3", 0)
        return "http://anna:secret@%s:%d" % self.listener.sockets[0].getsockname()

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head)
        to = TcpOnly(head.split()[1].decode())
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await to.carry(reader, writer)


async def test_a_proxy_is_named_or_of_the_environment(server, monkeypatch):
    url, at, _ = server
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    proxy = Proxy()
    async with proxy as address:

        async def ask(**more: object) -> int:
            asked = len(proxy.asked)
            async with udpack.connect(url, transport="wss", **more) as socket:
                assert await in_time((await socket.open("ping")).request("ping", 7)) is not None
            return len(proxy.asked) - asked

        assert await ask() == 0
        assert await ask(proxy=address) == 1
        head = proxy.asked[0].decode()
        assert head.startswith(f"CONNECT {at} HTTP/1.1\r\n") and "Proxy-Authorization: Basic YW5uYTpzZWNyZXQ=" in head
        monkeypatch.setenv("https_proxy", address)
        assert await ask() == 1
        assert await ask(proxy=False) == 0
        monkeypatch.setenv("no_proxy", "127.0.0.0/8")
        assert await ask() == 0
        monkeypatch.delenv("no_proxy")
        monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
        with pytest.warns(RuntimeWarning, match="https_proxy is not used"):
            assert await ask() == 0
    with pytest.raises(ValueError, match="^proxy: "):
        udpack.connect("127.0.0.1:1", token="t", proxy="socks5://h").__await__().send(None)
