"""GGUF files: metadata and tensors, read by hand.

The `gguf` package's own reader makes a numpy array for each of the hundred thousand strings of a vocabulary,
which takes seconds; this one reads the same header in a tenth of one. Blocks are unpacked by `gguf`.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3 (little-endian).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stillroom.errors import ModelError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
GROUP_ELEMENTS = 1 << 16
"""Elements unpacked in one row of work; sixteen rows make a group in `gguf`, which then fits a cache."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file: shape as numpy has it (slowest first), ggml's type, bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF's metadata by key, the value type of each as GGUF numbers it, and what tensors it holds."""

    path: Path
    metadata: dict[str, Any]
    types: dict[str, tuple[int, int | None]]
    tensors: dict[str, TensorInfo]

    def tensor(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A tensor's values, unpacked to fp32.

        Raises:
            ModelError: the file is cut short, or has a block type that the installed `gguf` does not know.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        info = self.tensors[name]
        try:
            kind = GGMLQuantizationType(info.type_id)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            count = math.prod(info.shape)
            raw = np.memmap(self.path, np.uint8, "r", info.offset, (count // block * block_bytes,))
            rows = _group_rows(count, info.shape[-1])
            values: np.ndarray[Any, Any] = dequantize(raw.reshape(rows, -1), kind)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise ModelError(
                f"tensor {name} of {self.path} cannot be read: {error}.\nhelp: fetch the file again."
            ) from error
        # fp32 tensors come back as a view of the file, which must not be trained in place.
        values = values if values.flags.writeable else values.copy()
        return values.astype(np.float32, copy=False).reshape(info.shape)


def read_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        ModelError: not a GGUF of version 2 or 3, or damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except (OSError, struct.error, UnicodeDecodeError, ValueError, KeyError, MemoryError) as error:
        raise ModelError(
            f"{path} is not a readable GGUF file: {error}.\nhelp: fetch it again, or check the path."
        ) from error


def _read(path: Path, file: BinaryIO) -> GgufFile:
    magic, version, tensor_count, pair_count = struct.unpack("<4sIQQ", _take(file, 24))
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    metadata: dict[str, Any] = {}
    types: dict[str, tuple[int, int | None]] = {}
    for _ in range(pair_count):
        key = _string(file)
        (kind,) = struct.unpack("<I", _take(file, 4))
        metadata[key], item_kind = _value(file, kind)
        types[key] = (kind, item_kind)
    infos = [_tensor_info(file) for _ in range(tensor_count)]
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-file.tell() // alignment) * alignment
    tensors = {name: TensorInfo(name, shape, kind, start + offset) for name, shape, kind, offset in infos}
    return GgufFile(path, metadata, types, tensors)


def _tensor_info(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _string(file)
    (dimensions,) = struct.unpack("<I", _take(file, 4))
    *shape, kind, offset = struct.unpack(f"<{dimensions}QIQ", _take(file, 8 * dimensions + 12))
    return name, tuple(reversed(shape)), kind, offset


def _value(file: BinaryIO, kind: int) -> tuple[Any, int | None]:
    """A value, and the type of its items if it is an array."""
    if kind in SCALARS:
        layout = "<" + SCALARS[kind]
        return struct.unpack(layout, _take(file, struct.calcsize(layout)))[0], None
    if kind == STRING:
        return _string(file), None
    if kind != ARRAY:
        raise ValueError(f"unknown value type {kind}")
    item_kind, count = struct.unpack("<IQ", _take(file, 12))
    if item_kind in SCALARS:
        layout = f"<{count}{SCALARS[item_kind]}"
        return list(struct.unpack(layout, _take(file, struct.calcsize(layout)))), item_kind
    return [_value(file, item_kind)[0] for _ in range(count)], item_kind


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", _take(file, 8))
    return _take(file, length).decode("utf-8")


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"it ends where {size} more bytes should follow")
    return data


def _group_rows(count: int, last: int) -> int:
    """How many rows to unpack `count` elements in: whole rows of the tensor, about GROUP_ELEMENTS each."""
    rows = count // last
    merge = max(d for d in range(1, max(1, GROUP_ELEMENTS // last) + 1) if rows % d == 0)
    return rows // merge
