"""Cancellation, forks, loops that close, and an interpreter that ends."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading

import pytest

import udpack
from udpack import sync
from conftest import PATIENCE, TOKENS, client, in_time, served


def echo() -> udpack.Server:
    server = udpack.Server(tokens=TOKENS)

    @server.channel("echo")
    async def serve(channel):
        async for event, data in channel:
            await channel.send(event, data)

    return server


async def test_a_cancelled_recv_loses_nothing():
    async with served(echo()) as socket:
        channel = await socket.open("echo")
        got = []
        for number in range(300):
            await channel.send("n", number)
            receiving = asyncio.ensure_future(channel.recv())
            # As far as it comes, at each possible step.
            for _ in range(number % 7):
                await asyncio.sleep(0)
            receiving.cancel()
            try:
                got.append((await receiving)[1])
            except asyncio.CancelledError:
                pass
        while len(got) < 300:
            got.append((await in_time(channel.recv()))[1])
        assert got == list(range(300))


async def test_a_cancelled_connect_leaves_nothing():
    server = echo()
    async with server.listen("127.0.0.1:0"):
        for steps in range(10):
            connecting = asyncio.ensure_future(client(server)._connect())
            for _ in range(steps):
                await asyncio.sleep(0)
            connecting.cancel()
            try:
                socket = await connecting
            except asyncio.CancelledError:
                continue
            # It stood before the cancel came, which nothing but a quick turn of the loop keeps from happening.
            assert steps > 0
            await socket.close()
        async with client(server) as socket:
            assert socket.is_connected


def test_a_loop_that_closes_with_work_under_way():
    async def leave_behind():
        server = echo()
        running = server.listen("127.0.0.1:0")
        await running.__aenter__()
        socket = await client(server)
        channel = await socket.open("echo")
        waiting = asyncio.ensure_future(channel.recv())
        await asyncio.sleep(0)
        return server, running, socket, channel, waiting

    for _ in range(3):
        loop = asyncio.new_event_loop()
        left = loop.run_until_complete(leave_behind())
        loop.close()
        del left
        gc.collect()
    asyncio.run(_ping())


async def _ping():
    async with served(echo()) as socket:
        channel = await socket.open("echo")
        await channel.send("ping", 1)
        assert await in_time(channel.recv()) == ("ping", 1)


def test_a_socket_outlives_its_loop():
    """Handles belong to no loop: another one can go on with them."""
    server = echo()
    loop = asyncio.new_event_loop()
    running = server.listen("127.0.0.1:0")
    loop.run_until_complete(running.__aenter__())
    ending = threading.Event()
    serving = threading.Thread(target=lambda: loop.run_until_complete(_until(ending)))
    serving.start()
    try:
        socket = asyncio.run(_connected(server))
        assert asyncio.run(_asked(socket)) == ("again", 2)
    finally:
        ending.set()
        serving.join()
        loop.run_until_complete(running.__aexit__(None, None, None))
        loop.close()


async def _until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.01)


async def _connected(server):
    return await client(server)


async def _asked(socket):
    channel = await socket.open("echo")
    await channel.send("again", 2)
    answer = await in_time(channel.recv())
    await socket.close()
    return answer


async def test_a_forked_child_gets_an_error():
    async with served(echo()) as socket:
        channel = await socket.open("echo")
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            # What follows must neither hang nor end the parent's session.
            said = "nothing"
            try:
                try:
                    channel.try_send("from", "the child")
                except udpack.ForkedError as error:
                    said = error.code
                try:
                    sync.connect("127.0.0.1:1")
                except udpack.ForkedError as error:
                    said += " " + error.code
                del channel, socket
                gc.collect()
            finally:
                os.write(into, said.encode())
                os._exit(0)
        os.close(into)
        loop = asyncio.get_running_loop()
        said = await in_time(loop.run_in_executor(None, os.read, out, 100))
        await in_time(loop.run_in_executor(None, os.waitpid, child, 0))
        os.close(out)
        assert said == b"forked forked"
        await channel.send("still", "here")
        assert await in_time(channel.recv()) == ("still", "here")


def test_a_child_that_forks_before_first_use_works():
    run_program("""
        import asyncio, os, udpack
        child = os.fork()
        async def main():
            server = udpack.Server(tokens={"t": "p"})
            async with server.listen("127.0.0.1:0"):
                async with udpack.connect("%s:%d" % server.address, token="t", key=server.key):
                    pass
        asyncio.run(main())
        if child:
            _, status = os.waitpid(child, 0)
            assert status == 0, status
    """)


def test_the_interpreter_ends_with_sockets_open():
    run_program("""
        import asyncio, threading, udpack
        from udpack import sync
        async def main():
            global kept
            server = udpack.Server(tokens={"t": "p"})
            @server.channel("flood")
            async def flood(channel):
                while True:
                    await channel.send("x", bytes(10_000))
            running = server.listen("127.0.0.1:0")
            await running.__aenter__()
            socket = await udpack.connect("%s:%d" % server.address, token="t", key=server.key)
            channel = await socket.open("flood")
            await channel.recv()
            blocking = sync.Socket(socket._core)
            waiting = threading.Thread(target=lambda: list(blocking.volatile()), daemon=True)
            waiting.start()
            kept = server, running, socket, channel
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        print("done")
    """, "done")


def test_ctrl_c_ends_a_blocking_wait():
    run_program("""
        import os, signal, threading
        from udpack import sync
        # Whoever runs the tests in the background has the signal ignored, and Python keeps that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            sync.connect("192.0.2.1:9", reconnect={"first_too": True}, timeouts={"handshake": 600})
        except KeyboardInterrupt:
            print("interrupted")
    """, "interrupted")


def run_program(text: str, expected: str | None = None) -> None:
    """Runs a program to its end."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(text)], timeout=PATIENCE, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    if expected is not None:
        assert done.stdout.strip() == expected, done.stderr


async def test_many_threads_with_a_loop_each():
    server = echo()
    async with server.listen("127.0.0.1:0"):
        where, key = "%s:%d" % server.address, server.key
        answers: list[int] = []

        def work(number: int) -> None:
            async def main():
                async with udpack.connect(where, token="secret", key=key) as socket:
                    channel = await socket.open("echo")
                    for step in range(50):
                        await channel.send("n", number * 100 + step)
                    for step in range(50):
                        assert await channel.recv() == ("n", number * 100 + step)
                    answers.append(number)

            asyncio.run(main())

        await in_time(asyncio.gather(*(asyncio.to_thread(work, number) for number in range(4))))
        assert sorted(answers) == [0, 1, 2, 3]
