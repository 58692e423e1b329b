"""The writer: a program of its own that makes a staged checkpoint durable.

    python -P writer.py SOCKET      started by `daemon.py` with one end of a socket pair

It shares the arena's memory with the trainer and holds no lock of it. Requests and replies are lines of JSON, one
reply for each request; an arena's file descriptor comes with the request that names it.

    arena    {"id", "bytes"}                                     map the memory that came along
    write    {"arena", "folder", "parts", ...}                   CRC32s, one rank's files and sidecars, synced
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
from collections.abc import Iterator, Sequence
from typing import Any

try:
    from isal.isal_zlib import crc32
except ImportError:  # announced where there is somebody to read it, by `daemon.py`
    crc32 = zlib.crc32

BLOCK_BYTES = 1 << 16
PIECE_BYTES = 8 << 20
"""Bytes handed to the kernel at a time: large enough for the disk, small enough that checksums stay ahead."""

WRITERS = 2
"""Pieces on their way at once, so that the disk does not wait for the next one."""

PAGE_BYTES = 4096
GAVE_UP = -1
"""Stands where the trainer says how much is staged, when it will not stage the rest."""

POLL_S = 0.0002
CRC = struct.Struct("<I")
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
        self._removals: list[threading.Thread] = []

    def arena(self, descriptor: int, id: int, bytes: int) -> None:
        """Map an arena; its `id` replaces one of that name."""
        if bytes:
            self._arenas[id] = mmap.mmap(descriptor, bytes)
        else:
            self._arenas.pop(id, None)
        os.close(descriptor)

    def write(
        self, _: None, arena: int, folder: str, parts: list[dict[str, Any]], progress: int, previous: str
    ) -> dict[str, Any]:
        """Write one rank's files and their sidecars into `folder`, durably, behind the trainer that stages them.

        Args:
            parts: the files, see `_Part`.
            progress: offset of an int64: how much of the arena is staged.
            previous: an older checkpoint. A file after the first is linked from there where its content is the same.

        Returns:
            `unchanged`: rows of the first file whose CRC32s are those of this arena's last write; `changed`: rows of
            the second that are not as in `previous`.
        """
        self._enter(folder)
        memory = memoryview(self._arenas[arena])
        staged = _Staged(memory, progress)
        first, *others = [_Part(memory, folder=folder, **part) for part in parts]
        unchanged = self._write_first(first, staged)
        changed: list[int] = []
        for part in others:
            changed += self._write_unless_linked(part, staged, previous)
        _sync_folder(folder)
        return {"unchanged": unchanged, "changed": changed}

    def _write_first(self, part: _Part, staged: _Staged) -> list[int]:
        before = part.running.tolist()
        self.doing = part.path
        if part.file_bytes:
            with _File(part.path, part.image, part.file_bytes) as out:
                for ready in part.checksummed(staged):
                    out.write_until(ready)
                out.write_until(part.file_bytes, last=True)
                part.write_sidecar()  # while the last pieces are on their way
        else:
            part.write_sidecar()
        return part.rows_with(before, same=True)

    def _write_unless_linked(self, part: _Part, staged: _Staged, previous: str) -> list[int]:
        for _ in part.checksummed(staged):
            pass
        before = _read(os.path.join(previous, part.sidecar)) if previous else b""
        names = (part.file, part.sidecar)
        if before == part.sidecar_content() and _linked(previous, part.folder, names):
            return []
        self.doing = part.path
        with _File(part.path, part.image, part.file_bytes) as out:
            out.write_until(part.file_bytes, last=True)
            part.write_sidecar()
        return part.rows_with(part.running_in(before), same=False)

    def commit(
        self,
        _: None,
        folder: str,
        final: str,
        token: str,
        files: dict[str, str],
        arena: int,
        metadata: tuple[int, int],
        head: tuple[int, int],
        previous: str,
    ) -> dict[str, Any]:
        """Make `folder` the checkpoint `final`, replacing one that is there, in one step.

        Args:
            head: first part of rank 0's sidecar. Where that of `previous` is the same, so is its `.metadata`.
        """
        if not _committed(final, token):
            memory = memoryview(self._arenas[arena])
            for name, text in files.items():
                _write_small(os.path.join(folder, name), text.encode())
            same = previous and _read(os.path.join(previous, "__0_0.checksums"), len(SIDECAR_MAGIC) + head[1])
            if same != SIDECAR_MAGIC + memory[head[0] : sum(head)] or not _linked(previous, folder, [".metadata"]):
                _write_small(os.path.join(folder, ".metadata"), memory[metadata[0] : sum(metadata)])
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
                # Freeing gigabytes takes a while, which nobody needs to wait for.
                self._removals.append(threading.Thread(target=shutil.rmtree, args=(doomed, True)))
                self._removals[-1].start()

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
        self._finish_removals()

    def _finish_removals(self) -> None:
        while self._removals:
            self._removals.pop().join()

    def _enter(self, folder: str) -> None:
        self._leave()
        self._finish_removals()  # their room may be needed
        os.makedirs(folder, exist_ok=True)
        self._folder, self._lock = folder, os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def _leave(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._folder, self._lock = "", None


class _Staged:
    """How much of an arena the trainer has staged: the number stands in the arena, and only grows."""

    def __init__(self, memory: memoryview, progress: int) -> None:
        self._word = memory[progress : progress + 8].cast("q")

    def wait_for(self, end: int) -> int:
        """Wait until `end` is staged; how much is."""
        while (staged := self._word[0]) < end:
            if staged == GAVE_UP:
                raise RuntimeError("the trainer could not stage the state")
            time.sleep(POLL_S)
        return int(staged)


class _Part:
    """One file of a rank, in the arena.

    Args:
        begin: where its image begins, which has `file_bytes` and is followed by zeros up to a whole page.
        table: offset and length of rows of four int64: begin and length of a payload, and two places in the file that
            want its CRC32, or zeros.
        crcs: offset and length of uint32: the running CRC32 at the end of every block of every payload.
        head: offset and length of the sidecar's first part.
    """

    def __init__(
        self,
        memory: memoryview,
        folder: str,
        file: str,
        sidecar: str,
        begin: int,
        file_bytes: int,
        table: tuple[int, int],
        crcs: tuple[int, int],
        head: tuple[int, int],
    ) -> None:
        self.folder, self.file, self.sidecar, self.file_bytes = folder, file, sidecar, file_bytes
        self.path, self.image = os.path.join(folder, file), memory[begin : begin + _whole_pages(file_bytes)]
        self.running = memory[crcs[0] : sum(crcs)].cast("I")
        self._begin, self._head = begin, memory[head[0] : sum(head)]
        numbers = memory[table[0] : sum(table)].cast("q").tolist()
        self._rows = list(zip(*[iter(numbers)] * 4, strict=True))

    def checksummed(self, staged: _Staged) -> Iterator[int]:
        """Fill `running`, put each payload's CRC32 where its archive wants it; yields how much of the file is final."""
        block, here, running, image = 0, 0, self.running, self.image
        for begin, length, first, second in self._rows:
            crc, end = 0, begin + length
            for at in range(begin, end, BLOCK_BYTES):
                to = min(at + BLOCK_BYTES, end)
                if to > here or block % 64 == 0:
                    yield at
                if to > here:
                    here = staged.wait_for(self._begin + to) - self._begin
                running[block] = crc = crc32(image[at:to], crc)
                block += 1
            if first:
                CRC.pack_into(image, first, crc)
                CRC.pack_into(image, second, crc)
        staged.wait_for(self._begin + self.file_bytes)

    def write_sidecar(self) -> None:
        _write_small(os.path.join(self.folder, self.sidecar), self.sidecar_content())

    def sidecar_content(self) -> bytes:
        content = b"".join((SIDECAR_MAGIC, self._head, self.running))
        return content + CRC.pack(crc32(content))

    def running_in(self, sidecar: bytes) -> list[int]:
        """The running CRC32s that a sidecar of the same items has; none where it is of others."""
        begin = len(SIDECAR_MAGIC) + len(self._head)
        if sidecar[len(SIDECAR_MAGIC) : begin] != self._head or len(sidecar) != begin + self.running.nbytes + 4:
            return []
        return memoryview(sidecar[begin:-4]).cast("I").tolist()

    def rows_with(self, before: list[int], same: bool) -> list[int]:
        """The rows of tensors whose running CRC32s are `before`'s, or are not."""
        found, block, now = [], 0, self.running.tolist()
        for number, (_, length, first, _) in enumerate(self._rows if before else ()):
            end = block + -(-length // BLOCK_BYTES)
            if first and length and (before[block:end] == now[block:end]) == same:
                found.append(number)
            block = end
        return found


class _File:
    """A new file filled from memory by threads of its own, past the page cache where that works."""

    def __init__(self, path: str, memory: memoryview, size_bytes: int) -> None:
        self._path, self._memory, self._size = path, memory, size_bytes
        self._handed = 0
        self._error: OSError | None = None
        self._pieces: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._descriptor = _open(path)
        self._threads = [threading.Thread(target=self._run) for _ in range(WRITERS)]
        for thread in self._threads:
            thread.start()

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
            self._pieces.put((self._handed, _whole_pages(ready)))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join()
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


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def _open(path: str) -> int:
    flags = _new_file(path)
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


def _new_file(path: str) -> int:
    """Flags to open `path` as a new file: one that an earlier try left may be linked from another checkpoint."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return os.O_WRONLY | os.O_CREAT | os.O_EXCL


def _write_small(path: str, content: Any) -> None:
    descriptor = os.open(path, _new_file(path), 0o666)
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


def _read(path: str, limit: int = -1) -> bytes:
    """What a file begins with; nothing where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError:
        return b""


def _linked(source: str, folder: str, names: Sequence[str]) -> bool:
    """Whether files of another folder could be made to appear in this one too."""
    try:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
            os.link(os.path.join(source, name), os.path.join(folder, name))
    except OSError:  # it is gone, or has as many links as it may, or the file system has none
        return False
    return True


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
