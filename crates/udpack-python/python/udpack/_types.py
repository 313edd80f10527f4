"""Plain values that the package hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _udpack

__all__ = ["CloseReason", "Entry", "Outcome", "Position", "PresenceChange", "PresenceEntry", "Progress", "Sent", "State", "Volatile", "CLOSE_CODES"]

#: The number of each close code of the protocol, by name.
CLOSE_CODES: dict[str, int] = {name: number for number, name, _ in _udpack.close_codes()}


class Position(NamedTuple):
    """How far a member has come in a room with a history: what it presents when it joins again."""

    room: str
    epoch: int
    offset: int


@dataclass(frozen=True)
class CloseReason:
    """How a channel or a socket ended."""

    number: int
    code: str
    text: str
    by: str
    retry: bool

    @property
    def normal(self) -> bool:
        """Whether this is an orderly end."""
        return self.number == 0


@dataclass(frozen=True)
class State:
    """What a socket's connection is doing: ``name`` is ``"connecting"``, ``"connected"``, ``"going_away"``,
    ``"silent"``, ``"detached"``, ``"reconnecting"``, ``"transport_changed"`` or ``"closed"``; ``fields`` has what belongs to it."""

    name: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "State":
        fields = dict(fields)
        return cls(fields.pop("name"), fields)


class Volatile(NamedTuple):
    """A message of which only the newest counts."""

    event: str
    data: Any
    key: str | None


class Sent(NamedTuple):
    """What became of a message to a room: members it is on its way to, and messages lost by it."""

    delivered: int
    dropped: int


class PresenceEntry(NamedTuple):
    """One session of one peer in a room."""

    peer: str
    session: str
    meta: Any


class PresenceChange(tuple[list[PresenceEntry], list[PresenceEntry]]):
    """What one message changed: ``joins, leaves = change``. ``why`` says why all of ``leaves`` have left, where the server says it:
    ``"node_lost"`` when the server that they were on is out of reach for the others."""

    why: str | None

    def __new__(cls, joins: list[PresenceEntry], leaves: list[PresenceEntry], why: str | None) -> "PresenceChange":
        change = super().__new__(cls, (joins, leaves))
        change.why = why
        return change

    @property
    def joins(self) -> list[PresenceEntry]:
        """Those who came; a new meta is a leave and a join."""
        return self[0]

    @property
    def leaves(self) -> list[PresenceEntry]:
        """Those who went."""
        return self[1]


@dataclass(frozen=True)
class Progress:
    """How far a transfer is."""

    #: Bytes that the other side has acknowledged, those of files it had already included.
    bytes: int
    #: Bytes of all files listed so far that have not failed.
    total: int
    files_done: int
    files: int
    #: All files are listed: the totals grow no more.
    listed: bool
    #: Bytes that were transferred in this run.
    moved: int


@dataclass(frozen=True)
class Outcome:
    """One file that arrived: whole, verified, and synced to the disk."""

    path: str
    size: int
    #: BLAKE3 of its bytes, computed on both sides.
    hash: bytes
    #: Bytes that were sent; 0 when the other side had the file.
    sent: int
    #: Bytes that an earlier transfer had brought.
    resumed: int
    same: bool
    skipped: bool
    #: Seconds.
    elapsed: float


@dataclass(frozen=True)
class Entry:
    """What has a name at a server: ``kind`` is ``"file"``, ``"dir"``, ``"link"`` or ``"other"``."""

    path: str
    kind: str
    size: int
