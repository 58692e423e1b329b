"""Students cut out of larger models: what stays is the same, what goes is gone, and any text can still be written."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from stillroom.errors import ConfigError, ModelError
from stillroom.models import PruneConfig, encode_prompt, encode_target, export, load, prune, restrict, token_map
from stillroom.models.loading import Loaded
from stillroom.models.prompts import chat_template_text
from stillroom.models.pruning import block_influence, most_influential, spread_layers
from stillroom.models.vocabulary import keep_tokens, trim_tokenizer
from stillroom.schema import Message

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the whether of the weather in the north",
    "naïve café déjà vu 東京 東京都",
    "import numpy as np; print(12 + 30)",
]
PROMPTS = [[Message("user", "the weather in the north?")], [Message("user", "déjà vu in 東京")]]


def byte_level(**model) -> FastTokenizer:
    """Byte-level BPE with merges, as GPT-2, Llama 3 and Qwen have it."""
    inner = Tokenizer(models.BPE(**model))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS * 4, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer = FastTokenizer(
        tokenizer_object=inner, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2], unk_token=SPECIAL[0]
    )
    tokenizer.add_tokens(["[TOOL]"])  # an added token that is not special, as Qwen's <tool_call>
    return tokenizer


def byte_fallback() -> FastTokenizer:
    """SentencePiece's kind, as Llama 2 and Mistral have it: characters, and bytes for those it does not know."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    inner.train_from_iterator(CORPUS * 4, trainer)
    text = inner.to_str()
    inner = Tokenizer.from_str(text)
    return FastTokenizer(tokenizer_object=inner, bos_token=SPECIAL[1], eos_token=SPECIAL[2], unk_token="<unk>")


TOKENIZERS = {"byte level": byte_level(), "whole words first": byte_level(ignore_merges=True), "bytes": byte_fallback()}


def teacher_of(kind: str = "llama", *, tied: bool = True, layers: int = 6, padding: int = 5) -> Loaded:
    """A random model with a head padded past its tokenizer, as Qwen's is."""
    torch.manual_seed(0)
    tokenizer = TOKENIZERS["byte level"]
    tokenizer.chat_template = chat_template_text("chatml-tools")
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer) + padding, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return Loaded(model, tokenizer, "teacher", "d" * 64, tokenizer.chat_template, None)


def prompts(loaded: Loaded) -> list[list[int]]:
    return [encode_prompt(loaded, messages) for messages in PROMPTS]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    text=st.text(max_size=60), seen=st.lists(st.sampled_from(CORPUS), max_size=2), at_least=st.sampled_from([0, 350])
)
def test_any_text_can_be_written_and_seen_text_keeps_its_tokens(kind, text, seen, at_least):
    whole = TOKENIZERS[kind]
    needed = {token for line in seen for token in whole.encode(line, add_special_tokens=False)}
    kept = keep_tokens(whole, needed, at_least)
    small = trim_tokenizer(whole, kept)
    assert len(small) == len(kept) <= len(whole)
    assert len(kept) >= min(at_least, len(whole))

    encoded = small.encode(text)
    assert all(0 <= token < len(small) for token in encoded)
    assert small.decode(encoded) == whole.decode(whole.encode(text))
    to_whole = token_map(small, whole)
    assert to_whole.tolist() == kept
    for line in seen:
        assert to_whole[small.encode(line)].tolist() == whole.encode(line)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_everything_seen_keeps_every_token_and_nothing_seen_only_bytes_and_specials(kind):
    whole = TOKENIZERS[kind]
    assert keep_tokens(whole, range(len(whole))) == list(range(len(whole)))
    least = {whole.convert_ids_to_tokens(token) for token in keep_tokens(whole, ())}
    assert set(SPECIAL) <= least
    assert ("[TOOL]" in least) == (kind != "bytes")
    assert least & {"Ġthe", "▁the"} == set()
    small = trim_tokenizer(whole, keep_tokens(whole, ()))
    assert small.unk_token_id not in small.encode("the 東京 🎉", add_special_tokens=False)


def test_only_tokenizers_of_one_origin_are_mapped():
    whole = TOKENIZERS["byte level"]
    small = trim_tokenizer(whole, keep_tokens(whole, ()))
    assert token_map(whole, whole).tolist() == list(range(len(whole)))
    assert token_map(whole, small) is None
    assert token_map(TOKENIZERS["bytes"], whole) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_student_with_every_layer_says_what_the_teacher_says_of_the_tokens_that_stay(kind, tied):
    teacher = teacher_of(kind, tied=tied)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    student = prune(teacher, PruneConfig(vocabulary="from-data"), prompts(teacher))
    kept = token_map(student.tokenizer, teacher.tokenizer)
    assert student.model.config.vocab_size == len(student.tokenizer) < len(teacher.tokenizer)
    assert student.digest != teacher.digest
    for messages, ids in zip(PROMPTS, prompts(teacher), strict=True):
        own = encode_prompt(student, messages)
        assert kept[own].tolist() == ids
        with torch.no_grad():
            wanted = teacher.model(torch.tensor([ids])).logits[..., kept]
            assert torch.equal(student.model(torch.tensor([own])).logits, wanted)
    end = encode_target(student.tokenizer, Message("assistant", "the"))[-1]
    assert student.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    assert student.model.config.eos_token_id == student.model.generation_config.eos_token_id == end

    with torch.no_grad():  # training the student leaves the teacher alone
        for parameter in student.model.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


