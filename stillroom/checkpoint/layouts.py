"""Where every byte of a checkpoint goes, known before any of it is: a pure function of what is saved.

Each rank says which pieces of which tensors it holds, and how much room its small values take (`Item`). A piece that
several ranks hold is written by one of them (`planning.py`). From that follows every rank's file.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.checkpoint.disk import BLOCK_BYTES
from stillroom.checkpoint.framing import ALIGNMENT, tensor_frame
from stillroom.checkpoint.trees import Shape
from stillroom.errors import CheckpointError

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a piece within a tensor."""


class Item(NamedTuple):
    """A piece of a tensor that a rank holds; or a value, which has no dtype and takes `slot` bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    slot: int
    part: int = 0


CHANGING, SETTLED = 0, 1
"""Parts of what a rank writes, each a file: what is written every time, and what is linked while it stays the same."""


class Place(NamedTuple):
    """Where an item lies in its file. For a value everything is payload."""

    item: Item
    number: int
    offset: int
    head_bytes: int
    payload_bytes: int
    size_bytes: int
    frame_crc: int
    first_block: int

    @property
    def payload_at(self) -> int:
        return self.offset + self.head_bytes


@dataclass(frozen=True)
class Part:
    """One file of a rank, and its sidecar.

    Attributes:
        places: what is in it; `number` counts the items that the rank described.
        file_bytes: length of the file; 0 where there is none.
        blocks: blocks of 64 KiB that have a CRC32, over all payloads.
        head: first part of the sidecar: its length, then JSON.
    """

    file: str
    sidecar: str
    places: list[Place]
    file_bytes: int
    blocks: int
    head: bytes


@dataclass(frozen=True)
class Layout:
    """What one rank writes.

    Attributes:
        parts: one file, or two where some tensors are settled.
        digest: of all ranks' items: equal layouts have equal digests.
        metadata: the bytes of `.metadata` on rank 0, else none.
    """

    rank: int
    parts: list[Part]
    digest: str
    metadata: bytes

    @cached_property
    def values(self) -> list[Place]:
        """The places of values."""
        return [place for part in self.parts for place in part.places if not place.item.dtype]


def file_name(rank: int, part: int = CHANGING) -> str:
    return f"__{rank}_{part}.distcp"


def sidecar_name(rank: int, part: int = CHANGING) -> str:
    return f"__{rank}_{part}.checksums"


def lay_out(
    rank: int,
    items: Sequence[Item],
    chosen: Sequence[int],
    digest: str,
    metadata: bytes = b"",
    shape: Shape = None,
    schema: str = "",
) -> Layout:
    """One rank's files: the chosen items in order, each at a multiple of 64.

    Args:
        schema: what `schema_of` says of the rank's state; by it the layout is found again (`recalling.py`).
    """
    by_part = [[index for index in chosen if items[index].part == part] for part in (CHANGING, SETTLED)]
    parts = [_part(rank, part, places(items, mine), {}) for part, mine in enumerate(by_part) if mine and part]
    crc = zlib.crc32(metadata) if rank == 0 else None
    about = {"plan": digest, "schema": schema, "metadata_crc32": crc, "shape": shape, "parts": 1 + len(parts)}
    return Layout(rank, [_part(rank, CHANGING, places(items, by_part[CHANGING]), about), *parts], digest, metadata)


def schema_of(items: Sequence[Item], shape: Shape, rank: int, world: int) -> str:
    """A digest of everything that decides the layout but for the room of values, and for what is settled."""
    described = [[i.key, i.dtype, i.shape, i.offsets, i.sizes] for i in items]
    return hashlib.sha256(json.dumps([described, shape, rank, world]).encode()).hexdigest()


def _part(rank: int, number: int, laid_out: list[Place], about: dict[str, Any]) -> Part:
    header = {
        "file": file_name(rank, number),
        "file_bytes": _end(laid_out),
        "block_bytes": BLOCK_BYTES,
        **about,
        "items": [
            [p.item.key, p.offset, p.head_bytes, p.payload_bytes, p.size_bytes, p.frame_crc, p.first_block]
            for p in laid_out
        ],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    blocks = laid_out[-1].first_block + _blocks(laid_out[-1].payload_bytes) if laid_out else 0
    head = len(text).to_bytes(4, "little") + text
    return Part(file_name(rank, number), sidecar_name(rank, number), laid_out, _end(laid_out), blocks, head)


def places(items: Sequence[Item], chosen: Iterable[int]) -> list[Place]:
    """Where the chosen items lie in one file."""
    found, end, block = [], 0, 0
    for index in chosen:
        item = items[index]
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        if item.dtype:
            frame = tensor_frame(getattr(torch, item.dtype), item.sizes)
            crc = zlib.crc32(frame.head + frame.tail)
            place = Place(
                item, index, offset, len(frame.head), frame.payload_bytes, frame.size_bytes, crc, block
            )  # fmt: skip
        else:
            place = Place(item, index, offset, 0, item.slot, item.slot, 0, block)
        found.append(place)
        end, block = offset + place.size_bytes, block + _blocks(place.payload_bytes)
    return found


def _end(laid_out: Sequence[Place]) -> int:
    return laid_out[-1].offset + laid_out[-1].size_bytes if laid_out else 0


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES)


def is_dtensor(tensor: Any) -> bool:
    return isinstance(tensor, _dtensor())


def is_dtensor_class(kind: type) -> bool:
    return issubclass(kind, _dtensor())


def placed(tensor: Any) -> tuple[Any, Any]:
    """Mesh and placements of a DTensor."""
    return tensor.device_mesh, tensor.placements


def local_piece(tensor: Tensor) -> tuple[Tensor, Box] | None:
    """What this rank holds of a tensor, with its offsets and sizes in the whole; None where it holds nothing.

    Raises:
        CheckpointError: the tensor is sparse, quantized, on the meta device, or a sum that is still distributed.
    """
    if is_dtensor(tensor):
        return _piece_of_dtensor(tensor)
    if hasattr(tensor, "local_shards"):
        raise CheckpointError(
            "it is a ShardedTensor.\nhelp: save DTensors, as FSDP2 has them, or local shards by name."
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(
            f"a tensor is {tensor.layout} on {tensor.device}; only dense tensors with data are saved."
        )
    return tensor, ((0,) * tensor.dim(), tuple(tensor.shape))


def _piece_of_dtensor(tensor: Any) -> tuple[Tensor, Box] | None:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.get_coordinate() is None:
        return None
    if any(placement.is_partial() for placement in placements):
        raise CheckpointError("a DTensor is partial: its sum is still distributed.\nhelp: redistribute it first.")
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tensor.to_local()
    if not local.numel() and tensor.numel():
        return None
    if local.shape != tuple(sizes):
        raise CheckpointError(
            f"a DTensor holds {tuple(local.shape)} on this rank, its placements {placements} say {tuple(sizes)}."
        )
    return local, (tuple(offsets), tuple(sizes))


@lru_cache(maxsize=1)
def _dtensor() -> Any:
    """DTensor, or a class that nothing is, where this torch has no distributed part."""
    if not torch.distributed.is_available():
        return type("Never", (), {})
    from torch.distributed.tensor import DTensor

    return DTensor
