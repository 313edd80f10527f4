"""Uploads a directory with a bar, without an event loop. What is counted as done is whole, verified and on the server's disk.

Run it with `python examples/python/upload.py PATH URL`, with the URL that `udpack-server` printed; or without arguments,
with a server of its own. It needs tqdm.
"""

import asyncio
import sys
import tempfile
import threading
from pathlib import Path

from tqdm import tqdm

import udpack
from udpack import sync


def upload(what: Path, to: str) -> list[udpack.Outcome]:
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=what.name) as bar:

        def show(progress: udpack.Progress) -> None:
            bar.total = progress.total
            bar.update(progress.bytes - bar.n)

        return sync.upload(to, what, progress=show)


def demo() -> None:
    """A server in a thread, and something to send."""
    with tempfile.TemporaryDirectory() as directory:
        photos = Path(directory, "photos")
        photos.mkdir()
        for number in range(4):
            (photos / f"{number}.jpg").write_bytes(bytes([number]) * (3 << 20))
        server = udpack.Server(tokens={"secret": "guest"}, uploads=Path(directory, "store"))
        loop, running, over = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

        async def serve() -> None:
            async with server.listen("127.0.0.1:0"):
                running.set()
                await over.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        running.wait()
        try:
            outcomes = upload(photos, "udpack://secret@%s:%d#%s" % (*server.address, server.key))
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join()
        print(f"{len(outcomes)} files, {sum(one.size for one in outcomes)} bytes are stored")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        upload(Path(sys.argv[1]), sys.argv[2])
    else:
        demo()
