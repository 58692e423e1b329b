"""The chunked engine behind every objective that compares a student with its teacher, row by row.

    rows of a chunk      student's head → logits [C, V], the one large buffer
      rows of a piece    teacher.rows() → logits [P, V] or top-k
        rows of a block  divergences and their gradient, which overwrites the student's logits
    chunk's gradient     → gradient of the hidden states, and of the head in place

Loss and gradient are computed in the forward pass, so nothing of size S x V is kept and each head is multiplied
once. Blocks are small enough for a processor's cache: on a CPU the passes over a whole chunk would take as long
as its matrix products, and temporaries of a chunk's size would be fresh pages every time.

Every row counts the same: `scale` is 1 / (scored tokens of the whole step), over accumulated rows and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillroom.models.divergences import Divergence, log_normaliser, pair
from stillroom.models.losses import TokenLoss, check_shapes
from stillroom.models.products import Products, add_gradient, project
from stillroom.models.signals import TeacherSignal, TopK

CHUNK_ELEMENTS, CHUNK_ROWS = 2**26, 256
"""On a CPU, logits of the student at a time (256 MiB), and the fewest rows: fewer make its products slower."""

PIECE_ELEMENTS, PIECE_ROWS = 3 * 2**21, 96
"""The same for what the teacher is asked for at a time (24 MiB), which only has to be compared with the student's."""

BLOCK_ELEMENTS = 2**19
"""Logits compared at a time on a CPU: 2 MiB, so that the passes of a divergence stay within the cache."""

KEPT_BYTES = 31 * 2**20
"""glibc returns freed memory to the system beyond a threshold, and taking it anew costs a page fault per 4 KiB:
four times as long as a divergence. Freeing one block of this size, never touched, raises the threshold to twice it."""

FREE_SHARE = 0.5
"""Of the memory that is free, what a chunk with its temporaries may take where it is chosen by that."""

LEAST_TAIL = 1e-7
"""A top-k's remaining mass is at least this, the resolution of fp32 near 1, so that reverse KL stays finite."""

LEAST_LOGPROB = -80.0
"""Tokens that a top-k gives less, among them those at -inf that fill a row up, count as this."""


@dataclass(frozen=True, slots=True)
class Blend:
    """What is minimised: a weighted sum of divergences from the teacher and cross-entropy with the labels.

    Attributes:
        divergences: weights with functions of `divergences`; at least one.
        labels: weight of the cross-entropy, which is always at temperature 1.
        temperature: divides both sides' logits before the divergences.
        temperature_squared: multiply the divergences by temperature squared, which keeps their gradient's size
            (Hinton et al. 2015, section 2; DistillKit and ModelOpt do, TRL and Liger do not).
        tail: what a top-k leaves out. `bucket`: one more token that has it all, on both sides; the divergence is
            then a lower bound of the full one. `renormalise`: both sides given that the token is in the top-k,
            so nothing holds the student's mass elsewhere back.
    """

    divergences: tuple[tuple[float, Divergence], ...]
    labels: float = 0.0
    temperature: float = 1.0
    temperature_squared: bool = False
    tail: Literal["bucket", "renormalise"] = "bucket"


def distil(
    hidden_SD: Tensor,
    head_VD: Tensor,
    labels_S: Tensor,
    teacher: TeacherSignal,
    blend: Blend,
    products: Products,
    *,
    scale: float = 1.0,
    gradient: bool = True,
    chunk_rows: int | None = None,
) -> TokenLoss:
    """`scale` times the sum over rows of `blend`, in nats, and its gradient.

    Vocabularies of one tokenizer may be padded differently: the ids that both heads have are compared, each side
    normalised over them, and the rest of the student's head gets no gradient.

    Args:
        hidden_SD: the student's final hidden states, fp32, detached.
        head_VD: its output head; if it requires a gradient, that is added to `head_VD.grad`.
        labels_S: int64, in [0, V); looked at only where `blend.labels` is not 0.
        teacher: what the teacher says about the same rows, in the same order.
        products: arithmetic of the student's products; softmaxes and divergences are fp32.
        scale: usually 1 / (scored tokens of the whole step).
        gradient: False computes the loss alone.
        chunk_rows: rows of logits at a time; by default what is fastest and fits, all of them on a GPU with room.

    Raises:
        ValueError: shapes disagree, a label or an id of the teacher's is outside the vocabulary.
    """
    vocabulary = min(head_VD.shape[0], teacher.vocabulary)
    check_shapes(hidden_SD, head_VD, labels_S, vocabulary if blend.labels else None)

    def compare(student_BV: Tensor, said: Tensor | TopK, rows: slice) -> Tensor:
        return _compare(student_BV, _aligned(said, vocabulary), labels_S[rows, None], blend, scale)

    return over_rows(
        hidden_SD, head_VD, vocabulary, teacher, compare, products, gradient=gradient, chunk_rows=chunk_rows
    )


Compare = Callable[[Tensor, "Tensor | TopK", slice], Tensor]
"""Loss of a block of rows (0-d fp64) from the student's logits, which its gradient overwrites, and the teacher's."""


