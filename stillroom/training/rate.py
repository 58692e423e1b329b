"""How fast this machine trains, from one short step that leaves the model as it was."""

from __future__ import annotations

import time
from typing import Any

import torch

from stillroom.models.packing import TokenSequence
from stillroom.training.config import TrainConfig
from stillroom.training.step import Stepper


def measure_rate(loaded: Any, config: TrainConfig, *, sequence_tokens: int = 170, scored_tokens: int = 30) -> float:
    """Tokens per second of training `loaded` with `config`, from one step after a warm-up; weights are unchanged.

    Sequences are random tokens that share no beginning, so real data, which may, is at most a little faster.
    """
    if config.method == "lora":
        # More work than adapters are, but these would stay in the model.
        config = config.model_copy(update={"method": "full"})
    generator = torch.Generator().manual_seed(0)
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    count = max(1, config.tokens_per_step // sequence_tokens)
    ids = torch.randint(vocabulary, (count, sequence_tokens), generator=generator).tolist()
    sequences = [TokenSequence(tuple(row), sequence_tokens - scored_tokens, f"sample {i}") for i, row in enumerate(ids)]
    was = [(p, p.requires_grad) for p in loaded.model.parameters()]
    stepper = Stepper(loaded.model, config.model_copy(update={"weight_decay": 0.0}))
    stepper.step(sequences[:1], learning_rate=0.0)
    started = time.monotonic()
    stepper.step(sequences, learning_rate=0.0)
    seconds = time.monotonic() - started
    for parameter, requires_grad in was:
        parameter.grad = None
        parameter.requires_grad_(requires_grad)
    loaded.model.eval()
    return count * sequence_tokens / seconds
