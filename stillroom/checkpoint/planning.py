"""The global plan: who writes which piece, and `.metadata` for all of them.

Ranks differ in where their pieces begin and in little else, so a rank sends its `pattern` (keys, dtypes, shapes, sizes)
as one text and the offsets as another: what is decoded and laid out once for a pattern serves every rank that has it.
`.metadata` is written as pickle code from prepared fragments, one for each key, each offset and each place; unpickled
it equals what PyTorch DCP (torch 2.13) would have pickled.
"""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from stillroom.checkpoint import trees
from stillroom.checkpoint.layouts import CHANGING, SETTLED, Item, file_name, places
from stillroom.checkpoint.trees import Shape
from stillroom.errors import CheckpointError

Part = tuple[str, list[int] | None, str]
"""For one rank: the digest of the global plan, the items that it writes (None for all), and what is wrong."""


def described(items: Sequence[Item], shape: Shape) -> tuple[str, str, str]:
    """What a rank tells the coordinator: pattern, offsets, tree; equal texts mean equal content."""
    pattern = json.dumps([[i.key, i.dtype, i.shape, i.sizes, i.slot, i.part] for i in items], separators=(",", ":"))
    offsets = " ".join(str(offset) for item in items for offset in item.offsets)
    return pattern, offsets, json.dumps(shape, separators=(",", ":"))


def plan_for_all(everybody: Sequence[tuple[str, str, str]]) -> tuple[list[Part], bytes, Shape]:
    """The part of each rank, `.metadata`, and the tree of all ranks' states together."""
    shape = trees.merged([json.loads(text) for text in dict.fromkeys(tree for _, _, tree in everybody)])
    digest = hashlib.sha256("\n".join(text for texts in everybody for text in texts).encode()).hexdigest()
    with _no_collection():
        patterns = {text: _Pattern(json.loads(text)) for text in dict.fromkeys(text for text, _, _ in everybody)}
        held = [_Held(patterns[pattern], offsets) for pattern, offsets, _ in everybody]
        try:
            _check_kinds(list(patterns.values()))
            chosen = _choose(held)
        except CheckpointError as error:
            return [("", [], str(error))] * len(held), b"", shape
        return [(digest, part, "") for part in chosen], metadata_bytes(held, chosen, trees.paths(shape)), shape


