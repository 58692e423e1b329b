"""The files of one checkpoint, read by range: mapped where they are local, fetched where they are objects.

Whoever knows what will be read says so first (`fetch`); from an object store that much arrives in few, parallel
requests, and little else. What was not announced is fetched when it is asked for.
"""

from __future__ import annotations

import errno
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from stillroom.checkpoint.roots import Objects, explained, generation_of
from stillroom.errors import CheckpointError, StorageError
from stillroom.storage import ObjectPath, located

GAP_BYTES = 1 << 16
"""Ranges of an object that lie no further apart are fetched as one: a request costs more than so many bytes."""

CHUNK_BYTES = 8 << 20
FETCHERS = 16


class Range(NamedTuple):
    """Bytes of a file."""

    file: str
    begin: int
    end: int


class Files(Protocol):
    """What reading a checkpoint takes. A file that is missing raises `FileNotFoundError`."""

    def names(self) -> list[str]:
        """Of all its files."""

    def read(self, name: str) -> bytes:
        """The whole of a small file."""

    def size_bytes(self, name: str) -> int:
        """Length of a file."""

    def fetch(self, ranges: Iterable[Range]) -> None:
        """Have these ready until `forget`."""

    def view(self, span: Range) -> memoryview:
        """The bytes of a range, writable in memory of ours; it lies within the file."""

    def forget(self) -> None:
        """Let go of what was fetched or mapped; views that were handed out stay."""


class LocalFiles:
    """A directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._maps: dict[str, memoryview] = {}

    def names(self) -> list[str]:
        return os.listdir(self._path)

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def size_bytes(self, name: str) -> int:
        return len(self._map(name))

    def fetch(self, ranges: Iterable[Range]) -> None:
        """The kernel fetches what is looked at."""

    def view(self, span: Range) -> memoryview:
        whole = self._map(span.file)
        page = span.begin // mmap.PAGESIZE * mmap.PAGESIZE
        whole.obj.madvise(mmap.MADV_WILLNEED, page, span.end - page)  # type: ignore[attr-defined]
        return whole[span.begin : span.end]

    def forget(self) -> None:
        self._maps.clear()

    def _map(self, name: str) -> memoryview:
        if name in self._maps:
            return self._maps[name]
        descriptor = os.open(self._path / name, os.O_RDONLY)
        try:
            if not os.fstat(descriptor).st_size:
                return memoryview(b"")  # which cannot be mapped
            # Private and writable: torch wants memory that it could write; the file stays as it is.
            mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            # What is needed is asked for by range; reading ahead of it would read many times as much.
            mapped.madvise(mmap.MADV_RANDOM)
        finally:
            os.close(descriptor)
        return self._maps.setdefault(name, memoryview(mapped))


class ObjectFiles:
    """A folder of an object store: a generation, or the one that the commit of `path` names.

    Attributes:
        bytes_fetched: of data files so far.

    Raises:
        CheckpointError: (every method) the store fails; or the checkpoint was replaced or removed meanwhile.
    """

    def __init__(self, path: ObjectPath) -> None:
        self.bytes_fetched = 0
        self._root = Objects(path.parent)
        self._final, self._record = path, self._root.record(path)
        self._folder = generation_of(path, self._record)
        with explained():
            found = self._root.store.under(self._folder)
        self._sizes = {entry.path.name: entry.size_bytes for entry in found}
        self._held: dict[str, list[tuple[int, memoryview]]] = {}

    def names(self) -> list[str]:
        return list(self._sizes)

    def read(self, name: str) -> bytes:
        with explained():
            content = self._root.store.read(self._folder / name)
        if content is None:
            raise self._missing(name)
        return content

    def size_bytes(self, name: str) -> int:
        if name not in self._sizes:
            raise self._missing(name)
        return self._sizes[name]

    def fetch(self, ranges: Iterable[Range]) -> None:
        wanted = [(span, memoryview(bytearray(span.end - span.begin))) for span in _joined(ranges)]
        self._download(wanted)
        for span, memory in wanted:
            self._held.setdefault(span.file, []).append((span.begin, memory))
        for held in self._held.values():
            held.sort(key=_begin)

    def view(self, span: Range) -> memoryview:
        held = self._held.get(span.file, [])
        begin, memory = held[max(0, bisect_right(held, span.begin, key=_begin) - 1)] if held else (0, memoryview(b""))
        if begin <= span.begin and span.end <= begin + len(memory):
            return memory[span.begin - begin : span.end - begin]
        memory = memoryview(bytearray(span.end - span.begin))
        self._download([(span, memory)])
        return memory

    def forget(self) -> None:
        self._held.clear()

    def _download(self, wanted: list[tuple[Range, memoryview]]) -> None:
        chunks = [
            (span.file, span.begin + at, memory[at : at + CHUNK_BYTES])
            for span, memory in wanted
            for at in range(0, len(memory), CHUNK_BYTES)
        ]
        with ThreadPoolExecutor(FETCHERS) as pool:
            list(pool.map(self._read_into, *zip(*chunks, strict=True)) if chunks else ())
        self.bytes_fetched += sum(len(memory) for _, memory in wanted)

    def _read_into(self, file: str, begin: int, memory: memoryview) -> None:
        try:
            self._root.store.read_into(self._folder / file, begin, memory)
        except StorageError as error:
            self._check_unchanged()
            raise CheckpointError(str(error)) from error

    def _missing(self, name: str) -> FileNotFoundError:
        self._check_unchanged()
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._folder / name))

    def _check_unchanged(self) -> None:
        if self._root.record(self._final) != self._record:
            raise CheckpointError(
                f"checkpoint {self._final} was replaced or removed while it was read.\nhelp: try again."
            )


def files_of(path: str | Path | ObjectPath) -> Files:
    """The files of the checkpoint at `path`."""
    with explained():
        place = located(path)
    return ObjectFiles(place) if isinstance(place, ObjectPath) else LocalFiles(place)


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in fewer ranges, of which no two touch or nearly do."""
    joined: list[Range] = []
    for span in sorted(ranges):
        last = joined[-1] if joined else None
        if last and last.file == span.file and span.begin <= last.end + GAP_BYTES:
            joined[-1] = last._replace(end=max(last.end, span.end))
        elif span.begin < span.end:
            joined.append(span)
    return joined


def _begin(held: tuple[int, memoryview]) -> int:
    return held[0]
