"""Training state on disk, committed as a whole or not at all.

with Checkpointer("runs/a/checkpoints", config=CheckpointConfig(keep_latest=3)) as checkpointer:
    checkpointer.save(step, state).result()
    checkpointer.load(into=state)      # the newest committed one
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.checkpoint.checkpointer import Checkpointer as Checkpointer
    from stillroom.checkpoint.checkpointer import CheckpointInfo as CheckpointInfo
    from stillroom.checkpoint.checkpointer import Save as Save
    from stillroom.checkpoint.config import CheckpointConfig as CheckpointConfig

_HOMES = {
    "CheckpointConfig": "config",
    "CheckpointInfo": "checkpointer",
    "Checkpointer": "checkpointer",
    "Save": "checkpointer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
