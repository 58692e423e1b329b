"""One committed checkpoint, as it is read: ours with every byte checked, or one that PyTorch DCP wrote.

`.metadata` is unpickled by a reader that admits DCP's metadata classes and nothing else. Only what is asked for is
read (`ranges.py`); the CRC32 of a range of ours is checked from the running value before it to the one at
its end, so a slice costs its blocks and not the whole item. DCP's own files carry one CRC32 an item, which it never
checks and we do: there the whole item is read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.checkpoint import trees
from stillroom.checkpoint.disk import BLOCK_BYTES, SIDECAR_MAGIC, crc32
from stillroom.checkpoint.framing import tensor_frame
from stillroom.checkpoint.layouts import CHANGING, SETTLED, Box, sidecar_name
from stillroom.checkpoint.ranges import Range, files_of
from stillroom.checkpoint.roots import STEP_NAME, parse_record
from stillroom.checkpoint.unpickling import load_metadata, load_value
from stillroom.checkpoint.writer import RECORD
from stillroom.errors import CheckpointCorrupt, CheckpointError
from stillroom.storage import ObjectPath, located

METADATA = ".metadata"
READERS = min(8, os.cpu_count() or 1)
VERIFIED_AT_ONCE = 256 << 20
"""Bytes of an object store's files that are held at a time while a whole checkpoint is verified."""


class Stored(NamedTuple):
    """A piece of a tensor, or a value, in a file."""

    file: str
    offset: int
    size_bytes: int
    box: Box


class Checked(NamedTuple):
    """What the sidecar says of an item: its frame's checksum and the running CRC32 of its blocks."""

    head_bytes: int
    payload_bytes: int
    size_bytes: int
    frame_crc: int
    blocks: memoryview


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the checkpoint and the pieces that it is stored in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Stored]


