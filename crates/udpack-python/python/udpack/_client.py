"""Clients: sockets and channels for asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import Any, AsyncIterable, AsyncIterator, Generator, Iterable, Mapping

from . import _udpack
from ._bridge import run
from ._types import CloseReason, Position, PresenceChange, PresenceEntry, State, Volatile
from .errors import ClosedError, OpenError

__all__ = ["Channel", "Connecting", "ItemStream", "Message", "Presence", "Socket", "Subscription", "connect"]

Items = AsyncIterable[Any] | Iterable[Any]


async def _each(items: Items) -> AsyncIterator[Any]:
    if hasattr(items, "__aiter__"):
        async for item in items:  # type: ignore[union-attr]
            yield item
    else:
        for item in items:  # type: ignore[union-attr]
            yield item


async def _feed(sender: _udpack.ItemSender, items: Items) -> None:
    """Puts items into a stream until they end or nobody wants more."""
    try:
        async for item in _each(items):
            pushed = sender.push(item)
            if not (pushed if isinstance(pushed, bool) else await run(pushed)):
                return
    except BaseException:
        # Not the end of the stream: the request fails before it can be taken for one.
        raise
    else:
        sender.end()


class ItemStream:
    """The items that answer a request: an async iterator. Closing it, or dropping it, cancels the request."""

    def __init__(self, channel: "Channel", event: str, data: Any, timeout: float | None, items: Items | None) -> None:
        self._asked = (channel, event, data, timeout, items)
        self._reader: _udpack.ItemReader | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._queue: deque[Any] = deque()
        self._over = False

    @classmethod
    def _of(cls, reader: _udpack.ItemReader | None) -> "ItemStream":
        stream = cls.__new__(cls)
        stream._reader, stream._feeding, stream._queue = reader, None, deque()
        stream._over = reader is None
        return stream

    async def _begin(self) -> _udpack.ItemReader:
        channel, event, data, timeout, items = self._asked
        sender = None
        if items is not None:
            sender = _udpack.ItemSender()
            self._feeding = asyncio.ensure_future(_feed(sender, items))
        self._reader = await run(channel._core.request_items(event, data, timeout, sender))
        return self._reader

    def __aiter__(self) -> "ItemStream":
        return self

    async def __anext__(self) -> Any:
        queue = self._queue
        if not queue and not self._over:
            reader = self._reader or await self._begin()
            taking = run(reader.next(), self._put)
            if self._feeding is None:
                self._put(await taking)
            else:
                self._put(await _while_feeding(taking, self._feeding))
        if queue:
            item = queue.popleft()
            if isinstance(item, Exception):
                await self.aclose()
                raise item
            return item
        await self.aclose()
        raise StopAsyncIteration

    def _put(self, batch: list[Any] | None) -> None:
        if batch is None:
            self._over = True
        else:
            self._queue.extend(batch)

    async def aclose(self) -> None:
        """Wants no more items; a request that is not answered to its end is cancelled."""
        self._over = True
        self._queue.clear()
        if self._reader is not None:
            self._reader.stop()
        if self._feeding is not None:
            self._feeding.cancel()

    async def __aenter__(self) -> "ItemStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _while_feeding(waiting: Any, feeding: asyncio.Task[None]) -> Any:
    """Waits for an answer while items are sent; a failure of the items fails it."""
    asking = asyncio.ensure_future(waiting)
    try:
        if not feeding.done():
            await asyncio.wait({asking, feeding}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done() and feeding.done() and not feeding.cancelled():
            error = feeding.exception()
            if error is not None:
                raise error
        return await asking
    finally:
        asking.cancel()


class Message:
    """A received message with all that belongs to it. A request is answered with :meth:`reply` or :meth:`fault`."""

    __slots__ = ("_core",)

    def __init__(self, core: _udpack.Message) -> None:
        self._core = core

    @property
    def event(self) -> str:
        """Names what happened."""
        return self._core.event

    @property
    def data(self) -> Any:
        """The data, decoded anew each time."""
        return self._core.data

    @property
    def is_request(self) -> bool:
        """Whether the peer waits for an answer."""
        return self._core.is_request

    @property
    def deadline(self) -> float | None:
        """How many seconds the asker waits, from when it asked."""
        return self._core.deadline

    def raw(self) -> bytes:
        """The data as the MessagePack that came."""
        return self._core.raw()

    async def reply(self, data: Any = None) -> None:
        """Answers a request. For a message that is no request: does nothing."""
        await run(self._core.reply(data))

    async def fault(self, code: str, text: str, data: Any = None) -> None:
        """Refuses a request. For a message that is no request: does nothing."""
        await run(self._core.fault(code, text, data))


class Channel:
    """Ordered messages ``(event, data)`` both ways.

    ``async for event, data in channel`` ends when the peer has finished or closed in order, and raises
    :class:`ClosedError` for any other end. Leaving the loop loses nothing: the next one goes on. A request that arrives
    there is refused with ``no_handler``; who answers requests reads :meth:`messages`.

    When the last handle of a channel is gone, what is queued still goes out, then it ends.
    """

    __slots__ = ("_core", "_queue", "_whole")

    def __init__(self, core: _udpack.Channel) -> None:
        self._core = core
        self._queue: deque[tuple[str, Any]] = deque()
        self._whole: deque[_udpack.Message] = deque()

    @property
    def name(self) -> str:
        """The name it was opened with."""
        return self._core.name

    @property
    def id(self) -> int:
        """The opener's number for it."""
        return self._core.id

    @property
    def meta(self) -> Any:
        """What the opener said when opening."""
        return self._core.meta

    @property
    def peer(self) -> str | None:
        """The peer's id."""
        return self._core.peer

    def claim(self, key: str) -> str | None:
        """What the verifier knows of the peer besides its id."""
        return self._core.claim(key)

    @property
    def session_id(self) -> str:
        """The id of the socket it belongs to."""
        return self._core.session_id

    @property
    def resumable(self) -> bool:
        """Whether it outlives its connection."""
        return self._core.resumable

    @property
    def unconfirmed(self) -> int:
        """Messages of a resumable channel that the peer has not confirmed."""
        return self._core.unconfirmed

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait here to be sent."""
        return self._core.queued_bytes

    @property
    def socket(self) -> "Socket":
        """The socket it belongs to."""
        return Socket(self._core.socket())

    @property
    def close_reason(self) -> CloseReason | None:
        """How it ended, if it has."""
        reason = self._core.close_reason
        return None if reason is None else CloseReason(**reason)

    @property
    def positions(self) -> list[Position]:
        """How far this side has come in rooms with a history, messages that wait here to be taken included: for ``since``
        of :meth:`Socket.open`, once everything is taken."""
        return [Position(*position) for position in self._core.positions]

    async def send(self, event: str, data: Any = None) -> None:
        """Queues a message; waits while the queue is full because the peer or the link is slow.

        Cancelling it has queued the whole message or nothing.
        """
        op = self._core.send(event, data)
        if op is not None:
            await run(op)

    async def send_many(self, messages: Iterable[tuple[str, Any]]) -> None:
        """Queues messages, pairs of event and data, in order: in fewer steps than one :meth:`send` for each.

        When it raises or is cancelled, those before the failed one are queued, and none behind it.
        """
        messages = iter(messages)
        while batch := list(islice(messages, 512)):
            while batch and (stopped := self._core.send_many(batch)) is not None:
                queued, op = stopped
                await run(op)
                del batch[:queued]

    def try_send(self, event: str, data: Any = None) -> bool:
        """Queues a message if there is room now; says whether there was."""
        return self._core.try_send(event, data)

    async def request(
        self, event: str, data: Any = None, *, timeout: float | None = None, items: Items | None = None
    ) -> Any:
        """Asks the peer and gives its reply. ``items`` are sent behind the question, as the peer takes them.

        Cancelling it tells the peer, whose handler is stopped. The default of ``timeout`` is the socket's
        ``timeouts["request"]``; with items there is none.

        Raises :class:`Fault`, :class:`NoHandlerError`, :class:`RequestTimeoutError`, :class:`RequestCancelledError`,
        :class:`ClosedError`.
        """
        if items is None:
            return await run(self._core.request(event, data, timeout))
        sender = _udpack.ItemSender()
        asking = run(self._core.request(event, data, timeout, sender))
        feeding = asyncio.ensure_future(_feed(sender, items))
        try:
            return await _while_feeding(asking, feeding)
        finally:
            feeding.cancel()

    def stream(
        self, event: str, data: Any = None, *, timeout: float | None = None, items: Items | None = None
    ) -> ItemStream:
        """Asks for a stream of items: ``async for item in channel.stream("tail", "log")``."""
        return ItemStream(self, event, data, timeout, items)

    async def recv(self) -> tuple[str, Any] | None:
        """The next message; ``None`` after the peer has finished or closed in order. Cancelling it loses nothing."""
        queue = self._queue
        if not queue and not await self._fill():
            return None
        return queue.popleft()

    async def _fill(self) -> bool:
        while not self._queue:
            batch = await run(self._core.recv(False), self._rescue)
            if batch is None:
                return bool(self._queue)
            self._queue.extend(batch)
        return True

    def _rescue(self, batch: list[tuple[str, Any]] | None) -> None:
        self._queue.extend(batch or ())

    async def __aiter__(self) -> AsyncIterator[tuple[str, Any]]:
        queue = self._queue
        while True:
            while queue:
                yield queue.popleft()
            if not await self._fill():
                return
            # Others have their turn, too, when messages come faster than they are read.
            await asyncio.sleep(0)

    async def messages(self) -> AsyncIterator[Message]:
        """Messages with all that belongs to them, requests among them."""
        queue = self._whole
        while True:
            while queue:
                yield Message(queue.popleft())
            batch = await run(self._core.recv(True), lambda batch: queue.extend(batch or ()))
            if batch is None:
                return
            queue.extend(batch)
            await asyncio.sleep(0)

    async def finish(self) -> None:
        """Ends the sending direction and waits until everything sent has arrived."""
        await run(self._core.finish())

    async def close(self, number: int = 0, text: str = "") -> CloseReason:
        """Closes both directions: what is queued is still sent. Gives the reason that counts."""
        return CloseReason(**await run(self._core.close(number, text)))

    async def closed(self) -> CloseReason:
        """Waits until the channel is over."""
        return CloseReason(**await run(self._core.closed()))

    def join(self, room: str, *, start: str | tuple[int, int] | None = None) -> None:
        """At a server: joins a room. In one with a history the member begins where its opener was, or where ``start`` says:
        with what is sent from ``"now"`` on, with the ``"oldest"`` message, or behind a position, as epoch and offset."""
        self._core.join(room, start)

    def leave(self, room: str) -> bool:
        """At a server: leaves a room; says whether it was in it."""
        return self._core.leave(room)

    @property
    def rooms(self) -> list[str]:
        """At a server: the rooms it is in."""
        return self._core.rooms

    def track(self, room: str, meta: Any = None) -> None:
        """At a server: tells the room that this session is there, and what it says about itself."""
        self._core.track(room, meta)

    def untrack(self, room: str) -> bool:
        """At a server: takes the entry out of the room."""
        return self._core.untrack(room)

    def __repr__(self) -> str:
        return f"<udpack.Channel {self.name!r} #{self.id}>"


class Subscription:
    """A channel for listening to rooms, of a client that reconnects: made by :meth:`Socket.subscribe`.

    When its session is lost for good, it opens another channel of the same name and meta, which goes on where the last
    one was. In rooms with a history the program sees each message once, in order, or a :class:`Gap`.
    """

    __slots__ = ("_meta", "_priority", "_socket", "channel")

    def __init__(self, socket: "Socket", channel: Channel, meta: Any, priority: str) -> None:
        self._socket, self._meta, self._priority = socket, meta, priority
        self.channel = channel
        """The channel of this moment: to send on it, to ask something. Not to be read."""

    @property
    def positions(self) -> list[Position]:
        """How far it has come; see :attr:`Channel.positions`."""
        return self.channel.positions

    async def recv(self) -> tuple[str, Any] | None:
        """The next message, of this channel or of the next one; ``None`` after the server has finished. Cancelling it
        loses nothing. One at a time."""
        while True:
            try:
                return await self.channel.recv()
            except ClosedError as error:
                if error.by == "peer" or error.code not in ("not_resumed", "connection_lost", "moved"):
                    raise
            await self._open_again()

    async def _open_again(self) -> None:
        try:
            self.channel = await self._socket.open(
                self.channel.name, meta=self._meta, resumable=True, priority=self._priority,
                since=self.channel.positions,
            )
        except OpenError as error:
            # The socket is still looking for a connection.
            if error.code != "no_connection":
                raise

    async def __aiter__(self) -> AsyncIterator[tuple[str, Any]]:
        while (message := await self.recv()) is not None:
            yield message


class Socket:
    """A session with one peer. As an async context manager it is closed at the end of the block."""

    __slots__ = ("_core", "_volatile")

    def __init__(self, core: _udpack.Socket) -> None:
        self._core = core
        self._volatile: deque[tuple[str, Any, str | None]] = deque()

    @property
    def id(self) -> str:
        """The session's id."""
        return self._core.id

    @property
    def agent(self) -> str:
        """What the peer's program calls itself."""
        return self._core.agent

    @property
    def peer(self) -> str:
        """Who the peer is."""
        return self._core.peer

    @property
    def remote_address(self) -> tuple[str, int]:
        """The peer's address as of now."""
        return self._core.remote_address

    @property
    def is_connected(self) -> bool:
        """Whether the peer is there."""
        return self._core.is_connected

    @property
    def transport(self) -> str:
        """What carries the connection as of now: ``"quic"``, ``"wss"``, or ``"webtransport"`` with a browser."""
        return self._core.transport

    @property
    def expires_in(self) -> float | None:
        """Seconds that the token still counts."""
        return self._core.expires_in

    @property
    def state(self) -> State:
        """What the connection is doing."""
        return State.of(self._core.state)

    @property
    def close_reason(self) -> CloseReason | None:
        """How it ended, if it has."""
        reason = self._core.close_reason
        return None if reason is None else CloseReason(**reason)

    def stats(self) -> dict[str, Any]:
        """Bytes and packets so far, and the round-trip time in seconds."""
        return self._core.stats()

    async def open(
        self, name: str, *, meta: Any = None, resumable: bool = False, priority: str = "normal",
        since: Iterable[Position] = (),
    ) -> Channel:
        """Opens a channel. A ``resumable`` one outlives its connection; ``priority`` is ``"bulk"``, ``"normal"`` or
        ``"high"``. It costs no round trip: whether the peer serves the name shows in what follows.

        ``since`` are the ``positions`` of another channel: in rooms with a history it goes on where that one was.
        """
        return Channel(await run(self._core.open(name, meta, resumable, priority, [tuple(at) for at in since])))

    async def subscribe(self, name: str, *, meta: Any = None, priority: str = "normal") -> "Subscription":
        """Opens a channel for listening to rooms, and another each time that it is lost because its session was."""
        return Subscription(self, await self.open(name, meta=meta, resumable=True, priority=priority), meta, priority)

    async def accept_channel(self) -> Channel | None:
        """The next channel that the peer opens; ``None`` when the socket is over."""
        core = await run(self._core.accept_channel())
        return None if core is None else Channel(core)

    def send_volatile(self, event: str, data: Any = None, *, key: str | None = None) -> None:
        """Sends something of which only the newest of its event and key counts. It may be lost."""
        self._core.send_volatile(event, data, key)

    async def volatile(self) -> AsyncIterator[Volatile]:
        """The peer's volatile messages; a newer one takes the place of one that nobody has taken yet."""
        queue = self._volatile
        while True:
            while queue:
                yield Volatile(*queue.popleft())
            batch = await run(self._core.recv_volatile(), lambda batch: queue.extend(batch or ()))
            if batch is None:
                return
            queue.extend(batch)

    async def states(self) -> AsyncIterator[State]:
        """What the connection is doing: now, and each change. Ends with ``"closed"``."""
        states = self._core.states()
        while (state := await run(states.next())) is not None:
            yield State.of(state)

    async def refresh(self, token: str) -> None:
        """Presents a new token for the same identity."""
        await run(self._core.refresh(token))

    async def close(self, number: int = 0, text: str = "") -> CloseReason:
        """Closes in order: what is queued goes out and is acknowledged. Gives the reason that counts."""
        return CloseReason(**await run(self._core.close(number, text)))

    def abort(self, number: int = 0, text: str = "") -> None:
        """Closes now: what is queued is lost."""
        self._core.abort(number, text)

    async def closed(self) -> CloseReason:
        """Waits until the socket is over."""
        return CloseReason(**await run(self._core.closed()))

    async def __aenter__(self) -> "Socket":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<udpack.Socket {self.id} {self.state.name}>"


