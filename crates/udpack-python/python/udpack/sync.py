"""udpack without an event loop: every call waits on its own thread.

::

    from udpack import sync

    with sync.connect(url) as socket:
        chat = socket.open("chat")
        chat.send("say", "hello")
        print(chat.request("members", "hall", timeout=5))
        for event, data in chat:
            print(event, data)

Other threads go on meanwhile, and Ctrl-C ends the wait. One object may be used by several threads. Arguments and
exceptions are those of the asyncio classes. Servers need asyncio.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping

from . import _transfer, _udpack
from ._client import settings
from ._transfer import OnProgress, Tally, What
from ._types import CloseReason, Entry, Outcome, State, Volatile

__all__ = ["Channel", "Socket", "connect", "download", "listing", "remove", "upload"]


class Channel:
    """Ordered messages ``(event, data)`` both ways; see :class:`udpack.Channel`."""

    def __init__(self, core: _udpack.Channel) -> None:
        self._core = core
        self._queue: deque[tuple[str, Any]] = deque()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The name it was opened with."""
        return self._core.name

    @property
    def close_reason(self) -> CloseReason | None:
        """How it ended, if it has."""
        reason = self._core.close_reason
        return None if reason is None else CloseReason(**reason)

    def send(self, event: str, data: Any = None) -> None:
        """Queues a message; waits while the queue is full."""
        op = self._core.send(event, data)
        if op is not None:
            op.wait()

    def request(
        self, event: str, data: Any = None, *, timeout: float | None = None, items: Iterable[Any] | None = None
    ) -> Any:
        """Asks the peer and gives its reply. ``items`` are read by a thread of their own."""
        if items is None:
            return self._core.request(event, data, timeout).wait()
        sender = _udpack.ItemSender()
        op = self._core.request(event, data, timeout, sender)
        feeding = _Feeding(sender, items)
        return feeding.result(op)

    def stream(
        self, event: str, data: Any = None, *, timeout: float | None = None, items: Iterable[Any] | None = None
    ) -> Iterator[Any]:
        """Asks for a stream of items. Closing the iterator, or leaving its loop, cancels the request."""
        feeding, sender = None, None
        if items is not None:
            sender = _udpack.ItemSender()
            feeding = _Feeding(sender, items)
        reader = self._core.request_items(event, data, timeout, sender).wait()
        try:
            while True:
                op = reader.next()
                batch = op.wait() if feeding is None else feeding.result(op)
                if batch is None:
                    return
                for item in batch:
                    if isinstance(item, Exception):
                        raise item
                    yield item
        finally:
            reader.stop()

    def recv(self, timeout: float | None = None) -> tuple[str, Any] | None:
        """The next message; ``None`` after the peer has finished or closed in order. Raises ``TimeoutError`` when none
        came within ``timeout`` seconds; then nothing is lost."""
        with self._lock:
            while not self._queue:
                batch = self._core.recv(False).wait(timeout)
                if batch is None:
                    return None
                self._queue.extend(batch)
            return self._queue.popleft()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        while (message := self.recv()) is not None:
            yield message

    def finish(self) -> None:
        """Ends the sending direction and waits until everything sent has arrived."""
        self._core.finish().wait()

    def close(self, number: int = 0, text: str = "") -> CloseReason:
        """Closes both directions: what is queued is still sent."""
        return CloseReason(**self._core.close(number, text).wait())


class _Feeding:
    """A thread that puts items into a stream."""

    def __init__(self, sender: _udpack.ItemSender, items: Iterable[Any]) -> None:
        self._sender, self._items = sender, items
        self._failed: BaseException | None = None
        threading.Thread(target=self._run, name="udpack items", daemon=True).start()

    def _run(self) -> None:
        try:
            for item in self._items:
                pushed = self._sender.push(item)
                if not (pushed if isinstance(pushed, bool) else pushed.wait()):
                    return
            self._sender.end()
        except BaseException as failure:
            self._failed = failure

    def result(self, op: _udpack.Op) -> Any:
        """Waits for an operation; a failure of the items fails it."""
        while True:
            if self._failed is not None:
                op.cancel()
                raise self._failed
            if op.ready(0.1):
                return op.take()


