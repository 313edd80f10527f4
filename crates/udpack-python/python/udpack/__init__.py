"""Reliable UDP sessions with msgpack channels, and verified file transfer, for asyncio.

::

    import asyncio, udpack

    async def main():
        async with udpack.connect("udpack://TOKEN@192.0.2.7:45456#sha256:…") as socket:
            chat = await socket.open("chat", resumable=True)
            await chat.send("say", {"text": "hello"})
            members = await chat.request("members", "hall", timeout=5)
            async for event, data in chat:
                print(event, data)

    asyncio.run(main())

``udpack.sync`` is the same for programs without an event loop. Exceptions are in ``udpack.errors``.
"""

from __future__ import annotations

import os

from . import _udpack
from ._client import Channel, Connecting, ItemStream, Message, Presence, Socket, Subscription, connect
from ._server import Admission, Call, Member, Room, Server
from ._transfer import download, listing, remove, upload
from ._types import CLOSE_CODES, CloseReason, Entry, Outcome, Position, PresenceChange, PresenceEntry, Progress, Sent, State, Volatile
from ._udpack import DEFAULT_PORT, Timestamp, __version__
from .errors import (
    AuthError, BindError, ClosedError, ConnectError, EncodeError, Fault, ForkedError, Gap, NoHandlerError, OpenError,
    ProtocolError, RequestCancelledError, RequestError, RequestTimeoutError, RoomError, TransferError, UdpackError,
)

os.register_at_fork(after_in_child=_udpack.forked)

__all__ = [
    "CLOSE_CODES", "DEFAULT_PORT", "Admission", "AuthError", "BindError", "Call", "Channel", "CloseReason",
    "ClosedError", "ConnectError", "Connecting", "EncodeError", "Entry", "Fault", "ForkedError", "Gap", "ItemStream",
    "Member", "Message", "NoHandlerError", "OpenError", "Outcome", "Position", "Presence", "PresenceChange", "PresenceEntry", "Progress",
    "ProtocolError", "RequestCancelledError", "RequestError", "RequestTimeoutError", "Room", "RoomError", "Sent",
    "Server", "Socket", "State", "Subscription", "Timestamp", "TransferError", "UdpackError", "Volatile", "__version__", "connect",
    "download", "listing", "remove", "upload",
]
