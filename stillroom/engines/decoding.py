"""Answers written side by side, each as it would be alone.

    write_answers   the way in: chooses how
    write_stream    Llama-like models: a row whose answer is finished is given to the next prompt
    write_batch     any causal model: left-padded prefill, then steps; finished rows leave the batch

Promise: greedy answers are those of each prompt alone, up to ties in rounding; sampled ones do not depend
on their neighbours either. Dims: B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from stillroom.engines.jobs import Job, choose, plan_batches
from stillroom.engines.llama import LlamaDecoder, is_llama_like

KEEP_SHARE = 0.75  # below this share of unfinished rows, the finished ones are taken out
ROOM = 64  # tokens for which the cache has room before it is copied to a larger one
PREFILL_TOKENS = 1024  # prompts read together: enough for full speed, few enough to stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Partner:
    """A second model with the same token ids: each next token is drawn from `share` of its distribution and the rest
    of the first one's."""

    model: Any
    share: float


def write_answers(
    model: Any,
    jobs: Sequence[Job],
    end_ids: frozenset[int],
    finished: Callable[[Job], None],
    *,
    max_batch: int,
    batch_tokens: int,
    partner: Partner | None = None,
) -> None:
    """Write every job's answer; `finished` is called for each as soon as it is done.

    Args:
        model: a Transformers causal language model in evaluation mode.
        jobs: with at least one token of prompt and of `max_tokens` each.
        end_ids: tokens that end an answer.
        max_batch: answers under way at once. batch_tokens: tokens of prompts and answers in memory at once.
        partner: a model, in evaluation mode too, that is mixed in at every token.
    """
    positions = max(len(job.prompt) + job.max_tokens for job in jobs)
    if all(is_llama_like(each, positions) for each in (model, *([partner.model] if partner else []))):
        rows = max(1, min(max_batch, len(jobs), batch_tokens // positions))
        first = LlamaDecoder(model, rows, positions)
        decoder: LlamaDecoder | MixedDecoder = first
        if partner:
            decoder = MixedDecoder(first, LlamaDecoder(partner.model, rows, positions), partner.share)
        write_stream(decoder, jobs, end_ids, finished, rows)
        return
    lengths = [len(job.prompt) + job.max_tokens for job in jobs]
    for batch in plan_batches(lengths, max_batch, batch_tokens):
        write_batch(model, [jobs[index] for index in batch], end_ids, finished, partner)


class MixedDecoder:
    """Two decoders that read the same text, with the interface of one."""

    def __init__(self, first: LlamaDecoder, second: LlamaDecoder, share: float) -> None:
        self.first, self.second, self.weight = first, second, share

    @property
    def shared(self) -> int:
        return self.first.shared

    def share(self, beginning: list[int]) -> None:
        self.first.share(beginning)
        self.second.share(beginning)

    def prefill(self, prompts: Sequence[list[int]]) -> Tensor:
        return mix(self.first.prefill(prompts), self.second.prefill(prompts), self.weight)

    def step(self, tokens: Sequence[int]) -> Tensor:
        return mix(self.first.step(tokens), self.second.step(tokens), self.weight)

    def drop(self, row: int) -> None:
        self.first.drop(row)
        self.second.drop(row)


def mix(first_BV: Tensor, second_BV: Tensor, share: float) -> Tensor:
    """Log-probabilities of (1 - share) softmax(first) + share softmax(second), over the ids that both have."""
    width = min(first_BV.shape[-1], second_BV.shape[-1])  # heads may be padded differently
    first, second = (torch.softmax(part[:, :width].float(), -1) for part in (first_BV, second_BV))
    return torch.lerp(first, second.to(first.device), share).log_()


@torch.inference_mode()
def write_stream(
    decoder: LlamaDecoder | MixedDecoder,
    jobs: Sequence[Job],
    end_ids: frozenset[int],
    finished: Callable[[Job], None],
    rows: int,
) -> None:
    """Keep up to `rows` answers under way until all are written; longest prompts first."""
    decoder.share(_common_beginning([job.prompt for job in jobs]))
    waiting = deque(sorted(jobs, key=lambda job: -len(job.prompt)))
    writing: list[Job] = []  # by row of the decoder
    enough = max(1, rows // 4)  # free rows worth a prefill: each one costs a pass over all weights
    while waiting or writing:
        free = rows - len(writing)
        if waiting and free >= min(enough, len(waiting)):
            group = _next_group(waiting, free, decoder.shared)
            logits_BV = decoder.prefill([job.prompt for job in group])
            first, writing = len(writing), [*writing, *group]
        else:
            first, logits_BV = 0, decoder.step([job.written[-1] for job in writing])
        for job, token in zip(writing[first:], choose(logits_BV, writing[first:]), strict=True):
            job.take(token, end_ids)
        for row in range(len(writing) - 1, -1, -1):
            if writing[row].finish is not None:
                finished(writing[row])
                decoder.drop(row)
                writing[row] = writing[-1]
                writing.pop()


def _next_group(waiting: deque[Job], free: int, shared: int) -> list[Job]:
    group, tokens = [waiting.popleft()], 0
    while waiting and len(group) < free:
        tokens += len(group[-1].prompt) - shared
        if tokens + len(waiting[0].prompt) - shared > PREFILL_TOKENS:
            break
        group.append(waiting.popleft())
    return group


def _common_beginning(prompts: Sequence[list[int]]) -> list[int]:
    """What all prompts begin with (the instruction, examples), leaving each at least its last token; often nothing."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    most = min(len(prompt) for prompt in prompts) - 1
    return first[: next((i for i in range(most) if first[i] != last[i]), most)]


@torch.inference_mode()
def write_batch(
    model: Any,
    jobs: Sequence[Job],
    end_ids: frozenset[int],
    finished: Callable[[Job], None],
    partner: Partner | None = None,
) -> None:
    """Write the answers of one batch by the model's own code; `finished` is called for each as soon as it is done.

    Args:
        model: a Transformers causal language model in evaluation mode.
        jobs: with at least one token of prompt and of `max_tokens` each.
        end_ids: tokens that end an answer.
        partner: a model that is mixed in.
    """
    device = model.device
    longest = max(len(job.prompt) for job in jobs)
    ids_BT, mask_BT = _left_padded([job.prompt for job in jobs], longest, device)
    caches = [(each, _roomy_cache(each)) for each in (model, *([partner.model] if partner else []))]
    share = partner.share if partner else 0.0
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_(min=0)
    logits_BV = _forward(caches, share, ids_BT, mask_BT, positions_BT)
    rows = list(range(len(jobs)))  # which job each row of the batch writes
    next_B = positions_BT[:, -1] + 1
    while True:
        tokens = choose(logits_BV, [jobs[row] for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            job = jobs[row]
            if job.finish is None:
                job.take(token, end_ids)
                if job.finish is not None:
                    finished(job)
        going = [index for index, row in enumerate(rows) if jobs[row].finish is None]
        if not going:
            return
        if len(going) <= KEEP_SHARE * len(rows) or len(going) == 1:
            keep_R = torch.tensor(going, device=device)
            for _, cache in caches:
                for layer in cache.layers:
                    layer.batch_select_indices(keep_R)
            mask_BT, next_B = mask_BT[keep_R], next_B[keep_R]
            rows, tokens = [rows[index] for index in going], [tokens[index] for index in going]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
        ids_B1 = torch.tensor(tokens, device=device)[:, None]
        logits_BV = _forward(caches, share, ids_B1, mask_BT, next_B[:, None])
        next_B = next_B + 1


def _forward(
    caches: Sequence[tuple[Any, Cache]], share: float, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor
) -> Tensor:
    """The logits after the last of `ids_BT`; of two models, mixed."""
    logits = [
        model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        .logits[:, -1]
        .float()
        for model, cache in caches
    ]
    return mix(logits[0], logits[1], share) if len(logits) > 1 else logits[0]


def _left_padded(prompts: Sequence[list[int]], longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _roomy_cache(model: Any) -> Cache:
    """A cache that grows in strides where every layer attends to everything, else the model's own kind."""
    cache = DynamicCache(config=model.config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        return Cache(layers=[_RoomyLayer() for _ in cache.layers])
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values with room to grow: the plain layer copies all of them at every token."""

    keys: Tensor
    values: Tensor
    _used = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [_with_room(key_states), _with_room(value_states)]
            self._used = 0
        end = self._used + key_states.shape[-2]
        if end > self._room[0].shape[-2]:
            self._room = [_with_room(self.keys, end), _with_room(self.values, end)]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., self._used : end, :] = states
        self._used = end
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._room = [room[indices] for room in self._room]
        self.keys, self.values = (room[..., : self._used, :] for room in self._room)


def _with_room(states: Tensor, used: int | None = None) -> Tensor:
    """An empty tensor for these states and more, or, given `used`, a larger copy of them."""
    rows, heads, length, size = states.shape
    room = states.new_empty(rows, heads, max(length, used or 0) + ROOM, size)
    if used is not None:
        room[..., :length, :] = states
    return room
