"""Answers written side by side: one prefill, then one token a step for every answer that is not finished.

    plan_batches    jobs of similar length together, within a token budget
    write_answers   left-padded prefill, then steps; finished rows leave the batch

Promise: greedy answers are those of each prompt alone, up to ties in rounding; sampled ones draw from a
generator of their own, seeded by the request, so they do not depend on their neighbours.
Dims: B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from stillroom.engines.constrain import Matcher

KEEP_SHARE = 0.75  # below this share of unfinished rows, the finished ones are taken out
ROOM = 64  # tokens for which the cache has room before it is copied to a larger one


@dataclass
class Job:
    """One answer to write, and what has been written.

    Attributes:
        prompt: token ids. max_tokens: how many may be written. temperature: 0 is greedy.
        seed: of the answer's own generator. matcher: restricts the tokens, or None.
        stopped_by_text: whether the tokens so far contain a stop string.
        written: token ids so far, the ending one included. finish: `stop` or `length`, None while it is written.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    matcher: Matcher | None = None
    stopped_by_text: Callable[[list[int]], bool] | None = None
    written: list[int] = field(default_factory=list)
    finish: str | None = None


def plan_batches(lengths: Sequence[int], max_batch: int, batch_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first; a batch has at most `batch_tokens` padded tokens.

    A single prompt longer than that is a batch by itself.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else None
        if last is None or len(last) >= max_batch or lengths[last[0]] * (len(last) + 1) > batch_tokens:
            batches.append([index])
        else:
            last.append(index)
    return batches


@torch.inference_mode()
def write_answers(
    model: Any, jobs: Sequence[Job], end_ids: frozenset[int], finished: Callable[[Job], None] | None = None
) -> None:
    """Write every job's answer; `finished` is called for each as soon as it is done.

    Args:
        model: a Transformers causal language model in evaluation mode.
        jobs: with at least one token of prompt and of `max_tokens` each.
        end_ids: tokens that end an answer.
    """
    device = model.device
    longest = max(len(job.prompt) for job in jobs)
    ids_BT, mask_BT = _left_padded([job.prompt for job in jobs], longest, device)
    cache = _roomy_cache(model)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_(min=0)
    logits_BV = _forward(model, ids_BT, mask_BT, positions_BT, cache)
    draw = [_generator(job, device) for job in jobs]
    rows = list(range(len(jobs)))  # which job each row of the batch writes
    next_B = positions_BT[:, -1] + 1
    while True:
        tokens = _choose(logits_BV, [jobs[row] for row in rows], [draw[row] for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            job = jobs[row]
            if job.finish is None:
                _take(job, token, end_ids)
                if job.finish is not None and finished is not None:
                    finished(job)
        going = [index for index, row in enumerate(rows) if jobs[row].finish is None]
        if not going:
            return
        if len(going) <= KEEP_SHARE * len(rows) or len(going) == 1:
            keep_R = torch.tensor(going, device=device)
            for layer in cache.layers:
                layer.batch_select_indices(keep_R)
            mask_BT, next_B = mask_BT[keep_R], next_B[keep_R]
            rows, tokens = [rows[index] for index in going], [tokens[index] for index in going]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
        ids_B1 = torch.tensor(tokens, device=device)[:, None]
        logits_BV = _forward(model, ids_B1, mask_BT, next_B[:, None], cache)
        next_B = next_B + 1


def _forward(model: Any, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Cache) -> Tensor:
    # Without padding no mask is passed: attention then takes its faster path.
    out = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = out.logits[:, -1].float()
    return logits


def _take(job: Job, token: int, end_ids: frozenset[int]) -> None:
    job.written.append(token)
    if (
        token in end_ids
        or (job.matcher is not None and job.matcher.take(token))
        or (job.stopped_by_text is not None and job.stopped_by_text(job.written))
    ):
        job.finish = "stop"
    elif len(job.written) >= job.max_tokens:
        job.finish = "length"


def _choose(logits_BV: Tensor, jobs: Sequence[Job], draws: Sequence[torch.Generator | None]) -> list[int]:
    for index, job in enumerate(jobs):
        if job.matcher is not None and job.finish is None:
            job.matcher.mask(logits_BV[index])
    tokens: list[int] = logits_BV.argmax(-1).tolist()
    for index, (job, draw) in enumerate(zip(jobs, draws, strict=True)):
        if draw is not None and job.finish is None:
            chances_V = torch.softmax(logits_BV[index] / job.temperature, -1)
            tokens[index] = int(torch.multinomial(chances_V, 1, generator=draw))
    return tokens


def _generator(job: Job, device: torch.device) -> torch.Generator | None:
    if job.temperature <= 0:
        return None
    return torch.Generator(device=device).manual_seed(job.seed)


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