@dataclass
class _Pattern:
    """What a rank holds, but for the offsets."""

    pieces: list[list[Any]]
    laid_out: dict[Any, list[tuple[int, bytes]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = [piece[0] for piece in self.pieces]
        self.items = [
            Item(key, dtype, tuple(shape), (), tuple(sizes), slot, part)
            for key, dtype, shape, sizes, slot, part in self.pieces
        ]
        self.dimensions = [len(item.shape) for item in self.items]
        self.sizes = [_size(item.sizes) for item in self.items]
        every = places(self.items, range(len(self.items)))
        self.bytes = [place.size_bytes for place in every]

    def where(self, chosen: list[int] | None) -> list[tuple[int, bytes]]:
        """Number and pickled offset and length of each item that is written."""
        key = None if chosen is None else tuple(chosen)
        if key not in self.laid_out:
            every = range(len(self.items)) if chosen is None else chosen
            found = [
                place
                for part in (CHANGING, SETTLED)
                for place in places(self.items, [number for number in every if self.items[number].part == part])
            ]
            self.laid_out[key] = [
                (p.number, _place(_integer(p.offset), _integer(p.size_bytes))) for p in found
            ]  # fmt: skip
        return self.laid_out[key]


class _Held:
    """What one rank holds."""

    def __init__(self, pattern: _Pattern, offsets: str) -> None:
        self.pattern = pattern
        numbers = iter(list(map(int, offsets.split())))
        take = {1: lambda: (next(numbers),), 2: lambda: (next(numbers), next(numbers))}
        self.offsets = [
            take[count]() if count in take else tuple(next(numbers) for _ in range(count))
            for count in pattern.dimensions
        ]  # fmt: skip

    def pairs(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        return zip(self.pattern.keys, self.offsets, strict=True)


def _check_kinds(patterns: list[_Pattern]) -> None:
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for pattern in patterns:
        for item in pattern.items:
            kind = kinds.setdefault(item.key, (item.dtype, item.shape))
            if kind != (item.dtype, item.shape):
                raise CheckpointError(
                    f"tensor {item.key!r} is {kind[1]} {kind[0]} on one rank and {item.shape} {item.dtype} on another."
                    "\nhelp: give what differs between ranks a key of its own on each."
                )


def _choose(everybody: list[_Held]) -> list[list[int] | None]:
    """What each rank writes: a piece that several hold goes to the one with least to write, a value to the first."""
    seen: set[Any] = set()
    shared: set[Any] = set()
    for held in everybody:
        pairs = set(held.pairs())
        shared |= seen & pairs
        seen |= pairs
    if not shared:
        return [None] * len(everybody)
    holders: dict[Any, list[tuple[int, int]]] = {}
    load = []
    for rank, held in enumerate(everybody):
        own = 0
        for number, pair in enumerate(held.pairs()):
            if pair in shared:
                holders.setdefault(pair, []).append((rank, number))
            else:
                own += held.pattern.bytes[number]
        load.append(own)
    lost: list[set[int]] = [set() for _ in everybody]
    for candidates in holders.values():
        first = candidates[0]
        chosen = first
        if everybody[first[0]].pattern.items[first[1]].dtype:
            chosen = min(candidates, key=lambda candidate: load[candidate[0]])
        load[chosen[0]] += everybody[chosen[0]].pattern.bytes[chosen[1]]
        for rank, number in candidates:
            if (rank, number) != chosen:
                lost[rank].add(number)
    return [
        [number for number in range(len(held.offsets)) if number not in gone] if gone else None
        for held, gone in zip(everybody, lost, strict=True)
    ]


def metadata_bytes(everybody: list[_Held], chosen: Sequence[list[int] | None], paths: dict[str, Any]) -> bytes:
    """`.metadata`: for each key its kind and pieces, for each piece its file, offset and length."""
    chunks: dict[str, list[bytes]] = {}
    kinds: dict[str, Item] = {}
    storage: list[bytes] = []
    for rank, held in enumerate(everybody):
        pattern, files = held.pattern, [_string(file_name(rank, part)) for part in (CHANGING, SETTLED)]
        for item in pattern.items:
            kinds.setdefault(item.key, item)
        for number, where in pattern.where(chosen[rank]):
            key, file = pattern.keys[number], files[pattern.items[number].part]
            pieces = chunks.setdefault(key, [])
            if not pattern.items[number].dtype:
                storage += (INDEX, _string(key), VALUE_INDEX, INFO, file, where)
                continue
            offsets = _size(held.offsets[number])
            storage += (
                INDEX,
                _string(key),
                OFFSET,
                offsets,
                NUMBER,
                _integer(len(pieces) // FRAGMENTS),
                END,
                INFO,
                file,
                where,
            )
            pieces += (CHUNK, offsets, SIZES, pattern.sizes[number], END)  # as many as FRAGMENTS
    state = []
    for key, pieces in chunks.items():
        item = kinds[key]
        if not item.dtype:
            state += [_string(key), VALUE]
            continue
        properties = _properties(item.dtype)
        state += [_string(key), TENSOR, properties, SIZE, _size(item.shape), CHUNKS, b"](", *pieces, b"e", END]
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
    from torch.distributed.checkpoint.metadata import StorageMeta

    return b"".join((
        PREAMBLE, METADATA, b"}(", *state, b"u", PLANNER_DATA, _own(paths), STORAGE_DATA, b"}(", *storage, b"u",
        STORAGE_META, _own(StorageMeta()), VERSION, _string(CURRENT_DCP_VERSION), END, b".",
    ))  # fmt: skip


def _own(value: Any) -> bytes:
    """The code that builds `value`, which refers to nothing outside of it."""
    return pickle.dumps(value, protocol=2)[2:-1]


@lru_cache(maxsize=256)
def _properties(dtype: str) -> bytes:
    from torch.distributed.checkpoint.metadata import TensorProperties

    return _own(TensorProperties(dtype=getattr(torch, dtype)))


@lru_cache(maxsize=1 << 18)
def _integer(number: int) -> bytes:
    return _own(number)


@lru_cache(maxsize=1 << 18)
def _size(numbers: tuple[int, ...]) -> bytes:
    """A `torch.Size`."""
    return _get("Size") + b"((" + b"".join(map(_integer, numbers)) + b"ttR"


@lru_cache(maxsize=1 << 18)
def _string(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of small objects are made and none is garbage: looking for it would cost more than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


CLASSES = {
    "Metadata": "torch.distributed.checkpoint.metadata",
    "TensorStorageMetadata": "torch.distributed.checkpoint.metadata",
    "BytesStorageMetadata": "torch.distributed.checkpoint.metadata",
    "ChunkStorageMetadata": "torch.distributed.checkpoint.metadata",
    "MetadataIndex": "torch.distributed.checkpoint.metadata",
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
    "Size": "torch",
}
FIELDS = (
    "state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version", "properties", "size", "chunks",
    "offsets", "sizes", "fqn", "offset", "index", "relative_path", "length",
)  # fmt: skip
MEMO = 1 << 24
"""Names are kept in the unpickler's memo from here on, beyond what the parts made by `_own` use."""

_NAMES = [*CLASSES, *FIELDS]


def _memo(name: str) -> bytes:
    return struct.pack("<I", MEMO + _NAMES.index(name))


def _get(name: str) -> bytes:
    return b"j" + _memo(name)


def _new(name: str) -> bytes:
    """The code that begins an object of a class; fields follow, then `END`."""
    return _get(name) + b")\x81}("


END = b"ub"
PREAMBLE = b"\x80\x04" + b"".join(
    [f"c{module}\n{name}\n".encode() + b"r" + _memo(name) + b"0" for name, module in CLASSES.items()]
    + [_string(name) + b"r" + _memo(name) + b"0" for name in FIELDS]
)
METADATA = _new("Metadata") + _get("state_dict_metadata")
PLANNER_DATA, STORAGE_DATA, STORAGE_META = map(_get, ("planner_data", "storage_data", "storage_meta"))
VERSION = _get("version")
TENSOR = _new("TensorStorageMetadata") + _get("properties")
SIZE, CHUNKS = _get("size"), _get("chunks")
VALUE = _get("BytesStorageMetadata") + b")\x81"
CHUNK = _new("ChunkStorageMetadata") + _get("offsets")
SIZES = _get("sizes")
FRAGMENTS = 5
"""Of one chunk."""

INDEX = _new("MetadataIndex") + _get("fqn")
OFFSET, NUMBER = _get("offset"), _get("index")
VALUE_INDEX = OFFSET + b"N" + NUMBER + b"N" + END
INFO = _new("_StorageInfo") + _get("relative_path")


def _place(offset: bytes, length: bytes) -> bytes:
    return OFFSET + offset + _get("length") + length + END
