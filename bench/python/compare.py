"""udpack for Python beside python-socketio and nats-py, and beside udpack's Rust client. Only ratios of one run count.

    cargo build --release --locked -p udpack-python -p udpack-cli
    cp target/release/lib_udpack.so crates/udpack-python/python/udpack/_udpack.abi3.so
    python3 -m venv target/bench-python && target/bench-python/bin/pip install -r bench/python/requirements.txt
    PYTHONPATH=crates/udpack-python/python target/bench-python/bin/python bench/python/compare.py

Each side of each exchange is a process of its own, on loopback; the contenders take turns. `--messages`, `--requests`, `--mib`
and `--rounds` say how much. Scenarios: `one-way` (64 B messages of one sender to one receiver, until the last has arrived),
`request` (p50 of requests one after the other) and `upload` (one file of zeros from memory to memory, with fsync switched off).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = "x" * 52  # with `{"t": …}` and the event's name a message of about 64 B


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


# The sides. A server says where it listens; then it counts, or answers.


async def udpack_server(_: argparse.Namespace) -> None:
    import udpack

    server = udpack.Server(tokens={"t": "p"})

    @server.channel("sink")
    async def sink(channel):
        count = 0
        async for event, data in channel:
            count += 1
            if event == "last":
                await channel.send("got", count)

    @server.on("rpc", "echo")
    def echo(data):
        return data

    async with server.listen("127.0.0.1:0"):
        say(address="%s:%d" % server.address, key=server.key)
        await asyncio.get_running_loop().create_future()


async def udpack_client(args: argparse.Namespace) -> None:
    import udpack

    async with udpack.connect(args.address, token=args.token, key=args.key) as socket:
        if args.scenario == "one-way":
            channel = await socket.open("sink")
            begun = time.perf_counter()
            for _ in range(args.messages - 1):
                await channel.send("m", {"t": TEXT})
            await channel.send("last", None)
            event, count = await channel.recv()
            assert count == args.messages, (event, count)
            say(rate=args.messages / (time.perf_counter() - begun))
        else:
            channel = await socket.open(args.channel)
            await times(args.requests, lambda: channel.request(args.event, 1), args.pause)


async def times(requests: int, ask, pause: float = 0.0) -> None:
    for _ in range(min(200, requests)):
        await ask()
    taken = []
    for _ in range(requests):
        if pause:
            await asyncio.sleep(pause)
        begun = time.perf_counter()
        await ask()
        taken.append(time.perf_counter() - begun)
    say(p50=statistics.median(taken) * 1e6, mean=statistics.mean(taken) * 1e6)


async def socketio_server(_: argparse.Namespace) -> None:
    import socketio
    from aiohttp import web

    server = socketio.AsyncServer(async_mode="aiohttp")
    app = web.Application()
    server.attach(app)
    count = 0

    @server.on("m")
    async def message(sid, data):
        nonlocal count
        count += 1

    @server.on("last")
    async def last(sid, data=None):
        nonlocal count
        got, count = count + 1, 0
        return got

    @server.on("echo")
    async def echo(sid, data):
        return data

    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    say(address=f"http://127.0.0.1:{port}", key="")
    await asyncio.get_running_loop().create_future()


async def socketio_client(args: argparse.Namespace) -> None:
    import socketio

    client = socketio.AsyncClient()
    await client.connect(args.address, transports=["websocket"])
    if args.scenario == "one-way":
        begun = time.perf_counter()
        for _ in range(args.messages - 1):
            await client.emit("m", {"t": TEXT})
        count = await client.call("last", None, timeout=600)
        assert count == args.messages, count
        say(rate=args.messages / (time.perf_counter() - begun))
    else:
        await times(args.requests, lambda: client.call("echo", 1))
    await client.disconnect()


async def nats_server(args: argparse.Namespace) -> None:
    import msgpack
    import nats

    broker = await nats.connect(args.address, pending_size=64 << 20)
    count = 0

    async def message(one):
        nonlocal count
        msgpack.unpackb(one.data)
        count += 1

    async def last(one):
        nonlocal count
        got, count = count + 1, 0
        await one.respond(msgpack.packb(got))

    async def either(one):
        await (last(one) if one.reply else message(one))

    async def echo(one):
        await one.respond(one.data)

    await broker.subscribe("m", cb=either, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await broker.subscribe("echo", cb=echo)
    await broker.flush()
    say(address=args.address, key="")
    await asyncio.get_running_loop().create_future()


async def nats_client(args: argparse.Namespace) -> None:
    import msgpack
    import nats

    client = await nats.connect(args.address)
    if args.scenario == "one-way":
        begun = time.perf_counter()
        for _ in range(args.messages - 1):
            await client.publish("m", msgpack.packb({"t": TEXT}))
        answer = await client.request("m", msgpack.packb(None), timeout=600)
        got = msgpack.unpackb(answer.data)
        assert got == args.messages, got
        say(rate=args.messages / (time.perf_counter() - begun))
    else:
        data = msgpack.packb(1)
        await times(args.requests, lambda: client.request("echo", data))
    await client.close()


# The driver.


class Process:
    """A side, and the lines of JSON that it says."""

    def __init__(self, side: str, **args: object) -> None:
        words = [word for name, value in args.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, __file__, "--side", side, *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def line(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with {self.process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def exchange(contender: str, scenario: str, args: argparse.Namespace) -> dict:
    broker, more = None, {}
    if contender == "nats":
        broker = subprocess.Popen(["nats-server", "-a", "127.0.0.1", "-p", "14222"], stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        more = {"address": "nats://127.0.0.1:14222"}
    server = Process(f"{contender}-server", **more)
    try:
        at = server.line()
        client = Process(
            f"{contender}-client", scenario=scenario, messages=args.messages, requests=args.requests, **at
        )
        found = client.line()
        client.process.wait()
        return found
    finally:
        server.end()
        if broker is not None:
            broker.terminate()
            broker.wait()


def of_rust(args: argparse.Namespace, directory: Path) -> tuple[subprocess.Popen, str]:
    server = subprocess.Popen(
        [str(args.bin / "udpack-server"), "--listen", "127.0.0.1:0", "--fsync", "never"],
        cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("uploads "):
            told = [str(args.bin / "udpack-server"), "url"]
            url = subprocess.run(told, cwd=directory, stdout=subprocess.PIPE, text=True, check=True)
            return server, url.stdout.strip()
    raise SystemExit("udpack-server does not say where it listens")


def requests_beside_rust(args: argparse.Namespace) -> tuple[float, float]:
    """The same question to the same server, a hundred times a second: mean microseconds of the Rust client and of Python."""
    with tempfile.TemporaryDirectory() as directory:
        server, url = of_rust(args, Path(directory))
        try:
            environment = os.environ | {"UDPACK_URL": url}
            count = str(min(args.requests, 1000))
            rust = subprocess.run(
                [str(args.bin / "udpack-client"), "ping", "-c", count, "--interval", "0.01", "--json"],
                env=environment, capture_output=True, text=True, check=True,
            )
            client = Process(
                "udpack-client", scenario="request", requests=count, address=url, channel="ping", event="ping", pause=0.01
            )
            return json.loads(rust.stdout.splitlines()[-1])["avg"] * 1e3, client.line()["mean"]
        finally:
            server.terminate()
            server.wait()


def uploads(args: argparse.Namespace) -> tuple[float, float]:
    """MB/s of the Rust client and of Python."""
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shm) as directory:
        source = Path(directory, "source")
        with open(source, "wb") as file:
            for _ in range(args.mib):
                file.write(os.urandom(1 << 20))
        server, url = of_rust(args, Path(directory))
        environment = os.environ | {"UDPACK_URL": url}
        try:
            begun = time.perf_counter()
            subprocess.run(
                [str(args.bin / "udpack-client"), "put", "--quiet", str(source), "--as", "rust"], env=environment, check=True
            )
            rust = args.mib * (1 << 20) / (time.perf_counter() - begun) / 1e6
            os.unlink(Path(directory, "uploads", "rust"))
            program = "import sys, udpack.sync as u; u.upload(sys.argv[1], sys.argv[2], remote='python')"
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", program, url, str(source)], check=True)
            return rust, args.mib * (1 << 20) / (time.perf_counter() - begun) / 1e6
        finally:
            server.terminate()
            server.wait()


def drive(args: argparse.Namespace) -> None:
    contenders = ["udpack", "socketio"] + (["nats"] if shutil.which("nats-server") else [])
    for scenario, unit in (("one-way", "rate"), ("request", "p50")):
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name in contenders:
                found[name].append(exchange(name, scenario, args)[unit])
        for name in contenders:
            print(f"{scenario:8} {name:9} {statistics.median(found[name]):>12,.0f} {'/s' if unit == 'rate' else 'µs'}")
    if (args.bin / "udpack-server").exists():
        rust, python = requests_beside_rust(args)
        print(f"request  Rust client {rust:.0f} µs, Python {python:.0f} µs (means): {python / rust:.2f} times")
        rust, python = uploads(args)
        print(f"upload   Rust client {rust:,.0f} MB/s, Python {python:,.0f} MB/s: {python / rust:.2f} times")
    else:
        print(f"SKIPPED: no udpack-server in {args.bin}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=500_000)
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bin", type=Path, default=Path("target/release"), help="where udpack-server is")
    for hidden in ("side", "address", "key", "scenario"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--token", default="t", help=argparse.SUPPRESS)
    parser.add_argument("--channel", default="rpc", help=argparse.SUPPRESS)
    parser.add_argument("--event", default="echo", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.bin = args.bin.resolve()
    if args.side is None:
        drive(args)
        return
    if args.address is not None and args.address.startswith("udpack://"):
        args.token = args.key = None
    sides = {
        "udpack-server": udpack_server, "udpack-client": udpack_client, "socketio-server": socketio_server,
        "socketio-client": socketio_client, "nats-server": nats_server, "nats-client": nats_client,
    }
    asyncio.run(sides[args.side](args))


if __name__ == "__main__":
    main()
