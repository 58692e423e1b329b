"""Which committed checkpoints may go."""

from __future__ import annotations

from collections.abc import Mapping

from stillroom.checkpoint.config import CheckpointConfig


def superfluous(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> list[int]:
    """The steps that no policy keeps, ascending.

    Args:
        metrics: metrics of every committed checkpoint, by step.
    """
    steps = sorted(metrics)
    kept = set(steps[-config.keep_latest :])
    if config.keep_every_steps:
        kept |= {step for step in steps if step % config.keep_every_steps == 0}
    if config.keep_best:
        sign = 1 if config.best_is == "lowest" else -1
        measured = [step for step in steps if config.best_metric in metrics[step]]
        # Of equals the newest stays; NaN is worse than everything.
        measured.sort(key=lambda step: (_badness(sign * metrics[step][config.best_metric]), -step))
        kept |= set(measured[: config.keep_best])
    return [step for step in steps if step not in kept]


def _badness(value: float) -> float:
    return float("inf") if value != value else value
