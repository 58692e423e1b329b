"""A teacher's log-probabilities on disk, so that later epochs and runs need no teacher.

    <root>/<16 digits>/
        identity.json   what all records were computed from, for people; the folder's name is its digest
        signals.bin     64 bytes that name the format and the identity, then records, appended whole

    record   64 bytes: magic, CRC32 of the rest of these, CRC32 of the body, positions, k, size and key of the body;
             the body (see `top_k`), filled up to a multiple of 8

A record's key is the content: SHA-256 over the token ids and where the answer begins.

Promise: killed or powered off at any instruction, the file gives every record that `put` returned from, and no torn
one. A record that does not match its checksums is never read: it counts as absent, its sequence is named, and putting
it again replaces it. Several processes may write at once: records are appended under a file lock.
Memory: an index of about 200 bytes a record; bodies are read from a memory map.
Out of scope: expiry. Delete the folder to forget.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from stillroom.errors import ArtifactError
from stillroom.models.packing import TokenSequence
from stillroom.schema import digest
from stillroom.storage import sync_directory, write_atomic
from stillroom.teacher.top_k import Layout, SequenceTopK, ValueBytes
from stillroom.telemetry import note

FORMAT = 1
"""Raised when the bytes or what they mean change, so that older files are left alone."""

_FILE_MAGIC, _MAGIC = b"STLRTOPK", b"\x93TOPKREC"
_FILE_HEADER = struct.Struct("<8sI20x32s")
_HEADER = struct.Struct("<8sIIIHxxQ32s")
_SCAN_BYTES = 2**22


class SignalIdentity(BaseModel, frozen=True, extra="forbid"):
    """Everything but the token ids that decides a signal; each has files of its own."""

    teacher: str
    """Digest of the teacher's weights, or what names a served teacher."""

    precision: str
    """Arithmetic of the teacher."""

    tokenizer: str
    """Digest of the tokenizer's vocabulary."""

    template: str
    """Digest of the chat template that made the prompts."""

    vocabulary: int = Field(ge=1, le=2**24)
    """Ids lie below this."""

    top_k: int = Field(ge=1, lt=2**16)
    """Tokens kept at each position; a served teacher may give fewer."""

    value_bytes: ValueBytes
    """Bytes of a log-probability."""

    format: int = FORMAT
    """Of the file."""


