"""How checkpoints are written and kept. When to save is the trainer's setting."""

from __future__ import annotations

from pydantic import BaseModel, Field


class CheckpointConfig(BaseModel, frozen=True, extra="forbid"):
    """How many checkpoints stay."""

    keep_latest: int = Field(default=2, ge=1)
    """Committed checkpoints to retain; unfinished ones never count. Two, so that a damaged one has a successor."""
