"""A teacher in memory: it reads the same packed rows as the student, on its own device and in its own arithmetic.

    signal   the teacher's full distribution, projected when the loss asks for it
    top_k    what a cache keeps of it

Promise: what a sequence gets depends on the packed row that it is computed in by rounding alone, and equal rows give
equal bits on one machine with one number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import ConfigError
from stillroom.models.loading import Loaded
from stillroom.models.losses import CHUNK_ROWS
from stillroom.models.packed import hidden_states
from stillroom.models.packing import Packed, TokenSequence, pack
from stillroom.models.precision import pick_precision
from stillroom.models.products import Products
from stillroom.models.signals import Projected, TeacherSignal
from stillroom.schema import digest
from stillroom.teacher.signal_cache import SignalIdentity
from stillroom.teacher.tokens import vocabulary_digest
from stillroom.teacher.top_k import SequenceTopK, ValueBytes


class LiveTeacher:
    """A model that gives a signal for any packed row.

    Args:
        loaded: the teacher, on the device where it is to compute; its weights are frozen. Quantised layers are
            called as they are.
        precision: arithmetic of its products; weights in bf16 are always multiplied in bf16.
        vocabulary: so many ids of its head count, where a student's head is shorter; by default all.

    Raises:
        ConfigError: the weights are neither fp32 nor bf16.
    """

    def __init__(
        self, loaded: Loaded, *, precision: Literal["auto", "fp32", "bf16"] = "auto", vocabulary: int | None = None
    ) -> None:
        self.loaded = loaded
        self.model = loaded.model.requires_grad_(False).eval()
        head = self.model.get_output_embeddings().weight
        if head.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"the teacher's weights are {head.dtype}.\nhelp: load it in float32 or bfloat16.")
        self.vocabulary = min(head.shape[0], vocabulary or head.shape[0])
        self.precision = pick_precision("bf16" if head.dtype == torch.bfloat16 else precision, head.device.type)
        self._products = Products(self.precision)
        self._head = head

    @property
    def digest(self) -> str:
        """What decides the signals, see `TeacherSource`."""
        return digest(self.identity(1).model_dump(mode="json"))

    def identity(self, top_k: int, value_bytes: ValueBytes = 2) -> SignalIdentity:
        """What decides the signals of this teacher, for a `SignalCache`."""
        kinds = sorted({type(module).__name__ for module in self.model.modules()})  # quantised layers show here
        return SignalIdentity(
            teacher=self.loaded.digest,
            precision=digest([self.precision.name, str(self._head.dtype), kinds])[:16],
            tokenizer=vocabulary_digest(self.loaded.tokenizer),
            template=digest(self.loaded.chat_template),
            vocabulary=self.vocabulary,
            top_k=min(top_k, self.vocabulary),
            value_bytes=value_bytes,
        )

    def signal(self, packed: Packed, sequences: Sequence[TokenSequence]) -> TeacherSignal:
        """See `TeacherSource`: dense logits, computed on the teacher's device and handed over on the packed row's."""
        return _Shown(self._projected(packed), self.vocabulary, packed.ids_T.device)

    def top_k(self, row: Sequence[TokenSequence], wanted: Sequence[TokenSequence], k: int) -> list[SequenceTopK]:
        """The k most likely tokens at every target of `wanted`, computed in one packed row with the rest of `row`.

        Args:
            row: what is computed together: a row computed again gives the same bits.
            wanted: those of `row` to return, in this order.
            k: at most the vocabulary.
        """
        packed = pack(row)
        signal = self._projected(packed)
        pieces = [
            _most_likely(signal.rows(slice(start, start + CHUNK_ROWS))[:, : self.vocabulary], k)
            for start in range(0, len(signal), CHUNK_ROWS)
        ]
        ids_SK, logprobs_SK, tail_S = (torch.cat(parts).numpy() for parts in zip(*pieces, strict=True))
        order = np.lexsort((packed.target_S.numpy(), packed.sequence_S.numpy()))
        ends = np.cumsum([sequence.targets for sequence in row])
        rows_of = dict(zip(row, np.split(order, ends[:-1]), strict=True))
        return [SequenceTopK(ids_SK[at], logprobs_SK[at], tail_S[at]) for at in (rows_of[one] for one in wanted)]

    @torch.no_grad()
    def _projected(self, packed: Packed) -> Projected:
        packed = packed.to(self._head.device)
        return Projected(hidden_states(self.model, packed, self._products), self._head, self._products)


class _Shown:
    """The ids of a dense signal that count, on another device."""

    def __init__(self, signal: Projected, vocabulary: int, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self._signal, self._device = signal, device

    def __len__(self) -> int:
        return len(self._signal)

    def rows(self, rows: slice) -> Tensor:
        return self._signal.rows(rows)[:, : self.vocabulary].to(self._device)


def _most_likely(logits_RV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and log of the remaining mass, on the CPU; overwrites the logits."""
    values_RK, ids_RK = logits_RV.topk(k)
    highest_R1 = values_RK[:, :1]
    logits_RV.scatter_(1, ids_RK, -torch.inf)
    # The rest is summed by itself: 1 - sum(p) would have no digit left where the k hold nearly everything.
    rest_R1 = logits_RV.sub_(highest_R1).exp_().sum(-1, keepdim=True).log_().add_(highest_R1)
    normal_R1 = torch.logaddexp(values_RK.logsumexp(-1, keepdim=True), rest_R1)
    return ids_RK.cpu(), (values_RK - normal_R1).cpu(), (rest_R1 - normal_R1)[:, 0].cpu()
