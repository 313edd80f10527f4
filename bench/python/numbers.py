"""Numbered messages both ways through whatever happens to the network, for bench/networks.sh.

`numbers.py serve HOST:PORT` prints an address; `numbers.py count URL SECONDS` sends 10,000 numbers within about that time while the
server sends as many, and prints the changes of the transport and what came, as lines of JSON.
"""

import asyncio
import json
import sys

import udpack

COUNT = 10_000


async def send(channel: udpack.Channel, seconds: float) -> None:
    for number in range(COUNT):
        await channel.send("n", number)
        if number % 10 == 9:
            await asyncio.sleep(10 * seconds / COUNT)


async def serve(address: str) -> None:
    server = udpack.Server(tokens={"secret": "counter"})

    @server.channel("numbers")
    async def numbers(channel: udpack.Channel) -> None:
        _, seconds = await anext(aiter(channel))
        sending = asyncio.create_task(send(channel, seconds))
        got = [await anext(aiter(channel)) for _ in range(COUNT)]
        await sending
        await channel.send("got", [number for _, number in got])
        async for _ in channel:
            pass

    async with server.listen(address, tcp=True):
        print("udpack://secret@%s:%d#%s" % (*server.address, server.key), flush=True)
        await asyncio.Event().wait()


def tell(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


async def watch(socket: udpack.Socket) -> None:
    async for state in socket.states():
        if state.name == "transport_changed":
            tell("transport", transport=socket.transport, reason=state.fields["reason"])


async def count(url: str, seconds: float) -> None:
    async with udpack.connect(url) as socket:
        watching = asyncio.create_task(watch(socket))
        channel = await socket.open("numbers", resumable=True)
        await channel.send("begin", seconds)
        sending = asyncio.create_task(send(channel, seconds))
        here = []
        async for event, data in channel:
            if event == "got":
                there = data
                break
            here.append(data)
        await sending
        ways = (here, there)
        tell(
            "end",
            lost=sum(COUNT - len(set(way)) for way in ways),
            doubled=sum(len(way) - len(set(way)) for way in ways),
            reordered=sum(way != sorted(way) for way in ways),
        )
        watching.cancel()


if __name__ == "__main__":
    what, where, *more = sys.argv[1:]
    asyncio.run(serve(where) if what == "serve" else count(where, float(more[0])))
