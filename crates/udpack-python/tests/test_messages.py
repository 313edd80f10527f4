"""Messages, requests and streams between a client and a server."""

from __future__ import annotations

import asyncio

import pytest

import udpack
from conftest import TOKENS, address, client, in_time, served


def echo() -> udpack.Server:
    server = udpack.Server(tokens=TOKENS)

    @server.channel("echo")
    async def serve(channel: udpack.Channel) -> None:
        async for event, data in channel:
            await channel.send(event, data)

    return server


def math() -> udpack.Server:
    server = udpack.Server(tokens=TOKENS)
    server.stopped = asyncio.Event()
    server.begun = asyncio.Event()

    @server.on("math", "add", concurrency=4)
    async def add(data):
        return sum(data)

    @server.on("math", "double")
    def double(data, call):
        return {"twice": data * 2, "by": call.peer, "request": call.is_request}

    @server.on("math", "divide")
    async def divide(data):
        if data[1] == 0:
            raise udpack.Fault("not by zero", code="zero", detail={"of": data[0]})
        return data[0] / data[1]

    @server.on("math", "fail")
    async def fail(data):
        raise RuntimeError("a secret")

    @server.on("math", "wait")
    async def wait(data):
        server.begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            server.stopped.set()
            raise

    @server.on("math", "count")
    async def count(data):
        for number in range(data):
            yield number

    @server.on("math", "spoil")
    async def spoil(data):
        yield 1
        raise udpack.Fault("no more", code="spoiled")

    @server.on("math", "sum")
    async def total(data, call):
        result = 0
        async for item in call.items():
            result += item
        return result

    return server


async def test_messages_come_back_in_order():
    async with served(echo()) as socket:
        channel = await socket.open("echo")
        for number in range(2000):
            await channel.send("n", number)
        got = []
        async for event, data in channel:
            assert event == "n"
            got.append(data)
            if len(got) == 2000:
                break
        assert got == list(range(2000))


async def test_the_end_of_the_peer_ends_the_loop():
    async with served(echo()) as socket:
        channel = await socket.open("echo")
        await channel.send("one", 1)
        await channel.finish()
        assert [message async for message in channel] == [("one", 1)]
        assert await channel.recv() is None
        assert await channel.recv() is None


async def test_requests_get_replies():
    async with served(math()) as socket:
        channel = await socket.open("math")
        assert await channel.request("add", [1, 2, 3]) == 6
        assert await channel.request("double", "ab") == {"twice": "abab", "by": "ann", "request": True}
        answers = await asyncio.gather(*(channel.request("add", [n, n]) for n in range(100)))
        assert answers == [2 * n for n in range(100)]


async def test_a_fault_has_its_code_and_data():
    async with served(math()) as socket:
        channel = await socket.open("math")
        with pytest.raises(udpack.Fault, match="not by zero") as caught:
            await channel.request("divide", [7, 0])
        assert (caught.value.code, caught.value.detail) == ("zero", {"of": 7})
        with pytest.raises(udpack.Fault) as caught:
            await channel.request("fail", None)
        assert (caught.value.code, str(caught.value)) == ("internal", "the handler failed")
        with pytest.raises(udpack.NoHandlerError) as caught:
            await channel.request("nothing", None)
        assert caught.value.code == "no_handler"
        assert await channel.request("divide", [6, 3]) == 2.0


async def test_a_request_has_a_deadline():
    server = math()
    async with served(server) as socket:
        channel = await socket.open("math")
        with pytest.raises(TimeoutError) as caught:
            await channel.request("wait", None, timeout=0.2)
        assert isinstance(caught.value, udpack.RequestTimeoutError)
        await in_time(server.stopped.wait())


async def test_cancelling_a_request_stops_its_handler():
    server = math()
    async with served(server) as socket:
        channel = await socket.open("math")
        asking = asyncio.create_task(channel.request("wait", None, timeout=3600))
        await in_time(server.begun.wait())
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await in_time(server.stopped.wait())
        assert await channel.request("add", [1, 1]) == 2


