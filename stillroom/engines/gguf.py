"""Metadata of a GGUF file, read without numpy and without touching the tensors.

Source: the GGUF specification, versions 2 and 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from stillroom.errors import ModelError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
MAX_STRING_BYTES = 16 * 2**20
MAX_ITEMS = 2**24


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Every metadata value of a GGUF by key.

    Raises:
        ModelError: no such file, not a GGUF, or damaged.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file.\nhelp: give the path of a `.gguf` file.")
            version, _, count = struct.unpack("<IQQ", _exactly(file, 20))
            if version not in (2, 3) or count > MAX_ITEMS:
                raise ModelError(f"{path} is a GGUF of version {version}, which is not understood (2 and 3 are).")
            return dict(_pair(file) for _ in range(count))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}.\nhelp: check `path`.") from error
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"the GGUF {path} is damaged: {error}.\nhelp: fetch it again.") from error


def _pair(file: BinaryIO) -> tuple[str, Any]:
    key = _string(file)
    return key, _value(file, struct.unpack("<I", _exactly(file, 4))[0])


def _value(file: BinaryIO, kind: int, depth: int = 0) -> Any:
    if kind in _SCALARS:
        layout = _SCALARS[kind]
        return struct.unpack(layout, _exactly(file, struct.calcsize(layout)))[0]
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY or depth > 3:
        raise ValueError(f"unknown value type {kind}")
    inner, count = struct.unpack("<IQ", _exactly(file, 12))
    if count > MAX_ITEMS:
        raise ValueError(f"an array of {count} items")
    if inner in _SCALARS:
        layout = _SCALARS[inner]
        return list(struct.unpack(f"<{count}{layout[1]}", _exactly(file, count * struct.calcsize(layout))))
    return [_value(file, inner, depth + 1) for _ in range(count)]


def _string(file: BinaryIO) -> str:
    length = struct.unpack("<Q", _exactly(file, 8))[0]
    if length > MAX_STRING_BYTES:
        raise ValueError(f"a string of {length} bytes")
    return _exactly(file, length).decode("utf-8", "replace")


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"it ends {size - len(data)} bytes early")
    return data


def special_token(metadata: dict[str, Any], which: str) -> str:
    """The text of the `bos` or `eos` token, or nothing where the file names none."""
    index = metadata.get(f"tokenizer.ggml.{which}_token_id")
    tokens: Collection[str] = metadata.get("tokenizer.ggml.tokens", ())
    return list(tokens)[index] if isinstance(index, int) and index < len(tokens) else ""
