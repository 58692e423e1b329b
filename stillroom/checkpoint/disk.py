"""A rank's files as they are written: checksummed and handed to the disk.

Both ends read the constants here. Standard library only (and ISA-L where it is installed), as in `writer.py`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import queue
import struct
import threading
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
CRC = struct.Struct("<I")
SIDECAR_MAGIC = b"stillroom checksums 1\n"

# Buffered writing for file systems without direct I/O; read from the environment so that a test can ask for it.
DIRECT = os.environ.get("STILLROOM_DIRECT_IO", "1") == "1"


class Part:
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
        self.path, self.image = os.path.join(folder, file), memory[begin : begin + whole_pages(file_bytes)]
        self.running = memory[crcs[0] : sum(crcs)].cast("I")
        self._begin, self._head = begin, memory[head[0] : sum(head)]
        numbers = memory[table[0] : sum(table)].cast("q").tolist()
        self._rows = list(zip(*[iter(numbers)] * 4, strict=True))

    def checksummed(self) -> Iterator[int]:
        """Fill `running`, put each payload's CRC32 where its archive wants it; yields how much of the file is final."""
        block, running, image = 0, self.running, self.image
        for begin, length, first, second in self._rows:
            crc, end = 0, begin + length
            for at in range(begin, end, BLOCK_BYTES):
                if block % 64 == 0:
                    yield at
                running[block] = crc = crc32(image[at : min(at + BLOCK_BYTES, end)], crc)
                block += 1
            if first:
                CRC.pack_into(image, first, crc)
                CRC.pack_into(image, second, crc)

    @property
    def sidecar_path(self) -> str:
        return os.path.join(self.folder, self.sidecar)

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


class NewFile:
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

    def __enter__(self) -> NewFile:
        return self

    def write_until(self, ready: int, last: bool = False) -> None:
        """Hand over whole pieces before `ready`; with `last`, everything."""
        if self._error:
            raise self._error
        while ready - self._handed >= PIECE_BYTES:
            self._pieces.put((self._handed, self._handed + PIECE_BYTES))
            self._handed += PIECE_BYTES
        if last and self._handed < ready:
            self._pieces.put((self._handed, whole_pages(ready)))

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


def whole_pages(size_bytes: int) -> int:
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


def write_small(path: str, content: Any) -> None:
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


def read(path: str, limit: int = -1) -> bytes:
    """What a file begins with; nothing where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError:
        return b""


def linked(source: str, folder: str, names: Sequence[str]) -> bool:
    """Whether files of another folder could be made to appear in this one too."""
    try:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
            os.link(os.path.join(source, name), os.path.join(folder, name))
    except OSError:  # it is gone, or has as many links as it may, or the file system has none
        return False
    return True


def sync_folder(path: str) -> None:
    """A name can be lost on power failure until its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
