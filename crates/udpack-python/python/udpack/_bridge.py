"""Operations of the Rust core as awaitables.

An operation is polled by the event loop's own thread. A socket pair tells the loop which operations can go on: one
wake for as many as are ready, and no thread of the core needs the GIL for it.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, Callable

from . import _udpack

__all__ = ["run"]


class _Waiting:
    """The operations that one event loop waits for."""

    __slots__ = ("bridge", "entries", "__weakref__")

    def __init__(self) -> None:
        self.bridge = _udpack.Bridge()
        self.entries: dict[int, tuple[_udpack.Op, asyncio.Future[None]]] = {}

    def ready(self) -> None:
        for number in self.bridge.woken():
            entry = self.entries.get(number)
            if entry is None:
                continue
            op, future = entry
            # One that was cancelled a moment ago must take nothing: nobody would get it.
            if future.done():
                continue
            try:
                if not op.poll(self.bridge):
                    continue
            except BaseException as error:
                del self.entries[number]
                future.set_exception(error)
                continue
            del self.entries[number]
            future.set_result(None)


_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Waiting] = weakref.WeakKeyDictionary()


def _waiting(loop: asyncio.AbstractEventLoop) -> _Waiting:
    waiting = _loops.get(loop)
    if waiting is None:
        waiting = _Waiting()
        loop.add_reader(waiting.bridge.fileno(), waiting.ready)
        _loops[loop] = waiting
    return waiting


async def run(op: _udpack.Op, rescue: Callable[[Any], None] | None = None) -> Any:
    """Waits for an operation and gives its result.

    Cancelling it drops the operation. If the result was there already, ``rescue`` gets it.
    """
    loop = asyncio.get_running_loop()
    waiting = _waiting(loop)
    if op.poll(waiting.bridge):
        return op.take()
    future = loop.create_future()
    number = op.id
    waiting.entries[number] = (op, future)
    try:
        await future
    except BaseException:
        waiting.entries.pop(number, None)
        if rescue is not None and future.done() and not future.cancelled() and future.exception() is None:
            try:
                result = op.take()
            except Exception:
                pass
            else:
                rescue(result)
        op.cancel()
        raise
    return op.take()
