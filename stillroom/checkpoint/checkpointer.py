"""Save and load training state: nested dictionaries of tensors and small values.

    root/
    ├── step-00000400/            committed: the directory was renamed into place, whole
    │   ├── tensors.safetensors   every tensor, under its path in the state, such as `optimizer/3/exp_avg`
    │   ├── values.json           everything else, at the same paths
    │   └── checksums.json        size and CRC32 of both files, and CRC32 of every tensor; written last
    └── .step-00000400.*.tmp/     being written, or left by a crash: invisible to every reader

Promise: after a crash at any instruction a reader sees the old set of checkpoints or the new one, never a
part. What is loaded is what was saved, bit for bit, or `CheckpointCorrupt` names the item that is not.
Nothing is unpickled. Saving is synchronous here: `save` returns when the checkpoint is committed, so its
handle is done from the start. Out of scope: when to save (training), several processes.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from stillroom.checkpoint.config import CheckpointConfig
from stillroom.checkpoint.files import checksum, read_tensor_file, write_tensor_file
from stillroom.errors import CheckpointCorrupt, CheckpointError
from stillroom.storage import atomic_directory

STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint: its step, where it lies, and its size."""

    step: int
    path: Path
    size_bytes: int


class Save:
    """What `Checkpointer.save` returns. Saving is synchronous, so both waits return at once."""

    def __init__(self, info: CheckpointInfo) -> None:
        self._info = info

    def staged(self) -> None:
        """Wait until the state may be changed again."""

    def result(self) -> CheckpointInfo:
        """Wait until the checkpoint is committed."""
        return self._info


