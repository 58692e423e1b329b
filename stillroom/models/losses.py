"""Token losses that never hold logits for every token.

Rows are taken a chunk at a time: project, take the loss and its gradient at once, add the head's gradient
in place, keep only the gradient of the hidden states. Peak memory is one chunk of logits. The gradient is
returned rather than left to autograd, so that nothing of the chunk has to live until a backward pass:

    loss, dhidden = cross_entropy(hidden.detach(), head, labels, products, scale=1 / tokens)
    hidden.backward(dhidden)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.models.products import Products, add_gradient

CHUNK_ROWS = 256
"""Rows of logits at a time: 256 x 49,152 x 4 bytes = 48 MiB. Fewer would pass over the head's gradient more often."""


class TokenLoss(NamedTuple):
    """A scaled sum of token losses (0-d fp64) and its gradient in the hidden states ([S, D] fp32, or None)."""

    loss: Tensor
    gradient_SD: Tensor | None


def cross_entropy(
    hidden_SD: Tensor,
    head_VD: Tensor,
    labels_S: Tensor,
    products: Products,
    *,
    scale: float = 1.0,
    gradient: bool = True,
    label_smoothing: float = 0.0,
) -> TokenLoss:
    """`scale` times the sum over rows of the cross-entropy of `softmax(hidden_SD @ head_VD.T)`, in nats.

    Args:
        hidden_SD: final hidden states, fp32, detached.
        head_VD: the output head; if it requires a gradient, that is added to `head_VD.grad`.
        labels_S: int64, in [0, V).
        products: arithmetic of the projection; the softmax is fp32.
        scale: usually 1 / (scored tokens of the whole step).
        gradient: False computes the loss alone.
        label_smoothing: share of the label's mass spread evenly over the vocabulary, in [0, 1).

    Raises:
        ValueError: shapes disagree, or a label is outside the vocabulary.

    Source: on a teacher's answers this is sequence-level distillation, Kim & Rush 2016, arXiv:1606.07947.
    """
    check_shapes(hidden_SD, head_VD, labels_S, head_VD.shape[0])
    head, smoothing = products.weight(head_VD), label_smoothing
    total = torch.zeros((), dtype=torch.float64, device=hidden_SD.device)
    gradient_SD = torch.empty_like(hidden_SD) if gradient else None
    for start in range(0, len(labels_S), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        hidden, labels = products.operand(hidden_SD[rows]), labels_S[rows, None]
        logits = (hidden @ head.T).float()
        normal = torch.logsumexp(logits, -1, keepdim=True)
        wanted = logits.gather(1, labels)
        if smoothing:
            wanted = wanted.mul_(1 - smoothing).add_(logits.mean(-1, keepdim=True), alpha=smoothing)
        total += (normal - wanted).sum(dtype=torch.float64)
        if gradient_SD is None:
            continue
        # d/dlogits = softmax - (1 - smoothing) onehot - smoothing / V
        slope = logits.sub_(normal).exp_()
        if smoothing:
            slope.sub_(smoothing / slope.shape[-1])
        slope.scatter_add_(1, labels, slope.new_full(labels.shape, smoothing - 1))
        narrow = products.operand(slope.mul_(scale))
        gradient_SD[rows] = narrow @ head
        if head_VD.requires_grad:
            add_gradient(head_VD, narrow.T, hidden)
    return TokenLoss(total * scale, gradient_SD)


def check_shapes(hidden_SD: Tensor, head_VD: Tensor, labels_S: Tensor, vocabulary: int | None) -> None:
    """Refuse what does not fit together; with `vocabulary`, labels outside it too."""
    if hidden_SD.shape[0] != labels_S.shape[0] or hidden_SD.shape[1] != head_VD.shape[1]:
        shapes = f"hidden {tuple(hidden_SD.shape)}, head {tuple(head_VD.shape)}, labels {tuple(labels_S.shape)}"
        raise ValueError(f"shapes disagree: {shapes}")
    if vocabulary and len(labels_S) and not 0 <= int(labels_S.min()) <= int(labels_S.max()) < vocabulary:
        raise ValueError(f"a label is outside [0, {vocabulary})")