class Connecting:
    """What :func:`connect` returns: to be awaited, or entered with ``async with``."""

    __slots__ = ("_url", "_settings", "_socket")

    def __init__(self, url: str, settings: dict[str, Any]) -> None:
        self._url, self._settings = url, settings
        self._socket: Socket | None = None

    async def _connect(self) -> Socket:
        return Socket(await run(_udpack.connect(self._url, self._settings)))

    def __await__(self) -> Generator[Any, None, Socket]:
        return self._connect().__await__()

    async def __aenter__(self) -> Socket:
        self._socket = await self._connect()
        return self._socket

    async def __aexit__(self, *_: object) -> None:
        if self._socket is not None:
            await self._socket.close()


def settings(
    token: str | None, key: str | None, reconnect: bool | Mapping[str, Any], agent: str | None,
    timeouts: Mapping[str, float] | None, limits: Mapping[str, int] | None, local_address: str | None,
    transport: str, proxy: str | bool,
) -> dict[str, Any]:
    """The arguments of ``connect`` without those that are not given."""
    given: dict[str, Any] = {
        "token": token, "key": key, "agent": agent, "local_address": local_address,
        "transport": transport, "proxy": proxy,
        "reconnect": reconnect if isinstance(reconnect, bool) else dict(reconnect),
        "timeouts": None if timeouts is None else dict(timeouts),
        "limits": None if limits is None else dict(limits),
    }
    return {name: value for name, value in given.items() if value is not None}


