"""Rooms with a history: what a member missed comes once and in order, or a gap says what is gone."""

from __future__ import annotations

import asyncio

import pytest

import udpack
from conftest import TOKENS, client, in_time, relay

QUICK = {"idle": 3.0, "keep_alive": 1.0}
MESSAGES = 1000


def hall(**settings) -> udpack.Server:
    server = udpack.Server(tokens=TOKENS, **settings)

    @server.channel("chat")
    async def serve(channel):
        channel.join("hall", start=channel.meta)
        await channel.send("joined")
        await channel.closed()

    return server


async def joined(channel) -> None:
    """Reads until the server has made it a member."""
    while True:
        event, _ = await in_time(channel.recv())
        if event == "joined":
            return


async def test_a_channel_goes_on_where_another_was():
    server = hall()
    async with server.listen("127.0.0.1:0"), client(server) as socket:
        room = server.to("hall")
        assert room.position is None
        room.history(100)
        epoch = room.position.epoch
        first = await socket.open("chat")
        await joined(first)
        assert first.positions == [udpack.Position("hall", epoch, 0)]
        for number in range(3):
            room.send("n", number)
        assert await in_time(first.recv()) == ("n", 0)
        since = udpack.Position("hall", epoch, 1)
        second = await socket.open("chat", since=[since])
        seen = [await in_time(second.recv()) for _ in range(3)]
        # What is missed follows the position; what the channel is told besides has no place in that order.
        assert [data for event, data in seen if event == "n"] == [1, 2]
        assert second.positions == [udpack.Position("hall", epoch, 3)]
        oldest = await socket.open("chat", meta="oldest")
        assert [await in_time(oldest.recv()) for _ in range(4)].count(("n", 0)) == 1
        room.history(None)
        assert room.position is None
        with pytest.raises(ValueError):
            server.to("hall").overflow("recovers")
        room.overflow("recover")


async def test_what_is_gone_is_a_gap_with_its_bounds():
    server = hall()
    async with server.listen("127.0.0.1:0"), client(server) as socket:
        room = server.to("hall")
        room.history(2)
        for number in range(5):
            room.send("n", number)
        epoch = room.position.epoch
        for since, gap in [
            (udpack.Position("hall", epoch, 1), udpack.Gap("hall", 2, epoch, 2, 3, "gone")),
            (udpack.Position("hall", epoch, 99), udpack.Gap("hall", 3, epoch, 1, 3, "epoch")),
            (udpack.Position("hall", epoch + 1, 1), udpack.Gap("hall", 3, epoch, 1, 3, "epoch")),
        ]:
            channel = await socket.open("chat", since=[since])
            seen = [await in_time(channel.recv()) for _ in range(4)]
            seen.remove(("joined", None))
            assert seen == [("$gap", gap), ("n", 3), ("n", 4)]


async def test_a_subscription_goes_on_when_its_session_is_gone():
    server = hall(timeouts=QUICK | {"resume": 0.5})
    async with server.listen("127.0.0.1:0"), relay(server) as path:
        room = server.to("hall")
        room.history(2 * MESSAGES)
        settings = {"reconnect": {"first": 0.05, "most": 0.2}, "timeouts": QUICK}
        async with udpack.connect(path.address, token="secret", key=server.key, **settings) as socket:
            subscription = await socket.subscribe("chat")
            await joined(subscription)
            got: list[int] = []
            whole = asyncio.Event()

            async def read():
                async for event, data in subscription:
                    assert event in ("n", "joined")
                    if event == "n":
                        got.append(data)
                    if data == MESSAGES - 1:
                        whole.set()

            reading = asyncio.create_task(read())
            for number in range(MESSAGES):
                room.send("n", number)
                if number % 100 == 0:
                    await asyncio.sleep(0)
                if number == MESSAGES // 2:
                    await lose(path, server, socket)
            await in_time(whole.wait())
            reading.cancel()
    assert got == list(range(MESSAGES))


async def lose(path, server: udpack.Server, socket: udpack.Socket) -> None:
    """Cuts the network until the server has forgotten the session, and waits until the client is back in another."""
    path.cut = True
    async for state in socket.states():
        if state.name == "reconnecting" and path.cut:
            while server.sockets:
                await asyncio.sleep(0.05)
            path.cut = False
        elif state.name == "connected" and not path.cut:
            assert not state.fields["resumed"], state
            return
