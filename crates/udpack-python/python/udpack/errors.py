"""What can go wrong, and what it is called.

Every exception has

``code``
    What went wrong, for programs: the name of a close code (``"forbidden"``), the code of a fault (``"no_handler"``),
    or the kind of trouble of a file (``"not_found"``).
``number``
    The number of the close code, if it is one.
``retry``
    Whether trying again later can help.
``by``
    Who ended it: ``"local"``, ``"peer"`` or ``"transport"``; of :class:`ClosedError` and its like.
``detail``
    What the other side added: the data of a fault, the text of a close.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = [
    "AuthError", "BindError", "ClosedError", "ConnectError", "EncodeError", "Fault", "ForkedError", "Gap",
    "NoHandlerError", "OpenError", "ProtocolError", "RequestCancelledError", "RequestError", "RequestTimeoutError",
    "RoomError", "TransferError", "UdpackError",
]


class UdpackError(Exception):
    """Everything that udpack raises, but for wrong arguments."""

    def __init__(
        self, text: str = "", *, code: str = "internal", number: int | None = None, retry: bool = False,
        by: str | None = None, detail: Any = None,
    ) -> None:
        super().__init__(text)
        self.code = code
        self.number = number
        self.retry = retry
        self.by = by
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, self.__dict__


class ForkedError(UdpackError):
    """This process was forked after its parent had used udpack, whose threads are gone here."""


class ConnectError(UdpackError):
    """There is no connection."""


class AuthError(ConnectError):
    """The server refused the token, or is not the one that was expected."""


class BindError(UdpackError):
    """A server could not start."""


class OpenError(UdpackError):
    """A channel could not be opened."""


class EncodeError(UdpackError, ValueError):
    """The message cannot be sent: an unsound event, too large, or of a type that MessagePack does not have."""


class ClosedError(UdpackError):
    """The channel or the socket is over."""


class ProtocolError(ClosedError):
    """The peer broke the protocol; the channel was closed for it."""


class RequestError(UdpackError):
    """A request has no reply."""


class Fault(RequestError):
    """The peer's handler refused. A handler raises it to refuse: ``raise Fault("no such room", code="not_found")``."""


class NoHandlerError(RequestError):
    """The peer has no handler for the event."""


class RequestCancelledError(RequestError):
    """The peer's handler was stopped before it answered."""


class RequestTimeoutError(RequestError, TimeoutError):
    """No reply came in time."""


class RoomError(UdpackError):
    """A channel cannot join a room, or be tracked in it."""


class TransferError(UdpackError):
    """A file was not transferred. Of several, ``failed`` has the path and the error of each."""

    failed: list[tuple[str, "TransferError"]] = []
    outcomes: list[Any] = []


class Gap(NamedTuple):
    """Messages of a room that this member will not get. Arrives as the data of the event ``"$gap"``.

    In a room with a history ``first`` and ``last`` are the offsets of those that are missing, in ``epoch``, and ``why``
    says why: ``"slow"``, this member was; ``"gone"``, they are not kept any more; ``"epoch"``, the history is another one
    than the member knew, and how many are missing of that one nobody knows (``lost`` may be 0).
    """

    room: str
    lost: int
    epoch: int | None = None
    first: int | None = None
    last: int | None = None
    why: str | None = None