async def test_streams_go_both_ways():
    async with served(math()) as socket:
        channel = await socket.open("math")
        assert [n async for n in channel.stream("count", 3000)] == list(range(3000))
        assert [n async for n in channel.stream("count", 0)] == []
        assert await channel.request("sum", items=range(1000)) == 499500

        async def numbers():
            for number in (1, 2, 3):
                yield number

        assert await channel.request("sum", items=numbers()) == 6


async def test_a_stream_ends_with_its_fault_after_its_items():
    async with served(math()) as socket:
        channel = await socket.open("math")
        got = []
        with pytest.raises(udpack.Fault) as caught:
            async for item in channel.stream("spoil"):
                got.append(item)
        assert (got, caught.value.code) == ([1], "spoiled")


async def test_items_that_fail_fail_their_request():
    async with served(math()) as socket:
        channel = await socket.open("math")

        async def broken():
            yield 1
            raise LookupError("no second item")

        with pytest.raises(LookupError):
            await channel.request("sum", items=broken())
        assert await channel.request("add", [1, 2]) == 3


async def test_leaving_a_stream_stops_it():
    async with served(math()) as socket:
        channel = await socket.open("math")
        async with channel.stream("count", 10**9) as items:
            async for item in items:
                if item == 100:
                    break
        assert await channel.request("add", [1, 2]) == 3


async def test_a_reader_answers_requests_itself():
    server = udpack.Server(tokens=TOKENS)

    @server.channel("chat")
    async def serve(channel):
        async for message in channel.messages():
            if message.event == "no":
                await message.fault("refused", "no", [1])
            else:
                await message.reply({"heard": message.data, "event": message.event})

    async with served(server) as socket:
        channel = await socket.open("chat")
        assert await channel.request("say", "x") == {"heard": "x", "event": "say"}
        with pytest.raises(udpack.Fault) as caught:
            await channel.request("no")
        assert (caught.value.code, caught.value.detail) == ("refused", [1])


async def test_a_reader_of_pairs_refuses_requests():
    async with served(echo()) as socket:
        channel = await socket.open("echo")
        with pytest.raises(udpack.NoHandlerError):
            await channel.request("ask", 1)


async def test_what_a_client_says_when_opening():
    server = udpack.Server(tokens=TOKENS)

    @server.channel("meta")
    async def serve(channel):
        await channel.send("meta", [channel.name, channel.meta, channel.peer])

    async with served(server) as socket:
        channel = await socket.open("meta", meta={"a": [1, b"x"]}, priority="high")
        assert await channel.recv() == ("meta", ["meta", {"a": [1, b"x"]}, "ann"])
        assert await channel.recv() is None
    with pytest.raises(ValueError, match="priority"):
        await socket.open("meta", priority="urgent")


async def test_a_channel_that_nobody_serves():
    async with served(echo()) as socket:
        channel = await socket.open("nothing")
        with pytest.raises(udpack.ClosedError) as caught:
            await channel.recv()
        assert (caught.value.code, caught.value.number) == ("no_such_channel", 0x40)
        assert caught.value.by == "peer"
        with pytest.raises(udpack.ClosedError):
            await channel.send("x", 1)


async def test_the_codes_of_an_end_arrive():
    server = udpack.Server(tokens=TOKENS)

    @server.channel("bye")
    async def serve(channel):
        await channel.close(0x1234, "own reasons")

    @server.channel("broken")
    async def broken(channel):
        raise RuntimeError("a secret")

    async with served(server) as socket:
        channel = await socket.open("bye")
        with pytest.raises(udpack.ClosedError) as caught:
            await channel.recv()
        assert (caught.value.code, caught.value.number) == ("application", 0x1234)
        assert caught.value.detail == "own reasons"
        assert not caught.value.retry
        reason = await in_time(channel.closed())
        assert (reason.number, reason.text, reason.by) == (0x1234, "own reasons", "peer")
        channel = await socket.open("broken")
        with pytest.raises(udpack.ClosedError) as caught:
            await channel.recv()
        assert caught.value.code == "handler_failed"
        assert "secret" not in str(caught.value)
    assert udpack.CLOSE_CODES["handler_failed"] == 0x43


