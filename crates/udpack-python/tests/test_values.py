"""Values both ways: the vectors of PROTOCOL.md, another codec, and what is hostile."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import msgpack
import numpy
import pytest

import udpack
from udpack import Timestamp, _udpack
from conftest import TOKENS, in_time, served

PROTOCOL = Path(__file__).parents[3] / "docs" / "PROTOCOL.md"


def vectors() -> list[dict[str, str]]:
    """The vectors of messages in PROTOCOL.md."""
    found = []
    for block in re.findall(r"^```vectors\n(.*?)^```", PROTOCOL.read_text(), re.M | re.S):
        for part in block.split("\n\n"):
            lines = [line for line in part.splitlines() if line and not line.startswith("#")]
            if not lines or not lines[0].startswith("name: "):
                continue
            fields: dict[str, str] = {}
            last = ""
            for line in lines:
                if line.startswith(" "):
                    fields[last] += " " + line.strip()
                    continue
                last, _, value = line.partition(":")
                fields[last] = value.strip()
            if fields.get("kind") == "message":
                found.append(fields)
    return found


def octets(text: str) -> bytes:
    """Bytes in hex, with `(…)*n` for what repeats."""
    while (repeat := re.search(r"\(([^()]*)\)\*(\d+)", text)) is not None:
        text = text[: repeat.start()] + " ".join([repeat[1]] * int(repeat[2])) + text[repeat.end():]
    return bytes.fromhex(text)


def stretched(value):
    """JSON with what it lacks."""
    if isinstance(value, list):
        return [stretched(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, of),) = value.items()
        if key == "$bin":
            return bytes.fromhex(of)
        if key == "$ts":
            return ("timestamp", of)
        if key == "$f64":
            return float(of)
        if key == "$repeat":
            return repeated(stretched(of[0]), of[1])
        if key.startswith("$"):
            raise LookupError(key)
    return {key: stretched(of) for key, of in value.items()}


def repeated(value, times):
    return value * times if isinstance(value, (str, bytes)) else [value] * times


VECTORS = vectors()


def test_there_are_vectors():
    assert len([one for one in VECTORS if one["expect"] == "ok"]) > 30
    assert len([one for one in VECTORS if one["expect"].startswith("refuse")]) > 20


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vector(vector):
    body = octets(vector["hex"])
    if vector["expect"] != "ok":
        with pytest.raises(udpack.ProtocolError) as caught:
            _udpack.unpack(body)
        assert vector["expect"].split()[:2] == ["refuse", caught.value.code]
        return
    event, data, id = _udpack.unpack(body)
    assert event == stretched(json.loads(vector["event"]))
    assert id == (int(vector["id"]) if "id" in vector else None)
    if "data" not in vector:
        return
    try:
        expected = stretched(json.loads(vector["data"]))
    except (LookupError, ValueError):
        return
    if isinstance(expected, tuple):
        assert isinstance(data, Timestamp)
    elif isinstance(expected, float):
        assert data == expected or math.isnan(data) and math.isnan(expected)
    else:
        assert data == expected and type(data) is type(expected)
    if vector.get("canonical") == "yes" and id is None and not event.startswith("$"):
        assert _udpack.pack(event, data) == body


VALUES = [
    None, True, False, 0, 1, -1, 127, 128, 255, 256, -32, -33, -128, -129, 2**31, -(2**31), 2**32, -(2**63), 2**63, 2**64 - 1,
    0.0, -0.0, 1.5, math.inf, -math.inf, "", "aé漢🦀", "x" * 31, "x" * 32, "x" * 256, "x" * 70_000, b"", b"\x00\xff", b"x" * 70_000,
    [], [1, [2, [3]]], list(range(20)), list(range(70)), {}, {"a": 1, "b": [None, {"c": b"x"}]}, {1: "one", True: 2, None: 3, b"k": 4},
    {str(n): n for n in range(20)}, [1, 2.5, "three"], [200, "a list that begins with a small number"],
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_another_codec_agrees(value):
    body = _udpack.pack("e", value)
    assert msgpack.unpackb(body, strict_map_key=False) == ["e", value]
    assert _udpack.unpack(msgpack.packb(["e", value])) == ("e", value, None)
    assert type(_udpack.unpack(body)[1]) is type(value)


def test_what_else_can_be_sent():
    assert sent((1, (2, 3))) == [1, [2, 3]]
    assert sent(bytearray(b"ab")) == b"ab"
    assert sent(memoryview(b"abcd")[1:3]) == b"bc"
    assert sent(numpy.arange(3, dtype="<u2")) == b"\x00\x00\x01\x00\x02\x00"
    assert sent(numpy.arange(6, dtype="u1").reshape(2, 3).T) == bytes([0, 3, 1, 4, 2, 5])
    assert sent(numpy.int64(-7)) == -7 and type(sent(numpy.int64(-7))) is int
    assert sent(numpy.float32(0.5)) == 0.5 and type(sent(numpy.float32(0.5))) is float
    assert sent(numpy.bool_(True)) is True
    moment = datetime(2026, 11, 30, 12, 0, 0, 250_000, tzinfo=timezone(timedelta(hours=2)))
    assert sent(moment).datetime() == moment


def sent(value):
    return _udpack.unpack(_udpack.pack("e", value))[1]


@pytest.mark.parametrize("time", [
    Timestamp(0), Timestamp(2**32 - 1), Timestamp(2**32), Timestamp(1, 1), Timestamp(2**34 - 1, 999_999_999),
    Timestamp(2**34), Timestamp(-1, 5), Timestamp(-(2**63), 2**32 - 1), Timestamp(2**63 - 1, 0),
])
def test_timestamps_keep_every_bit(time):
    assert sent(time) == time
    assert hash(sent(time)) == hash(time)
    if 0 <= time.seconds < 2**33 and time.nanoseconds < 10**9:
        theirs = msgpack.unpackb(_udpack.pack("e", time), timestamp=0)[1]
        assert (theirs.seconds, theirs.nanoseconds) == (time.seconds, time.nanoseconds)


def test_a_timestamp_that_no_datetime_can_be():
    with pytest.raises(OverflowError):
        Timestamp(2**62).datetime()


class Reentrant(dict):
    """Changes what it is in while it is sent."""

    def items(self):
        self.clear()
        return super().items()


class Liar:
    def __buffer__(self, flags):
        raise RuntimeError("no buffer")


def endless():
    loop: list = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize("value", [
    2**64, -(2**63) - 1, object(), {1, 2}, 1j, "\ud800", {"a": object()}, endless(), datetime(2026, 1, 1), range(3), Liar(),
    print, type, ..., [[]] * 2 and [object()],
], ids=lambda value: type(value).__name__)
async def test_what_cannot_be_sent_harms_nothing(value):
    server = udpack.Server(tokens=TOKENS)

    @server.channel("echo")
    async def serve(channel):
        async for event, data in channel:
            await channel.send(event, data)

    async with served(server) as socket:
        channel = await socket.open("echo")
        with pytest.raises(udpack.EncodeError) as caught:
            await channel.send("e", value)
        assert caught.value.code == "bad_payload" and isinstance(caught.value, ValueError)
        with pytest.raises(udpack.EncodeError):
            await channel.request("e", value)
        await channel.send("fine", 1)
        assert await in_time(channel.recv()) == ("fine", 1)


@pytest.mark.parametrize("event", ["", "$close", "a\n", "x" * 129])
async def test_what_cannot_be_an_event(event):
    with pytest.raises(udpack.EncodeError) as caught:
        _udpack.pack(event, None)
    assert caught.value.code == "name"


def test_depth_ends_at_the_limit_of_the_protocol():
    def nested(depth):
        value = None
        for _ in range(depth):
            value = [value]
        return value

    # The message's own array is one level.
    assert sent(nested(31)) == nested(31)
    for depth in (32, 33, 1000, 100_000):
        value = nested(depth)
        with pytest.raises(udpack.EncodeError):
            _udpack.pack("e", value)
        while value:  # taken apart by hand: the interpreter recurses, too
            value = value.pop()


def test_keys_that_a_dict_cannot_have_become_tuples():
    body = bytes([0x92, 0xA1, 0x65, 0x82, 0x92, 1, 2, 0xA1, 0x61, 0x81, 0xA1, 0x6B, 0x90, 0xA1, 0x62])
    assert _udpack.unpack(body)[1] == {(1, 2): "a", (("k", ()),): "b"}


def test_hostile_dicts_and_lists():
    changing = Reentrant(a=1)
    assert sent(changing) == {"a": 1} or changing == {}
    with pytest.raises(udpack.ProtocolError) as caught:
        _udpack.unpack(b"\xdd\xff\xff\xff\xff")
    assert caught.value.code == "bad_msgpack"


async def test_names_of_fields_are_their_messages_own():
    """Messages that arrive together share the objects of the first short names; the others are made for each."""
    server = udpack.Server(tokens=TOKENS)
    names = ["a", "b", "aé", "", "x" * 31, "x" * 32, "x" * 33, "x" * 300] + [f"n{n}" for n in range(20)]
    sent_ones = [
        (names[n % 7] or "e", {names[(n + k) % len(names)]: [k, {names[k]: n, n: names[k], None: b"x"}] for k in range(n % 28)})
        for n in range(300)
    ]

    @server.channel("all")
    async def serve(channel):
        await channel.send_many(sent_ones)

    async with served(server) as socket:
        channel = await socket.open("all")
        for expected in sent_ones:
            assert await in_time(channel.recv()) == expected


def test_dicts_of_subclasses_are_as_they_are_kept():
    class Text(str):
        pass

    class Number(int):
        def __index__(self):
            raise AssertionError("nobody asks")

    assert sent({Text("a"): Number(7), "b": True, 3: None}) == {"a": 7, "b": True, 3: None}
    assert sent({"a": 1, "b": [1]}) == {"a": 1, "b": [1]}
    with pytest.raises(udpack.EncodeError):
        sent({"a": 1, "b": "\ud800"})
    with pytest.raises(udpack.EncodeError):
        sent({"a": 1, "b": 2**64})


async def test_a_message_above_the_limit_harms_nothing():
    server = udpack.Server(tokens=TOKENS)

    @server.on("math", "big")
    def big(size):
        return bytes(size)

    async with served(server) as socket:
        channel = await socket.open("math")
        with pytest.raises(udpack.EncodeError) as caught:
            await channel.send("big", bytes(2 << 20))
        assert caught.value.code == "frame_too_large"
        with pytest.raises(udpack.Fault) as caught:
            await channel.request("big", 2 << 20)
        assert caught.value.code == "reply_too_large"
        assert len(await channel.request("big", 1 << 20)) == 1 << 20
