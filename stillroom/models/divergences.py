"""How far a student's next-token distribution q is from its teacher's p, with the gradient in closed form.

Each function takes a `Pair`, made once for a block of rows and shared by every objective that is mixed, and
returns the divergence of each row in nats and its gradient in the student's logits. With g = dD/dq the
gradient is q (g - sum q g), whatever the divergence: a constant added to g changes nothing.

Nothing here knows of heads, chunks, temperatures or sparse teachers: see `distilling`. A row may be a whole
vocabulary or the top-k of one with the rest as a last token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_RATIO = 80.0
"""|log(q/p)| where it is exponentiated; beyond it, a mixture equals one of its parts to the last bit of fp32."""

HEAD_CANDIDATES = 64
"""So many of the likeliest tokens nearly always hold `mu` of the mass; rows where they do not are sorted whole."""


class Pair(NamedTuple):
    """Two distributions over the same tokens: `q_BV` the student's, `p_BV` the teacher's, and log(q/p)."""

    q_BV: Tensor
    p_BV: Tensor
    log_ratio_BV: Tensor


Divergence = Callable[[Pair], tuple[Tensor, Tensor]]
"""A pair's divergence in each row ([B], nats) and its gradient in the student's logits ([B, V], fresh memory)."""


def pair(student_BV: Tensor, teacher_BV: Tensor) -> Pair:
    """The distributions of two matrices of finite logits, which stay as they are."""
    q_BV, p_BV = torch.softmax(student_BV, -1), torch.softmax(teacher_BV, -1)
    shift_B1 = log_normaliser(teacher_BV, p_BV) - log_normaliser(student_BV, q_BV)
    return Pair(q_BV, p_BV, torch.sub(student_BV, teacher_BV).add_(shift_B1))


def log_normaliser(logits_BV: Tensor, probabilities_BV: Tensor) -> Tensor:
    """logsumexp of each row, [B, 1], from its softmax: two maxima are cheaper than exponentiating once more."""
    return logits_BV.amax(-1, keepdim=True) - probabilities_BV.amax(-1, keepdim=True).log_()


def forward_kl(pair: Pair) -> tuple[Tensor, Tensor]:
    """KL(p || q): the student covers all that the teacher says. Hinton et al. 2015, arXiv:1503.02531."""
    return -_dot(pair.p_BV, pair.log_ratio_BV), pair.q_BV - pair.p_BV


def reverse_kl(pair: Pair) -> tuple[Tensor, Tensor]:
    """KL(q || p): the student keeps to what the teacher would say. Gu et al. 2023 (MiniLLM), arXiv:2306.08543."""
    loss_B = _dot(pair.q_BV, pair.log_ratio_BV)
    return loss_B, (pair.log_ratio_BV - loss_B[:, None]).mul_(pair.q_BV)


def adaptive_kl(pair: Pair, mu: float = 0.5) -> tuple[Tensor, Tensor]:
    """Forward KL by the share of the gap in the teacher's head, reverse KL by the share in its tail.

    The head is the teacher's likeliest tokens whose masses sum to at most `mu`, the first always among them; the
    gap is |p - q|, and the shares are constants to the gradient. Wu et al. 2024, arXiv:2404.02657, section 4.
    """
    gap_BV = (pair.p_BV - pair.q_BV).abs_()
    whole_B = gap_BV.sum(-1).clamp_min_(torch.finfo(gap_BV.dtype).tiny)
    share_B = (_head_gap(pair.p_BV, gap_BV, mu) / whole_B).clamp_(max=1.0)
    forward_B, forward_BV = forward_kl(pair)
    reverse_B, reverse_BV = reverse_kl(pair)
    slope_BV = forward_BV.mul_(share_B[:, None]).add_(reverse_BV.mul_(1 - share_B[:, None]))
    return share_B * forward_B + (1 - share_B) * reverse_B, slope_BV


def generalised_jsd(pair: Pair, beta: float = 0.5, normalised: bool = False) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: beta weights the teacher.

    At beta 0 and 1 it is the forward and the reverse KL, towards which it tends when divided by beta (1 - beta),
    as `normalised` does: otherwise its gradient fades near the ends, to a hundredth at beta = 0.01.

    Agarwal et al. 2023 (GKD), arXiv:2306.13649, equation 1.
    """
    if beta in (0, 1):
        return forward_kl(pair) if beta == 0 else reverse_kl(pair)
    ratio_BV = pair.log_ratio_BV.clamp(-LARGEST_RATIO, LARGEST_RATIO)
    student_BV = _log_over_mixture(ratio_BV, beta)  # log(q / m)
    loss_B = beta * _dot(pair.p_BV, student_BV - ratio_BV) + (1 - beta) * _dot(pair.q_BV, student_BV)
    slope_BV = _through_softmax(student_BV, pair.q_BV).mul_(1 / beta if normalised else 1 - beta)
    return loss_B / (beta * (1 - beta)) if normalised else loss_B, slope_BV


