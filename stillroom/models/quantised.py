"""Frozen linear layers kept in 8 or 4 bits and unpacked for each product: a base for adapters, on any device.

    int8    a scale per row, symmetric: 1 byte a weight
    nf4     QLoRA's 4-bit normal floats, a scale per block of 64: 0.56 byte a weight

Unpacking costs one pass over the weights per product, forward and backward, and holds one layer unpacked at a
time. Kernels that multiply packed weights would be faster on a GPU; these need nothing but PyTorch.

Source of NF4: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E. Scales are not quantised again.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

Packing = Literal["int8", "nf4"]
BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero."""


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is packed and never trained; `weight` is it unpacked, anew at each reading.

    Args:
        linear: the layer to pack; its bias is kept as it is.
        packing: how.
    """

    def __init__(self, linear: nn.Linear, packing: Packing) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.packing = linear.in_features, linear.out_features, packing
        self.bias = linear.bias
        pack = _pack_int8 if packing == "int8" else _pack_nf4
        codes, scales = pack(linear.weight.detach().float())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as the products see it, [out, in] fp32."""
        codes, scales = self.get_buffer("codes"), self.get_buffer("scales")
        if self.packing == "int8":
            return codes * scales
        levels = torch.tensor(NF4, device=codes.device)[torch.stack([codes >> 4, codes & 15], -1).long()]
        flat = (levels.view(-1, BLOCK) * scales).flatten()
        return flat[: self.in_features * self.out_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias

    def plain(self) -> nn.Linear:
        """An ordinary layer that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device=self.get_buffer("codes").device)
        linear.weight = nn.Parameter(self.weight)
        linear.bias = self.bias
        return linear


def quantise(model: Any, packing: Packing) -> None:
    """Pack every linear layer inside the decoder's layers, in place; embedding, head and norms stay as they are."""
    _replace(model.get_decoder().layers, nn.Linear, lambda linear: QuantisedLinear(linear, packing))


def unpack(model: Any) -> None:
    """Make packed layers ordinary ones again, in place, with the values that they computed with."""
    _replace(model, QuantisedLinear, QuantisedLinear.plain)


def _replace(root: Any, kind: type, make: Any) -> None:
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if type(child) is kind:
                setattr(module, name, make(child))


class _Product(Function):
    """x W^T that keeps nothing but the layer: unpacked weights would otherwise live until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return x @ layer.weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        return (g @ ctx.layer.weight.to(g.dtype)).to(ctx.dtype), None


def _pack_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    scales_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    codes = torch.round(weight_OI / scales_O1.clamp(min=torch.finfo(torch.float32).tiny))
    return codes.to(torch.int8), scales_O1


def _pack_nf4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    flat = nn.functional.pad(weight_OI.flatten(), (0, -weight_OI.numel() % BLOCK)).view(-1, BLOCK)
    scales = flat.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4, device=flat.device)
    between = (levels[1:] + levels[:-1]) / 2
    scaled = flat / scales.clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(scaled, between).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales
