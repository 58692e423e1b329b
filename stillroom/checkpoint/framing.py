"""The bytes around each item of a checkpoint file: one archive that `torch.load` reads.

A `.distcp` file is a row of such archives, each an uncompressed zip:

    head      local headers, `data.pkl`, `byteorder`, header of `data/0`      a function of dtype and shape
    payload   the tensor's bytes in row-major order, at a multiple of 64
    tail      CRC32 of the payload, `version`, central directory              the same, but for eight bytes

So head, tail and every offset are known before a tensor is; only the payload's CRC32 is filled in, at two places
of the tail. A small value is one archive without a payload, padded to the size of its slot.

Source: APPNOTE.TXT 6.3.10 for zip and zip64; the reader in torch 2.13 takes archives of stored records that begin
with `<name>/data.pkl`.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64
"""Payloads start at a multiple of this within their archive, and archives within their file."""

ZIP64 = 0xFFFFFFFF
STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}
"""Storage classes that torch.save names; every younger dtype is stored untyped, with the dtype beside it."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PLAIN = (str, int, float, bool, bytes, complex, type(None))


class Frame(NamedTuple):
    """What surrounds a payload of `payload_bytes`; `crc_at` are offsets into `tail`."""

    head: bytes
    tail: bytes
    payload_bytes: int
    crc_at: tuple[int, int]

    @property
    def size_bytes(self) -> int:
        return len(self.head) + self.payload_bytes + len(self.tail)


@lru_cache(maxsize=65536)
def tensor_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
    """The frame of a contiguous tensor."""
    payload_bytes = math.prod(shape) * dtype.itemsize
    zip_ = _Zip()
    zip_.add("data.pkl", _tensor_pickle(dtype, shape, payload_bytes))
    zip_.add("byteorder", b"little")
    zip_.open("data/0", payload_bytes, ALIGNMENT)
    head = bytes(zip_.data)
    descriptor_at = 4
    zip_.skip(payload_bytes)
    zip_.add("version", b"3\n")
    central_at = zip_.finish("data/0")
    return Frame(head, bytes(zip_.data[len(head) :]), payload_bytes, (descriptor_at, central_at - len(head)))


def value_records(value: Any) -> list[tuple[str, bytes]]:
    """The records of `value` as `torch.save` would store it.

    Raises:
        Exception: whatever pickling raises.
    """
    if _is_plain(value):
        return [("data.pkl", pickle.dumps(value, protocol=2))]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as stored:
        records = [(name.split("/", 1)[1], stored.read(name)) for name in stored.namelist()]
    return [(name, data) for name, data in records if name == "data.pkl" or name.startswith("data/")]


