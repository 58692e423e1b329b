"""Training state on disk, saved behind training's back, committed as a whole or not at all.

with Checkpointer("runs/a/checkpoints", like=state, config=CheckpointConfig(keep_latest=3)) as checkpointer:
    save = checkpointer.save(step, state)    # returns once it is safe to go on
    save.result()                            # waits until it is committed; raises what went wrong
    checkpointer.load(into=state)            # the newest committed one

`dcp` has `save`, `async_save` and `load` as `torch.distributed.checkpoint` has them; `exporting` turns a checkpoint
into safetensors or a `torch.save` file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.checkpoint.checkpointer import Checkpointer as Checkpointer
    from stillroom.checkpoint.config import CheckpointConfig as CheckpointConfig
    from stillroom.checkpoint.reading import Snapshot as Snapshot
    from stillroom.checkpoint.saves import CheckpointInfo as CheckpointInfo
    from stillroom.checkpoint.saves import Save as Save

_HOMES = {
    "Snapshot": "reading",
    "CheckpointConfig": "config",
    "CheckpointInfo": "saves",
    "Checkpointer": "checkpointer",
    "Save": "saves",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
