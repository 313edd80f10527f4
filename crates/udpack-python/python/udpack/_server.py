"""Servers for asyncio: handlers of channels and events, rooms, presence."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from contextlib import asynccontextmanager
from typing import Any, AsyncIterator, Awaitable, Callable, Mapping, NamedTuple, TypeVar

from . import _udpack
from ._bridge import run
from ._client import Channel, ItemStream, Socket, _feed
from ._types import Position, Sent
from .errors import Fault, UdpackError

__all__ = ["Admission", "Call", "Member", "Room", "Server"]

log = logging.getLogger("udpack")
Handler = TypeVar("Handler", bound=Callable[..., Any])


class Call:
    """One message that a handler is called with, as its second argument."""

    __slots__ = ("_core", "_channel")

    def __init__(self, core: _udpack.Call) -> None:
        self._core = core
        self._channel: Channel | None = None

    @property
    def event(self) -> str:
        """Names what happened."""
        return self._core.event

    @property
    def is_request(self) -> bool:
        """Whether the peer waits for the answer."""
        return self._core.is_request

    @property
    def channel(self) -> Channel:
        """The channel that it came on; to send back, and to join rooms."""
        if self._channel is None:
            self._channel = Channel(self._core.channel)
        return self._channel

    @property
    def peer(self) -> str | None:
        """Who sent it."""
        return self.channel.peer

    def items(self) -> ItemStream:
        """The stream behind the request: an async iterator, once."""
        return ItemStream._of(self._core.items())


class Admission(NamedTuple):
    """A client that presents a token: what ``Server(auth=…)`` is called with."""

    token: str
    agent: str
    remote: tuple[str, int]


class Member(NamedTuple):
    """A channel in a room."""

    peer: str | None
    session: str
    channel: str


class Room:
    """The channels in a room. A message to it is encoded once and never waits for a slow member."""

    __slots__ = ("_server", "name")

    def __init__(self, server: "Server", name: str) -> None:
        self._server, self.name = server, name

    def send(self, event: str, data: Any = None, *, but: Channel | None = None) -> Sent:
        """Sends to every member, but for those of the session of ``but``."""
        session = None if but is None else but.session_id
        return Sent(*self._server._running.broadcast(self.name, event, data, session))

    def send_volatile(
        self, event: str, data: Any = None, *, key: str | None = None, but: Channel | None = None
    ) -> Sent:
        """Sends a message of which only the newest counts."""
        session = None if but is None else but.session_id
        return Sent(*self._server._running.broadcast_volatile(self.name, event, data, key, session))

    @property
    def members(self) -> list[Member]:
        """Who is in it."""
        return [Member(*member) for member in self._server._running.members(self.name)]

    def overflow(self, policy: str, messages: int = 1024) -> None:
        """What becomes of slow members: ``"drop_oldest"``, ``"drop_newest"``, ``"latest_only"``, ``"disconnect"``, or in a
        room with a history ``"recover"``, its default: they lose nothing that it still has."""
        self._server._running.policy(self.name, policy, messages)

    def history(self, messages: int | None = 1000, *, bytes: int = 1 << 20, age: float = 300.0) -> None:
        """Keeps so many messages, of so many bytes, for so many seconds, for members that were away or are slow;
        ``None`` keeps none. Who joins with a position gets what it missed, in order, or a :class:`Gap`."""
        bounds = None if messages is None else (messages, bytes, age)
        self._server._running.history(self.name, bounds)

    @property
    def position(self) -> Position | None:
        """Where its history is."""
        position = self._server._running.position(self.name)
        return None if position is None else Position(self.name, *position)


class Server:
    """A server: handlers first, then ``async with server.listen("0.0.0.0:45456"):`` or ``await server.serve(…)``.

    ``keys``
        The directory of its key, made if need be; without one the key lasts as long as the process.
    ``tokens``
        A token file's path, made if need be, or a dict of token and peer id.
    ``auth``
        Instead: an async function of an :class:`Admission`, which returns the peer's id, or id and claims, or ``None``
        to refuse.
    ``uploads``
        A directory for files. ``allow_read``, ``allow_overwrite`` and ``allow_delete`` say what clients may do
        besides adding to it.
    """

    def __init__(
        self, *, keys: str | os.PathLike[str] | None = None,
        tokens: str | os.PathLike[str] | Mapping[str, str] | None = None,
        auth: Callable[[Admission], Awaitable[Any]] | None = None, uploads: str | os.PathLike[str] | None = None,
        allow_read: bool = False, allow_overwrite: bool = False, allow_delete: bool = False,
        timeouts: Mapping[str, float] | None = None, limits: Mapping[str, int] | None = None,
    ) -> None:
        if (tokens is None) == (auth is None):
            raise ValueError("a server needs tokens or auth, and not both")
        self._settings: dict[str, Any] = {
            "keys": None if keys is None else os.fspath(keys),
            "tokens": dict(tokens) if isinstance(tokens, Mapping) else tokens and os.fspath(tokens),
            "uploads": None if uploads is None else os.fspath(uploads),
            "allow_read": allow_read, "allow_overwrite": allow_overwrite, "allow_delete": allow_delete,
            "timeouts": None if timeouts is None else dict(timeouts),
            "limits": None if limits is None else dict(limits),
        }
        self._auth = auth
        self._channels: dict[str, Callable[[Channel], Awaitable[None]]] = {}
        self._routes: dict[str, dict[str, tuple[Callable[..., Any], int]]] = {}
        self._concurrency: dict[str, int] = {}
        self._core: _udpack.Server | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def channel(self, name: str) -> Callable[[Handler], Handler]:
        """Serves channels of this name by an async function of the :class:`Channel`. When it returns, the channel
        ends; when it raises, the channel is closed with ``handler_failed``."""

        def register(handler: Handler) -> Handler:
            if name in self._routes or name in self._channels:
                raise ValueError(f"channel {name!r} is served already")
            self._channels[name] = handler
            return handler

        return register

    def on(self, channel: str, event: str, *, concurrency: int | None = None) -> Callable[[Handler], Handler]:
        """Calls a function with the data of each message of an event, and with its :class:`Call` if it takes a second
        argument.

        What it returns answers a request; an async generator answers with a stream. Raising :class:`Fault` refuses
        it. A handler whose asker gives up, or whose time is over, is cancelled. ``concurrency``, the same for all
        events of a channel, says how many handlers of one channel may run at once; 1 by default.
        """

        def register(handler: Handler) -> Handler:
            if channel in self._channels:
                raise ValueError(f"channel {channel!r} is served already")
            takes = _arguments(handler)
            self._routes.setdefault(channel, {})[event] = (handler, takes)
            if concurrency is not None:
                self._concurrency[channel] = concurrency
            return handler

        return register

    def to(self, room: str) -> Room:
        """A room: its members, and sending to them."""
        return Room(self, room)

    @property
    def _running(self) -> _udpack.Server:
        if self._core is None:
            raise UdpackError("the server does not run", code="stopped")
        return self._core

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self._running.address

    @property
    def tcp_address(self) -> tuple[str, int] | None:
        """Where it listens on TCP, if it does."""
        return self._running.tcp_address

    @property
    def key(self) -> str:
        """The fingerprint of its key, as clients expect it."""
        return self._running.key

    @property
    def rooms(self) -> list[str]:
        """The names of its rooms."""
        return self._running.room_names

    @property
    def sockets(self) -> list[Socket]:
        """The sockets of its clients."""
        return [Socket(core) for core in self._running.sockets()]

    def revoke(self, peer: str) -> int:
        """Closes the sockets of a peer at once, with ``auth_revoked``; gives how many."""
        return self._running.revoke(peer)

    @asynccontextmanager
    async def listen(self, address: str = "0.0.0.0:45456", *, tcp: bool | None = None) -> AsyncIterator["Server"]:
        """Serves at this address until the end of the block; then closes everything.

        ``tcp``: whether clients whose network lets no UDP pass may come over TCP, at the same port number. True raises
        :class:`BindError` where that is taken; ``None`` goes without then, and logs a warning.
        """
        if self._core is not None:
            raise UdpackError("the server runs already", code="running")
        routes = [(name, self._concurrency.get(name, 1)) for name in self._routes]
        self._core = await run(_udpack.bind(address, list(self._channels), routes, self._settings, tcp))
        if self._core.no_tcp is not None:
            log.warning("not listening on TCP, so only clients that reach %s:%d over UDP can connect: %s", *self.address, self._core.no_tcp)
        asking = asyncio.ensure_future(self._answer(self._core))
        try:
            yield self
        finally:
            core, self._core = self._core, None
            try:
                await run(core.close())
            finally:
                tasks = [asking, *self._tasks.values()]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def serve(self, address: str = "0.0.0.0:45456", *, tcp: bool | None = None) -> None:
        """Serves until it is cancelled; ``tcp`` as for :meth:`listen`."""
        async with self.listen(address, tcp=tcp):
            await asyncio.get_running_loop().create_future()

    async def drain(self, within: float = 30.0) -> None:
        """Sends the clients away and lets what runs finish, within some seconds."""
        await run(self._running.drain(within))

    async def _answer(self, core: _udpack.Server) -> None:
        while (questions := await run(core.questions())) is not None:
            while questions:
                kind, number, question = questions.pop(0)
                if kind == "given_up":
                    task = self._tasks.get(number)
                    if task is not None:
                        task.cancel()
                    continue
                if kind == "message":
                    work = self._message(question)
                elif kind == "channel":
                    work = self._serve(question)
                else:
                    work = self._judge(question)
                task = asyncio.ensure_future(work)
                self._tasks[number] = task
                task.add_done_callback(lambda _, number=number: self._tasks.pop(number, None))
                # What is served must not live until the next question.
                del question, work, task

    async def _serve(self, served: _udpack.Served) -> None:
        channel = Channel(served.channel)
        error: str | None = "the handler was cancelled"
        try:
            await self._channels[channel.name](channel)
            error = None
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            log.exception("the handler of channel %r failed", channel.name)
        finally:
            served.done(error)

    async def _message(self, core: _udpack.Call) -> None:
        call = Call(core)
        route = self._routes[core.channel_name].get(core.event)
        if route is None:
            core.fault("no_handler", "there is no handler for this event")
            return
        handler, takes = route
        try:
            answer = handler(core.data, call) if takes > 1 else handler(core.data)
            if inspect.isasyncgen(answer):
                await _answer_stream(core, answer)
                return
            if inspect.isawaitable(answer):
                answer = await answer
            core.reply(answer)
        except Fault as fault:
            core.fault(fault.code, str(fault), fault.detail)
        except Exception:
            log.exception("the handler of event %r failed", core.event)
            core.fault("internal", "the handler failed")

    async def _judge(self, judged: _udpack.Judged) -> None:
        try:
            assert self._auth is not None
            peer = await self._auth(Admission(judged.token, judged.agent, judged.remote))
        except Exception:
            log.exception("the judge of tokens failed")
            peer = None
        if peer is None:
            judged.deny()
        elif isinstance(peer, str):
            judged.admit(peer)
        else:
            judged.admit(*peer)


async def _answer_stream(core: _udpack.Call, items: Any) -> None:
    sender = _udpack.ItemSender()
    core.stream(sender)
    try:
        await _feed(sender, items)
    except Fault as fault:
        await _fail(sender, fault.code, str(fault), fault.detail)
    except Exception:
        log.exception("the stream that answers %r failed", core.event)
        await _fail(sender, "internal", "the handler failed", None)
    finally:
        sender.end()
        await items.aclose()


async def _fail(sender: _udpack.ItemSender, code: str, text: str, detail: Any) -> None:
    failed = sender.fail(code, text, detail)
    if not isinstance(failed, bool):
        await run(failed)


def _arguments(handler: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(handler).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return 2
    return sum(parameter.kind in kinds for parameter in parameters)