class _Record(NamedTuple):
    """A whole record found in the file."""

    key: bytes
    body_at: int
    body_bytes: int
    body_crc: int
    positions: int
    k: int

    @property
    def end(self) -> int:
        return self.body_at + -(-self.body_bytes // 8) * 8


class SignalCache:
    """The signals of one identity, by token sequence.

    Args:
        root: a folder that any number of identities share.
        identity: whose signals.

    Raises:
        ArtifactError: the file is of another format or identity.
        OSError: the folder cannot be written.
    """

    def __init__(self, root: str | Path, identity: SignalIdentity) -> None:
        self.identity = identity
        self.layout = Layout(identity.vocabulary, identity.value_bytes)
        said = identity.model_dump(mode="json")
        self._digest = bytes.fromhex(digest(said))
        self.folder = Path(root) / self._digest.hex()[:16]
        self.path = self.folder / "signals.bin"
        if not (self.folder / "identity.json").exists():
            write_atomic(self.folder / "identity.json", json.dumps(said, indent=1, sort_keys=True))
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._records: dict[bytes, _Record] = {}
        self._end = _FILE_HEADER.size
        self._map: mmap.mmap | None = None
        self._mutex = threading.Lock()
        try:
            with self._locked():
                self._begin()
        except BaseException:
            self.close()
            raise

    def put(self, sequences: Sequence[TokenSequence], signals: Sequence[SequenceTopK]) -> None:
        """Store the signals of `sequences`, durably; one that is there already is replaced.

        Raises:
            ValueError: a signal has another number of positions than its sequence has targets, or is no signal.
        """
        data = b"".join(self._written(*pair) for pair in zip(sequences, signals, strict=True))
        with self._locked():
            self._index()
            os.ftruncate(self._descriptor, self._end)  # what a killed writer left of its last record
            at, view = self._end, memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, at)
                at, view = at + written, view[written:]
            os.fsync(self._descriptor)
            self._index()

    def read(self, sequence: TokenSequence) -> SequenceTopK:
        """The signal of a sequence, as it was put (rounded as `top_k` states).

        Raises:
            ArtifactError: it is not there, or is damaged; names the sequence.
        """
        with self._mutex:
            record = self._records.get(key_of(sequence))
            if record is None:
                self._index()
                record = self._records.get(key_of(sequence))
            if record is None:
                raise ArtifactError(
                    f"{self.path} has no signal for sequence {_called(sequence)}.\n"
                    "help: fill the cache with the same teacher, tokenizer and settings before training from it."
                )
            try:
                return self.layout.decode(self._body(record, sequence), record.positions, record.k)
            except ArtifactError as error:
                raise ArtifactError(
                    f"{self.path}: the signal of sequence {_called(sequence)} is damaged: {error}.\n"
                    "help: run again; filling the cache computes it anew."
                ) from None

    def missing(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Those of `sequences` that have no sound signal, each once; every other one was read and verified."""
        wanted: dict[bytes, TokenSequence] = {}
        with self._mutex:
            self._index()
            for sequence in sequences:
                key = key_of(sequence)
                if key not in wanted and not self._sound(key, sequence):
                    wanted[key] = sequence
        return list(wanted.values())

    @property
    def positions(self) -> int:
        """Scored positions that have a signal."""
        return sum(record.positions for record in self._records.values())

    @property
    def bytes_per_token(self) -> float:
        """Size of the file by its scored positions."""
        return self._end / max(1, self.positions)

    def __len__(self) -> int:
        return len(self._records)

    def close(self) -> None:
        """Close the file; calling it twice is fine."""
        self._map = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SignalCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _begin(self) -> None:
        """Write the file's header where there is none, else compare it; then find the records."""
        wanted = _FILE_HEADER.pack(_FILE_MAGIC, FORMAT, self._digest)
        found = os.pread(self._descriptor, len(wanted), 0)
        if found != wanted:
            if len(found) == len(wanted):
                raise ArtifactError(
                    f"{self.path} is no signal cache of this teacher and these settings, or is of another version.\n"
                    f"help: delete {self.folder} and run again."
                )
            os.ftruncate(self._descriptor, 0)  # new, or killed within its first 64 bytes
            os.pwrite(self._descriptor, wanted, 0)
            os.fsync(self._descriptor)
            sync_directory(self.folder)
        self._index()

    def _written(self, sequence: TokenSequence, top: SequenceTopK) -> bytes:
        positions, k = top.ids_NK.shape
        if positions != sequence.targets or k > self.identity.top_k:
            raise ValueError(f"a signal of {positions} x {k} for {sequence.targets} x {self.identity.top_k}")
        body = self.layout.encode(top)
        rest = _HEADER.pack(b"", 0, zlib.crc32(body), positions, k, len(body), key_of(sequence))[12:]
        return b"".join((_MAGIC, struct.pack("<I", zlib.crc32(rest)), rest, body, bytes(-len(body) % 8)))

    def _index(self) -> None:
        """Find the whole records that were added since last time; a torn one at the end is left out."""
        size = os.fstat(self._descriptor).st_size
        while (record := self._next(self._end, size)) is not None and record.end <= size:
            self._records[record.key] = record
            self._end = record.end

    def _next(self, at: int, size: int) -> _Record | None:
        """The record at `at`, or, where its header is damaged, the first one after it."""
        if at + _HEADER.size > size:
            return None
        record = self._record(os.pread(self._descriptor, _HEADER.size, at), at)
        while record is None and at < size:
            block = os.pread(self._descriptor, _SCAN_BYTES, at + 1)
            found = block.find(_MAGIC)
            at += 1 + (found if found >= 0 else max(1, len(block) - len(_MAGIC)))
            if found >= 0:
                record = self._record(os.pread(self._descriptor, _HEADER.size, at), at)
        return record

    def _record(self, header: bytes, at: int) -> _Record | None:
        """What a header says; None for bytes that are none, or that promise what no record has."""
        if len(header) < _HEADER.size:
            return None
        magic, crc, body_crc, positions, k, size, key = _HEADER.unpack(header)
        sound = magic == _MAGIC and crc == zlib.crc32(header[12:]) and 1 <= k <= self.identity.top_k
        if not sound or size != self.layout.body_bytes(positions, k):
            return None
        return _Record(key, at + _HEADER.size, size, body_crc, positions, k)

    def _sound(self, key: bytes, sequence: TokenSequence) -> bool:
        record = self._records.get(key)
        if record is None:
            return False
        try:
            self._body(record, sequence)
        except ArtifactError as error:
            note(f"{self.path}: the signal of sequence {_called(sequence)} is damaged ({error}); it is computed anew.")
            del self._records[key]
            return False
        return True

    def _body(self, record: _Record, sequence: TokenSequence) -> memoryview:
        """The body of a record, verified.

        Raises:
            ArtifactError: it does not match its checksum, or has another number of positions.
        """
        end = record.body_at + record.body_bytes
        if self._map is None or len(self._map) < end:
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        body = memoryview(self._map)[record.body_at : end]
        found = zlib.crc32(body)
        if found != record.body_crc:
            raise ArtifactError(f"it has CRC32 {found:08x}, written as {record.body_crc:08x}")
        if record.positions != sequence.targets:
            raise ArtifactError(f"it has {record.positions} positions, the sequence {sequence.targets} targets")
        return body


def key_of(sequence: TokenSequence) -> bytes:
    """What identifies a sequence: SHA-256 over its ids and where its answer begins; its name does not count."""
    hasher = hashlib.sha256(struct.pack("<Q", sequence.first_target))
    hasher.update(np.asarray(sequence.ids, dtype="<i8").tobytes())
    return hasher.digest()


def _called(sequence: TokenSequence) -> str:
    return repr(sequence.name) if sequence.name else f"of {len(sequence.ids)} tokens ({key_of(sequence).hex()[:12]})"
