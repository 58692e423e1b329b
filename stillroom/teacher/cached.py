"""Training from signals that lie in a cache, and filling the cache from a teacher.

    fill(cache, teacher, sequences)        one pass, before training; asks only for what lacks
    CachedTeacher(cache)                   training then needs no teacher
    CachedTeacher(cache, teacher)          or: what lacks is computed, and kept, when training first asks for it

Promise: killed anywhere and run again, the cache holds the same bytes and training sees the same numbers as in an
undisturbed run on the CPU: rows are computed whole, also when only a part of one lacks, and a signal is always
read back from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from stillroom.models.packing import Packed, TokenSequence, split
from stillroom.models.signals import Listed, TeacherSignal, TopK
from stillroom.schema import digest
from stillroom.teacher.signal_cache import SignalCache
from stillroom.teacher.top_k import SequenceTopK
from stillroom.telemetry import progress

ROW_TOKENS = 1024
"""Tokens that a teacher in memory reads at once."""


class TopKTeacher(Protocol):
    """Who can say the most likely tokens at given targets: a model in memory, a server."""

    def top_k(self, row: Sequence[TokenSequence], wanted: Sequence[TokenSequence], k: int) -> list[SequenceTopK]:
        """The signals of `wanted`, a part of `row`; what is computed together may be computed as `row`.

        Raises:
            StillroomError: names the sequence for which there is none.
        """
        ...


@dataclass(frozen=True, slots=True)
class FillReport:
    """What filling did: distinct sequences that the cache has now, and those that the teacher was asked for."""

    sequences: int
    asked: int
    asked_positions: int


def fill(
    cache: SignalCache, teacher: TopKTeacher, sequences: Sequence[TokenSequence], *, row_tokens: int = ROW_TOKENS
) -> FillReport:
    """Put the signals of `sequences` that `cache` lacks; stored row by row, so a kill loses one row at most.

    Args:
        teacher: the one whose identity the cache has.
        row_tokens: how much is computed together.

    Raises:
        StillroomError: the teacher has no signal for a sequence; what came before is stored.
    """
    lacking = set(cache.missing(sequences))
    rows = split(list(dict.fromkeys(sequences)), row_tokens)
    positions = sum(sequence.targets for sequence in lacking)
    with progress("teacher signals", positions, "tokens") as bar:
        for row in rows:
            wanted = [sequence for sequence in row if sequence in lacking]
            if wanted:
                cache.put(wanted, teacher.top_k(row, wanted, cache.identity.top_k))
                bar.advance(sum(sequence.targets for sequence in wanted))
    return FillReport(sum(map(len, rows)), len(lacking), positions)


class CachedTeacher:
    """A source of signals for training, see `TeacherSource`.

    Args:
        cache: where they lie.
        teacher: who is asked for what lacks; None refuses it.
    """

    def __init__(self, cache: SignalCache, teacher: TopKTeacher | None = None) -> None:
        self.cache, self.teacher = cache, teacher
        self.vocabulary = cache.identity.vocabulary
        self.model = None  # also with a teacher to ask: samples of one step would fill the cache for nobody

    @property
    def digest(self) -> str:
        """What decides the signals, see `TeacherSource`: the cache's identity; who filled it makes no difference."""
        return digest(self.cache.identity.model_dump(mode="json"))

    def signal(self, packed: Packed, sequences: Sequence[TokenSequence]) -> TeacherSignal:
        """The cached top-k of the scored rows; where a served teacher gave fewer for some, the fewest for all.

        Raises:
            ArtifactError: a sequence has no signal, or a damaged one, and there is no teacher to ask.
        """
        if self.teacher is not None and (lacking := self.cache.missing(sequences)):
            self.cache.put(lacking, self.teacher.top_k(sequences, lacking, self.cache.identity.top_k))
        tops = [self.cache.read(sequence) for sequence in sequences]
        fewest = min(top.ids_NK.shape[1] for top in tops)
        tops = [top.narrowed(fewest) for top in tops]
        first = np.cumsum([0, *(len(top.ids_NK) for top in tops)])
        device = packed.sequence_S.device
        at_S = torch.from_numpy(first).to(device)[packed.sequence_S] + packed.target_S
        ids_NK = torch.from_numpy(np.concatenate([top.ids_NK for top in tops])).to(device)
        logprobs_NK = torch.from_numpy(np.concatenate([top.logprobs_NK for top in tops])).to(device)
        return Listed(TopK(ids_NK[at_S], logprobs_NK[at_S]), self.vocabulary)