def connect(
    url: str, *, token: str | None = None, key: str | None = None, reconnect: bool | Mapping[str, Any] = True,
    agent: str | None = None, timeouts: Mapping[str, float] | None = None, limits: Mapping[str, int] | None = None,
    local_address: str | None = None, transport: str = "auto", proxy: str | bool = True,
) -> Connecting:
    """Connects to ``udpack://TOKEN@HOST:PORT#sha256:…``, or to ``HOST:PORT`` with ``token`` and ``key``.

    ``key`` is the fingerprint of the server's public key; without one the platform's CAs decide. A socket comes back by
    itself when its connection is lost, unless ``reconnect`` is ``False``; as a dict it sets ``attempts``, ``patience``,
    ``first``, ``most`` (seconds) and ``first_too``. ``timeouts`` (seconds) and ``limits`` replace single defaults by
    name. ``transport`` is ``"auto"``: QUIC, and 250 ms later TCP (a WebSocket) as well, for networks that let no UDP pass;
    each reconnect chooses again. ``"quic"`` and ``"wss"`` take one alone. Connections over TCP go through the HTTP proxy
    ``proxy``, ``"http://USER:PASSWORD@HOST:PORT"``; ``True`` means that of ``https_proxy`` or ``all_proxy``, as curl reads
    them, ``False`` none. Servers in ``no_proxy`` are reached without one.

    Raises :class:`ConnectError`, and :class:`AuthError` when the server refuses or is another one.
    """
    return Connecting(url, settings(token, key, reconnect, agent, timeouts, limits, local_address, transport, proxy))


class Presence:
    """Who is present in one room, built from the messages of a channel: pass each to :meth:`apply`."""

    __slots__ = ("_core", "room")

    def __init__(self, room: str) -> None:
        self._core = _udpack.PresenceMap(room)
        self.room = room

    def apply(self, event: str, data: Any) -> PresenceChange | None:
        """Takes a message in; gives who joined and who left, or ``None`` for a message about something else."""
        changed = self._core.apply(event, data)
        if changed is None:
            return None
        joins, leaves, why = changed
        return PresenceChange([PresenceEntry(*entry) for entry in joins], [PresenceEntry(*entry) for entry in leaves], why)

    @property
    def peers(self) -> list[str]:
        """The ids of those present, in order."""
        return self._core.peers

    def metas(self, peer: str) -> list[Any]:
        """What each session of a peer says about itself."""
        return self._core.metas(peer)

    def __len__(self) -> int:
        return len(self._core)

    def __contains__(self, peer: str) -> bool:
        return peer in self._core.peers
