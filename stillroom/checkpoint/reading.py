"""One committed checkpoint, as it is read: ours with every byte checked, or one that PyTorch DCP wrote.

`.metadata` is unpickled by a reader that admits DCP's metadata classes and nothing else. Files are mapped, so that
only what is asked for is read; the CRC32 of a range of ours is checked from the running value before it to the one at
its end, so a slice costs its blocks and not the whole item. DCP's own files carry one CRC32 an item, which it never
checks and we do: there the whole item is read.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import re
import zipfile
import zlib
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
from stillroom.checkpoint.unpickling import load_metadata, load_value
from stillroom.checkpoint.writer import RECORD
from stillroom.errors import CheckpointCorrupt, CheckpointError

METADATA = ".metadata"
STEP_NAME = re.compile(r"step-(\d{8,})")
READERS = min(8, os.cpu_count() or 1)


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
    """A checkpoint directory.

    Attributes:
        record: step, metrics and world size as they were saved; empty for one that DCP wrote.
        metadata: DCP's `Metadata`.
        shape: the tree of the state.
        tensors, values: what is stored, by name.
        bytes_used: payload bytes that were asked for so far, checked blocks counted whole.

    Raises:
        CheckpointCorrupt: the metadata or a sidecar is damaged or missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors: dict[str, TensorSpec] = {}
        self.values: dict[str, Stored] = {}
        self.bytes_used = 0
        self._maps: dict[str, memoryview] = {}
        self._checked: dict[tuple[str, int], Checked] = {}
        self._sizes: dict[str, int] = {}
        self.record = self._read_record()
        raw = self._read_small(METADATA)
        sidecars = [self._read_sidecar(rank) for rank in range(self.record.get("world", 0))]
        for rank, sidecar in enumerate(sidecars):
            if sidecar.get("parts", 1) > 1:
                self._read_sidecar(rank, SETTLED)
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
        match = STEP_NAME.fullmatch(self.path.name)
        named = f"checkpoint of step {int(match[1])} in {self.path.parent}" if match else f"checkpoint {self.path}"
        return CheckpointCorrupt(
            f"{named} is damaged: {what}.\n"
            f"help: run `stillroom checkpoint verify {self.path.parent}`, and resume from an older step."
        )

    def files(self) -> list[str]:
        """The data files that the metadata refers to."""
        pieces = [piece for spec in self.tensors.values() for piece in spec.pieces]
        return sorted({piece.file for piece in (*pieces, *self.values.values())})

    def piece(self, name: str, piece: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        """A stored piece of a tensor, or some rows of its first dimension, checked; maps the file, copies nothing.

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
        begin, end = 0, checked.payload_bytes
        if rows:
            row_bytes = checked.payload_bytes // sizes[0]
            begin, end = rows[0] * row_bytes, rows[1] * row_bytes
            sizes = (rows[1] - rows[0], *sizes[1:])
        self._check_payload(name, piece, checked, begin, end)
        if end - begin == checked.payload_bytes:
            self._check_frame(name, piece, checked)
        if begin == end:
            return torch.empty(sizes, dtype=spec.dtype)
        at = piece.offset + checked.head_bytes + begin
        raw = torch.frombuffer(self._map(piece.file), dtype=torch.uint8, offset=at, count=end - begin)
        # A slice need not begin at a multiple of its element's size; a view would be refused, a copy is not.
        return (raw if at % spec.dtype.itemsize == 0 else raw.clone()).view(spec.dtype).view(sizes)

    def value(self, name: str, trust: bool = False) -> Any:
        """A small value, checked.

        Args:
            trust: unpickle whatever it is; without, only what `torch.load(weights_only=True)` admits.

        Raises:
            CheckpointCorrupt: its checksum does not match.
            CheckpointError: it is of a class that is not admitted.
        """
        piece = self.values[name]
        raw = bytes(self._map(piece.file)[piece.offset : piece.offset + piece.size_bytes])
        checked = self._checked.get((piece.file, piece.offset))
        if checked is not None:
            self._check_payload(name, piece, checked, 0, checked.payload_bytes)
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
        names = [(name, piece) for name, spec in self.tensors.items() for piece in spec.pieces]
        with ThreadPoolExecutor(READERS) as pool:
            found = [*pool.map(self._damage, names), *pool.map(self._damage, self.values.items())]
        return [line for line in found if line]

    def close(self) -> None:
        """Forget the mapped files; tensors that were handed out keep them."""
        self._maps.clear()

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

    def _check_payload(self, name: str, piece: Stored, checked: Checked, begin: int, end: int) -> None:
        if begin == end:
            return
        first, last = begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        start = piece.offset + checked.head_bytes
        span = start + first * BLOCK_BYTES, start + min((last + 1) * BLOCK_BYTES, checked.payload_bytes)
        whole = self._map(piece.file)
        page = span[0] // mmap.PAGESIZE * mmap.PAGESIZE
        whole.obj.madvise(mmap.MADV_WILLNEED, page, span[1] - page)  # type: ignore[attr-defined]
        data = whole[span[0] : span[1]]
        self.bytes_used += len(data)
        before = checked.blocks[first - 1] if first else 0
        found = crc32(data, before)
        if found != checked.blocks[last]:
            raise self.corrupt(
                f"item {name!r} in {piece.file} has CRC32 {found:08x} up to block {last}, "
                f"written as {checked.blocks[last]:08x}"
            )

    def _check_frame(self, name: str, piece: Stored, checked: Checked) -> None:
        """Head and tail are as the layout has them, and the tail's CRC32 is the payload's."""
        spec = self.tensors[name]
        frame = tensor_frame(spec.dtype, piece.box[1])
        data = self._map(piece.file)
        head = data[piece.offset : piece.offset + checked.head_bytes]
        tail = bytearray(
            data[piece.offset + checked.head_bytes + checked.payload_bytes : piece.offset + piece.size_bytes]
        )
        crc = checked.blocks[-1] if len(checked.blocks) else 0
        stored = [bytes(tail[at : at + 4]) for at in frame.crc_at]
        for at in frame.crc_at:
            tail[at : at + 4] = bytes(4)
        if crc32(tail, crc32(head)) != checked.frame_crc or stored != [crc.to_bytes(4, "little")] * 2:
            raise self.corrupt(f"the framing of item {name!r} in {piece.file} does not match its checksum")

    def _foreign(self, name: str, piece: Stored) -> Tensor:
        raw = bytes(self._map(piece.file)[piece.offset : piece.offset + piece.size_bytes])
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

    def _map(self, file: str) -> memoryview:
        if file in self._maps:
            return self._maps[file]
        if os.path.basename(file) != file:
            raise self.corrupt(f"{METADATA} names the file {file!r} outside of its directory")
        try:
            descriptor = os.open(self.path / file, os.O_RDONLY)
        except OSError as error:
            raise self.corrupt(f"{file} cannot be opened: {error.strerror}") from error
        try:
            size, expected = os.fstat(descriptor).st_size, self._sizes.get(file)
            if (expected is not None and size != expected) or not size:
                raise self.corrupt(f"{file} has {size} bytes, written were {expected or 'more'}")
            # Private and writable: torch wants memory that it could write; the file stays as it is.
            mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            # What is needed is asked for by range; reading ahead of it would read many times as much.
            mapped.madvise(mmap.MADV_RANDOM)
        finally:
            os.close(descriptor)
        return self._maps.setdefault(file, memoryview(mapped))

    def _read_small(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise self.corrupt(f"{name} cannot be read: {error.strerror}") from error

    def _read_record(self) -> dict[str, Any]:
        """What was written beside DCP's files; a checkpoint without is DCP's own, unless it has sidecars."""
        if not (self.path / RECORD).exists():
            if list(self.path.glob("*.checksums")):
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


def parse_record(raw: bytes) -> dict[str, Any]:
    """The content of `checkpoint.json`.

    Raises:
        ValueError: it does not match its checksum.
    """
    whole = json.loads(raw)
    record: dict[str, Any] = whole["record"]
    if format_record(record) != raw.decode():
        raise ValueError("checksum")
    return record


def format_record(record: dict[str, Any]) -> str:
    """`record` with its CRC32, as `checkpoint.json` holds it."""
    text = json.dumps(record, sort_keys=True)
    return json.dumps({"record": json.loads(text), "crc32": zlib.crc32(text.encode())}, sort_keys=True) + "\n"
