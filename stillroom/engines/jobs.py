"""Answers to write, and the choice of each next token; what both ways of decoding share. Dims: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stillroom.engines.constrain import Matcher


@dataclass
class Job:
    """One answer to write, and what has been written.

    Attributes:
        prompt: token ids. max_tokens: how many may be written. temperature: 0 is greedy.
        seed: of the answer's own generator. top_p: share of the likeliest tokens' mass that is drawn from, in (0, 1].
        matcher: restricts the tokens, or None.
        stopped_by_text: says whether the tokens so far contain a stop string, or None.
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
    top_p: float = 1.0
    _draw: torch.Generator | None = None

    def take(self, token: int, end_ids: frozenset[int]) -> None:
        """Write one token, and note whether the answer ends with it."""
        self.written.append(token)
        if token in end_ids or self._complete(token):
            self.finish = "stop"
        elif len(self.written) >= self.max_tokens:
            self.finish = "length"

    def draw(self, device: torch.device) -> torch.Generator:
        """The answer's own source of chance, so that it does not depend on its neighbours."""
        if self._draw is None:
            self._draw = torch.Generator(device=device).manual_seed(self.seed)
        return self._draw

    def _complete(self, token: int) -> bool:
        by_grammar = self.matcher is not None and self.matcher.take(token)
        return by_grammar or (self.stopped_by_text is not None and self.stopped_by_text(self.written))


def choose(logits_BV: Tensor, jobs: Sequence[Job]) -> list[int]:
    """The next token of each row's job; rows of finished jobs get any. The logits may be changed in place."""
    for index, job in enumerate(jobs):
        if job.matcher is not None and job.finish is None:
            job.matcher.mask(logits_BV[index])
    tokens: list[int] = logits_BV.argmax(-1).tolist()
    for index, job in enumerate(jobs):
        if job.temperature > 0 and job.finish is None:
            chances_V = _nucleus(torch.softmax(logits_BV[index].float() / job.temperature, -1), job.top_p)
            tokens[index] = int(torch.multinomial(chances_V, 1, generator=job.draw(chances_V.device)))
    return tokens


def _nucleus(chances_V: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that together reach `top_p`, the others at 0. Source: Holtzman et al., arXiv:1904.09751."""
    if top_p >= 1:
        return chances_V
    ranked_V, order_V = chances_V.sort(descending=True, stable=True)
    ranked_V[ranked_V.cumsum(-1) - ranked_V >= top_p] = 0  # what comes before a token reaches it already
    return torch.zeros_like(chances_V).scatter_(0, order_V, ranked_V)


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
