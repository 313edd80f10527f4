"""Rooms, presence and volatile messages."""

from __future__ import annotations

import asyncio

import pytest

import udpack
from conftest import TOKENS, client, in_time


def chat() -> udpack.Server:
    server = udpack.Server(tokens=TOKENS)

    @server.on("chat", "join")
    def join(room, call):
        call.channel.join(room)
        return call.channel.rooms

    @server.on("chat", "leave")
    def leave(room, call):
        return call.channel.leave(room)

    @server.on("chat", "here")
    def here(meta, call):
        call.channel.track("hall", meta)

    @server.on("chat", "gone")
    def gone(_, call):
        return call.channel.untrack("hall")

    @server.on("chat", "say")
    def say(text, call):
        return list(server.to("hall").send("said", {"from": call.peer, "text": text}, but=call.channel))

    @server.on("chat", "point")
    def point(at, call):
        return list(server.to("hall").send_volatile("at", at, key=call.peer))

    return server


async def test_a_room_has_members():
    server = chat()
    async with server.listen("127.0.0.1:0"):
        async with client(server) as one, client(server, token="other") as two:
            ann, bob = await one.open("chat"), await two.open("chat")
            assert await ann.request("join", "hall") == ["hall"]
            assert await bob.request("join", "hall") == ["hall"]
            assert sorted(member.peer for member in server.to("hall").members) == ["ann", "bob"]
            assert server.rooms == ["hall"]
            assert await ann.request("say", "hello") == [1, 0]
            assert await in_time(bob.recv()) == ("said", {"from": "ann", "text": "hello"})
            assert await bob.request("leave", "hall") is True
            assert await bob.request("leave", "hall") is False
            assert await ann.request("say", "nobody hears") == [0, 0]
            with pytest.raises(udpack.RoomError):
                ann.join("hall")


async def test_presence_tells_who_is_there():
    server = chat()
    async with server.listen("127.0.0.1:0"):
        async with client(server) as one, client(server, token="other") as two:
            ann, bob = await one.open("chat"), await two.open("chat")
            await ann.request("here", {"mood": "fine"})
            await bob.request("join", "hall")
            hall = udpack.Presence("hall")
            event, data = await in_time(bob.recv())
            assert event == "presence_state"
            joins, leaves = hall.apply(event, data)
            assert [(entry.peer, entry.meta) for entry in joins] == [("ann", {"mood": "fine"})] and leaves == []
            assert hall.peers == ["ann"] and "ann" in hall and len(hall) == 1
            assert hall.metas("ann") == [{"mood": "fine"}]
            assert hall.apply("said", "x") is None
            assert await ann.request("gone") is True
            change = hall.apply(*await in_time(bob.recv()))
            joins, leaves = change
            assert (joins, [entry.peer for entry in leaves], change.why) == ([], ["ann"], None)
            assert hall.peers == []
            ann = {"peer": "ann", "session": "1", "meta": None}
            assert hall.apply("presence_diff", {"room": "hall", "joins": [ann], "leaves": []}).joins[0].peer == "ann"
            change = hall.apply("presence_diff", {"room": "hall", "joins": [], "leaves": [ann], "why": "node_lost"})
            assert (change.joins, change.leaves[0].session, change.why) == ([], "1", "node_lost")


async def test_volatile_messages_reach_the_others():
    server = chat()
    async with server.listen("127.0.0.1:0"):
        async with client(server) as one, client(server, token="other") as two:
            ann, bob = await one.open("chat"), await two.open("chat")
            await bob.request("join", "hall")
            arriving = two.volatile()
            got = asyncio.ensure_future(anext(arriving))
            # Each may be lost: they go on until one has come.
            number = 0
            while not got.done():
                number += 1
                await ann.request("point", [number, 0])
            message = await got
            assert (message.event, message.key) == ("at", "ann")
            assert 1 <= message.data[0] <= number
            one.send_volatile("level", 3)
            for socket in server.sockets:
                socket.send_volatile("level", 4)


async def test_a_slow_member_gets_a_gap():
    server = chat()
    async with server.listen("127.0.0.1:0"):
        windows = {"stream_window": 64 << 10, "connection_window": 64 << 10}
        async with client(server) as one, client(server, token="other", limits=windows) as two:
            ann, bob = await one.open("chat"), await two.open("chat")
            await bob.request("join", "hall")
            server.to("hall").overflow("drop_oldest", 16)
            text = "bla " * 8192
            for _ in range(150):
                await ann.request("say", text)
            heard = lost = 0
            while heard + lost < 150:
                event, data = await in_time(bob.recv())
                if event == "$gap":
                    assert isinstance(data, udpack.Gap) and data.room == "hall"
                    lost += data.lost
                else:
                    heard += 1
            assert heard > 0 and lost > 0
            with pytest.raises(ValueError):
                server.to("hall").overflow("nonsense")


async def test_revoked_peers_are_out():
    server = chat()
    async with server.listen("127.0.0.1:0"):
        async with client(server, reconnect=False) as socket:
            assert server.revoke("bob") == 0
            assert server.revoke("ann") == 1
            reason = await in_time(socket.closed())
            assert reason.code == "auth_revoked"


async def test_a_drained_server_sends_its_clients_away():
    server = chat()
    async with server.listen("127.0.0.1:0"):
        socket = await client(server, reconnect=False)
        await in_time(server.drain(5))
        reason = await in_time(socket.closed())
        assert (reason.code, reason.retry) == ("shutting_down", True)
