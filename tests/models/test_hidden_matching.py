"""Matching of hidden states: which layers, how far, and that only the student and the projector learn."""

from __future__ import annotations

import pytest
import torch

from stillroom.models.hidden_matching import Projector, layer_map, match_hidden


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [(2, 4, [1, 3]), (3, 3, [0, 1, 2]), (6, 30, [4, 9, 14, 19, 24, 29]), (1, 7, [6]), (4, 2, [0, 0, 1, 1])],
)
def test_layers_spread_over_the_teachers_depth(student, teacher, wanted):
    assert layer_map(student, teacher) == wanted


def test_every_map_ends_at_the_last_layer_and_never_goes_back():
    for student in range(1, 40):
        for teacher in range(1, 40):
            found = layer_map(student, teacher)
            assert found == sorted(found)
            assert found[-1] == teacher - 1
            assert found[0] >= 0
    with pytest.raises(ValueError, match="cannot be matched"):
        layer_map(0, 3)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_distance_and_its_gradients_are_autograds(kind):
    torch.manual_seed(0)
    student, teacher = torch.randn(9, 6, requires_grad=True), torch.randn(9, 10)
    projection = Projector(1, 6, 10).maps[0]
    torch.nn.init.normal_(projection.weight)
    weight = projection.weight.detach().double().requires_grad_(True)
    out, wide = student.double() @ weight.T, teacher.double()
    if kind == "mse":
        distance = ((out - wide) ** 2).mean(-1) / (wide**2).mean(-1)
    else:
        distance = 1 - (out * wide).sum(-1) / (out.norm(dim=-1) * wide.norm(dim=-1))
    wanted = torch.autograd.grad(distance.sum() / 9, (student, weight))
    loss, gradient = match_hidden(student, teacher, projection, kind=kind, scale=1 / 9)
    assert float(loss) == pytest.approx(float(distance.detach().mean()), rel=1e-5)
    assert (gradient - wanted[0]).norm() <= 1e-5 * wanted[0].norm()
    assert (projection.weight.grad - wanted[1]).norm() <= 1e-5 * wanted[1].norm()
    assert student.grad is None


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_equal_models_start_equal(kind):
    hidden = torch.randn(9, 6)
    loss, gradient = match_hidden(hidden, hidden, Projector(1, 6, 6).maps[0], kind=kind)
    assert abs(float(loss)) < 1e-5
    assert gradient.abs().max() < 1e-5


def test_rows_that_disagree_are_refused():
    with pytest.raises(ValueError, match="3 rows, the teacher 4"):
        match_hidden(torch.zeros(3, 2), torch.zeros(4, 2), Projector(1, 2, 2).maps[0])
