"""Unpickling what a stranger may have written: only what `.metadata` and small values need, and nothing that runs."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from typing import Any

import torch

from stillroom.errors import CheckpointError

ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip
"""Every global that DCP's `.metadata` refers to, dtypes apart."""

PLAIN_CLASSES = {"bytearray", "bytes", "complex", "frozenset", "set"}


def load_metadata(raw: bytes) -> Any:
    """DCP's `Metadata`.

    Raises:
        CheckpointError: it refers to something that no metadata needs.
        Exception: whatever unpickling damaged bytes raises.
    """
    return _MetadataUnpickler(io.BytesIO(raw)).load()


def load_value(raw: bytes, trust: bool) -> Any:
    """A small value from its archive.

    Args:
        trust: admit any class; without, those of `torch.load(weights_only=True)` and Python's own containers.

    Raises:
        pickle.UnpicklingError: it is of a class that is not admitted.
    """
    refused = contextlib.suppress(pickle.UnpicklingError, zipfile.BadZipFile, StopIteration)
    with refused, zipfile.ZipFile(io.BytesIO(raw)) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return _PlainUnpickler(io.BytesIO(archive.read(pickled))).load()
    return torch.load(io.BytesIO(raw), weights_only=not trust, map_location="cpu")


class _PlainUnpickler(pickle.Unpickler):
    """Values of built-in classes, of which `torch.load(weights_only=True)` lacks some; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode") or (module in ("builtins", "__builtin__") and name in PLAIN_CLASSES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class _MetadataUnpickler(pickle.Unpickler):
    """DCP's metadata classes; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ADMITTED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f".metadata refers to {module}.{name}, which no DCP metadata needs.\n"
            "help: do not open it by other means unless you trust whoever wrote it: unpickling can run any code."
        )