class Socket:
    """A session with one peer; closed at the end of a ``with`` block. See :class:`udpack.Socket`."""

    def __init__(self, core: _udpack.Socket) -> None:
        self._core = core

    @property
    def id(self) -> str:
        """The session's id."""
        return self._core.id

    @property
    def is_connected(self) -> bool:
        """Whether the peer is there."""
        return self._core.is_connected

    @property
    def transport(self) -> str:
        """What carries the connection as of now; see :attr:`udpack.Socket.transport`."""
        return self._core.transport

    @property
    def state(self) -> State:
        """What the connection is doing."""
        return State.of(self._core.state)

    def open(
        self, name: str, *, meta: Any = None, resumable: bool = False, priority: str = "normal"
    ) -> Channel:
        """Opens a channel."""
        return Channel(self._core.open(name, meta, resumable, priority).wait())

    def send_volatile(self, event: str, data: Any = None, *, key: str | None = None) -> None:
        """Sends something of which only the newest counts."""
        self._core.send_volatile(event, data, key)

    def volatile(self) -> Iterator[Volatile]:
        """The peer's volatile messages."""
        while (batch := self._core.recv_volatile().wait()) is not None:
            for message in batch:
                yield Volatile(*message)

    def close(self, number: int = 0, text: str = "") -> CloseReason:
        """Closes in order: what is queued goes out and is acknowledged."""
        return CloseReason(**self._core.close(number, text).wait())

    def __enter__(self) -> "Socket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    url: str, *, token: str | None = None, key: str | None = None, reconnect: bool | Mapping[str, Any] = True,
    agent: str | None = None, timeouts: Mapping[str, float] | None = None, limits: Mapping[str, int] | None = None,
    local_address: str | None = None, transport: str = "auto", proxy: str | bool = True,
) -> Socket:
    """Connects; see :func:`udpack.connect`."""
    given = settings(token, key, reconnect, agent, timeouts, limits, local_address, transport, proxy)
    return Socket(_udpack.connect(url, given).wait())


def _follow(over: _udpack.Link, transfer: _udpack.Transfer, progress: OnProgress | None, own: bool) -> list[Outcome]:
    tally = Tally(progress)
    try:
        while (events := transfer.next().wait()) is not None:
            tally.take(events)
    finally:
        transfer.close().wait()
    if own:
        over.close().wait()
    return tally.result()


def upload(
    to: str | Socket, what: What | Iterable[What] | Mapping[str, What], *, remote: str | None = None,
    progress: OnProgress | None = None, if_exists: str = "same", lanes: int | None = None, preserve: bool = False,
    resume: bool = True, limit: int | None = None, **connect: Any,
) -> list[Outcome]:
    """Sends files; see :func:`udpack.upload`."""
    over = _transfer.link(to, connect)  # type: ignore[arg-type]
    given = _transfer.options(if_exists=if_exists, lanes=lanes, preserve=preserve, resume=resume, limit=limit)
    return _follow(over, over.upload(_transfer.sources(what, remote), given), progress, isinstance(to, str))


def download(
    of: str | Socket, remote: str, local: str | os.PathLike[str] | None = None, *,
    progress: OnProgress | None = None, if_exists: str = "same", lanes: int | None = None, preserve: bool = False,
    limit: int | None = None, **connect: Any,
) -> bytes | list[Outcome]:
    """Gets a file or a directory; see :func:`udpack.download`."""
    over = _transfer.link(of, connect)  # type: ignore[arg-type]
    own = isinstance(of, str)
    if local is None:
        data, _ = over.fetch(remote).wait()
        if own:
            over.close().wait()
        return data
    (root,) = over.entries(remote, False, False).wait()
    entries = over.entries(remote, True, True).wait() if root["kind"] == "dir" else []
    dir, files = _transfer.wanted(entries, root, Path(local))
    given = _transfer.options(if_exists=if_exists, lanes=lanes, preserve=preserve, limit=limit)
    return _follow(over, over.download(files, str(dir), given), progress, own)


def listing(of: str | Socket, remote: str | None = None, *, recursive: bool = False, **connect: Any) -> list[Entry]:
    """What is at a server; see :func:`udpack.listing`."""
    over = _transfer.link(of, connect)  # type: ignore[arg-type]
    entries = over.entries(remote, recursive, True).wait()
    if isinstance(of, str):
        over.close().wait()
    return [Entry(**entry) for entry in entries]


def remove(of: str | Socket, remote: str, *, recursive: bool = False, **connect: Any) -> tuple[int, int]:
    """Removes a file or a directory at a server; see :func:`udpack.remove`."""
    over = _transfer.link(of, connect)  # type: ignore[arg-type]
    removed = over.remove(remote, recursive).wait()
    if isinstance(of, str):
        over.close().wait()
    return removed
