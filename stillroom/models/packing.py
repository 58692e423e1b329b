"""Many token sequences in one row, without padding, each blind to the others.

    seq 1:  prefix A1 A2          row:  prefix A1 A2 B1 B2
    seq 2:  prefix B1 B2                  │     └ sees prefix and itself
                                          └ computed once, seen by both

Sequences of one step that begin alike (the instruction, the same tools, the same prompt with two answers)
share the rows of their common beginning: causal attention makes those hidden states equal, so computing
them once is exact, and their gradient is the sum that separate copies would have had.

Promise: for every scored token, what it may attend to and at which position is what it would have been in
its sequence alone. The last token of a sequence predicts nothing that is scored, so it has no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

MIN_SHARED = 16
"""Shorter common beginnings are copied: a segment of its own costs about as much time as 8 tokens."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt with one answer: `ids[first_target:]` are learnt. `name` is for messages."""

    ids: tuple[int, ...]
    first_target: int
    name: str = ""

    @property
    def targets(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first_target


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start` to `stop`, which attend causally to themselves and wholly to the `context` segments before."""

    start: int
    stop: int
    depth: int
    context: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """One row of packed sequences.

    Attributes:
        ids_T, positions_T: int64; the token in each row and its place in its sequence.
        segments: what attends to what.
        scored_S: int64 rows whose hidden state predicts a scored token; rows of shared answers repeat.
        labels_S: int64, the tokens to predict there.
        sequence_S: int64, the place in what `pack` was given of the sequence that each scored row belongs to.
        target_S: int64, which of that sequence's targets the row predicts: 0 is `ids[first_target]`.
        tokens: real tokens that the row stands for, shared ones counted once for every sequence.
    """

    ids_T: Tensor
    positions_T: Tensor
    segments: tuple[Segment, ...]
    scored_S: Tensor
    labels_S: Tensor
    sequence_S: Tensor
    target_S: Tensor
    tokens: int

    def to(self, device: torch.device) -> Packed:
        """The same row with its tensors on `device`."""
        if self.ids_T.device == device:
            return self
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def pack(sequences: Sequence[TokenSequence], *, share: bool = True) -> Packed:
    """Lay `sequences` in one row; `share` computes common beginnings once."""
    layout = _Layout([])
    if share:
        _lay(layout, sorted(sequences, key=lambda sequence: sequence.ids), 0, ())
    else:
        for sequence in sequences:
            _lay(layout, [sequence], 0, ())
    scored: list[int] = []
    labels: list[int] = []
    places: list[int] = []
    left: dict[TokenSequence, list[int]] = {}  # equal sequences are interchangeable
    for place, sequence in enumerate(sequences):
        left.setdefault(sequence, []).append(place)
    for sequence, chain in layout.chains:
        row_of = [row for segment in chain for row in range(segment.start, segment.stop)]
        scored.extend(row_of[sequence.first_target - 1 :])
        labels.extend(sequence.ids[sequence.first_target :])
        places.extend([left[sequence].pop()] * sequence.targets)
    return Packed(
        torch.tensor(layout.ids),
        torch.cat([torch.arange(s.depth, s.depth + s.stop - s.start) for s in layout.segments]),
        tuple(layout.segments),
        torch.tensor(scored),
        torch.tensor(labels),
        torch.tensor(places),
        torch.cat([torch.arange(sequence.targets) for sequence, _ in layout.chains]),
        sum(len(sequence.ids) for sequence in sequences),
    )


def split(sequences: Sequence[TokenSequence], row_tokens: int) -> list[list[TokenSequence]]:
    """Divide one step's sequences into rows of about `row_tokens`, alike ones together; order does not matter.

    Alike beginnings stand side by side after sorting, so a row shares what it can. A sequence longer than
    the budget has a row of its own.
    """
    rows: list[list[TokenSequence]] = []
    used = row_tokens
    for sequence in sorted(sequences, key=lambda sequence: sequence.ids):
        shared = _common(rows[-1][-1].ids, sequence.ids) if rows else 0
        fresh = len(sequence.ids) - (shared if shared >= MIN_SHARED else 0)
        if used + fresh > row_tokens:
            rows.append([])
            used, fresh = 0, len(sequence.ids)
        rows[-1].append(sequence)
        used += fresh
    return rows


class _Layout:
    """What `_lay` fills: the row so far, and the chain of segments that each sequence is made of."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.segments: list[Segment] = []
        self.chains: list[tuple[TokenSequence, tuple[Segment, ...]]] = []

    def add(self, ids: Sequence[int], depth: int, context: tuple[Segment, ...]) -> tuple[Segment, ...]:
        if not ids:
            return context
        segment = Segment(len(self.ids), len(self.ids) + len(ids), depth, context)
        self.ids.extend(ids)
        self.segments.append(segment)
        return (*context, segment)


def _lay(layout: _Layout, group: Sequence[TokenSequence], depth: int, context: tuple[Segment, ...]) -> None:
    """Lay sequences that agree on their first `depth` tokens, which stand in `context`; `group` is sorted."""
    classes: dict[tuple[int, ...], list[TokenSequence]] = {}
    for sequence in group:
        classes.setdefault(sequence.ids[depth : depth + MIN_SHARED], []).append(sequence)
    for alike in classes.values():
        first, last = alike[0].ids[:-1], alike[-1].ids[:-1]  # of a sorted group, the two that differ soonest
        common = _common(first, last) if len(alike) > 1 else len(first)
        if common < min(depth + MIN_SHARED, len(first)) or (len(alike) > 1 and common <= depth):
            for sequence in alike:
                layout.chains.append((sequence, layout.add(sequence.ids[depth:-1], depth, context)))
            continue
        chain = layout.add(first[depth:common], depth, context)
        ended = [sequence for sequence in alike if len(sequence.ids) - 1 == common]
        layout.chains.extend((sequence, chain) for sequence in ended)
        if len(ended) < len(alike):
            _lay(layout, [sequence for sequence in alike if len(sequence.ids) - 1 > common], common, chain)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items `a` and `b` have in common at their beginning."""
    if a[: len(b)] == b[: len(a)]:
        return min(len(a), len(b))
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