class Checkpointer:
    """Checkpoints of one run, under `root`.

    Args:
        root: a directory; made when the first checkpoint is saved.
        like: a state of the shape that will be saved; not needed by this implementation.
        config: how many checkpoints stay.
    """

    def __init__(self, root: str | Path, *, like: Any = None, config: CheckpointConfig = CheckpointConfig()) -> None:
        self.root, self.config = Path(root), config
        self._closed = False

    def save(self, step: int, state: dict[str, Any]) -> Save:
        """Commit `state` as the checkpoint of `step`, then drop those beyond `keep_latest`.

        Args:
            step: not negative; an existing checkpoint of this step is replaced.
            state: nested dictionaries with string or integer keys; leaves are tensors or JSON values.

        Raises:
            CheckpointError: the state has a leaf that is neither, or the disk refused; nothing was committed.
        """
        if self._closed:
            raise CheckpointError("this Checkpointer is closed.\nhelp: open another for the same root.")
        tensors, values = flatten(state)
        path = self._path(step)
        try:
            with atomic_directory(path) as folder:
                crcs = write_tensor_file(folder / "tensors.safetensors", tensors)
                (folder / "values.json").write_text(json.dumps(values), encoding="utf-8")
                files = {name: checksum(folder / name) for name in ("values.json",)}
                size = (folder / "tensors.safetensors").stat().st_size
                record = {"step": step, "tensors": crcs, "tensors_bytes": size, "files": files}
                (folder / "checksums.json").write_text(json.dumps(record), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {self.root}: {error}\n"
                "help: free disk space or choose another directory; the checkpoints before are intact."
            ) from error
        self._retain()
        return Save(self._info(step))

    def load(self, into: dict[str, Any], step: int | None = None) -> CheckpointInfo | None:
        """Copy a checkpoint into `into`; None when there is none.

        Tensors are copied into the tensors of `into` where shape and dtype agree, everything else is replaced.
        The whole checkpoint is verified before anything is copied.

        Args:
            into: a state as `save` took it; keys that it lacks are added.
            step: which one; None for the newest committed.

        Raises:
            CheckpointCorrupt: a file or tensor does not match its checksum, or is missing. Nothing was copied.
            CheckpointError: there is no checkpoint of that step, or a tensor has another shape or dtype.
        """
        steps = self.steps()
        if step is None and not steps:
            return None
        chosen = steps[-1] if step is None else step
        if chosen not in steps:
            raise CheckpointError(f"no checkpoint of step {chosen} in {self.root}; there are {steps or 'none'}.")
        restored = self._read(chosen)
        _check_fits(into, restored, "", chosen)
        _copy(into, restored)
        return self._info(chosen)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        matches = (STEP_NAME.fullmatch(path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that it is no longer found but can still be looked at."""
        path = self._path(step)
        aside = path.with_name(f"{path.name}.damaged")
        if aside.exists():
            shutil.rmtree(aside)
        return path.rename(aside)

    def close(self) -> None:
        """Refuse later saves. Nothing is in flight."""
        self._closed = True

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _path(self, step: int) -> Path:
        if step < 0:
            raise CheckpointError(f"a step cannot be negative: {step}")
        return self.root / f"step-{step:08d}"

    def _info(self, step: int) -> CheckpointInfo:
        path = self._path(step)
        return CheckpointInfo(step, path, sum(file.stat().st_size for file in path.iterdir()))

    def _read(self, step: int) -> dict[str, Any]:
        path = self._path(step)
        try:
            record = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
            for name, wanted in record["files"].items():
                if checksum(path / name) != wanted:
                    raise ValueError(f"{name} does not match its checksum")
            values = json.loads((path / "values.json").read_text(encoding="utf-8"))
            tensors = read_tensor_file(path / "tensors.safetensors", record["tensors"], record["tensors_bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            before = [other for other in self.steps() if other < step]
            advice = f"resume from step {before[-1]}" if before else "start again"
            raise CheckpointCorrupt(
                f"checkpoint of step {step} in {self.root} is damaged: {error}\nhelp: {advice}, and check the disk."
            ) from error
        return unflatten(tensors, values)

    def _retain(self) -> None:
        """Drop what is too old, and what crashes left; a reader sees each one whole or not at all."""
        for step in self.steps()[: -self.config.keep_latest]:
            path = self._path(step)
            doomed = path.rename(path.with_name(f".{path.name}.old"))
            shutil.rmtree(doomed, ignore_errors=True)
        for pattern in (".step-*.tmp", ".step-*.old"):
            for leftover in self.root.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a nested state by path, and the state with each tensor replaced by a marker.

    Raises:
        CheckpointError: a key is neither text nor an integer, or contains `/`; a leaf is neither tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _strip(state, "", tensors)


def _strip(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        tensors[path] = node.detach()
        return {"tensor": path}
    if isinstance(node, dict):
        entries = []
        for key, value in node.items():
            if not isinstance(key, str | int) or isinstance(key, bool) or "/" in str(key):
                raise CheckpointError(
                    f"state key {key!r} at {path or 'the top'} is not text without '/', nor an integer."
                )
            entries.append([key, _strip(value, f"{path}/{key}" if path else str(key), tensors)])
        return {"dict": entries}
    if isinstance(node, list | tuple):
        return {"list": [_strip(value, f"{path}/{index}", tensors) for index, value in enumerate(node)]}
    if node is None or isinstance(node, str | int | float | bool):
        return {"value": node}
    raise CheckpointError(
        f"state at {path} is a {type(node).__name__}; tensors, numbers, text, None, lists and dictionaries are saved."
    )


def unflatten(tensors: dict[str, Tensor], node: Any) -> Any:
    """The inverse of `flatten`; tuples come back as lists."""
    (kind, content), *_ = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(tensors, value) for key, value in content}
    if kind == "list":
        return [unflatten(tensors, value) for value in content]
    return content


def _check_fits(into: Any, restored: Any, path: str, step: int) -> None:
    if isinstance(into, dict) and isinstance(restored, dict):
        for key in into.keys() & restored.keys():
            _check_fits(into[key], restored[key], f"{path}/{key}" if path else str(key), step)
    elif isinstance(into, Tensor) and isinstance(restored, Tensor):
        here, there = (tuple(into.shape), into.dtype), (tuple(restored.shape), restored.dtype)
        if here != there:
            raise CheckpointError(
                f"tensor {path!r} is {here[0]} {here[1]}, in the checkpoint of step {step} {there[0]} {there[1]}.\n"
                "help: it belongs to another model or configuration; use another directory."
            )


@torch.no_grad()
def _copy(into: dict[str, Any], restored: dict[str, Any]) -> None:
    for key, value in restored.items():
        here = into.get(key)
        if isinstance(here, Tensor) and isinstance(value, Tensor):
            here.copy_(value)
        elif isinstance(here, dict) and isinstance(value, dict):
            _copy(here, value)
        else:
            into[key] = value
