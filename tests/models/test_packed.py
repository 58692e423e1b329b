"""Packed hidden states and chunked losses against Transformers' own loss, one sequence at a time."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stillroom.models.losses import cross_entropy
from stillroom.models.packed import hidden_states, is_llama_like
from stillroom.models.packing import MIN_SHARED, TokenSequence, pack, split
from stillroom.models.precision import Precision, pick_precision
from stillroom.models.products import Products

VOCABULARY = 97
FP32 = Precision("fp32", True, "test")
LLAMA_SHAPE = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "head_dim": 8,
}  # fmt: skip
GPT2_SHAPE = {
    "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 1,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip


def tiny(kind: str, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = GPT2_SHAPE if kind == "gpt2" else LLAMA_SHAPE
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **(shape | settings)))
    for parameter in model.parameters():  # large enough that a wrong mask or position shows
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model


def sequences_that_share() -> list[TokenSequence]:
    """Two begin alike, two more alike for longer, one twice, one within another, one alone, one of four tokens."""
    draw = random.Random(0)
    ids = lambda count: [draw.randrange(VOCABULARY) for _ in range(count)]  # noqa: E731
    short = ids(MIN_SHARED + 4)
    long = short + ids(30)
    first = TokenSequence(tuple(short + ids(10)), len(short) + 5)
    second = TokenSequence(tuple(long + ids(7)), len(long) + 2)
    third = TokenSequence(tuple(long + ids(9)), len(long))
    inside = TokenSequence(second.ids[:-3], len(long) + 1)
    return [first, second, third, second, inside, TokenSequence(tuple(ids(33)), 5), TokenSequence(tuple(ids(4)), 1)]


def reference(model: torch.nn.Module, sequences: list[TokenSequence]) -> tuple[float, dict[str, torch.Tensor]]:
    """Transformers' loss with labels, each sequence alone; and its gradients."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for sequence in sequences:
        ids = torch.tensor(sequence.ids)[None]
        labels = ids.clone()
        labels[:, : sequence.first_target] = -100
        total = total + model(input_ids=ids, labels=labels).loss * sequence.targets
    mean = total / sum(sequence.targets for sequence in sequences)
    mean.backward()
    return float(mean.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def packed_loss(model: torch.nn.Module, rows: list[list[TokenSequence]], precision: Precision, share: bool) -> float:
    """Ours, leaving gradients in the model."""
    model.zero_grad(set_to_none=True)
    products, scored, total = Products(precision), sum(s.targets for row in rows for s in row), 0.0
    for row in rows:
        packed = pack(row, share=share)
        hidden_SD = hidden_states(model, packed, products)
        head = model.get_output_embeddings().weight
        loss, gradient = cross_entropy(hidden_SD.detach(), head, packed.labels_S, products, scale=1 / scored)
        hidden_SD.backward(gradient)
        total += float(loss)
    return total


def worst(model: torch.nn.Module, gradients: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a parameter's gradient, by norm."""
    pairs = ((p.grad, gradients[name]) for name, p in model.named_parameters())
    return max(float((ours - theirs).norm() / (theirs.norm() + 1e-7)) for ours, theirs in pairs)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_packed_loss_and_gradients_are_those_of_each_sequence_alone(kind, tied, share):
    model, sequences = tiny(kind, tie_word_embeddings=tied), sequences_that_share()
    loss, gradients = reference(model, sequences)

    rows = split(sequences, 100) if share else [sequences]
    assert packed_loss(model, rows, FP32, share) == pytest.approx(loss, rel=1e-5)
    assert worst(model, gradients) < 1e-5
    assert is_llama_like(model, 100) == (kind != "gpt2")


def test_bf16_is_near_fp32_on_any_hardware():
    model, sequences = tiny("llama"), sequences_that_share()
    loss, gradients = reference(model, sequences)
    for native in (True, False):
        assert packed_loss(model, [sequences], Precision("bf16", native, "test"), True) == pytest.approx(loss, rel=2e-3)
        assert worst(model, gradients) < 0.06


def test_a_shared_beginning_has_rows_once():
    sequences = sequences_that_share()
    packed = pack(sequences)
    assert packed.tokens == sum(len(sequence.ids) for sequence in sequences)
    assert len(packed.ids_T) < packed.tokens / 2
    assert len(pack(sequences, share=False).ids_T) == packed.tokens - len(sequences)  # last tokens have no row


@pytest.mark.parametrize("seed", range(20))
def test_every_scored_token_sees_exactly_its_own_sequence(seed):
    draw = random.Random(seed)
    stems = [[draw.randrange(3) for _ in range(draw.randrange(1, 60))] for _ in range(3)]
    sequences = []
    for _ in range(draw.randrange(1, 12)):
        ids = tuple(
            draw.choice(stems)[: draw.randrange(60)] + [draw.randrange(3) for _ in range(draw.randrange(2, 30))]
        )
        sequences.append(TokenSequence(ids, draw.randrange(1, len(ids))))
    packed = pack(sequences)

    seen = []
    columns = (packed.scored_S, packed.labels_S, packed.sequence_S, packed.target_S)
    for row, label, place, target in zip(*(column.tolist() for column in columns), strict=True):
        (segment,) = [s for s in packed.segments if s.start <= row < s.stop]
        before = [i for part in segment.context for i in range(part.start, part.stop)]
        rows = [*before, *range(segment.start, row + 1)]
        assert packed.positions_T[rows].tolist() == list(range(len(rows)))
        seen.append((*packed.ids_T[rows].tolist(), label))
        assert seen[-1] == sequences[place].ids[: sequences[place].first_target + target + 1]
    every = [(place, target) for place, s in enumerate(sequences) for target in range(s.targets)]
    assert sorted(zip(packed.sequence_S.tolist(), packed.target_S.tolist(), strict=True)) == every
    wanted = [s.ids[: stop + 1] for s in sequences for stop in range(s.first_target, len(s.ids))]
    assert sorted(seen) == sorted(wanted)


def test_split_keeps_every_sequence_and_the_budget():
    sequences = sequences_that_share()
    rows = split(sequences, 60)
    assert sorted(s.ids for row in rows for s in row) == sorted(s.ids for s in sequences)
    assert all(len(pack(row).ids_T) <= 60 or len(row) == 1 for row in rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 255, 256, 600])
def test_chunked_cross_entropy_is_the_dense_one(rows, smoothing):
    torch.manual_seed(rows)
    hidden, head = torch.randn(rows, 32, requires_grad=True), torch.randn(301, 32, requires_grad=True)
    labels = torch.randint(301, (rows,))
    dense = torch.nn.functional.cross_entropy(
        hidden.double() @ head.double().T, labels, reduction="sum", label_smoothing=smoothing
    ) * 0.25  # fmt: skip
    dense.backward()
    wanted, head.grad = head.grad, None

    loss, gradient = cross_entropy(
        hidden.detach(), head, labels, Products(FP32), scale=0.25, gradient=True, label_smoothing=smoothing
    )
    assert float(loss) == pytest.approx(dense.item(), rel=1e-5)
    assert (gradient - hidden.grad).norm() <= 1e-5 * hidden.grad.norm() + 1e-7
    assert (head.grad - wanted).norm() <= 1e-5 * wanted.norm() + 1e-7


def test_cross_entropy_refuses_what_does_not_fit():
    hidden, head, products = torch.randn(3, 4), torch.randn(7, 4), Products(FP32)
    with pytest.raises(ValueError, match="shapes disagree"):
        cross_entropy(hidden, head, torch.zeros(2, dtype=torch.long), products)
    with pytest.raises(ValueError, match="outside"):
        cross_entropy(hidden, head, torch.tensor([0, 7, 1]), products)


def test_frozen_lower_layers_get_no_gradient_and_the_others_the_right_one():
    model, sequences = tiny("llama", tie_word_embeddings=False), sequences_that_share()
    _, gradients = reference(model, sequences)
    for frozen in (model.model.embed_tokens, model.model.layers[0]):
        frozen.requires_grad_(False)
    packed_loss(model, [sequences], FP32, True)
    assert all(p.grad is None for p in model.model.layers[0].parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all((p.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 1e-7 for name, p in trained.items())


def test_auto_precision_is_bf16_only_where_the_hardware_has_it():
    picked = pick_precision("auto", "cpu")
    assert picked.native
    assert ("no bf16" in picked.reason) == (picked.name == "fp32")
    assert pick_precision("bf16", "cpu").name == "bf16"
