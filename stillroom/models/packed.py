"""Hidden states of packed sequences, for the rows that are scored, with little memory and few passes.

Llama-like decoders (llama, mistral, qwen2, qwen3) are computed here from their own modules: attention per
segment, weight gradients added in place (`products`), what is cheap to recompute not kept, and the last
layer's queries and MLP for scored rows only. Any other causal model runs its own forward, one sequence at
a time: right, but slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from stillroom.models.attention import Plan, attend, plan_attention
from stillroom.models.packing import Packed
from stillroom.models.products import Products, add_gradient, embed, linears

LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def hidden_states(model: Any, packed: Packed, products: Products) -> Tensor:
    """The final hidden states that predict `packed.labels_S`, [S, D] fp32, ready for the output head.

    Args:
        model: a Transformers causal language model, or a peft model around one.
        packed: what to compute; on the model's device.
        products: arithmetic of the matrix products.
    """
    core = getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model
    decoder = core.get_decoder()
    if is_llama_like(core, longest=int(packed.positions_T.max()) + 1):
        return _llama_like(decoder, packed, products)
    return _one_by_one(decoder, packed, products)


def is_llama_like(core: Any, longest: int) -> bool:
    """Whether `hidden_states` computes the decoder itself."""
    config = core.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        config.model_type in LLAMA_LIKE
        and config.hidden_act == "silu"
        and not (core.training and config.attention_dropout)
        and (window is None or longest <= window)
    )


def _llama_like(decoder: Any, packed: Packed, products: Products) -> Tensor:
    x_TD = embed(packed.ids_T, decoder.embed_tokens.weight)
    cos_TE, sin_TE = (part[0] for part in decoder.rotary_emb(x_TD[None], packed.positions_T[None]))
    rotation = cos_TE.float(), sin_TE.float()
    every = torch.arange(len(packed.ids_T), device=x_TD.device)
    rows_U, back_S = torch.unique(packed.scored_S, return_inverse=True)
    everywhere, scored = plan_attention(packed, every), plan_attention(packed, rows_U)
    for layer in decoder.layers[:-1]:
        x_TD = _layer(layer, x_TD, None, rotation, everywhere, products)
    x_UD = _layer(decoder.layers[-1], x_TD, rows_U, rotation, scored, products)
    return _norm(x_UD, decoder.norm)[back_S]


def _layer(
    layer: Any, x_TD: Tensor, rows_U: Tensor | None, rotation: tuple[Tensor, Tensor], plan: Plan, products: Products
) -> Tensor:
    """One decoder layer; with `rows_U`, only those rows of its output."""
    attention, mlp = layer.self_attn, layer.mlp
    h_TD = _norm(x_TD, layer.input_layernorm)
    if rows_U is None:
        q, k, v = linears(h_TD, (attention.q_proj, attention.k_proj, attention.v_proj), products)
    else:
        k, v = linears(h_TD, (attention.k_proj, attention.v_proj), products)
        (q,) = linears(h_TD[rows_U], (attention.q_proj,), products)
        x_TD = x_TD[rows_U]
    size = attention.head_dim
    q, k, v = (part.unflatten(-1, (-1, size)) for part in (q, k, v))
    if hasattr(attention, "q_norm"):
        q, k = _norm(q, attention.q_norm), _norm(k, attention.k_norm)
    o = attend(q, k, v, rotation, plan, attention.scaling, products)
    x_TD = x_TD + linears(o.flatten(1), (attention.o_proj,), products)[0]
    h_TD = _norm(x_TD, layer.post_attention_layernorm)
    gate, up = linears(h_TD, (mlp.gate_proj, mlp.up_proj), products)
    if type(mlp.down_proj) is nn.Linear and mlp.down_proj.bias is None:
        out: Tensor = _SwigluDown.apply(x_TD, gate, up, mlp.down_proj.weight, products)
        return out
    return x_TD + linears(nn.functional.silu(gate) * up, (mlp.down_proj,), products)[0]


def _norm(x: Tensor, module: Any) -> Tensor:
    out: Tensor = _RmsNorm.apply(x, module.weight, module.variance_epsilon)
    return out


class _RmsNorm(Function):
    """Keeps its input and one number per row; the normalised rows are recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.weight = weight
        ctx.save_for_backward(x, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,), (x, scale), weight = gradients, ctx.saved_tensors, ctx.weight
        normal = x * scale
        dweight = (g * normal).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        g = g * weight
        along = (g * normal).mean(-1, keepdim=True)
        return g.sub_(normal.mul_(along)).mul_(scale), dweight, None


class _SwigluDown(Function):
    """x + down(silu(gate) * up): keeps gate and up, recomputes their product, adds the weight's gradient in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, weight: Tensor, products: Products) -> Tensor:
        ctx.weight, ctx.products = weight, products
        ctx.save_for_backward(gate, up)
        a, narrow = products.operand(nn.functional.silu(gate).mul_(up)), products.weight(weight)
        return torch.addmm(x, a, narrow.T) if a.dtype == x.dtype else x + a @ narrow.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (gate, up), weight, products = gradients, ctx.saved_tensors, ctx.weight, ctx.products
        narrow_g, silu = products.operand(g), nn.functional.silu(gate)
        if weight.requires_grad:
            add_gradient(weight, narrow_g.T, products.operand(silu * up))
        da = (narrow_g @ products.weight(weight)).to(gate.dtype)
        dup = silu.mul_(da)
        return g, torch.ops.aten.silu_backward(da.mul_(up), gate), dup, None, None


def _one_by_one(decoder: Any, packed: Packed, products: Products) -> Tensor:
    """Any decoder: each leaf's whole sequence through the model's own forward."""
    hidden_of: dict[int, Tensor] = {}
    for segment in packed.segments:
        rows = torch.cat([torch.arange(s.start, s.stop) for s in (*segment.context, segment)]).to(packed.ids_T.device)
        wanted = packed.scored_S[(packed.scored_S >= segment.start) & (packed.scored_S < segment.stop)].unique()
        if not len(wanted):
            continue
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=products.bf16):
            out_TD = decoder(input_ids=packed.ids_T[rows][None], use_cache=False).last_hidden_state[0].float()
        for row in wanted.tolist():
            hidden_of[row] = out_TD[len(rows) - (segment.stop - row)]
    return torch.stack([hidden_of[row] for row in packed.scored_S.tolist()])