def skew_forward_kl(pair: Pair, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(p || skew p + (1 - skew) q), for 0 < skew < 1. Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1."""
    ratio_BV = pair.log_ratio_BV.clamp(-LARGEST_RATIO, LARGEST_RATIO)
    teacher_BV = _log_over_mixture(-ratio_BV, 1 - skew)  # log(p / m), at most -log(skew)
    loss_B = _dot(pair.p_BV, teacher_BV)
    return loss_B, _through_softmax(teacher_BV.exp_().mul_(skew - 1), pair.q_BV)


def skew_reverse_kl(pair: Pair, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(q || (1 - skew) p + skew q), for 0 < skew < 1. Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1."""
    ratio_BV = pair.log_ratio_BV.clamp(-LARGEST_RATIO, LARGEST_RATIO)
    student_BV = _log_over_mixture(ratio_BV, 1 - skew)  # log(q / m)
    loss_B = _dot(pair.q_BV, student_BV)
    return loss_B, _through_softmax(student_BV.sub_(student_BV.exp(), alpha=skew), pair.q_BV)


def total_variation(pair: Pair) -> tuple[Tensor, Tensor]:
    """Half the sum of |p - q|; where p = q the subgradient 0. Wen et al. 2023 (f-distill), arXiv:2307.15190."""
    gap_BV = pair.q_BV - pair.p_BV
    loss_B = gap_BV.abs().sum(-1).div_(2)
    return loss_B, _through_softmax(gap_BV.sign_().div_(2), pair.q_BV)


def _dot(a_BV: Tensor, b_BV: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_BV, b_BV)


def _through_softmax(g_BV: Tensor, q_BV: Tensor) -> Tensor:
    """The gradient in the logits of q from the one in q, in the memory of `g_BV`."""
    return g_BV.sub_(_dot(q_BV, g_BV)[:, None]).mul_(q_BV)


def _log_over_mixture(log_ratio_BV: Tensor, weight: float) -> Tensor:
    """log(a / ((1 - weight) a + weight b)) from log(a / b), with full relative precision where a is near b."""
    return log_ratio_BV.neg().expm1_().mul_(weight).log1p_().neg_()


def _head_gap(p_BV: Tensor, gap_BV: Tensor, mu: float) -> Tensor:
    """The sum of `gap_BV` over each row's head, [B]."""
    count = min(HEAD_CANDIDATES, p_BV.shape[-1])
    mass_BK, ids_BK = p_BV.topk(count, -1)
    inside_BK = mass_BK.cumsum(-1) <= mu
    inside_BK[:, 0] = True
    head_B = gap_BV.gather(1, ids_BK).mul_(inside_BK).sum(-1)
    for row in inside_BK[:, -1].nonzero()[:, 0].tolist() if count < p_BV.shape[-1] else ():
        mass_V, ids_V = p_BV[row].sort(descending=True)
        head_B[row] = gap_BV[row][ids_V][mass_V.cumsum(-1) <= mu].sum()
    return head_B
