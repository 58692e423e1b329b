"""Tensor files in the safetensors format, with a CRC32 for each tensor.

Written by hand rather than by the library because that copies every tensor to bytes first, which would
double the memory of training at each save.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE_BYTES = 1 << 22
"""Bytes written, or checked, at a time: small enough that the CRC finds them in cache."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of the dtypes that can be saved."""


def write_tensor_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, int]:
    """Write `tensors` to `path`; the CRC32 of each, and of the header under the empty name.

    Raises:
        OSError: the disk refused.
        KeyError: a tensor has a dtype that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crcs = {"": zlib.crc32(text)}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            crc = 0
            for piece in _pieces(tensor):
                crc = zlib.crc32(piece, crc)
                file.write(piece)
            crcs[name] = crc
    return crcs


def read_tensor_file(path: Path, crcs: dict[str, int], size_bytes: int) -> dict[str, Tensor]:
    """The tensors of a file that `write_tensor_file` wrote, memory-mapped, after checking every CRC32.

    Raises:
        ValueError: the size or a checksum disagrees; the message names the tensor.
        OSError: the file cannot be read.
    """
    if path.stat().st_size != size_bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, written were {size_bytes}")
    data = np.memmap(path, dtype=np.uint8, mode="c")  # copy on write: torch wants writable memory, the file stays
    length = struct.unpack("<Q", data[:8].tobytes())[0]
    if zlib.crc32(data[8 : 8 + length].tobytes()) != crcs[""]:
        raise ValueError(f"the header of {path.name} does not match its checksum")
    header = json.loads(data[8 : 8 + length].tobytes())
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        crc = 0
        for at in range(start, stop, PIECE_BYTES):
            crc = zlib.crc32(data[at : min(at + PIECE_BYTES, stop)].data, crc)
        if crc != crcs[name]:
            raise ValueError(f"tensor {name!r} has CRC32 {crc:08x}, written as {crcs[name]:08x}")
        raw = torch.from_numpy(data[start:stop]) if stop > start else torch.empty(0, dtype=torch.uint8)
        # Bytes need not be aligned for their dtype after another tensor; a view would be refused, a copy is not.
        typed = raw.view(dtypes[entry["dtype"]]) if start % 8 == 0 else raw.clone().view(dtypes[entry["dtype"]])
        tensors[name] = typed.reshape(entry["shape"])
    return tensors


def checksum(path: Path) -> dict[str, int]:
    """Size and CRC32 of a small file."""
    data = path.read_bytes()
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def _pieces(tensor: Tensor) -> Any:
    """The bytes of a tensor, a piece at a time, without copying those that lie in CPU memory in order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return
    view = flat.view(torch.uint8).numpy()
    for at in range(0, len(view), PIECE_BYTES):
        yield view[at : at + PIECE_BYTES].data
