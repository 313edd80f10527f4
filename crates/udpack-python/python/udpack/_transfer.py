"""Files: uploads and downloads. The bytes stay in Rust."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Mapping, Union

from . import _udpack
from ._bridge import run
from ._client import Socket, settings
from ._types import Entry, Outcome, Progress
from .errors import TransferError

__all__ = ["download", "listing", "remove", "upload"]

What = Union[str, "os.PathLike[str]", bytes, bytearray, memoryview, BinaryIO]
OnProgress = Callable[[Progress], None]


def link(to: str | Socket, given: Mapping[str, Any]) -> _udpack.Link:
    """What files travel over."""
    if isinstance(to, str):
        defaults = dict(
            token=None, key=None, reconnect=False, agent=None, timeouts=None, limits=None, local_address=None, transport="auto",
            proxy=True,
        )
        return _udpack.Link(to, settings(**(defaults | given)))
    if given:
        raise TypeError("a socket has its settings already: " + ", ".join(given))
    return _udpack.Link(to._core)


def source(what: What, remote: str | None) -> tuple[str, Any, str]:
    """What to send, and its name at the server."""
    if isinstance(what, (bytes, bytearray, memoryview)):
        if remote is None:
            raise ValueError("bytes need a name at the server: remote=")
        return "bytes", bytes(what), remote
    if hasattr(what, "read"):
        name = remote or os.path.basename(getattr(what, "name", "") or "")
        if not name:
            raise ValueError("a file object without a name needs one at the server: remote=")
        return "reader", what, name
    path = Path(os.fspath(what))  # type: ignore[arg-type]
    return "path", str(path), remote or path.resolve().name


def sources(what: What | Iterable[What] | Mapping[str, What], remote: str | None) -> list[tuple[str, Any, str]]:
    """All that is to be sent."""
    if isinstance(what, Mapping):
        below = f"{remote}/" if remote else ""
        return [source(one, below + name) for name, one in what.items()]
    if isinstance(what, (str, bytes, bytearray, memoryview)) or hasattr(what, "read") or hasattr(what, "__fspath__"):
        return [source(what, remote)]  # type: ignore[arg-type]
    below = f"{remote}/" if remote else ""
    return [(kind, one, below + name) for kind, one, name in (source(each, None) for each in what)]  # type: ignore


class Tally:
    """What happened in a transfer."""

    def __init__(self, progress: OnProgress | None) -> None:
        self.outcomes: list[Outcome] = []
        self.failed: list[tuple[str, TransferError]] = []
        self.progress = progress

    def take(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            kind = event.pop("kind")
            if kind == "progress" and self.progress is not None:
                self.progress(Progress(**event))
            elif kind == "done":
                self.outcomes.append(Outcome(**event["outcome"]))
            elif kind == "failed":
                self.failed.append((event["path"], event["error"]))

    def result(self) -> list[Outcome]:
        if not self.failed:
            return self.outcomes
        path, first = self.failed[0]
        more = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
        error = TransferError(f"{path}: {first}{more}", code=first.code, retry=first.retry)
        error.failed, error.outcomes = self.failed, self.outcomes
        raise error from first


def options(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


async def upload(
    to: str | Socket, what: What | Iterable[What] | Mapping[str, What], *, remote: str | None = None,
    progress: OnProgress | None = None, if_exists: str = "same", lanes: int | None = None, preserve: bool = False,
    resume: bool = True, limit: int | None = None, **connect: Any,
) -> list[Outcome]:
    """Sends files, whole directories, bytes or file objects to a server: by its URL, or over a socket.

    ``what``
        A path, bytes, an object with ``read``, several of these, or a dict of name at the server and one of these.
    ``remote``
        The name at the server; of several the directory. By default the file's own name.
    ``progress``
        Called with a :class:`Progress`, ten times a second at most.
    ``if_exists``
        ``"same"`` (success if the file there has the same bytes), ``"error"``, ``"skip"``, ``"overwrite"``, ``"rename"``.
    ``lanes``, ``preserve``, ``resume``, ``limit``
        Files side by side; keep times and permissions; go on where an earlier upload ended; bytes a second.
    ``connect``
        With a URL: the arguments of :func:`connect`.

    Gives an :class:`Outcome` for each file: whole, verified and synced. Raises :class:`TransferError` when a file
    failed; the others are done all the same, and are in its ``outcomes``. A lost connection is mended meanwhile.
    Cancelling it gives up what is unfinished; the next upload of the same resumes it.
    """
    over = link(to, connect)
    given = options(if_exists=if_exists, lanes=lanes, preserve=preserve, resume=resume, limit=limit)
    return await _follow(over, over.upload(sources(what, remote), given), progress, isinstance(to, str))


async def _follow(
    over: _udpack.Link, transfer: _udpack.Transfer, progress: OnProgress | None, own: bool
) -> list[Outcome]:
    tally = Tally(progress)
    try:
        while (events := await run(transfer.next())) is not None:
            tally.take(events)
    finally:
        await run(transfer.close())
    if own:
        await run(over.close())
    return tally.result()


def wanted(entries: list[dict[str, Any]], root: dict[str, Any], local: Path) -> tuple[Path, list[tuple[str, str, int]]]:
    """The directory to download into, and the files with their names in it."""
    name = root["path"].rsplit("/", 1)[-1]
    if root["kind"] == "file":
        if local.is_dir():
            return local, [(root["path"], name, root["size"])]
        return local.absolute().parent, [(root["path"], local.name, root["size"])]
    below = len(root["path"]) + 1 if root["path"] else 0
    files = [(one["path"], one["path"][below:], one["size"]) for one in entries if one["kind"] == "file"]
    return local, files


async def download(
    of: str | Socket, remote: str, local: str | os.PathLike[str] | None = None, *,
    progress: OnProgress | None = None, if_exists: str = "same", lanes: int | None = None, preserve: bool = False,
    limit: int | None = None, **connect: Any,
) -> bytes | list[Outcome]:
    """Gets a file, or a directory with all files below it, from a server.

    Without ``local`` the file is read into memory, verified, and returned. Otherwise ``local`` is the directory to put it
    in, or the new name; then it gives an :class:`Outcome` for each file. The other arguments are as of :func:`upload`.
    """
    over = link(of, connect)
    own = isinstance(of, str)
    if local is None:
        data, _ = await run(over.fetch(remote))
        if own:
            await run(over.close())
        return data
    (root,) = await run(over.entries(remote, False, False))
    entries = await run(over.entries(remote, True, True)) if root["kind"] == "dir" else []
    dir, files = wanted(entries, root, Path(local))
    given = options(if_exists=if_exists, lanes=lanes, preserve=preserve, limit=limit)
    return await _follow(over, over.download(files, str(dir), given), progress, own)


async def listing(of: str | Socket, remote: str | None = None, *, recursive: bool = False, **connect: Any) -> list[Entry]:
    """What is at a server below a name, or in all."""
    over = link(of, connect)
    entries = await run(over.entries(remote, recursive, True))
    if isinstance(of, str):
        await run(over.close())
    return [Entry(**entry) for entry in entries]


async def remove(of: str | Socket, remote: str, *, recursive: bool = False, **connect: Any) -> tuple[int, int]:
    """Removes a file or, if ``recursive``, a directory at a server; gives how many files and bytes."""
    over = link(of, connect)
    removed = await run(over.remove(remote, recursive))
    if isinstance(of, str):
        await run(over.close())
    return removed