def test_layers_stay_in_order_and_unchanged():
    teacher = teacher_of("qwen3")
    student = prune(teacher, PruneConfig(layers=3))
    assert len(student.model.model.layers) == student.model.config.num_hidden_layers == 3
    assert len(student.model.config.layer_types) == 3
    for new, old in enumerate([0, 2, 5]):
        wanted = teacher.model.model.layers[old].state_dict()
        found = student.model.model.layers[new].state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert student.tokenizer is teacher.tokenizer
    logits = student.model(torch.tensor([prompts(teacher)[0]]), use_cache=True).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_spread_layers_are_distinct_and_hold_first_and_last(count):
    for keep in range(1, count + 1):
        chosen = spread_layers(count, keep)
        assert len(set(chosen)) == keep
        assert chosen == sorted(chosen)
        assert chosen[0] == 0
        assert keep == 1 or chosen[-1] == count - 1
        gaps = np.diff(chosen)
        assert keep == 1 or gaps.max() - gaps.min() <= 1


def test_influence_is_what_hidden_states_say_and_a_layer_without_effect_goes():
    teacher = teacher_of()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            teacher.model.get_submodule(f"model.layers.3.{name}").weight.zero_()
    found = block_influence(teacher.model, prompts(teacher))
    parts = [[] for _ in found]
    for ids in prompts(teacher):
        with torch.no_grad():
            states = teacher.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        x = [state[0].double().numpy() for state in states[:-1]]  # the last one is after the norm
        for layer, (a, b) in enumerate(itertools.pairwise(x)):
            parts[layer] += list((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
    wanted = [1 - np.mean(values) for values in parts[:-1]]
    assert found[:-1] == pytest.approx(wanted, abs=1e-6)
    assert found[3] == pytest.approx(0, abs=1e-6)
    student = prune(teacher, PruneConfig(layers=5, choose="influence"), prompts(teacher))
    for new, old in enumerate([0, 1, 2, 4, 5]):
        wanted_weight = teacher.model.model.layers[old].mlp.up_proj.weight
        assert torch.equal(student.model.model.layers[new].mlp.up_proj.weight, wanted_weight)
    assert most_influential([0.5, 0.1, 0.5, 0.5], 2) == [0, 2]


def test_a_pruned_student_opens_everywhere(tmp_path):
    teacher = teacher_of()
    student = prune(teacher, PruneConfig(layers=2, vocabulary="from-data"), prompts(teacher))
    export(student, tmp_path, dtype="float32", gguf_type="F32")
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    text = "the 東京 weather, déjà vu 12"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == student.tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        wanted = student.model(torch.tensor([ids])).logits
        assert torch.equal(model(torch.tensor([ids])).logits, wanted)
        for path in (tmp_path, tmp_path / "student.F32.gguf"):
            again = load(path)
            assert encode_prompt(again, PROMPTS[0]) == encode_prompt(student, PROMPTS[0])
            assert torch.allclose(again.model(torch.tensor([ids])).logits, wanted, atol=1e-5)
            assert token_map(again.tokenizer, teacher.tokenizer).tolist() == token_map(
                student.tokenizer, teacher.tokenizer
            ).tolist()  # fmt: skip


def test_a_pruned_student_can_be_pruned_again():
    teacher = teacher_of()
    once = prune(teacher, PruneConfig(layers=4, vocabulary="from-data"), prompts(teacher))
    twice = prune(once, PruneConfig(layers=2, vocabulary="from-data"), [encode_prompt(once, PROMPTS[0])])
    assert len(twice.tokenizer) < len(once.tokenizer)
    assert (
        token_map(twice.tokenizer, teacher.tokenizer)[encode_prompt(twice, PROMPTS[0])].tolist() == prompts(teacher)[0]
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_restricted_teacher_speaks_the_students_ids_and_shares_its_layers(tied):
    teacher = teacher_of(tied=tied)
    student = prune(teacher, PruneConfig(layers=1, vocabulary="from-data"), prompts(teacher))
    judge = restrict(teacher, student.tokenizer)
    kept = token_map(student.tokenizer, teacher.tokenizer)
    with torch.no_grad():
        wanted = teacher.model(torch.tensor([prompts(teacher)[1]])).logits[..., kept]
        found = judge.model(torch.tensor([encode_prompt(judge, PROMPTS[1])])).logits
    assert torch.equal(found, wanted)
    for mine, theirs in zip(judge.model.model.layers, teacher.model.model.layers, strict=True):
        assert mine.mlp.up_proj.weight.data_ptr() == theirs.mlp.up_proj.weight.data_ptr()
    assert teacher.model.config.vocab_size == len(teacher.tokenizer) + 5
    with pytest.raises(ModelError, match="not trimmed"):
        restrict(student, teacher.tokenizer)


def test_what_cannot_be_pruned_is_refused_with_a_reason():
    teacher = teacher_of()
    with pytest.raises(ConfigError, match=r"layers=7.*6 layers"):
        prune(teacher, PruneConfig(layers=7))
    for config in (PruneConfig(layers=2, choose="influence"), PruneConfig(vocabulary="from-data")):
        with pytest.raises(ConfigError, match="looks at data"):
            prune(teacher, config)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ModelError, match=r"'gpt2'.*llama"):
        prune(Loaded(other, teacher.tokenizer, "other", "", "", None), PruneConfig(layers=1))
    words = FastTokenizer(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(ModelError, match="WordLevel"):
        keep_tokens(words, [0])
