"""What a training run was, in figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainResult:
    """A finished training, over all its resumptions.

    Attributes:
        steps, tokens, scored_tokens: optimizer steps; real tokens trained on, prompts included; answer tokens.
        losses: mean cross-entropy of each step's answer tokens, in nats.
        validation_losses: the same on the validation examples, after each epoch; empty without any.
        seconds: time in steps, validation and saving, summed over resumptions.
        tokens_per_s: `tokens` by the time in steps alone.
        peak_memory_bytes: the process's peak resident set, or the GPU's peak where one was used.
        precision, precision_reason: what matrix products were computed in, and why.
        trained_parameters: how many numbers were trained.
        skipped: examples left out: `{"id", "reason", "tokens"}`.
        resumed_at: the steps that the run was resumed at.
    """

    steps: int
    tokens: int
    scored_tokens: int
    losses: list[float]
    seconds: float
    tokens_per_s: float
    peak_memory_bytes: int
    precision: str
    precision_reason: str
    trained_parameters: int
    validation_losses: list[float] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
