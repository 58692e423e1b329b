"""Where every byte of a checkpoint goes, known before any of it is: a pure function of what is saved.

Each rank says which pieces of which tensors it holds, and how much room its small values take (`Item`). A piece that
several ranks hold is written by one of them (`planning.py`). From that follows every rank's file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.checkpoint.framing import ALIGNMENT, tensor_frame
from stillroom.checkpoint.trees import Shape
from stillroom.checkpoint.writer import BLOCK_BYTES
from stillroom.errors import CheckpointError


class Item(NamedTuple):
    """A piece of a tensor that a rank holds; or a value, which has no dtype and takes `slot` bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    slot: int


class Place(NamedTuple):
    """Where an item lies in its rank's file. For a value everything is payload."""

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
class Layout:
    """One rank's file.

    Attributes:
        places: what this rank writes; `number` counts the items that it described.
        file_bytes: length of the file; 0 where the rank writes nothing.
        blocks: blocks of 64 KiB that have a CRC32, over all payloads.
        digest: of all ranks' items: equal layouts have equal digests.
        metadata: the bytes of `.metadata` on rank 0, else none.
        sidecar_head: first part of the sidecar: its length, then JSON.
    """

    rank: int
    places: list[Place]
    file_bytes: int
    blocks: int
    digest: str
    metadata: bytes
    sidecar_head: bytes


def file_name(rank: int) -> str:
    return f"__{rank}_0.distcp"


def sidecar_name(rank: int) -> str:
    return f"__{rank}_0.checksums"


def lay_out(
    rank: int, items: Sequence[Item], chosen: Sequence[int], digest: str, metadata: bytes = b"", shape: Shape = None
) -> Layout:
    """One rank's file: the chosen items in order, each at a multiple of 64."""
    laid_out = places(items, chosen)
    header = {
        "file": file_name(rank),
        "file_bytes": _end(laid_out),
        "block_bytes": BLOCK_BYTES,
        "plan": digest,
        "metadata_crc32": zlib.crc32(metadata) if rank == 0 else None,
        "shape": shape,
        "items": [
            [p.item.key, p.offset, p.head_bytes, p.payload_bytes, p.size_bytes, p.frame_crc, p.first_block]
            for p in laid_out
        ],
    }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    blocks = laid_out[-1].first_block + _blocks(laid_out[-1].payload_bytes) if laid_out else 0
    head = len(text).to_bytes(4, "little") + text
    return Layout(rank, laid_out, _end(laid_out), blocks, digest, metadata, head)


def places(items: Sequence[Item], chosen: Iterable[int]) -> list[Place]:
    """Where the chosen items lie in a rank's file."""
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


def local_piece(tensor: Tensor) -> tuple[Tensor, tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """What this rank holds of a tensor, with its offsets and sizes in the whole; None where it holds nothing.

    Raises:
        CheckpointError: the tensor is sparse, quantized, on the meta device, or a sum that is still distributed.
    """
    if isinstance(tensor, _dtensor()):
        return _piece_of_dtensor(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(
            f"a tensor is {tensor.layout} on {tensor.device}; only dense tensors with data are saved."
        )
    return tensor, ((0,) * tensor.dim(), tuple(tensor.shape))


def _piece_of_dtensor(tensor: Any) -> tuple[Tensor, tuple[tuple[int, ...], tuple[int, ...]]] | None:
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
    return local, (tuple(offsets), tuple(sizes))


@lru_cache(maxsize=1)
def _dtensor() -> Any:
    """DTensor, or a class that nothing is, where this torch has no distributed part."""
    if not torch.distributed.is_available():
        return type("Never", (), {})
    from torch.distributed.tensor import DTensor

    return DTensor
