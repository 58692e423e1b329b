"""Distillation across tokenizers: which rows are compared, and the sorted distance against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.models.precision import Precision
from stillroom.models.products import Products
from stillroom.models.signals import Listed, Projected, TopK
from stillroom.models.uld import aligned_targets, uld

FP32 = Products(Precision("fp32", True, "test"))


def reference(hidden, head, teacher_logits, temperature, ranks=None):
    """Loss and gradients, summed over rows."""
    q = torch.softmax(hidden.double() @ head.double().T / temperature, -1).sort(-1, descending=True).values
    p = torch.softmax(teacher_logits.double() / temperature, -1).sort(-1, descending=True).values
    width = max(q.shape[1], p.shape[1])
    q, p = (torch.nn.functional.pad(x, (0, width - x.shape[1]))[:, :ranks] for x in (q, p))
    loss = (q - p).abs().sum()
    return (loss.item(), *torch.autograd.grad(loss, (hidden, head)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("student", "teacher"), [(90, 90), (90, 140), (140, 90)])
def test_the_sorted_distance_and_its_gradient_are_the_fp64_ones(student, teacher, temperature):
    torch.manual_seed(student + teacher)
    hidden, head = torch.randn(30, 8, requires_grad=True), torch.randn(student, 8, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(30, 12), torch.randn(teacher, 12) * 0.6
    wanted = reference(hidden, head, teacher_hidden @ teacher_head.T, temperature)
    signal = Projected(teacher_hidden, teacher_head, FP32)
    loss, gradient = uld(hidden.detach(), head, signal, FP32, temperature=temperature, scale=0.5, chunk_rows=7)
    assert float(loss) == pytest.approx(wanted[0] / 2, rel=1e-5)
    for ours, theirs in ((gradient, wanted[1]), (head.grad, wanted[2])):
        assert (ours - theirs / 2).norm() <= 1e-5 * theirs.norm()


def test_of_a_top_k_only_its_ranks_are_compared():
    torch.manual_seed(0)
    hidden, head = torch.randn(30, 8, requires_grad=True), torch.randn(90, 8, requires_grad=True)
    logits = torch.randn(30, 200) * 2
    top = torch.log_softmax(logits, -1).topk(5, -1)
    wanted = reference(hidden, head, logits, 1.0, ranks=5)
    loss, gradient = uld(hidden.detach(), head, Listed(TopK(top.indices, top.values), 200), FP32)
    assert float(loss) == pytest.approx(wanted[0], rel=1e-5)
    assert (gradient - wanted[1]).norm() <= 1e-5 * wanted[1].norm()


texts = st.lists(st.sampled_from([b"a", b"bc", b"\xc3", b"\xa9", b" d", b"<|end|>"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(texts, st.data())
def test_aligned_targets_begin_at_the_same_byte_and_none_is_missed(student, data):
    text = b"".join(student)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1))) if len(text) > 1 else [])
    teacher = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    before = lambda pieces, index: b"".join(pieces[:index])  # noqa: E731
    wanted = [
        (i, j)
        for i in range(len(student))
        for j in range(len(teacher))
        if len(before(student, i)) == len(before(teacher, j))
    ]
    assert aligned_targets(student, teacher) == wanted
    assert wanted[0] == (0, 0)


def test_tokens_of_another_text_are_refused():
    with pytest.raises(ValueError, match="not the same text"):
        aligned_targets([b"ab", b"c"], [b"abd"])
