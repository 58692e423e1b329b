"""From examples to token sequences, and from those to the steps of every epoch.

Promise: the steps are a pure function of the sequences, the seed and the epoch, so a resumed run sees
exactly what an undisturbed one would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from stillroom.errors import NotEnoughData
from stillroom.models import encode_prompt, encode_target
from stillroom.models.packing import TokenSequence
from stillroom.schema import Example
from stillroom.training.config import TrainConfig


def tokenize(
    loaded: Any, examples: Sequence[Example], max_sequence_tokens: int
) -> tuple[list[TokenSequence], list[dict[str, Any]]]:
    """Each target of each example as a sequence, and those left out: `{"id", "reason", "tokens"}`.

    Raises:
        NotEnoughData: no example has a target that fits.
    """
    sequences: list[TokenSequence] = []
    skipped: list[dict[str, Any]] = []
    for example in examples:
        if not example.targets:
            skipped.append({"id": example.id, "reason": "no target", "tokens": 0})
            continue
        prompt = encode_prompt(loaded, example.messages, example.tools)
        for target in example.targets:
            ids = (*prompt, *encode_target(loaded.tokenizer, target.message))
            if len(ids) > max_sequence_tokens:
                reason = f"longer than training.max_sequence_tokens={max_sequence_tokens}"
                skipped.append({"id": example.id, "reason": reason, "tokens": len(ids)})
            else:
                sequences.append(TokenSequence(ids, len(prompt), example.id))
    if not sequences:
        unlabelled = sum(not example.targets for example in examples)
        raise NotEnoughData(
            f"nothing to learn from: of {len(examples)} examples, {unlabelled} have no target "
            f"and the others are longer than max_sequence_tokens={max_sequence_tokens}.\n"
            "help: label the examples first (`stillroom distill` does), or raise training.max_sequence_tokens."
        )
    return sequences, skipped


def steps_of_epoch(
    sequences: Sequence[TokenSequence], config: TrainConfig, seed: int, epoch: int
) -> Iterator[list[TokenSequence]]:
    """The optimizer steps of `epoch` (from 0): sequences in its order, cut where the token budget is full."""
    order = list(range(len(sequences)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    if config.order == "short_first" and epoch == 0:
        order.sort(key=lambda index: len(sequences[index].ids))
    batch: list[TokenSequence] = []
    used = 0
    for index in order:
        size = len(sequences[index].ids)
        if batch and used + size > config.tokens_per_step:
            yield batch
            batch, used = [], 0
        batch.append(sequences[index])
        used += size
    yield batch