def slot_bytes(records: list[tuple[str, bytes]]) -> int:
    """Room kept for a value, so that one that grows moves what follows it only when it has doubled."""
    size = len(value_archive(records)) + PADDING_BYTES
    step = 256 if size <= 2048 else min(1 << (size - 1).bit_length(), 1 << 24)
    return -(-size // step) * step


def value_archive(records: list[tuple[str, bytes]], slot: int | None = None) -> bytes:
    """The archive of a value; exactly `slot` bytes long through a record that readers pass over.

    Raises:
        ValueError: it does not fit.
    """
    zip_ = _Zip()
    for name, data in records:
        zip_.add(name, data, ALIGNMENT if name.startswith("data/") else 1)
    zip_.add("byteorder", b"little")
    zip_.add("version", b"3\n")
    if slot is not None:
        padding = slot - len(zip_.data) - zip_.directory_bytes - PADDING_BYTES
        if padding < 0:
            raise ValueError(f"the value takes {slot - padding} bytes, its slot has {slot}")
        zip_.add(".padding", bytes(padding))
    zip_.finish()
    return bytes(zip_.data)


def _is_plain(value: Any) -> bool:
    if type(value) in PLAIN:
        return True
    if type(value) in (list, tuple, set):
        return all(map(_is_plain, value))
    return type(value) is dict and all(map(_is_plain, value)) and all(map(_is_plain, value.values()))


class _Zip:
    """An archive under construction. A record's CRC32 follows its data; a skipped payload's is left zero."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.skipped = 0
        self._entries: list[tuple[bytes, int, int, int]] = []

    @property
    def directory_bytes(self) -> int:
        """Bytes that `finish` adds for the records so far."""
        return sum(46 + len(name) for name, *_ in self._entries) + 22

    def add(self, name: str, content: bytes, alignment: int = 1) -> None:
        self.open(name, len(content), alignment)
        crc = zlib.crc32(content)
        self._entries[-1] = (*self._entries[-1][:3], crc)
        self.data += content
        self._close(crc, len(content))

    def open(self, name: str, size: int, alignment: int = 1) -> None:
        """The header of a record whose data comes next, at a multiple of `alignment`."""
        encoded = f"archive/{name}".encode()
        start = len(self.data) + self.skipped
        gap = -(start + 30 + len(encoded)) % alignment
        gap += alignment if 0 < gap < 4 else 0  # an extra field has a header of four bytes
        extra = struct.pack("<2sH", b"FB", gap - 4) + b"Z" * (gap - 4) if gap else b""
        self.data += struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x0808, 0, 0, 0, 0, 0, 0, len(encoded), gap)
        self.data += encoded + extra
        self._entries.append((encoded, start, size, 0))

    def skip(self, size: int) -> None:
        """Leave out the data of the open record."""
        self.skipped += size
        self._close(0, size)

    def finish(self, crc_of: str = "") -> int:
        """Append the central directory; the offset in `data` of the CRC32 of the record named."""
        start, crc_at = len(self.data) + self.skipped, 0
        for name, offset, size, crc in self._entries:
            large = [number for number in (size, size, offset) if number >= ZIP64]
            extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
            if name == f"archive/{crc_of}".encode():
                crc_at = len(self.data) + 16
            self.data += struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 0, 0, 0x0808, 0, 0, 0, crc, min(size, ZIP64), min(size, ZIP64),
                len(name), len(extra), 0, 0, 0, 0, min(offset, ZIP64),
            ) + name + extra  # fmt: skip
        size, count = len(self.data) + self.skipped - start, len(self._entries)
        if start >= ZIP64:
            end = start + size
            self.data += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
            self.data += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        self.data += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, min(start, ZIP64), 0)
        return crc_at

    def _close(self, crc: int, size: int) -> None:
        form = "<4sI2Q" if size >= ZIP64 else "<4s3I"
        self.data += struct.pack(form, b"PK\7\x08", crc, size, size)


PADDING_BYTES = 30 + 46 + 16 + 2 * len("archive/.padding")
"""What the padding record itself takes, without padding: local header, descriptor, directory entry."""


def _tensor_pickle(dtype: torch.dtype, shape: tuple[int, ...], payload_bytes: int) -> bytes:
    """The pickle that rebuilds a tensor from storage `0`: protocol 2, as `torch.save` writes it."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(1, size))
    name = STORAGES.get(dtype)
    storage = f"ctorch\n{name}\n" if name else "ctorch.storage\nUntypedStorage\n"
    count = math.prod(shape) if name else payload_bytes
    return b"".join(
        (
            b"\x80\x02ctorch._utils\n",
            b"_rebuild_tensor_v2\n" if name else b"_rebuild_tensor_v3\n",
            b"((" + _text("storage") + storage.encode() + _text("0") + _text("cpu") + _integer(count) + b"tQ",
            _integer(0) + _integers(shape) + _integers(strides[: len(shape)]),
            b"\x89ccollections\nOrderedDict\n)R",
            b"" if name else f"ctorch\n{str(dtype).removeprefix('torch.')}\n".encode(),
            b"tR.",
        )
    )


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _integer(number: int) -> bytes:
    return pickle.dumps(number, protocol=2)[2:-1]


def _integers(numbers: Any) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"


def copyable(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that torch can copy: it has no copies of the youngest ones."""
    return tensor if tensor.dtype in STORAGES else tensor.view(INTEGERS[tensor.dtype.itemsize])
