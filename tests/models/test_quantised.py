"""Packed linear layers: what they unpack to, what they cost, and gradients through them."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from torch import nn

from stillroom.models.quantised import BLOCK, NF4, QuantisedLinear, quantise, unpack
from tests.models.test_packed import tiny


def test_the_levels_are_the_normal_quantiles_of_qlora():
    """Equation 4 of arXiv:2305.14314 as its authors' code evens it out: 8 levels above an exact zero, 7 below."""
    edge, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(edge + (0.5 - edge) * i / 8) for i in range(8)]
    below = [-quantile(edge + (0.5 - edge) * i / 7) for i in range(7)]
    wanted = sorted([*above, 0.0, *below])
    assert pytest.approx([value / max(wanted) for value in wanted], abs=1e-6) == list(NF4)


@pytest.mark.parametrize("shape", [(64, 32), (5, 7), (3, 129)])
@pytest.mark.parametrize("packing", ["int8", "nf4"])
def test_every_weight_is_the_nearest_level_of_its_row_or_block(packing, shape):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        linear.weight[0] = 0  # a row of zeros has no scale
    found, weight = QuantisedLinear(linear, packing).weight, linear.weight.detach()
    assert found.shape == weight.shape
    flat, levels = (
        (weight, torch.arange(-127, 128) / 127) if packing == "int8" else (weight.flatten(), torch.tensor(NF4))
    )
    for part, got in zip(
        flat.split(BLOCK if packing == "nf4" else 1),
        found.reshape(flat.shape).split(BLOCK if packing == "nf4" else 1),
        strict=True,
    ):
        choices = part.abs().max() * levels
        errors = (part.flatten()[:, None] - choices).abs().amin(1)
        assert torch.allclose((part.flatten() - got.flatten()).abs(), errors, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packing", ["int8", "nf4"])
def test_products_and_gradients_are_those_of_the_unpacked_layer(packing, bias):
    torch.manual_seed(0)
    packed = QuantisedLinear(nn.Linear(48, 20, bias=bias), packing)
    plain = packed.plain()
    x = torch.randn(6, 48, requires_grad=True)
    packed(x).square().sum().backward()
    gradient, x.grad = x.grad, None
    plain(x).square().sum().backward()
    assert torch.allclose(gradient, x.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(packed(x), plain(x))


@pytest.mark.parametrize(("packing", "bytes_a_weight"), [("int8", 1.1), ("nf4", 0.57)])
def test_a_packed_model_takes_what_it_says_and_keeps_no_unpacked_weight_for_the_backward_pass(packing, bytes_a_weight):
    model = tiny("llama", hidden_size=96, intermediate_size=256, head_dim=16)
    weights = sum(m.weight.numel() for m in model.model.layers.modules() if type(m) is nn.Linear)
    head = model.get_output_embeddings()
    quantise(model, packing)
    assert model.get_output_embeddings() is head
    assert type(head) is nn.Linear
    held = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(("codes", "scales")))
    assert held <= bytes_a_weight * weights
    assert not any("_proj" in name for name, _ in model.named_parameters())

    largest = 0

    def saved(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel() * (tensor.shape != head.weight.shape[::-1]))
        return tensor

    model.get_input_embeddings().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert largest < 96 * 96  # the smallest matrix of a layer but keys and values

    unpack(model)
    assert all(type(m) is not QuantisedLinear for m in model.modules())
