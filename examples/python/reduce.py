"""A numpy array is streamed to a server in pieces, which reduces them as they come and answers with what it found. The
array is never whole in the server's memory, and the sender waits when the server is slow.

Run it with `python examples/python/reduce.py`; it needs numpy.
"""

import asyncio

import numpy as np

import udpack

server = udpack.Server(tokens={"secret": "lab"})


@server.on("arrays", "describe")
async def describe(dtype, call):
    count, total, low, high = 0, 0.0, np.inf, -np.inf
    async for piece in call.items():
        values = np.frombuffer(piece, dtype=dtype)
        count += values.size
        total += float(values.sum())
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return {"count": count, "mean": total / count, "min": low, "max": high}


def pieces(array: np.ndarray, size: int = 32_768):
    """Parts of 256 KiB: views, not copies. An array is sent as its bytes."""
    for start in range(0, array.size, size):
        yield array[start : start + size]


async def main() -> None:
    array = np.arange(2_000_000, dtype="<f8")
    async with server.listen("127.0.0.1:0"):
        async with udpack.connect("%s:%d" % server.address, token="secret", key=server.key) as socket:
            arrays = await socket.open("arrays", priority="bulk")
            found = await arrays.request("describe", array.dtype.str, items=pieces(array))
    assert found == {"count": array.size, "mean": array.mean(), "min": 0.0, "max": array.max()}
    print(f"{found['count']} values, mean {found['mean']}")


if __name__ == "__main__":
    asyncio.run(main())
