"""Files: uploads and downloads, with hashes."""

from __future__ import annotations

import asyncio
import io

import pytest

import udpack
from conftest import TOKENS, address, client, in_time


def store(tmp_path, **settings) -> udpack.Server:
    settings.setdefault("allow_read", True)
    return udpack.Server(tokens=TOKENS, uploads=tmp_path / "store", **settings)


def pattern(size: int) -> bytes:
    return bytes(range(251)) * (size // 251) + bytes(size % 251)


async def test_a_file_goes_up_and_comes_back(tmp_path):
    server = store(tmp_path)
    content = pattern(5_000_000)
    (tmp_path / "photo.jpg").write_bytes(content)
    seen = []
    async with server.listen("127.0.0.1:0"):
        url = f"udpack://secret@{address(server)}#{server.key}"
        (done,) = await in_time(udpack.upload(url, tmp_path / "photo.jpg", progress=seen.append))
        assert (done.path, done.size, done.sent >= done.size) == ("photo.jpg", len(content), True)
        assert len(done.hash) == 32
        assert (tmp_path / "store" / "photo.jpg").read_bytes() == content
        assert seen[-1].bytes == seen[-1].total == len(content)
        assert await in_time(udpack.download(url, "photo.jpg")) == content
        (got,) = await in_time(udpack.download(url, "photo.jpg", tmp_path / "again.jpg"))
        assert got.hash == done.hash
        assert (tmp_path / "again.jpg").read_bytes() == content
        # The same once more is there already.
        (same,) = await in_time(udpack.upload(url, tmp_path / "photo.jpg"))
        assert same.same and same.sent < same.size and same.hash == done.hash


async def test_bytes_file_objects_and_directories(tmp_path):
    server = store(tmp_path)
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "one.txt").write_text("one")
    (tree / "a" / "two.txt").write_text("two")
    (tree / "a" / "b" / "three.bin").write_bytes(pattern(300_000))
    big = pattern(3_000_000)
    async with server.listen("127.0.0.1:0"), client(server) as socket:
        await in_time(udpack.upload(socket, b"note", remote="notes/n.txt"))
        await in_time(udpack.upload(socket, io.BytesIO(big), remote="big.bin"))
        with open(tree / "one.txt", "rb") as file:
            await in_time(udpack.upload(socket, file))
        outcomes = await in_time(udpack.upload(socket, tree, remote="backup"))
        assert sorted(one.path for one in outcomes) == ["backup/a/b/three.bin", "backup/a/two.txt", "backup/one.txt"]
        outcomes = await in_time(udpack.upload(socket, {"x": b"1", "y/z": b"2"}, remote="many"))
        assert sorted(one.path for one in outcomes) == ["many/x", "many/y/z"]
        root = tmp_path / "store"
        assert (root / "notes" / "n.txt").read_bytes() == b"note"
        assert (root / "big.bin").read_bytes() == big
        assert (root / "one.txt").read_text() == "one"
        assert (root / "many" / "y" / "z").read_bytes() == b"2"

        names = [entry.path for entry in await udpack.listing(socket, "backup", recursive=True) if entry.kind == "file"]
        assert sorted(names) == ["backup/a/b/three.bin", "backup/a/two.txt", "backup/one.txt"]
        await in_time(udpack.download(socket, "backup", tmp_path / "restored"))
        restored = tmp_path / "restored"
        assert (restored / "a" / "b" / "three.bin").read_bytes() == pattern(300_000)
        assert (restored / "one.txt").read_text() == "one"
        assert not (restored / ".udpack").exists()


async def test_what_is_refused_says_why(tmp_path):
    server = store(tmp_path, allow_read=False)
    async with server.listen("127.0.0.1:0"), client(server) as socket:
        await in_time(udpack.upload(socket, b"first", remote="name"))
        with pytest.raises(udpack.TransferError) as caught:
            await in_time(udpack.upload(socket, {"name": b"other", "fine": b"x"}))
        assert caught.value.code == "exists"
        assert [path for path, _ in caught.value.failed] == ["name"]
        assert [one.path for one in caught.value.outcomes] == ["fine"]
        with pytest.raises(udpack.TransferError):
            await in_time(udpack.download(socket, "name"))
        with pytest.raises(udpack.TransferError):
            await in_time(udpack.upload(socket, tmp_path / "missing"))
        with pytest.raises(udpack.TransferError) as caught:
            await udpack.upload(socket, b"", remote="../up")
        assert caught.value.code == "policy"
        with pytest.raises(ValueError):
            await udpack.upload(socket, b"without a name")


async def test_a_file_object_that_fails(tmp_path):
    class Broken(io.RawIOBase):
        def read(self, size=-1):
            raise OSError("the disk is gone")

    server = store(tmp_path)
    async with server.listen("127.0.0.1:0"), client(server) as socket:
        with pytest.raises(udpack.TransferError, match="the disk is gone"):
            await in_time(udpack.upload(socket, Broken(), remote="x"))
        assert not (tmp_path / "store" / "x").exists()


async def test_a_cancelled_upload_is_resumed(tmp_path):
    server = store(tmp_path)
    content = pattern(24_000_000)
    (tmp_path / "big").write_bytes(content)
    async with server.listen("127.0.0.1:0"), client(server) as socket:
        begun = asyncio.Event()

        def progress(now):
            if now.bytes > 0:
                begun.set()

        uploading = asyncio.create_task(udpack.upload(socket, tmp_path / "big", progress=progress, limit=20_000_000))
        await in_time(begun.wait())
        uploading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await uploading
        assert not (tmp_path / "store" / "big").exists()
        (done,) = await in_time(udpack.upload(socket, tmp_path / "big"))
        assert (tmp_path / "store" / "big").read_bytes() == content
        assert done.size == len(content)


async def test_a_progress_callback_that_fails_ends_the_upload(tmp_path):
    server = store(tmp_path)

    def progress(now):
        raise LookupError("the bar is gone")

    async with server.listen("127.0.0.1:0"), client(server) as socket:
        with pytest.raises(LookupError):
            await in_time(udpack.upload(socket, pattern(1_000_000), remote="x", progress=progress))
