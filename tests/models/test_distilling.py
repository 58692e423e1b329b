"""Every objective, chunked and from a top-k, against autograd in fp64 on whole matrices of logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.models import distilling
from stillroom.models.distilling import Blend, distil
from stillroom.models.divergences import (
    adaptive_kl,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from stillroom.models.losses import cross_entropy
from stillroom.models.precision import Precision
from stillroom.models.products import Products
from stillroom.models.signals import Listed, Projected, TopK

FP32 = Precision("fp32", True, "test")
OURS = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "adaptive": adaptive_kl,
    "adaptive 0.9": partial(adaptive_kl, mu=0.9),
    "jsd 0": partial(generalised_jsd, beta=0.0),
    "jsd 0.05": partial(generalised_jsd, beta=0.05),
    "jsd 0.5": generalised_jsd,
    "jsd 0.9": partial(generalised_jsd, beta=0.9),
    "jsd 0.05 normalised": partial(generalised_jsd, beta=0.05, normalised=True),
    "jsd 1": partial(generalised_jsd, beta=1.0),
    "skew forward": skew_forward_kl,
    "skew reverse": partial(skew_reverse_kl, skew=0.3),
    "total variation": total_variation,
}


def kl(a, b):
    return (a * (a.log() - b.log())).sum(-1)


def adaptive(p, q, mu):
    gap, order = (p - q).detach().abs(), p.argsort(-1, descending=True)
    inside = p.gather(1, order).cumsum(-1) <= mu
    inside[:, 0] = True
    head = (gap.gather(1, order) * inside).sum(-1) / gap.sum(-1)
    return head * kl(p, q) + (1 - head) * kl(q, p)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


REFERENCE = {
    "forward": kl,
    "reverse": lambda p, q: kl(q, p),
    "adaptive": partial(adaptive, mu=0.5),
    "adaptive 0.9": partial(adaptive, mu=0.9),
    "jsd 0": kl,
    "jsd 0.05": partial(jsd, beta=0.05),
    "jsd 0.5": partial(jsd, beta=0.5),
    "jsd 0.9": partial(jsd, beta=0.9),
    "jsd 0.05 normalised": lambda p, q: jsd(p, q, 0.05) / (0.05 * 0.95),
    "jsd 1": lambda p, q: kl(q, p),
    "skew forward": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew reverse": lambda p, q: kl(q, 0.7 * p + 0.3 * q),
    "total variation": lambda p, q: (p - q).abs().sum(-1) / 2,
}


class Case:
    """Random models' ends and a mask of scored rows; the last ids of each head may be padding that the other lacks."""

    def __init__(self, seed: int, rows: int, vocabulary: int, padded: tuple[int, int], spread: float) -> None:
        torch.manual_seed(seed)
        student, teacher = (vocabulary + extra for extra in padded)
        self.vocabulary = min(student, teacher)
        self.hidden = torch.randn(rows, 12, requires_grad=True)
        self.head = torch.randn(student, 12).mul_(spread / 4).requires_grad_(True)
        self.teacher_hidden, self.teacher_head = torch.randn(rows, 20), torch.randn(teacher, 20) * spread / 5
        self.labels = torch.randint(vocabulary, (rows,))
        self.scored = torch.rand(rows) < 0.7
        self.scored[seed % rows] = True
        self.scale = 1 / int(self.scored.sum())

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides' in fp64, all rows, over the common ids."""
        student = self.hidden.double() @ self.head.double().T
        teacher = self.teacher_hidden.double() @ self.teacher_head.double().T
        return student[:, : self.vocabulary], teacher[:, : self.vocabulary]

    def dense(self, products: Products) -> Projected:
        return Projected(self.teacher_hidden[self.scored], self.teacher_head, products)

    def listed(self, k: int) -> Listed:
        """The likeliest k of the common ids, each row's in an order of its own."""
        logprobs = torch.log_softmax(self.logits()[1], -1)[self.scored]
        ids = logprobs.topk(k, -1).indices
        ids = ids.gather(1, torch.rand(ids.shape).argsort(-1))
        return Listed(TopK(ids.int(), logprobs.gather(1, ids).float()), self.vocabulary)

    def ours(self, signal, blend: Blend, products: Products, **options) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Loss, gradient of the hidden states of all rows, gradient of the head."""
        self.head.grad = None
        loss, gradient = distil(
            self.hidden.detach()[self.scored], self.head, self.labels[self.scored], signal, blend, products,
            scale=self.scale, **options,
        )  # fmt: skip
        every = torch.zeros_like(self.hidden)
        every[self.scored] = gradient
        return float(loss), every, self.head.grad

    def reference(self, blend: Blend, names: tuple[str, ...], listed: Listed | None = None):
        """The same by autograd; with `listed`, between what both sides say of its ids and of all others together."""
        student, teacher = self.logits()
        p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
        if listed is not None:
            ids = torch.arange(listed.top.ids_SK.shape[1]).repeat(len(p), 1)
            ids[self.scored] = listed.top.ids_SK.long()
            p, q = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(-1, keepdim=True)], 1) for x in (p, q))
            if blend.tail == "renormalise":
                p, q = (x[:, :-1] / x[:, :-1].sum(-1, keepdim=True) for x in (p, q))
        T = blend.temperature
        p, q = (torch.softmax(x.log() / T, -1) for x in (p, q))
        total = sum(weight * REFERENCE[name](p, q) for (weight, _), name in zip(blend.divergences, names, strict=True))
        total = total * (T**2 if blend.temperature_squared else 1)
        total = total + blend.labels * torch.nn.functional.cross_entropy(student, self.labels, reduction="none")
        loss = total[self.scored].sum() * self.scale
        return (loss.item(), *torch.autograd.grad(loss, (self.hidden, self.head)))


def assert_equal(found, wanted, bound: float = 1e-5) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=bound, abs=1e-7)
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm() + 1e-7


cases = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 40),
    vocabulary=st.integers(3, 400),
    padded=st.sampled_from([(0, 0), (0, 0), (5, 0), (0, 7), (3, 8)]),
    spread=st.floats(0.5, 6.0),
)
blends = st.tuples(
    st.lists(st.tuples(st.sampled_from([0.3, 1.0]), st.sampled_from(sorted(OURS))), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([1.0, 0.7, 2.0]),
    st.booleans(),
    st.sampled_from(["bucket", "renormalise"]),
)


def blend_of(drawn) -> tuple[Blend, tuple[str, ...]]:
    terms, labels, temperature, squared, tail = drawn
    divergences = tuple((weight, OURS[name]) for weight, name in terms)
    return Blend(divergences, labels, temperature, squared, tail), tuple(name for _, name in terms)


def check_any_blend(case, drawn, chunk_rows, share, block):
    blend, names = blend_of(drawn)
    products, k = Products(FP32), max(1, round(share * case.vocabulary))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilling, "BLOCK_ELEMENTS", block)
        dense = case.ours(case.dense(products), blend, products, chunk_rows=chunk_rows)
        full = case.ours(case.listed(case.vocabulary), blend, products, chunk_rows=chunk_rows)
        listed = case.listed(k)
        sparse = case.ours(listed, blend, products, chunk_rows=chunk_rows)
    wanted = case.reference(blend, names)
    assert_equal(dense, wanted)
    assert_equal(full, wanted)
    # 1 - sum p is what a top-k in fp32 has to say of its tail: where it is little, it says little of it.
    if k < case.vocabulary:
        assert_equal(sparse, case.reference(blend, names, listed), bound=1e-4)


given_any = given(
    case=cases,
    drawn=blends,
    chunk_rows=st.sampled_from([None, 1, 3, 16, 64]),
    share=st.floats(0.01, 0.6),
    block=st.sampled_from([1, 1000, 2**20]),
)
unhurried = partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
test_any_blend_is_the_fp64_one = unhurried(max_examples=60)(given_any(check_any_blend))
test_any_blend_is_the_fp64_one_at_length = pytest.mark.slow(unhurried(max_examples=3000)(given_any(check_any_blend)))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_objective_is_the_fp64_one(name, temperature):
    case, products = Case(7, 33, 301, (3, 0), 3.0), Products(FP32)
    blend = Blend(((1.0, OURS[name]),), temperature=temperature)
    assert_equal(case.ours(case.dense(products), blend, products, chunk_rows=8), case.reference(blend, (name,)))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_near_fp64_for_both_heads(name, native):
    case, products = Case(3, 40, 301, (0, 0), 2.0), Products(Precision("bf16", native, "test"))
    blend = Blend(((1.0, OURS[name]),))
    wanted = case.reference(blend, (name,))
    # Total variation's gradient jumps where the two sides cross, so rounding moves it most.
    assert_equal(case.ours(case.dense(products), blend, products), wanted, bound=0.05)
    narrow = Projected(case.teacher_hidden[case.scored].bfloat16(), case.teacher_head.bfloat16(), products)
    assert_equal(case.ours(narrow, blend, products), wanted, bound=0.05)


@pytest.mark.parametrize("name", OURS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    case, products = Case(1, 20, 90, (0, 0), 3.0), Products(FP32)
    case.teacher_hidden, case.teacher_head = case.hidden.detach(), case.head.detach()
    loss, hidden, head = case.ours(case.dense(products), Blend(((1.0, OURS[name]),)), products)
    assert abs(loss) < 1e-6
    assert max(hidden.abs().max(), head.abs().max()) < 1e-6


@pytest.mark.parametrize("name", OURS)
def test_a_student_far_from_its_teacher_has_a_finite_loss_and_gradient(name):
    case, products = Case(1, 20, 90, (0, 0), 3000.0), Products(FP32)
    for signal in (case.dense(products), case.listed(5), case.listed(90)):
        loss, *gradients = case.ours(signal, Blend(((1.0, OURS[name]),)), products)
        assert loss >= 0
        assert all(torch.isfinite(torch.tensor(loss)) and torch.isfinite(g).all() for g in gradients)


def test_rows_of_a_step_weigh_the_same_however_they_are_accumulated():
    case, products = Case(5, 40, 120, (0, 0), 3.0), Products(FP32)
    blend, whole = Blend(((1.0, reverse_kl),), labels=0.5), None
    whole = case.ours(case.dense(products), blend, products)
    case.head.grad, losses, gradients = None, [], []
    scored = case.scored.nonzero()[:, 0]
    for rows in scored.split(9):  # the last one is smaller
        signal = Projected(case.teacher_hidden[rows], case.teacher_head, products)
        loss, gradient = distil(
            case.hidden.detach()[rows], case.head, case.labels[rows], signal, blend, products, scale=case.scale
        )
        losses.append(float(loss))
        gradients.append(gradient)
    assert_equal((sum(losses), torch.cat(gradients), case.head.grad), (whole[0], whole[1][scored], whole[2]))


def test_the_label_part_alone_is_cross_entropy():
    case, products = Case(2, 40, 120, (0, 0), 3.0), Products(FP32)
    found = case.ours(case.dense(products), Blend(((0.0, forward_kl),), labels=1.0, temperature=3.0), products)
    rows = case.scored
    case.head.grad = None
    loss, gradient = cross_entropy(case.hidden.detach()[rows], case.head, case.labels[rows], products, scale=case.scale)
    assert_equal((found[0], found[1][rows], found[2]), (float(loss), gradient, case.head.grad))


def test_rows_of_a_top_k_may_be_filled_up():
    case, products = Case(2, 20, 60, (0, 0), 3.0), Products(FP32)
    listed = case.listed(6)
    more = Listed(
        TopK(
            torch.cat([listed.top.ids_SK, unlisted(listed.top.ids_SK, 60)[:, :3]], 1),
            torch.cat([listed.top.logprobs_SK, torch.full((len(listed), 3), -torch.inf)], 1),
        ),
        60,
    )
    blend = Blend(((1.0, forward_kl),))
    wanted, found = (case.ours(signal, blend, products) for signal in (listed, more))
    assert found[0] >= wanted[0]  # three tokens are now known to be impossible
    assert all(torch.isfinite(g).all() for g in found[1:])


def unlisted(ids_SK: torch.Tensor, vocabulary: int) -> torch.Tensor:
    rows = [[i for i in range(vocabulary) if i not in set(row)] for row in ids_SK.tolist()]
    return torch.tensor(rows, dtype=ids_SK.dtype)


def test_a_frozen_head_gets_no_gradient_and_the_loss_alone_none_at_all():
    case, products = Case(2, 20, 60, (0, 0), 3.0), Products(FP32)
    blend = Blend(((1.0, forward_kl),))
    arguments = (case.hidden.detach()[case.scored], case.head, case.labels[case.scored])
    with_gradient = distil(*arguments, case.dense(products), blend, products)
    case.head.grad = None
    alone = distil(*arguments, case.dense(products), blend, products, gradient=False)
    assert alone.gradient_SD is None
    assert case.head.grad is None
    assert float(alone.loss) == float(with_gradient.loss)
    case.head.requires_grad_(False)
    distil(*arguments, case.dense(products), blend, products)
    assert case.head.grad is None


def test_it_refuses_what_does_not_fit():
    case, products = Case(2, 20, 60, (0, 0), 3.0), Products(FP32)
    hidden, labels, blend = case.hidden.detach(), case.labels, Blend(((1.0, forward_kl),), labels=0.1)
    with pytest.raises(ValueError, match="speaks of"):
        distil(
            hidden[:3],
            case.head,
            labels[:3],
            Projected(torch.zeros(4, 20), case.teacher_head, products),
            blend,
            products,
        )
    signal = Projected(case.teacher_hidden, case.teacher_head, products)
    with pytest.raises(ValueError, match="shapes disagree"):
        distil(hidden, case.head, labels[:-1], signal, blend, products)
    with pytest.raises(ValueError, match="outside"):
        distil(hidden, case.head, labels + 60, signal, blend, products)
    with pytest.raises(ValueError, match="names token 60"):
        top = TopK(torch.full((20, 1), 60), torch.zeros(20, 1))
        distil(hidden, case.head, labels, Listed(top, 61), blend, products)
    with pytest.raises(ValueError, match="shapes disagree"):
        Projected(torch.zeros(4, 3), case.teacher_head, products)
    with pytest.raises(ValueError, match="disagree"):
        Listed(TopK(torch.zeros(2, 3), torch.zeros(2, 4)), 60)
