"""Numbered messages through a network that is cut: nothing lost, doubled or out of order."""

from __future__ import annotations

import asyncio

import udpack
from conftest import TOKENS, in_time, relay

MESSAGES = 10_000
QUICK = {"idle": 3.0, "keep_alive": 1.0}


async def test_ten_thousand_each_way_through_cuts():
    server = udpack.Server(tokens=TOKENS, timeouts=QUICK)
    heard: list[int] = []
    whole = asyncio.Event()

    @server.channel("numbers")
    async def serve(channel):
        async def answer():
            for number in range(MESSAGES):
                await channel.send("down", number)

        sending = asyncio.create_task(answer())
        async for _, number in channel:
            heard.append(number)
        await sending
        whole.set()

    async with server.listen("127.0.0.1:0"), relay(server) as path:
        settings = {"reconnect": {"first": 0.05, "most": 0.2}, "timeouts": QUICK}
        async with udpack.connect(path.address, token="secret", key=server.key, **settings) as socket:
            seen: list[str] = []

            async def watch():
                async for state in socket.states():
                    seen.append(state.name)

            watching = asyncio.create_task(watch())
            channel = await socket.open("numbers", resumable=True)
            got: list[int] = []

            async def read():
                async for _, number in channel:
                    got.append(number)

            async def write():
                for number in range(MESSAGES):
                    await channel.send("up", number)
                    # As many cuts as there are thousands: each ends when a loss was noticed.
                    if number % 2500 == 1000:
                        await cut(path, socket)
                await channel.finish()

            reading = asyncio.create_task(read())
            await asyncio.wait_for(write(), 150)
            await in_time(whole.wait())
            await in_time(reading)
            watching.cancel()
    assert heard == list(range(MESSAGES))
    assert got == list(range(MESSAGES))
    assert seen.count("reconnecting") >= 4


async def cut(path, socket: udpack.Socket) -> None:
    """Cuts the network until the client has lost its connection, then waits until it is back."""
    path.cut = True
    async for state in socket.states():
        if state.name == "reconnecting":
            path.cut = False
        elif state.name == "connected" and not path.cut:
            assert state.fields["resumed"], state
            return


async def test_a_session_that_is_gone_ends_its_channels():
    server = udpack.Server(tokens=TOKENS, timeouts=QUICK | {"resume": 0.5})

    @server.channel("quiet")
    async def serve(channel):
        await channel.closed()

    async with server.listen("127.0.0.1:0"), relay(server) as path:
        settings = {"reconnect": {"first": 0.05, "most": 0.2}, "timeouts": QUICK}
        async with udpack.connect(path.address, token="secret", key=server.key, **settings) as socket:
            channel = await socket.open("quiet", resumable=True)
            first = socket.id
            path.cut = True
            async for state in socket.states():
                if state.name == "reconnecting" and not server.sockets:
                    path.cut = False
                elif state.name == "connected" and not path.cut:
                    assert not state.fields["resumed"]
                    break
            assert socket.id != first
            try:
                await in_time(channel.recv())
                raise AssertionError("the channel goes on")
            except udpack.ClosedError as error:
                assert (error.code, error.retry) == ("not_resumed", True)
