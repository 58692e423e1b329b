"""How checkpoints are written and kept. When to save is the trainer's setting."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class CheckpointConfig(BaseModel, frozen=True, extra="forbid"):
    """Which checkpoints stay, and what saving may take."""

    keep_latest: int = Field(default=2, ge=1)
    """Newest committed checkpoints to retain; unfinished ones never count. Two, so that a damaged one has another."""

    keep_every_steps: int | None = Field(default=None, ge=1)
    """Also retain every checkpoint whose step is a multiple of this."""

    keep_best: int = Field(default=0, ge=0)
    """Also retain this many with the best value of `best_metric`."""

    best_metric: str = "loss"
    """Name of a metric given to `save`; checkpoints without it are never best."""

    best_is: Literal["lowest", "highest"] = "lowest"

    buffers: int = Field(default=1, ge=1, le=4)
    """Copies of the state in host memory. With one, a save waits until the save before it is written."""

    stage: Literal["at once", "behind"] = "at once"
    """Whether `save` copies the state before it returns, or behind the next forward and backward pass: then
    `Save.staged` has to be waited for before the state changes (`Checkpointer.guard` does that)."""

    link_unchanged: bool = True
    """Whether tensors that stay the same from save to save are written once, to a file of their own that later
    checkpoints link. Every checkpoint stays whole, but one damaged sector then damages all that link the file."""

    timeout_s: float = Field(default=600.0, gt=0)
    """How long a rank waits for the others, or for the disk, before the save has failed."""