async def test_a_wrong_token_and_a_wrong_key():
    server = echo()
    async with server.listen("127.0.0.1:0"):
        with pytest.raises(udpack.AuthError) as caught:
            await client(server, token="wrong")
        assert (caught.value.code, caught.value.retry) == ("auth_failed", False)
        with pytest.raises(udpack.AuthError) as caught:
            await udpack.connect(address(server), token="secret", key="sha256:" + "00" * 32)
        assert caught.value.code == "pin_mismatch"
    with pytest.raises(udpack.ConnectError) as caught:
        await udpack.connect("not an address")
    assert caught.value.code == "address"
    with pytest.raises(ValueError, match="there is no timeout"):
        await udpack.connect("127.0.0.1:1", timeouts={"nonsense": 1})


async def test_tokens_are_judged_by_a_function():
    seen = []

    async def judge(admission):
        seen.append(admission)
        if admission.token == "good":
            return "eve", {"role": "admin"}
        return None

    server = udpack.Server(auth=judge)

    @server.channel("who")
    async def who(channel):
        await channel.send("you", [channel.peer, channel.claim("role"), channel.claim("none")])

    async with served(server, token="good", agent="tests/1") as socket:
        channel = await socket.open("who")
        assert await channel.recv() == ("you", ["eve", "admin", None])
        assert seen[0].agent == "tests/1"
        with pytest.raises(udpack.AuthError):
            await client(server, token="bad")


async def test_a_url_has_it_all():
    server = echo()
    async with server.listen("127.0.0.1:0"):
        async with udpack.connect(f"udpack://secret@{address(server)}#{server.key}") as socket:
            assert socket.is_connected and socket.state.name == "connected"
            assert socket.remote_address == server.address
            assert socket.stats()["rtt"] >= 0
        assert socket.close_reason.normal


async def test_backpressure_makes_send_wait():
    server = udpack.Server(tokens=TOKENS)
    go = asyncio.Event()
    got = []

    @server.channel("slow")
    async def serve(channel):
        await go.wait()
        async for _, data in channel:
            got.append(len(data))

    async with served(server) as socket:
        channel = await socket.open("slow")
        sent = 0

        async def flood():
            nonlocal sent
            for _ in range(2000):
                await channel.send("big", bytes(100_000))
                sent += 1

        waiting = asyncio.create_task(flood())
        done, _ = await asyncio.wait({waiting}, timeout=1)
        assert not done and sent < 2000
        assert not channel.try_send("big", bytes(1 << 20)), "a full queue has no room"
        go.set()
        await in_time(waiting)
        await in_time(channel.finish())
    assert got == [100_000] * 2000


async def test_many_messages_at_once():
    async with served(echo()) as socket:
        channel = await socket.open("echo")
        sending = asyncio.create_task(channel.send_many(("n", number) for number in range(5000)))
        got = [(await in_time(channel.recv()))[1] for _ in range(5000)]
        await sending
        assert got == list(range(5000))
        with pytest.raises(udpack.EncodeError):
            await channel.send_many([("n", 1), ("n", object()), ("n", 2)])
        await channel.finish()
        assert [data async for _, data in channel] == [1]


async def test_a_server_can_listen_again(tmp_path):
    server = udpack.Server(tokens=TOKENS, uploads=tmp_path / "store", allow_read=True)
    for number in range(3):
        async with server.listen("127.0.0.1:0"), client(server) as socket:
            await in_time(udpack.upload(socket, b"x", remote=str(number)))
    with pytest.raises(udpack.UdpackError) as caught:
        server.address
    assert caught.value.code == "stopped"
