"""The k most likely tokens of each scored position, and how they are laid out in bytes.

    body of N positions, plane after plane, little-endian:
        ids        N x k uint16, the low 16 bits; then N x k uint8, the next 8, where the vocabulary has over 65,536
        values     N x k, see below
        tail       N float32, log of the mass outside the k

With 2 bytes a value the square root of the negative log-probability is kept in steps of 2**-13: a value x is off by at
most 2**-13 * sqrt(x) nats (0.0001 at 1, 0.001 at 64, where it is cut off), ten times less than half precision is in
the tail, where reverse KL looks. With 4 bytes it is float32, and nothing is lost.

Bytes a position at k=64: 260 for a vocabulary of up to 65,536 tokens, 324 above; with 4-byte values 388 and 452.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stillroom.errors import ArtifactError

ValueBytes = Literal[2, 4]
Array = NDArray[Any]

_STEPS = 2.0**13
LOWEST = ((2**16 - 1) / _STEPS) ** 2
"""Log-probabilities below minus this are stored as minus this, if in 2 bytes: 64 nats, a probability of 1.6e-28."""


@dataclass(frozen=True, slots=True)
class SequenceTopK:
    """What a teacher says at the N scored positions of one sequence, at temperature 1.

    Attributes:
        ids_NK: int64, token ids, the most likely first.
        logprobs_NK: float32, natural logarithms, never rising along K.
        tail_N: float32, log of the mass of all other tokens; minus infinity where there are none.
    """

    ids_NK: Array
    logprobs_NK: Array
    tail_N: Array

    def narrowed(self, k: int) -> SequenceTopK:
        """The first `k` alone; what falls out joins the tail."""
        if k >= self.ids_NK.shape[1]:
            return self
        out_NR = self.logprobs_NK[:, k:].astype(np.float64)
        tail_N = np.logaddexp(np.logaddexp.reduce(out_NR, axis=1), self.tail_N)
        return SequenceTopK(self.ids_NK[:, :k], self.logprobs_NK[:, :k], tail_N.astype(np.float32))


@dataclass(frozen=True, slots=True)
class Layout:
    """How wide ids and values are: decided by the vocabulary's size and the setting."""

    vocabulary: int
    value_bytes: ValueBytes

    @property
    def id_bytes(self) -> int:
        return 2 if self.vocabulary <= 2**16 else 3

    def body_bytes(self, positions: int, k: int) -> int:
        """Size of a body."""
        return positions * (k * (self.id_bytes + self.value_bytes) + 4)

    def encode(self, top: SequenceTopK) -> bytes:
        """The body.

        Raises:
            ValueError: shapes disagree, an id is outside the vocabulary, or a log-probability is above 0 or no number.
        """
        _check(top, self.vocabulary)
        planes = [top.ids_NK.astype("<u2")]
        if self.id_bytes == 3:
            planes.append((top.ids_NK >> 16).astype("u1"))
        values_NK = np.minimum(top.logprobs_NK, 0)
        if self.value_bytes == 2:
            values_NK = np.rint(np.sqrt(np.minimum(-values_NK, LOWEST)) * _STEPS).astype("<u2")
        else:
            values_NK = values_NK.astype("<f4")
        return b"".join(plane.tobytes() for plane in (*planes, values_NK, top.tail_N.astype("<f4")))

    def decode(self, body: memoryview, positions: int, k: int) -> SequenceTopK:
        """The body read back; 2-byte values are made to sum to one with their tail again.

        Raises:
            ArtifactError: the body has another size, or holds what no encoder writes.
        """
        if len(body) != self.body_bytes(positions, k):
            raise ArtifactError(f"{len(body)} bytes where {positions} positions of {k} tokens take another number")
        count, at = positions * k, 2 * positions * k
        ids_NK = np.frombuffer(body, "<u2", count).astype(np.int64)
        if self.id_bytes == 3:
            ids_NK |= np.frombuffer(body, "u1", count, at).astype(np.int64) << 16
            at += count
        values = np.frombuffer(body, "<u2" if self.value_bytes == 2 else "<f4", count, at).astype(np.float32)
        tail_N = np.frombuffer(body, "<f4", positions, at + self.value_bytes * count).astype(np.float32)
        if self.value_bytes == 2:
            values = -np.square(values / np.float32(_STEPS))
        top = SequenceTopK(ids_NK.reshape(positions, k), values.reshape(positions, k), tail_N)
        try:
            _check(top, self.vocabulary)
        except ValueError as error:
            raise ArtifactError(str(error)) from error
        return _normalised(top) if self.value_bytes == 2 else top


def _normalised(top: SequenceTopK) -> SequenceTopK:
    """Sums to one again: rounding alone would leave a KL of equal distributions off zero, even below it."""
    mass_N = np.exp(top.logprobs_NK).sum(axis=1, dtype=np.float64) + np.exp(top.tail_N, dtype=np.float64)
    shift_N = np.log(mass_N).astype(np.float32)
    return SequenceTopK(top.ids_NK, top.logprobs_NK - shift_N[:, None], top.tail_N - shift_N)


def _check(top: SequenceTopK, vocabulary: int) -> None:
    positions, k = top.ids_NK.shape
    if top.logprobs_NK.shape != (positions, k) or top.tail_N.shape != (positions,) or not k:
        raise ValueError(f"shapes disagree: {top.ids_NK.shape}, {top.logprobs_NK.shape}, {top.tail_N.shape}")
    if not positions:
        return
    if not 0 <= top.ids_NK.min() <= top.ids_NK.max() < vocabulary:
        raise ValueError(f"a token id is outside [0, {vocabulary})")
    # Negated, so that no number fails too. A sum of rounded probabilities may pass one by a little.
    if not (top.logprobs_NK.max() <= 1e-3 and top.tail_N.max() <= 1e-3):
        raise ValueError("a log-probability is above 0, or is not a number")