class Snapshot:
    """A checkpoint: a directory, or the same under an `s3://` URL.

    Attributes:
        record: step, metrics and world size as they were saved; empty for one that DCP wrote.
        metadata: DCP's `Metadata`.
        shape: the tree of the state.
        tensors, values: what is stored, by name.
        bytes_used: payload bytes that were asked for so far, checked blocks counted whole.

    Raises:
        CheckpointCorrupt: the metadata or a sidecar is damaged or missing.
    """

    def __init__(self, path: str | Path | ObjectPath) -> None:
        self._files = files_of(path)
        self.path = located(path)
        self.tensors: dict[str, TensorSpec] = {}
        self.values: dict[str, Stored] = {}
        self.bytes_used = 0
        self._checked: dict[tuple[str, int], Checked] = {}
        self._sizes: dict[str, int] = {}
        self.record = self._read_record()
        raw = self._read_small(METADATA)
        with ThreadPoolExecutor(READERS) as pool:
            sidecars = list(pool.map(self._read_sidecar, range(self.record.get("world", 0))))
            parted = [rank for rank, sidecar in enumerate(sidecars) if sidecar.get("parts", 1) > 1]
            list(pool.map(self._read_sidecar, parted, [SETTLED] * len(parted)))
        if sidecars and sidecars[0]["metadata_crc32"] != zlib.crc32(raw):
            raise self.corrupt(f"{METADATA} does not match its checksum")
        metadata = self._unpickle(raw)
        self.metadata = metadata
        self._index(metadata)
        self.paths = metadata.planner_data or {name: (name,) for name in metadata.state_dict_metadata}
        self.shape = sidecars[0]["shape"] if sidecars else trees.shape_from_paths(self.paths)

    @property
    def ours(self) -> bool:
        return bool(self.record)

    def corrupt(self, what: str) -> CheckpointCorrupt:
        match = STEP_NAME.match(self.path.name)
        named = f"checkpoint of step {int(match[1])} in {self.path.parent}" if match else f"checkpoint {self.path}"
        return CheckpointCorrupt(
            f"{named} is damaged: {what}.\n"
            f"help: run `stillroom checkpoint verify {self.path.parent}`, and resume from an older step."
        )

    def files(self) -> list[str]:
        """The data files that the metadata refers to."""
        pieces = [piece for spec in self.tensors.values() for piece in spec.pieces]
        return sorted({piece.file for piece in (*pieces, *self.values.values())})

    def range_of(self, name: str, piece: Stored, rows: tuple[int, int] | None = None) -> Range:
        """What `piece` or `value` reads of a file: the blocks that some rows lie in, or the item with its frame."""
        whole = Range(piece.file, piece.offset, piece.offset + piece.size_bytes)
        checked = self._checked.get((piece.file, piece.offset))
        if rows is None or checked is None or name in self.values:
            return whole
        begin, end = _row_bytes(checked, piece, rows)
        if end - begin == checked.payload_bytes:
            return whole
        start = piece.offset + checked.head_bytes
        stop = min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, checked.payload_bytes)
        return Range(piece.file, start + begin // BLOCK_BYTES * BLOCK_BYTES, start + stop)

    def fetch(self, ranges: Iterable[tuple[str, Range]]) -> None:
        """Say what will be read, for which item: from an object store it comes in few requests, and stays.

        Raises:
            CheckpointCorrupt: a file is missing or has another length; the item is named.
        """
        wanted = list(ranges)
        for name, span in wanted:
            self._check_there(name, span)
        self._files.fetch(span for _, span in wanted)

    def piece(self, name: str, piece: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        """A stored piece of a tensor, or some rows of its first dimension, checked; of a local file nothing is copied.

        Raises:
            CheckpointCorrupt: a checksum does not match; the tensor is named.
        """
        spec = self.tensors[name]
        sizes = piece.box[1]
        checked = self._checked.get((piece.file, piece.offset))
        if checked is None:
            tensor = self._foreign(name, piece)
            if tuple(tensor.shape) != sizes or tensor.dtype != spec.dtype:
                raise self.corrupt(f"tensor {name!r} is not what {METADATA} says it is")
            return tensor[rows[0] : rows[1]] if rows else tensor
        frame = tensor_frame(spec.dtype, sizes)
        if (len(frame.head), frame.payload_bytes) != (checked.head_bytes, checked.payload_bytes):
            raise self.corrupt(f"tensor {name!r} is not what {METADATA} says it is")
        begin, end = _row_bytes(checked, piece, rows) if rows else (0, checked.payload_bytes)
        sizes = (rows[1] - rows[0], *sizes[1:]) if rows else sizes
        span = self.range_of(name, piece, rows)
        data = self._view(name, span)
        payload_at = piece.offset + checked.head_bytes - span.begin
        self._check_payload(name, piece, checked, begin, end, data, payload_at)
        if end - begin == checked.payload_bytes:
            self._check_frame(name, piece, checked, data)
        if begin == end:
            return torch.empty(sizes, dtype=spec.dtype)
        at = payload_at + begin
        raw = torch.frombuffer(data, dtype=torch.uint8, offset=at, count=end - begin)
        # A slice need not begin at a multiple of its element's size; a view would be refused, a copy is not.
        return (raw if raw.data_ptr() % spec.dtype.itemsize == 0 else raw.clone()).view(spec.dtype).view(sizes)

    def value(self, name: str, trust: bool = False) -> Any:
        """A small value, checked.

        Args:
            trust: unpickle whatever it is; without, only what `torch.load(weights_only=True)` admits.

        Raises:
            CheckpointCorrupt: its checksum does not match.
            CheckpointError: it is of a class that is not admitted.
        """
        piece = self.values[name]
        data = self._view(name, self.range_of(name, piece))
        raw = bytes(data)
        checked = self._checked.get((piece.file, piece.offset))
        if checked is not None:
            self._check_payload(name, piece, checked, 0, checked.payload_bytes, data, 0)
        else:
            self._check_zip(name, raw)
        try:
            return load_value(raw, trust)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"value {name!r} of {self.path} is of a class that is not admitted: {str(error).splitlines()[0]}\n"
                "help: pass trust=True if you trust whoever wrote this checkpoint; unpickling can run any code."
            ) from error

    def damages(self) -> list[str]:
        """Everything that does not match its checksum, one line each; empty when all is well."""
        found: list[str | None] = []
        with ThreadPoolExecutor(READERS) as pool:
            for items in self._batches():
                self._files.fetch(self._there(items))
                found += pool.map(self._damage, items)
                self._files.forget()
        return [line for line in found if line]

    def close(self) -> None:
        """Forget what was mapped or fetched; tensors that were handed out keep it."""
        self._files.forget()

    def _batches(self) -> Iterator[list[tuple[str, Stored]]]:
        """All items in the order of the files, so many at a time as may be held in memory."""
        items = [(name, piece) for name, spec in self.tensors.items() for piece in spec.pieces]
        batch: list[tuple[str, Stored]] = []
        for name, piece in sorted((*items, *self.values.items()), key=lambda item: item[1][:2]):
            if batch and sum(held.size_bytes for _, held in batch) + piece.size_bytes > VERIFIED_AT_ONCE:
                yield batch
                batch = []
            batch.append((name, piece))
        yield batch

    def _there(self, items: list[tuple[str, Stored]]) -> Iterator[Range]:
        """What of the items can be read at all."""
        for name, piece in items:
            span = self.range_of(name, piece)
            with contextlib.suppress(CheckpointCorrupt):
                self._check_there(name, span)
                yield span

    def _damage(self, named: tuple[str, Stored]) -> str | None:
        name, piece = named
        try:
            if name in self.tensors:
                self.piece(name, piece)
            else:
                self.value(name)
        except CheckpointCorrupt as error:
            return str(error).splitlines()[0].split(" is damaged: ", 1)[-1].removesuffix(".")
        except CheckpointError:
            pass
        return None

    def _check_payload(
        self, name: str, piece: Stored, checked: Checked, begin: int, end: int, data: memoryview, payload_at: int
    ) -> None:
        """Bytes `begin` to `end` of the payload, which begins at `payload_at` of `data`, by whole blocks."""
        if begin == end:
            return
        first, last = begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        stop = min((last + 1) * BLOCK_BYTES, checked.payload_bytes)
        blocks = data[payload_at + first * BLOCK_BYTES : payload_at + stop]
        self.bytes_used += len(blocks)
        before = checked.blocks[first - 1] if first else 0
        found = crc32(blocks, before)
        if found != checked.blocks[last]:
            raise self.corrupt(
                f"item {name!r} in {piece.file} has CRC32 {found:08x} up to block {last}, "
                f"written as {checked.blocks[last]:08x}"
            )

    def _check_frame(self, name: str, piece: Stored, checked: Checked, data: memoryview) -> None:
        """Head and tail of the item `data` are as the layout has them, and the tail's CRC32 is the payload's."""
        frame = tensor_frame(self.tensors[name].dtype, piece.box[1])
        head, tail = data[: checked.head_bytes], bytearray(data[checked.head_bytes + checked.payload_bytes :])
        crc = checked.blocks[-1] if len(checked.blocks) else 0
        stored = [bytes(tail[at : at + 4]) for at in frame.crc_at]
        for at in frame.crc_at:
            tail[at : at + 4] = bytes(4)
        if crc32(tail, crc32(head)) != checked.frame_crc or stored != [crc.to_bytes(4, "little")] * 2:
            raise self.corrupt(f"the framing of item {name!r} in {piece.file} does not match its checksum")

    def _foreign(self, name: str, piece: Stored) -> Tensor:
        raw = bytes(self._view(name, self.range_of(name, piece)))
        self.bytes_used += len(raw)
        self._check_zip(name, raw)
        try:
            tensor: Tensor = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
        except Exception as error:
            raise self.corrupt(f"item {name!r} cannot be read: {str(error).splitlines()[0]}") from error
        return tensor.detach()

    def _check_zip(self, name: str, raw: bytes) -> None:
        try:
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
            raise self.corrupt(f"item {name!r} is not an archive: {error}") from error
        if broken:
            raise self.corrupt(f"item {name!r} does not match its CRC32")

    def _view(self, name: str, span: Range) -> memoryview:
        self._check_there(name, span)
        return self._files.view(span)

    def _check_there(self, name: str, span: Range) -> None:
        """The file that an item lies in exists, and is as long as it was written."""
        if os.path.basename(span.file) != span.file:
            raise self.corrupt(f"{METADATA} names the file {span.file!r} outside of its directory")
        try:
            size = self._files.size_bytes(span.file)
        except OSError as error:
            raise self.corrupt(
                f"item {name!r} cannot be read: {span.file} cannot be opened: {error.strerror}"
            ) from error
        expected = self._sizes.get(span.file, max(size, span.end))
        if size != expected:
            raise self.corrupt(f"item {name!r} cannot be read: {span.file} has {size} bytes, written were {expected}")

    def _read_small(self, name: str) -> bytes:
        try:
            return self._files.read(name)
        except OSError as error:
            raise self.corrupt(f"{name} cannot be read: {error.strerror}") from error

    def _read_record(self) -> dict[str, Any]:
        """What was written beside DCP's files; a checkpoint without is DCP's own, unless it has sidecars."""
        try:
            names = self._files.names()
        except OSError as error:
            raise self.corrupt(f"it cannot be read: {error.strerror}") from error
        if RECORD not in names:
            if any(name.endswith(".checksums") for name in names):
                raise self.corrupt(f"{RECORD} is missing")
            return {}
        try:
            return parse_record(self._read_small(RECORD))
        except (ValueError, KeyError, TypeError) as error:
            raise self.corrupt(f"{RECORD} does not match its checksum") from error

    def _read_sidecar(self, rank: int, part: int = CHANGING) -> dict[str, Any]:
        name = sidecar_name(rank, part)
        try:
            header, running = parse_sidecar(self._read_small(name))
        except ValueError as error:
            raise self.corrupt(f"{name} does not match its checksum") from error
        self._sizes[header["file"]] = header["file_bytes"]
        for _, offset, head, payload, size, frame_crc, first in header["items"]:
            blocks = running[first : first + -(-payload // BLOCK_BYTES)]
            self._checked[(header["file"], offset)] = Checked(head, payload, size, frame_crc, blocks)
        return header

    def _unpickle(self, raw: bytes) -> Any:
        try:
            metadata = load_metadata(raw)
            metadata.state_dict_metadata, metadata.storage_data  # noqa: B018
        except CheckpointError:
            raise
        except Exception as error:
            raise self.corrupt(f"{METADATA} cannot be read: {error}") from error
        return metadata

    def _index(self, metadata: Any) -> None:
        stored = metadata.storage_data
        for name, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                self.values[name] = self._stored(name, None, stored, ((), ()))
                continue
            pieces = [
                self._stored(name, chunk.offsets, stored, (tuple(chunk.offsets), tuple(chunk.sizes)))
                for chunk in entry.chunks
            ]
            self.tensors[name] = TensorSpec(entry.properties.dtype, tuple(entry.size), pieces)

    def _stored(self, name: str, offsets: Any, stored: Any, box: Box) -> Stored:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        try:
            info = stored[MetadataIndex(name, offsets)]
        except KeyError:
            raise self.corrupt(f"{METADATA} does not say where item {name!r} lies") from None
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"item {name!r} of {self.path} went through a DCP extension, which is not supported.")
        found = Stored(info.relative_path, info.offset, info.length, box)
        if self.ours and getattr(self._checked.get((found.file, found.offset)), "size_bytes", None) != found.size_bytes:
            raise self.corrupt(f"{METADATA} and the sidecars disagree about item {name!r}")
        return found


def parse_sidecar(raw: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header of a sidecar, and the running CRC32 of every block.

    Raises:
        ValueError: it does not match its checksum.
    """
    data = memoryview(raw)
    if data[-4:] != crc32(data[:-4]).to_bytes(4, "little") or data[: len(SIDECAR_MAGIC)] != SIDECAR_MAGIC:
        raise ValueError("checksum")
    at = len(SIDECAR_MAGIC)
    length = int.from_bytes(data[at : at + 4], "little")
    header: dict[str, Any] = json.loads(bytes(data[at + 4 : at + 4 + length]))
    return header, memoryview(bytes(data[at + 4 + length : -4])).cast("I")


def _row_bytes(checked: Checked, piece: Stored, rows: tuple[int, int]) -> tuple[int, int]:
    """Where some rows begin and end in the payload."""
    row_bytes = checked.payload_bytes // piece.box[1][0]
    return rows[0] * row_bytes, rows[1] * row_bytes
