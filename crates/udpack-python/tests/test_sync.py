"""The blocking face."""

from __future__ import annotations

import asyncio
import threading

import pytest

import udpack
from conftest import PATIENCE, TOKENS, address
from udpack import sync


@pytest.fixture
def server(tmp_path):
    """A server on a loop of its own, in a thread."""
    server = udpack.Server(tokens=TOKENS, uploads=tmp_path / "store", allow_read=True, allow_delete=True)

    @server.channel("echo")
    async def echo(channel):
        async for event, data in channel:
            await channel.send(event, data)

    @server.on("math", "add")
    def add(data):
        return sum(data)

    @server.on("math", "wait")
    async def wait(_):
        await asyncio.sleep(3600)

    @server.on("math", "count")
    async def count(data):
        for number in range(data):
            yield number

    @server.on("math", "sum")
    async def total(_, call):
        return sum([item async for item in call.items()])

    started, loop, over = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def run():
        async with server.listen("127.0.0.1:0"):
            started.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert started.wait(PATIENCE)
    yield server
    loop.call_soon_threadsafe(over.set)
    thread.join(PATIENCE)
    loop.close()


def url(server) -> str:
    return f"udpack://secret@{address(server)}#{server.key}"


def test_messages_and_requests(server):
    with sync.connect(url(server)) as socket:
        echo = socket.open("echo")
        for number in range(1000):
            echo.send("n", number)
        assert [echo.recv()[1] for _ in range(1000)] == list(range(1000))
        with pytest.raises(TimeoutError):
            echo.recv(timeout=0.05)
        echo.send("last", None)
        echo.finish()
        assert list(echo) == [("last", None)]

        math = socket.open("math")
        assert math.request("add", [1, 2]) == 3
        with pytest.raises(udpack.RequestTimeoutError):
            math.request("wait", timeout=0.1)
        with pytest.raises(udpack.NoHandlerError):
            math.request("nothing")
        assert list(math.stream("count", 1000)) == list(range(1000))
        assert math.request("sum", items=range(100)) == 4950
        for item in math.stream("count", 10**9):
            if item == 10:
                break
        assert math.request("add", [2, 2]) == 4


def test_items_that_fail_fail_their_request(server):
    def broken():
        yield 1
        raise LookupError("no second item")

    with sync.connect(url(server)) as socket:
        math = socket.open("math")
        with pytest.raises(LookupError):
            math.request("sum", items=broken())
        assert math.request("add", [1]) == 1


def test_threads_share_a_channel(server):
    with sync.connect(url(server)) as socket:
        math = socket.open("math")
        answers = []
        threads = [
            threading.Thread(target=lambda n=n: answers.append(math.request("add", [n, 1]))) for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(answers) == list(range(1, 17))


def test_files(server, tmp_path):
    content = bytes(range(256)) * 4000
    seen = []
    (done,) = sync.upload(url(server), content, remote="a/b.bin", progress=seen.append)
    assert done.size == len(content) and seen[-1].bytes == len(content)
    assert sync.download(url(server), "a/b.bin") == content
    (got,) = sync.download(url(server), "a", tmp_path / "got")
    assert got.hash == done.hash and (tmp_path / "got" / "b.bin").read_bytes() == content
    assert [entry.path for entry in sync.listing(url(server), recursive=True)] == ["a", "a/b.bin"]
    assert sync.remove(url(server), "a", recursive=True) == (1, len(content))


def test_nobody_answers():
    with pytest.raises(udpack.ConnectError) as caught:
        sync.connect("127.0.0.1:9", timeouts={"handshake": 1})
    assert caught.value.code == "unreachable" and caught.value.retry
