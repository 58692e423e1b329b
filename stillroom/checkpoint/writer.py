"""The writer: a program of its own that makes a staged checkpoint durable.

    python -P writer.py SOCKET      started by `daemon.py` with one end of a socket pair

It shares the arena's memory with the trainer and holds no lock of it. Requests and replies are lines of JSON, one
reply for each request; an arena's file descriptor comes with the request that names it.

    arena    {"id", "bytes"}                                     map the memory that came along
    write    {"arena", "folder", "file", "sidecar", ...}         CRC32s, one file and its sidecar, synced
    commit   {"folder", "final", "files", "token", ...}          the last small files, then the rename
    remove   {"paths"}, sweep {"root"}                           what retention dropped; what crashes left

The end of the connection means that the trainer is gone: the writer removes what it had begun, and leaves.
Standard library only (and ISA-L where it is installed): importing torch would cost seconds and memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import queue
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

try:
    from isal.isal_zlib import crc32
except ImportError:
    crc32 = zlib.crc32

BLOCK_BYTES = 1 << 16
PIECE_BYTES = 16 << 20
"""Bytes handed to the kernel at a time: large enough for the disk, small enough that checksums stay ahead."""

PAGE_BYTES = 4096
SIDECAR_MAGIC = b"stillroom checksums 1\n"
RECORD = "checkpoint.json"
RENAME_EXCHANGE = 2
AT_FDCWD = -100

# Buffered writing for file systems without direct I/O; read from the environment so that a test can ask for it.
DIRECT = os.environ.get("STILLROOM_DIRECT_IO", "1") == "1"


def main(descriptor: int) -> None:
    """Serve requests until the connection ends."""
    connection = socket.socket(fileno=descriptor)
    requests: queue.SimpleQueue[tuple[dict[str, Any], int | None]] = queue.SimpleQueue()
    writer = Writer()
    threading.Thread(target=_listen, args=(connection, requests, writer), daemon=True).start()
    while True:
        request, arena = requests.get()
        began, cpu = time.monotonic(), time.process_time()
        try:
            reply = getattr(writer, request.pop("op"))(arena, **request) or {}
        except OSError as error:
            reply = {"error": f"{error.strerror}: {error.filename or writer.doing}", "errno": error.errno}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        reply |= {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
        connection.sendall(json.dumps(reply).encode() + b"\n")


def _listen(connection: socket.socket, requests: Any, writer: Writer) -> None:
    buffer, descriptors = b"", []
    while True:
        try:
            data, received, _, _ = socket.recv_fds(connection, 1 << 16, 4)
        except OSError:
            data, received = b"", []
        descriptors += received
        if not data:
            writer.abandon()
            os._exit(0)
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            requests.put((request, descriptors.pop(0) if request["op"] == "arena" else None))


class Writer:
    """The requests, each a method that returns what its reply says."""

    def __init__(self) -> None:
        self.doing = ""
        self._arenas: dict[int, mmap.mmap] = {}
        self._folder = ""
        self._lock: int | None = None

    def arena(self, descriptor: int, id: int, bytes: int) -> None:
        """Map an arena; its `id` replaces one of that name."""
        if bytes:
            self._arenas[id] = mmap.mmap(descriptor, bytes)
        else:
            self._arenas.pop(id, None)
        os.close(descriptor)

    def write(
        self,
        _: None,
        arena: int,
        folder: str,
        file: str,
        sidecar: str,
        file_bytes: int,
        table: tuple[int, int],
        crcs: tuple[int, int],
        head: tuple[int, int],
    ) -> dict[str, Any]:
        """Write one rank's file and its sidecar into `folder`, durably.

        Args:
            file_bytes: length of the file, which is the beginning of the arena.
            table: offset and number of rows of four int64: begin and length of a payload, and two places in the
                file that want its CRC32, or zeros.
            crcs: offset and number of uint32: the running CRC32 at the end of every block of every payload.
            head: offset and length of the sidecar's first part.
        """
        self._enter(folder)
        memory = memoryview(self._arenas[arena])
        self.doing = f"{folder}/{file}"
        running = memory[crcs[0] : crcs[0] + 4 * crcs[1]].cast("I")
        rows = memory[table[0] : table[0] + 32 * table[1]].cast("q")
        if file_bytes:
            with _File(self.doing, memory, file_bytes) as out:
                for ready in _checksummed(memory, rows, running):
                    out.write_until(ready)
                out.write_until(file_bytes, last=True)
        self.doing = f"{folder}/{sidecar}"
        content = b"".join((SIDECAR_MAGIC, memory[head[0] : head[0] + head[1]], running))
        _write_small(self.doing, content + struct.pack("<I", crc32(content)))
        _sync_folder(folder)
        return {"bytes": file_bytes}

    def commit(
        self,
        _: None,
        folder: str,
        final: str,
        token: str,
        files: dict[str, str],
        arena: int,
        metadata: tuple[int, int],
    ) -> dict[str, Any]:
        """Make `folder` the checkpoint `final`, replacing one that is there, in one step."""
        if not _committed(final, token):
            begin, length = metadata
            for name, text in files.items():
                _write_small(os.path.join(folder, name), text.encode())
            _write_small(os.path.join(folder, ".metadata"), memoryview(self._arenas[arena])[begin : begin + length])
            _sync_folder(folder)
            self.doing = final
            if os.path.exists(final):
                _exchange(folder, final)
            else:
                os.rename(folder, final)
            _sync_folder(os.path.dirname(final))
        shutil.rmtree(folder, ignore_errors=True)  # what an exchange left
        self._leave()
        return {}

    def remove(self, _: None, paths: list[str]) -> None:
        """Drop whole checkpoints: invisible at once, then gone."""
        for path in paths:
            doomed = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.urandom(4).hex()}.old")
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self, _: None, root: str) -> None:
        """Remove what crashed saves left under `root`; a save under way holds a lock on its folder."""
        with contextlib.suppress(FileNotFoundError):
            for entry in list(os.scandir(root)):
                if entry.name.startswith(".step-") and entry.name.endswith((".tmp", ".old")):
                    _remove_if_free(entry.path)

    def drop(self, _: None, folder: str) -> None:
        """Give up a save."""
        if self._folder == folder:
            self._leave()
        shutil.rmtree(folder, ignore_errors=True)

    def abandon(self) -> None:
        """Remove what was begun: nobody will commit it."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _enter(self, folder: str) -> None:
        self._leave()
        os.makedirs(folder, exist_ok=True)
        self._folder, self._lock = folder, os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def _leave(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._folder, self._lock = "", None


def _checksummed(memory: memoryview, rows: memoryview, running: memoryview) -> Iterator[int]:
    """Fill `running`, put each payload's CRC32 where its archive wants it; yields how much of the file is final."""
    block = 0
    for row in range(0, len(rows), 4):
        begin, length, first, second = rows[row : row + 4]
        crc = 0
        for at in range(begin, begin + length, BLOCK_BYTES):
            crc = crc32(memory[at : min(at + BLOCK_BYTES, begin + length)], crc)
            running[block] = crc
            block += 1
            if block % 64 == 0:
                yield at
        if first:
            struct.pack_into("<I", memory, first, crc)
            struct.pack_into("<I", memory, second, crc)
        yield begin + length


class _File:
    """A file filled from memory in order by a thread of its own, past the page cache where that works."""

    def __init__(self, path: str, memory: memoryview, size_bytes: int) -> None:
        self._path, self._memory, self._size = path, memory, size_bytes
        self._handed = 0
        self._error: OSError | None = None
        self._pieces: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._descriptor = _open(path)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> _File:
        return self

    def write_until(self, ready: int, last: bool = False) -> None:
        """Hand over whole pieces before `ready`; with `last`, everything."""
        if self._error:
            raise self._error
        while ready - self._handed >= PIECE_BYTES:
            self._pieces.put((self._handed, self._handed + PIECE_BYTES))
            self._handed += PIECE_BYTES
        if last and self._handed < ready:
            self._pieces.put((self._handed, -(-ready // PAGE_BYTES) * PAGE_BYTES))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._pieces.put(None)
        self._thread.join()
        try:
            if self._error:
                raise self._error
            if kind is None:
                os.ftruncate(self._descriptor, self._size)
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._error is None:
                try:
                    self._write(*piece)
                except OSError as error:
                    error.filename = self._path
                    self._error = error

    def _write(self, begin: int, end: int) -> None:
        while begin < end:
            try:
                begin += os.pwrite(self._descriptor, self._memory[begin:end], begin)
            except OSError as error:
                if error.errno != errno.EINVAL or not _is_direct(self._descriptor):
                    raise
                _set_buffered(self._descriptor)
            if begin % PAGE_BYTES and _is_direct(self._descriptor):
                _set_buffered(self._descriptor)  # a short write left an offset that direct I/O refuses


def _open(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if DIRECT and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o666)


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _set_buffered(descriptor: int) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))


def _write_small(path: str, content: Any) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        view = memoryview(content).cast("B")
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def _sync_folder(path: str) -> None:
    """A name can be lost on power failure until its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _committed(final: str, token: str) -> bool:
    """Whether an earlier try, cut short after its rename, did it already."""
    try:
        with open(os.path.join(final, RECORD), encoding="utf-8") as file:
            return bool(json.load(file)["record"]["token"] == token)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _exchange(new: str, old: str) -> None:
    """Swap two folders in one step; where the kernel cannot, the old one is moved aside first."""
    library = ctypes.CDLL(None, use_errno=True)
    paths = (AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old))
    if hasattr(library, "renameat2") and library.renameat2(*paths, RENAME_EXCHANGE) == 0:
        return
    aside = f"{new}.old"
    os.rename(old, aside)
    os.rename(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_if_free(path: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]))
