"""`save`, `async_save` and `load` with the signatures of `torch.distributed.checkpoint`: swap the import.

    import stillroom.checkpoint.dcp as dcp

Each argument is honoured or refused. A call that brings a storage writer or reader of its own, such as one for Hugging
Face's safetensors, is handed on to torch's DCP, whose promises are then what counts. Planners and
`use_collectives=False` are refused: they would replace what this engine is. An `async_stager` is not called, since
staging is the arena's; giving one only asks for an `AsyncSaveResponse`, as it does in DCP. `async_checkpointer_type`
makes no difference: the writer is always a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from stillroom.checkpoint import trees
from stillroom.checkpoint.checkpointer import Checkpointer
from stillroom.checkpoint.config import CheckpointConfig
from stillroom.checkpoint.group import Solo
from stillroom.checkpoint.loading import Load
from stillroom.checkpoint.reading import Snapshot
from stillroom.checkpoint.roots import Where, root_of
from stillroom.checkpoint.saves import Save
from stillroom.errors import CheckpointError
from stillroom.storage import ObjectPath

EVERY = 1 << 60
"""DCP keeps whatever was saved, so nothing is ever superfluous."""


def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Any = None,
    storage_writer: Any = None,
    planner: Any = None,
    process_group: Any = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Any:
    """Save `state_dict` as the directory or `s3://` URL `checkpoint_id`, and wait until it is committed.

    Returns:
        The checkpoint's `torch.distributed.checkpoint.metadata.Metadata`.

    Raises:
        CheckpointError: it was not saved, on any rank; or an argument is refused.
    """
    if storage_writer is not None:
        return _stock().save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=storage_writer,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
            use_collectives=use_collectives,
        )
    _refuse(planner, use_collectives)
    _begin(state_dict, checkpoint_id, process_group, no_dist).result()
    return Snapshot(checkpoint_id).metadata


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Any = None,
    storage_writer: Any = None,
    planner: Any = None,
    process_group: Any = None,
    async_checkpointer_type: Any = None,
    async_stager: Any = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Any:
    """Save in the background; returns when the state may be changed again.

    Returns:
        A `Future` that ends when the checkpoint is committed; with a stager an `AsyncSaveResponse` of two.
    """
    if storage_writer is not None:
        kind: dict[str, Any] = (
            {} if async_checkpointer_type is None else {"async_checkpointer_type": async_checkpointer_type}
        )
        return _stock().async_save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=storage_writer,
            planner=planner,
            process_group=process_group,
            async_stager=async_stager,
            no_dist=no_dist,
            use_collectives=use_collectives,
            **kind,
        )
    _refuse(planner, use_collectives)
    begun = _begin(state_dict, checkpoint_id, process_group, no_dist)
    done: Future[None] = Future()
    begun.add_done_callback(lambda save: _settle(save, done))
    if async_stager is None:
        return done
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

    staged: Future[None] = Future()
    staged.set_result(None)
    return AsyncSaveResponse(staging_completion=staged, upload_completion=done)


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Any = None,
    storage_reader: Any = None,
    planner: Any = None,
    process_group: Any = None,
    no_dist: bool = False,
    trust: bool = False,
) -> None:
    """Fill `state_dict` in place with what the checkpoint has for its keys; `Stateful` members load their part.

    Args:
        trust: unpickle values of any class, as DCP always does.

    Raises:
        CheckpointError: a key is not in the checkpoint, or does not fit. Nothing was changed.
        CheckpointCorrupt: something does not match its checksum. Nothing was changed.
    """
    if storage_reader is not None:
        _stock().load(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_reader=storage_reader,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
        )
        return
    _refuse(planner)
    plain = _plain(state_dict)
    path = _path(checkpoint_id)
    root_of(path.parent).restore()
    _engine(process_group, no_dist, path).load_from(lambda: _whole(path, plain, trust))
    for key, member in state_dict.items():
        if _is_stateful(member):
            member.load_state_dict(plain[key])
        else:
            state_dict[key] = plain[key]


class _Folders(Checkpointer):
    """A Checkpointer whose checkpoints lie wherever the caller says, in places of one kind."""

    def __init__(self, process_group: Any, alone: bool, root: Where) -> None:
        self._targets: dict[int, Where] = {}
        # Directories of the caller's own choosing have nothing in common on disk.
        config = CheckpointConfig(keep_latest=EVERY, link_unchanged=False)
        super().__init__(root, config=config, process_group=process_group)
        if alone:
            self._group = Solo()

    def save_as(self, path: Where, state: dict[str, Any]) -> Save:
        number = len(self._targets)
        self._targets[number] = path
        return self.save(number, state)

    def load_from(self, read: Callable[[], Load]) -> None:
        self._load_together(self._next_number(), read)

    def steps(self) -> list[int]:
        return []

    def _path(self, step: int) -> Where:
        return self._targets[step]


_ENGINES: dict[Any, _Folders] = {}


def _engine(process_group: Any, alone: bool, path: Where) -> _Folders:
    """One engine for each group of ranks and kind of place, kept: its memory and its plan serve the next save."""
    key = (process_group, alone, type(path))
    if key not in _ENGINES:
        _ENGINES[key] = _Folders(process_group, alone, path.parent if isinstance(path, ObjectPath) else Path("."))
    return _ENGINES[key]


def _begin(state_dict: dict[str, Any], checkpoint_id: Any, process_group: Any, no_dist: bool) -> Save:
    path = _path(checkpoint_id)
    return _engine(process_group, no_dist, path).save_as(path, _plain(state_dict))


def _whole(path: Where, into: dict[str, Any], trust: bool) -> Load:
    """A load of every leaf of `into`, none of which may be absent."""
    load = Load(Snapshot(path), into, trees.leaves(into).keys(), trust)
    if load.absent:
        raise CheckpointError(f"{path} has no {load.absent[0]!r} ({len(load.absent)} keys missing).")
    return load


def _settle(save: Save, done: Future[None]) -> None:
    try:
        save.result()
    except CheckpointError as error:
        done.set_exception(error)
    else:
        done.set_result(None)


def _plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {key: member.state_dict() if _is_stateful(member) else member for key, member in state_dict.items()}


def _is_stateful(member: Any) -> bool:
    from torch.distributed.checkpoint.stateful import Stateful

    return isinstance(member, Stateful)


def _path(checkpoint_id: Any) -> Where:
    if checkpoint_id is None:
        raise CheckpointError("checkpoint_id is needed: the directory of the checkpoint, or its s3:// URL.")
    where: Where = root_of(checkpoint_id).where
    return where.absolute() if isinstance(where, Path) else where


def _refuse(planner: Any, use_collectives: bool = True) -> None:
    if planner is not None:
        raise CheckpointError("planner is not supported here.\nhelp: leave it out, or call torch's own DCP.")
    if not use_collectives:
        raise CheckpointError("use_collectives=False is not supported here.\nhelp: call torch's own DCP.")


def _stock() -> Any:
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint
