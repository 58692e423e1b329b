"""Distillation across tokenizers: the shapes of two distributions are compared, whatever their tokens are called.

    text        {"name":          "search"}
    student     {"│name│":│ "│search│"}          rows where both have read the same bytes (^) are compared:
    teacher     {"│na│me│":│ "│sear│ch│"}        each side says there what follows the same prefix
                ^  ^     ^   ^       ^

Between such boundaries one side stands within a word that the other has not begun, and nothing is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillroom.models.distilling import over_rows
from stillroom.models.losses import TokenLoss
from stillroom.models.products import Products
from stillroom.models.signals import TeacherSignal, TopK


def aligned_targets(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[int, int]]:
    """Pairs of targets, the student's and the teacher's, that begin at the same byte of the same answer.

    Args:
        student: the bytes of each of its targets, one after another; of a special token its own name.
        teacher: the same text in the other tokenizer's pieces.

    Raises:
        ValueError: the two texts differ where both go on.

    Source: the byte offsets of TRL's GOLD, which also merges what lies between boundaries; here it is left out.
    """
    length = min(sum(map(len, student)), sum(map(len, teacher)))
    if b"".join(student)[:length] != b"".join(teacher)[:length]:
        raise ValueError("the student's and the teacher's tokens are not the same text")
    starts = {start: index for index, start in enumerate(_starts(teacher)) if start < length}
    return [(index, starts[start]) for index, start in enumerate(_starts(student)) if start in starts]


def uld(
    hidden_SD: Tensor,
    head_VD: Tensor,
    teacher: TeacherSignal,
    products: Products,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    gradient: bool = True,
    chunk_rows: int | None = None,
) -> TokenLoss:
    """`scale` times the sum over rows of the L1 distance between both sides' probabilities, each sorted.

    The shorter vocabulary is filled up with zeros. Of a top-k, only its k ranks are compared.

    Args:
        hidden_SD: the student's final hidden states of the aligned rows, fp32, detached.
        head_VD: its output head; if it requires a gradient, that is added to `head_VD.grad`.
        teacher: what the teacher says about its aligned rows, in the same order, in its own vocabulary.
        products: arithmetic of the student's products.
        temperature: divides both sides' logits.
        scale, gradient, chunk_rows: see `distil`.

    Raises:
        ValueError: shapes disagree.

    Source: Boizard et al. 2024, arXiv:2402.12030, equation 4: the Wasserstein distance with a cost of 1.
    """

    def compare(student_BV: Tensor, said: Tensor | TopK, rows: slice) -> Tensor:
        loss, slope_BV = _sorted_distance(student_BV / temperature, said, temperature)
        torch.mul(slope_BV, scale / temperature, out=student_BV)
        return loss * scale

    return over_rows(
        hidden_SD, head_VD, head_VD.shape[0], teacher, compare, products, gradient=gradient, chunk_rows=chunk_rows
    )


def _sorted_distance(student_BV: Tensor, said: Tensor | TopK, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss of a block, 0-d fp64, and its gradient in the student's logits."""
    q_BV = torch.softmax(student_BV, -1)
    ranked_BV, order_BV = q_BV.sort(-1, descending=True)
    if isinstance(said, TopK):
        p_BK = (
            (said.logprobs_SK.float() / temperature).softmax(-1) if temperature != 1 else said.logprobs_SK.float().exp()
        )
        ranks = min(p_BK.shape[1], ranked_BV.shape[1])
    else:
        p_BK, ranks = torch.softmax(said / temperature, -1), ranked_BV.shape[1]
    p_BK = p_BK.sort(-1, descending=True).values
    loss = p_BK[:, ranks:].sum(dtype=torch.float64)
    gap_BV = (
        torch.nn.functional.pad(p_BK[:, :ranks], (0, max(0, ranks - p_BK.shape[1]))).neg_().add_(ranked_BV[:, :ranks])
    )
    loss += gap_BV.abs().sum(dtype=torch.float64)
    sign_BV = torch.zeros_like(q_BV).scatter_(1, order_BV[:, :ranks], gap_BV.sign_())
    return loss, sign_BV.sub_(torch.linalg.vecdot(q_BV, sign_BV)[:, None]).mul_(q_BV)


def _starts(pieces: Sequence[bytes]) -> list[int]:
    starts = [0]
    for piece in pieces[:-1]:
        starts.append(starts[-1] + len(piece))
    return starts[: len(pieces)]
