"""How fast this machine trains, from one short step that leaves the model as it was."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from stillroom.models.packing import TokenSequence
from stillroom.training.config import ObjectiveConfig, TrainConfig
from stillroom.training.step import Stepper


def measure_rate(loaded: Any, config: TrainConfig, prompts: Sequence[Sequence[int]], *, answer_tokens: int) -> float:
    """Tokens per second of training `loaded` with `config`, from one step after a warm-up; weights are unchanged.

    Measured on sequence distillation, whatever the objective: what a teacher adds is for its source to say.

    Args:
        prompts: token ids of real prompts, whose lengths and common beginnings decide the rate; a few suffice.
        answer_tokens: how long an answer is about.
    """
    # More work than adapters or chosen matrices are; but adapters would stay in the model, and choosing takes a scan.
    config = config.model_copy(update={"method": "full", "spectrum": None})
    sequences = list(_sequences(prompts, answer_tokens, config))
    was = [(p, p.requires_grad) for p in loaded.model.parameters()]
    stepper = Stepper(loaded.model, config.model_copy(update={"weight_decay": 0.0, "objective": ObjectiveConfig()}))
    stepper.step(sequences[:2], learning_rate=0.0)
    started = time.monotonic()
    stepper.step(sequences, learning_rate=0.0)
    seconds = time.monotonic() - started
    for parameter, requires_grad in was:
        parameter.grad = None
        parameter.requires_grad_(requires_grad)
    loaded.model.eval()
    return sum(len(sequence.ids) for sequence in sequences) / seconds


def _sequences(prompts: Sequence[Sequence[int]], answer_tokens: int, config: TrainConfig) -> Iterator[TokenSequence]:
    """As many prompts as one step has, each with some of its own tokens for an answer."""
    left = config.tokens_per_step
    for index, prompt in enumerate(prompts):
        ids = (*prompt, *prompt[-answer_tokens:])[: config.max_sequence_tokens]
        if index and len(ids) > left:
            return
        left -= len(ids)
        yield TokenSequence(ids, max(1, len(ids) - answer_tokens), f"sample {index}")
