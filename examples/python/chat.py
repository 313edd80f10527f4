"""Rooms: a server and two who talk. A line is encoded once and goes to every member; who is there shows.

Run it with `python examples/python/chat.py`.
"""

import asyncio

import udpack

server = udpack.Server(tokens={"ann's secret": "ann", "bob's secret": "bob"})


@server.on("chat", "enter")
def enter(room, call):
    call.channel.track(room, {"mood": "curious"})


@server.on("chat", "say")
def say(data, call):
    sent = server.to(data["room"]).send("said", {"from": call.peer, "text": data["text"]})
    return sent.delivered


async def member(token: str) -> tuple[udpack.Socket, udpack.Channel]:
    socket = await udpack.connect("%s:%d" % server.address, token=token, key=server.key)
    # Resumable: the conversation goes on over a lost connection.
    channel = await socket.open("chat", resumable=True)
    await channel.request("enter", "hall")
    return socket, channel


async def main() -> None:
    async with server.listen("127.0.0.1:0"):
        (first, ann), (second, bob) = await member("ann's secret"), await member("bob's secret")
        heard = await ann.request("say", {"room": "hall", "text": "is anybody here?"})
        print(f"{heard} members were sent it")

        present = udpack.Presence("hall")
        async for event, data in bob:
            if event == "said":
                print(f"bob heard {data['from']} say: {data['text']}")
                break
            present.apply(event, data)
        print("here:", ", ".join(present.peers))
        await first.close()
        await second.close()


if __name__ == "__main__":
    asyncio.run(main())
