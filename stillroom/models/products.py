"""Matrix products with the gradients of weights added in place, in fp32 or bf16.

Autograd would write each weight gradient to fresh memory and then add it to `.grad`: for a small model on a
CPU that is as much memory traffic as a tenth of the arithmetic, once per row. These functions let the
product itself add to `.grad`. Weights, residuals and sums over tokens stay fp32; in bf16 operands and results of
products are narrow, as under autocast.

bf16 on a device without it: operands are rounded to bf16 and multiplied in fp32, which is what such hardware
computes (bf16 products, fp32 sums), at the speed of fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from stillroom.models.precision import Precision


class Products:
    """How products are computed; remembers narrowed weights until `forget`, to be called when weights change."""

    def __init__(self, precision: Precision) -> None:
        self.bf16 = precision.name == "bf16"
        self.native = precision.native
        self._narrow: dict[int, Tensor] = {}

    def operand(self, x: Tensor) -> Tensor:
        """`x` as it enters a product."""
        if not self.bf16:
            return x
        narrow = x.bfloat16()
        return narrow if self.native else narrow.to(torch.float32)

    def weight(self, weight: Tensor) -> Tensor:
        """A weight as it enters a product, narrowed once per step."""
        if not self.bf16:
            return weight.detach()
        if id(weight) not in self._narrow:
            self._narrow[id(weight)] = weight.detach().bfloat16()
        narrow = self._narrow[id(weight)]
        return narrow if self.native else narrow.to(torch.float32)

    def forget(self) -> None:
        """Drop narrowed weights."""
        self._narrow.clear()


def linears(x_TI: Tensor, modules: tuple[nn.Module, ...], products: Products) -> tuple[Tensor, ...]:
    """`module(x_TI)` of each; plain linear layers add their weight gradients in place, others use autograd.

    Results are as products give them: bf16 where they are computed in it, else fp32.
    """
    if all(type(module) is nn.Linear for module in modules):
        weights = [module.weight for module in modules]
        biases = [module.bias for module in modules]
        outputs: tuple[Tensor, ...] = _Linears.apply(x_TI, products, len(modules), *weights, *biases)
        return outputs
    with torch.autocast(x_TI.device.type, torch.bfloat16, enabled=products.bf16):
        return tuple(module(x_TI).float() for module in modules)


def embed(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of an embedding; the gradient is added to the rows used, without a dense copy."""
    out: Tensor = _Embed.apply(ids_T, weight_VD)
    return out


def project(hidden_CD: Tensor, head_VD: Tensor, buffer_CV: Tensor) -> Tensor:
    """Logits `hidden_CD @ head_VD.T` in the first rows of an fp32 buffer."""
    logits_CV = buffer_CV[: len(hidden_CD)]
    if hidden_CD.dtype == logits_CV.dtype:
        return torch.mm(hidden_CD, head_VD.T, out=logits_CV)
    return logits_CV.copy_(hidden_CD @ head_VD.T)


def add_gradient(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """`weight.grad += left @ right`, in the product itself where the formats allow; of the first rows, if fewer."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    gradient = weight.grad[: len(left)]
    if left.dtype == gradient.dtype:
        gradient.addmm_(left, right)
    else:
        gradient.add_(left @ right)


class _Linears(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Products, count: int, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        ctx.products, ctx.weights, ctx.biases = products, parameters[:count], parameters[count:]
        ctx.dtype = x.dtype
        x = products.operand(x)
        ctx.save_for_backward(x)
        outputs = []
        for weight, bias in zip(ctx.weights, ctx.biases, strict=True):
            out = x @ products.weight(weight).T
            outputs.append(out if bias is None else out.add_(bias))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), products, dx = ctx.saved_tensors, ctx.products, None
        for weight, bias, g in zip(ctx.weights, ctx.biases, gradients, strict=True):
            if bias is not None and bias.requires_grad:
                bias.grad = g.sum(0) if bias.grad is None else bias.grad.add_(g.sum(0))
            g = products.operand(g)
            if weight.requires_grad:
                add_gradient(weight, g.T, x)
            if ctx.needs_input_grad[0]:
                narrow = products.weight(weight)
                if dx is None:
                    dx = (g @ narrow).to(ctx.dtype)
                elif g.dtype == dx.dtype:
                    dx.addmm_(g, narrow)
                else:
                    dx.add_(g @ narrow)
        return (dx, None, None, *(None for _ in ctx.weights), *(None for _ in ctx.biases))


class _Embed(Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ids)
        return weight.detach()[ids]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        weight = ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ctx.saved_tensors[0], gradients[0].to(weight.dtype))
        return None, None