def over_rows(
    hidden_SD: Tensor,
    head_VD: Tensor,
    vocabulary: int,
    teacher: TeacherSignal,
    compare: Compare,
    products: Products,
    *,
    gradient: bool,
    chunk_rows: int | None,
) -> TokenLoss:
    """The sum of `compare` over all rows and its gradient, on the first `vocabulary` logits of a chunk at a time.

    Raises:
        ValueError: the teacher speaks of more or fewer rows.
    """
    if len(teacher) != len(hidden_SD):
        raise ValueError(f"the teacher speaks of {len(teacher)} rows, the student of {len(hidden_SD)}")
    head = products.weight(head_VD)[:vocabulary]
    chunk_rows = chunk_rows or fitting_rows(len(hidden_SD), vocabulary, hidden_SD.device)
    piece_rows = block_rows = chunk_rows
    if hidden_SD.device.type == "cpu":
        piece_rows = min(chunk_rows, max(PIECE_ROWS, PIECE_ELEMENTS // vocabulary))
        block_rows = max(1, BLOCK_ELEMENTS // vocabulary)
        torch.empty(KEPT_BYTES, dtype=torch.uint8)  # freed at once
    buffer_CV = hidden_SD.new_empty(min(chunk_rows, len(hidden_SD)), vocabulary)
    total = torch.zeros((), dtype=torch.float64, device=hidden_SD.device)
    gradient_SD = torch.empty_like(hidden_SD) if gradient else None
    for chunk in _slices(0, len(hidden_SD), chunk_rows):
        hidden = products.operand(hidden_SD[chunk])
        logits_CV = project(hidden, head, buffer_CV)
        for piece in _slices(chunk.start, chunk.stop, piece_rows):
            said = teacher.rows(piece)
            for block in _slices(piece.start, piece.stop, block_rows):
                student_BV = logits_CV[block.start - chunk.start : block.stop - chunk.start]
                total += compare(student_BV, _part(said, block.start - piece.start, len(student_BV)), block)
        if gradient_SD is None:
            continue
        narrow = products.operand(logits_CV)
        gradient_SD[chunk] = narrow @ head
        if head_VD.requires_grad:
            add_gradient(head_VD, narrow.T, hidden)
    return TokenLoss(total, gradient_SD)


def fitting_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    """How many of `rows` to project at a time, by the memory that is free now."""
    if device.type == "cpu":
        return max(1, min(rows, max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)))
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    per_row = 4 * vocabulary * 6  # both sides' logits and the temporaries of a divergence
    return max(1, min(rows, int(FREE_SHARE * free / per_row)))


def _compare(student_BV: Tensor, teacher: Tensor | TopK, labels_B1: Tensor, blend: Blend, scale: float) -> Tensor:
    """The scaled loss of a block, 0-d fp64; its gradient overwrites `student_BV`."""
    labelled = _cross_entropy(student_BV, labels_B1) if blend.labels else None
    if isinstance(teacher, TopK):
        loss = _sparse(student_BV, teacher, blend, scale)
    else:
        loss = _dense(student_BV, teacher, blend, scale)
    if labelled is not None:
        loss_B, slope_BV = labelled
        student_BV.add_(slope_BV, alpha=scale * blend.labels)
        loss += loss_B.sum(dtype=torch.float64) * (scale * blend.labels)
    return loss


def _cross_entropy(student_BV: Tensor, labels_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Like a divergence, from the labels."""
    q_BV = torch.softmax(student_BV, -1)
    loss_B = (log_normaliser(student_BV, q_BV) - student_BV.gather(1, labels_B1))[:, 0]
    return loss_B, q_BV.scatter_add_(1, labels_B1, q_BV.new_full(labels_B1.shape, -1.0))


def _dense(student_BV: Tensor, teacher_BV: Tensor, blend: Blend, scale: float) -> Tensor:
    """The divergences of a block; their gradient overwrites `student_BV`."""
    T = blend.temperature
    compared = pair(student_BV, teacher_BV) if T == 1 else pair(student_BV / T, teacher_BV / T)
    factor = scale * (T**2 if blend.temperature_squared else 1.0)
    loss = torch.zeros((), dtype=torch.float64, device=student_BV.device)
    for index, (weight, divergence) in enumerate(blend.divergences):
        loss_B, slope_BV = divergence(compared)
        loss += loss_B.sum(dtype=torch.float64) * (factor * weight)
        if index == 0:
            torch.mul(slope_BV, factor * weight / T, out=student_BV)
        else:
            student_BV.add_(slope_BV, alpha=factor * weight / T)
    return loss


def _sparse(student_BV: Tensor, top: TopK, blend: Blend, scale: float) -> Tensor:
    """`_dense` on the top-k and their bucket; the gradient of the bucket is spread over its tokens by their mass."""
    ids_BK, q_BV = top.ids_SK.long(), torch.softmax(student_BV, -1)
    teacher_BJ = top.logprobs_SK.float().clamp_min(LEAST_LOGPROB)
    student_BJ = student_BV.gather(1, ids_BK) - log_normaliser(student_BV, q_BV)
    if blend.tail == "renormalise" or ids_BK.shape[1] >= student_BV.shape[1]:
        loss = _dense(student_BJ, teacher_BJ, blend, scale)
        student_BV.zero_().scatter_(1, ids_BK, student_BJ)
        return loss
    rest_BV = q_BV.scatter(1, ids_BK, 0.0)
    rest_B1 = rest_BV.sum(-1, keepdim=True).clamp_min_(torch.finfo(rest_BV.dtype).tiny)
    said_B1 = 1 - teacher_BJ.double().exp().sum(-1, keepdim=True)
    student_BJ = torch.cat([student_BJ, rest_B1.log()], 1)
    teacher_BJ = torch.cat([teacher_BJ, said_B1.clamp_min_(LEAST_TAIL).log_().float()], 1)
    loss = _dense(student_BJ, teacher_BJ, blend, scale)
    torch.mul(rest_BV, student_BJ[:, -1:] / rest_B1, out=student_BV).scatter_(1, ids_BK, student_BJ[:, :-1])
    return loss


def _aligned(said: Tensor | TopK, vocabulary: int) -> Tensor | TopK:
    """What the teacher said about the ids that both vocabularies have."""
    if isinstance(said, Tensor):
        return said[:, :vocabulary]
    if said.ids_SK.numel() and int(said.ids_SK.max()) >= vocabulary:
        raise ValueError(f"the teacher names token {int(said.ids_SK.max())}, the student has {vocabulary}")
    return said


def _part(said: Tensor | TopK, start: int, count: int) -> Tensor | TopK:
    rows = slice(start, start + count)
    return said[rows] if isinstance(said, Tensor) else TopK(said.ids_SK[rows], said.logprobs_SK[rows])


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))
