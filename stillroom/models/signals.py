"""What a teacher says about the scored rows of a packed row, a few rows at a time.

    the student is asked for      the teacher answers with
    rows 0..255 of S          →   logits [256, V]              (dense: it is in memory)
                                  TopK ids, logprobs [256, K]  (sparse: cached on disk, or served elsewhere)

Row i of a signal belongs to scored row i of the `Packed` that it was made for: `packed.sequence_S[i]` says
which sequence that is and `packed.target_S[i]` which of its targets the row predicts. The engine asks for rows
in order, once each, and in pieces of any size; nothing larger than a piece has to exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stillroom.models.packing import Packed, TokenSequence
from stillroom.models.products import Products, project


class TopK(NamedTuple):
    """The K likeliest next tokens of each row; what is left of the mass is spread over the others, unsaid how.

    Attributes:
        ids_SK: int32 or int64, distinct within a row, each below the signal's `vocabulary`; in any order.
        logprobs_SK: float of any width, natural logarithms at temperature 1. A row with fewer than K tokens
            is filled up with other ids at -inf.
    """

    ids_SK: Tensor
    logprobs_SK: Tensor


class TeacherSignal(Protocol):
    """The teacher's next-token distributions for the S scored rows of one packed row.

    Attributes:
        vocabulary: how many ids the teacher's distribution covers, padding of its head included.
    """

    vocabulary: int

    def __len__(self) -> int:
        """S, the number of rows."""
        ...

    def rows(self, rows: slice) -> Tensor | TopK:
        """Rows `rows` (bounds within 0..S, no step), on the student's device.

        Returns:
            Either unnormalised logits at temperature 1, [rows, vocabulary] fp32, which the caller may overwrite
            and which stay valid until the next call; or a `TopK`, which nobody overwrites.
        """
        ...


class TeacherSource(Protocol):
    """Where training gets a signal for each packed row from: a model in memory, a cache, a server.

    Attributes:
        digest: changes whenever the signals would; part of what makes two training runs the same.
        model: the teacher itself, where it is in memory and judges any text, also what a student has just sampled;
            None where its signals were made before, for texts that were known then.
    """

    @property
    def digest(self) -> str: ...

    @property
    def model(self) -> Any: ...

    def signal(self, packed: Packed, sequences: Sequence[TokenSequence]) -> TeacherSignal:
        """The signal for `packed = pack(sequences)`, which lies on the student's device.

        Raises:
            StillroomError: there is no signal for a sequence; the message names it and says what to do.
        """
        ...


class Projected:
    """A dense signal: the teacher's head on its final hidden states, projected when asked for.

    Args:
        hidden_SE: the teacher's final hidden states of the scored rows, in any float format.
        head_VE: its output head; where the formats differ, the product has the head's.
        products: arithmetic where the head is fp32; a narrower head multiplies in its own format.
    """

    def __init__(self, hidden_SE: Tensor, head_VE: Tensor, products: Products) -> None:
        if hidden_SE.shape[1] != head_VE.shape[1]:
            raise ValueError(f"shapes disagree: hidden {tuple(hidden_SE.shape)}, head {tuple(head_VE.shape)}")
        self.vocabulary = head_VE.shape[0]
        wide = head_VE.dtype == torch.float32
        self._head = products.weight(head_VE) if wide else head_VE.detach()
        self._hidden = products.operand(hidden_SE.float()) if wide else hidden_SE.to(head_VE.dtype)
        self._buffer: Tensor | None = None

    def __len__(self) -> int:
        return len(self._hidden)

    def rows(self, rows: slice) -> Tensor:
        hidden = self._hidden[rows]
        if self._buffer is None or len(self._buffer) < len(hidden):
            self._buffer = hidden.new_empty(len(hidden), self.vocabulary, dtype=torch.float32)
        return project(hidden, self._head, self._buffer)


class Listed:
    """A sparse signal whose top-k lie in memory, gathered for one packed row."""

    def __init__(self, top: TopK, vocabulary: int) -> None:
        if top.ids_SK.shape != top.logprobs_SK.shape:
            raise ValueError(f"ids {tuple(top.ids_SK.shape)} and logprobs {tuple(top.logprobs_SK.shape)} disagree")
        self.top, self.vocabulary = top, vocabulary

    def __len__(self) -> int:
        return len(self.top.ids_SK)

    def rows(self, rows: slice) -> TopK:
        return TopK(self.top.ids_SK[rows], self.top.logprobs_SK[rows])
