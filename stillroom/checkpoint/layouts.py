"""Where every byte of a checkpoint goes, known before any of it is: a pure function of what is saved.

Each rank says which pieces of which tensors it holds, and how much room its small values take (`Item`). A piece that
several ranks hold is written by one of them. From that follow every rank's file, and `.metadata`, which lists where
each piece lies, in the classes that PyTorch DCP (torch 2.13) pickles.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.checkpoint.framing import ALIGNMENT, tensor_frame
from stillroom.checkpoint.trees import Shape, paths
from stillroom.checkpoint.writer import BLOCK_BYTES
from stillroom.errors import CheckpointError

PICKLE_PROTOCOL = 4
"""What `pickle.dump` uses by default in every Python that torch 2.13 supports."""


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


def plan_for_all(held: list[Any], shape: Shape) -> tuple[list[tuple[str, list[int], str]], bytes]:
    """For each rank the digest of the whole layout, the items that it writes, and what is wrong; and `.metadata`."""
    items = [
        [
            Item(key, dtype, tuple(size), tuple(offsets), tuple(sizes), slot)
            for key, dtype, size, offsets, sizes, slot in rank
        ]
        for rank in held
    ]
    try:
        chosen = assign(items)
    except CheckpointError as error:
        return [("", [], str(error))] * len(items), b""
    digest = digest_of(items, shape)
    return [(digest, part, "") for part in chosen], metadata_bytes(items, chosen, paths(shape))


def assign(items: Sequence[Sequence[Item]]) -> list[list[int]]:
    """For each rank the indices of the items that it writes: each piece once, by the rank that writes least so far.

    Raises:
        CheckpointError: ranks disagree about a tensor's shape or dtype.
    """
    holders: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, held in enumerate(items):
        for index, item in enumerate(held):
            holders.setdefault((item.key, item.offsets), []).append((rank, index))
            kind = kinds.setdefault(item.key, (item.dtype, item.shape))
            if kind != (item.dtype, item.shape):
                raise CheckpointError(
                    f"tensor {item.key!r} is {kind[1]} {kind[0]} on one rank and {item.shape} {item.dtype} on rank "
                    f"{rank}.\nhelp: give what differs between ranks a key of its own on each."
                )
    chosen: list[list[int]] = [[] for _ in items]
    load = [0] * len(items)
    for candidates in holders.values():
        rank, index = candidates[0]
        if len(candidates) > 1 and items[rank][index].dtype:
            rank, index = min(candidates, key=lambda candidate: load[candidate[0]])
        load[rank] += _size_bytes(items[rank][index])
        chosen[rank].append(index)
    return [sorted(indices) for indices in chosen]


def lay_out(
    rank: int, items: Sequence[Item], chosen: Sequence[int], digest: str, metadata: bytes = b"", shape: Shape = None
) -> Layout:
    """One rank's file: the chosen items in order, each at a multiple of 64."""
    places = _places(items, chosen)
    header = {
        "file": file_name(rank),
        "file_bytes": _end(places),
        "block_bytes": BLOCK_BYTES,
        "plan": digest,
        "metadata_crc32": zlib.crc32(metadata) if rank == 0 else None,
        "shape": shape,
        "items": [
            [p.item.key, p.offset, p.head_bytes, p.payload_bytes, p.size_bytes, p.frame_crc, p.first_block]
            for p in places
        ],
    }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    blocks = places[-1].first_block + _blocks(places[-1].payload_bytes) if places else 0
    head = len(text).to_bytes(4, "little") + text
    return Layout(rank, places, _end(places), blocks, digest, metadata, head)


def metadata_bytes(
    items: Sequence[Sequence[Item]], chosen: Sequence[Sequence[int]], tree_paths: dict[str, Any]
) -> bytes:
    """`.metadata` for all ranks' files."""
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for rank, held in enumerate(items):
        for place in _places(held, chosen[rank]):
            item, where = place.item, _StorageInfo(file_name(rank), place.offset, place.size_bytes)
            if not item.dtype:
                state[item.key] = BytesStorageMetadata()
                storage[MetadataIndex(item.key)] = where
                continue
            tensor = state.get(item.key)
            if tensor is None:
                properties = TensorProperties(dtype=getattr(torch, item.dtype))
                tensor = state[item.key] = TensorStorageMetadata(properties, torch.Size(item.shape), [])
            offsets = torch.Size(item.offsets)
            storage[MetadataIndex(item.key, offsets, len(tensor.chunks))] = where
            tensor.chunks.append(ChunkStorageMetadata(offsets, torch.Size(item.sizes)))
    metadata = Metadata(state, tree_paths, storage, StorageMeta(), CURRENT_DCP_VERSION)
    return pickle.dumps(metadata, protocol=PICKLE_PROTOCOL)


def digest_of(items: Sequence[Sequence[Item]], shape: Shape) -> str:
    """SHA-256 of everything that decides the layout."""
    text = json.dumps([items, shape], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _places(items: Sequence[Item], chosen: Sequence[int]) -> list[Place]:
    places, end, block = [], 0, 0
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
        places.append(place)
        end, block = offset + place.size_bytes, block + _blocks(place.payload_bytes)
    return places


def _end(places: Sequence[Place]) -> int:
    return places[-1].offset + places[-1].size_bytes if places else 0


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES)


def _size_bytes(item: Item) -> int:
    return tensor_frame(getattr(torch, item.dtype), item.sizes).size_bytes if item.dtype else item.slot


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
