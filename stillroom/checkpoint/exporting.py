"""A checkpoint as other programs read it: sharded safetensors, or one file of `torch.save`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.checkpoint.loading import Load
from stillroom.checkpoint.reading import Snapshot
from stillroom.checkpoint.roots import Where
from stillroom.errors import CheckpointError
from stillroom.storage import atomic_directory, write_atomic

SHARD_BYTES = 5 * 10**9


def export_safetensors(
    checkpoint: str | Where, out: Path, prefix: str = "", shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write the tensors under `prefix` to the directory `out`, as Transformers loads them, names without the prefix.

    Raises:
        CheckpointError: there is no such tensor.
        CheckpointCorrupt: a tensor does not match its checksum.
    """
    from safetensors.torch import save_file

    snapshot = Snapshot(checkpoint)
    names = [name for name in snapshot.tensors if name.startswith(f"{prefix}." if prefix else "")]
    if not names:
        raise CheckpointError(f"{checkpoint} has no tensor under {prefix!r}.")
    shards = _shards(snapshot, names, shard_bytes)
    total = sum(size for size, _ in shards)
    with atomic_directory(out) as folder:
        weights: dict[str, str] = {}
        for number, (_, members) in enumerate(shards, start=1):
            many = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = many if len(shards) > 1 else "model.safetensors"
            tensors = {name[len(prefix) + bool(prefix) :]: _whole(snapshot, name) for name in members}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weights |= dict.fromkeys(tensors, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weights}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return {"out": str(out), "tensors": len(names), "bytes": total, "files": len(shards)}


def export_torch(checkpoint: str | Where, out: Path, prefix: str = "", trust: bool = False) -> dict[str, Any]:
    """Write the whole state, or its branch `prefix`, as one file that `torch.load` reads."""
    import io

    state: dict[str, Any] = {}
    Load(Snapshot(checkpoint), state, [prefix] if prefix else None, trust).apply()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(out, buffer.getvalue())
    return {"out": str(out), "bytes": out.stat().st_size}


def _shards(snapshot: Snapshot, names: list[str], shard_bytes: int) -> list[tuple[int, list[str]]]:
    shards: list[tuple[int, list[str]]] = []
    for name in names:
        spec = snapshot.tensors[name]
        size = torch.Size(spec.shape).numel() * spec.dtype.itemsize
        if not shards or shards[-1][0] + size > shard_bytes:
            shards.append((0, []))
        shards[-1] = (shards[-1][0] + size, [*shards[-1][1], name])
    return shards


def _whole(snapshot: Snapshot, name: str) -> Tensor:
    into: dict[str, Any] = {}
    Load(snapshot, into, [name]).apply()
    leaf: Any = into
    while not isinstance(leaf, Tensor):
        leaf = next(iter(leaf.values() if isinstance(leaf, dict) else (part for part in leaf if part is not None)))
    return leaf
