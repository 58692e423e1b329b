"""How a student is cut out of a larger model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class PruneConfig(BaseModel, frozen=True, extra="forbid"):
    """What is left of the model that a student begins as; distillation heals what the cut costs."""

    layers: int | None = Field(default=None, ge=1)
    """Layers that stay; null keeps all."""

    choose: Literal["spread", "influence"] = "spread"
    """Which layers stay. `spread`: the first, the last and evenly spaced ones between (arXiv:2010.13002).
    `influence`: those that change their input most, measured on the data (ShortGPT, arXiv:2403.03853)."""

    influence_sequences: int = Field(default=32, ge=1)
    """So many sequences of the data are read to measure influence."""

    vocabulary: Literal["all", "from-data"] = "all"
    """`from-data` keeps the tokens that occur in the data, and every byte and special token: any text can still be
    written, in more tokens where the data has nothing like it."""

    min_vocabulary: int = Field(default=0, ge=0)
    """With `from-data`: tokens that the tokenizer learnt first are kept besides, until there are so many."""
