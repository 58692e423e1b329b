"""What is exported opens elsewhere and says the same: Transformers, llama.cpp, and ourselves."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
import torch

from stillroom.errors import ModelError
from stillroom.models import encode_prompt, export, load, load_tokenizer, weights_bytes
from stillroom.models.gguf_file import read_gguf
from stillroom.models.gguf_layout import gguf_name, permute
from stillroom.models.gguf_writer import write_gguf
from stillroom.models.prompts import prompt_text
from stillroom.schema import Message, ToolCall, ToolSpec
from stillroom.toolcalls import write_tools

TOOLS = (
    ToolSpec("ping", "Pings.", {"type": "object", "properties": {"host": {"type": "string"}}, "required": ["host"]}),
)
PROMPTS = ["ping example.org", "What's 12 plus  30?\n\n\tplease", "été 東京 🎉 don't I'LL 3.14e-5"]


@pytest.fixture(scope="module")
def merging_student(tmp_path_factory):
    """A random Llama whose tokenizer has merges, and splits digits as SmolLM's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    inner.decoder = decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([f"{text} ping the host please, and answer" for text in PROMPTS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[0], eos_token=special[2], pad_token=special[0]
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("merging")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def student(merging_student):
    loaded = load(merging_student, chat_template="chatml-tools")
    torch.manual_seed(1)
    for parameter in loaded.model.parameters():  # spread out, so that greedy choices are no ties
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return loaded


def worst_gap(student, prompt: list[int], answer: list[int]) -> float:
    """By how much, in nats, any token of `answer` is less likely than the best one there, as Transformers sees it.

    The end of the turn does not compete: llama.cpp was told to ignore it.
    """
    with torch.no_grad():
        logits = student.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    logits[:, student.tokenizer.eos_token_id] = -torch.inf
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.max(-1).values - chosen).max())


def test_the_directory_opens_in_transformers_as_it_is(student, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(student, tmp_path, dtype="float32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ours = student.model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    messages, tools = [Message("user", "hi")], TOOLS
    assert encode_prompt(tokenizer, messages, tools) == encode_prompt(student, messages, tools)
    assert tokenizer.eos_token == "<|im_end|>"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert weights_bytes(tmp_path) > 0
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1  # whoever may read one may read all


def test_bfloat16_halves_the_file_and_stays_near(student, tmp_path):
    export(student, tmp_path / "wide", dtype="float32", gguf=False)
    export(student, tmp_path / "narrow", gguf=False)
    assert weights_bytes(tmp_path / "narrow") < 0.6 * weights_bytes(tmp_path / "wide")
    again = load(tmp_path / "narrow")
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, student.model.state_dict()[name].bfloat16().float())
    assert not list((tmp_path / "wide").glob("*.gguf"))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_written_gguf_reads_back_as_the_same_model(student, tmp_path, kind):
    write_gguf(student, tmp_path / "s.gguf", kind)
    again = load(tmp_path / "s.gguf")
    tolerance = {"F32": 0.0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2}[kind]
    for name, value in again.model.state_dict().items():
        wanted = student.model.state_dict()[name]
        assert (value - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert again.chat_template == student.chat_template
    for text in PROMPTS:
        messages = [Message("user", text)]
        assert encode_prompt(again, messages, TOOLS) == encode_prompt(student, messages, TOOLS)


def test_a_gguf_written_from_a_gguf_keeps_its_tokenizer(student, tmp_path):
    write_gguf(student, tmp_path / "first.gguf", "F32")
    again = load(tmp_path / "first.gguf")
    write_gguf(again, tmp_path / "second.gguf", "F32")
    first, second = read_gguf(tmp_path / "first.gguf"), read_gguf(tmp_path / "second.gguf")
    mine = [key for key in first.metadata if key.startswith("tokenizer.")]
    assert {key: first.metadata[key] for key in mine} == {key: second.metadata[key] for key in mine}
    assert all(np.array_equal(first.tensor(name), second.tensor(name)) for name in first.tensors)


class LlamaServer:
    """llama.cpp's own server over a GGUF, asked over HTTP as its users ask it."""

    def __init__(self, path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), 1024, 1
        params.use_jinja, params.warmup, params.cpuparams.n_threads = True, False, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)


def test_llama_cpp_reads_and_answers_as_transformers_does(student, tmp_path):
    """The same prompt from the file's own template, the same tokens of it, the same greedy answer."""
    write_gguf(student, tmp_path / "s.gguf", "F32")
    server = LlamaServer(tmp_path / "s.gguf")
    tools = write_tools(TOOLS, "openai")
    for text in PROMPTS:
        call = {"name": "ping", "arguments": json.dumps({"host": text, "n": [1, 2.5, None, True]})}
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        asked += [
            {"role": "assistant", "content": None, "tool_calls": [{"id": "0", "type": "function", "function": call}]}
        ]
        asked += [{"role": "tool", "tool_call_id": "0", "content": "pong"}, {"role": "user", "content": "and?"}]
        prompt = server.post("/apply-template", {"messages": asked, "tools": tools})["prompt"]
        turns = [
            Message("system", "Be brief."),
            Message("user", text),
            Message("assistant", "", (ToolCall("ping", json.loads(call["arguments"])),)),
            Message("tool", "pong"),
            Message("user", "and?"),
        ]
        assert prompt == prompt_text(student.tokenizer, turns, TOOLS)
        ids = encode_prompt(student, turns, TOOLS)
        assert server.post("/tokenize", {"content": prompt, "parse_special": True})["tokens"] == ids
        wanted = {"prompt": ids, "n_predict": 12, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        # Greedy there is greedy here, up to near ties, since ggml rounds attention differently.
        answer = server.post("/completion", wanted)["tokens"]
        assert len(answer) == 12
        assert worst_gap(student, ids, answer) < 0.02


def test_what_has_no_layout_in_gguf_is_said_and_the_rest_is_written(student, tmp_path, capsys):
    student.model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    export(student, tmp_path)
    assert "no GGUF is written" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("damage", [0, 3, 30, 200, 2000])
def test_a_damaged_gguf_is_a_clear_error(student, tmp_path, damage):
    write_gguf(student, tmp_path / "s.gguf", "F16")
    data = (tmp_path / "s.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:damage])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load(tmp_path / "cut.gguf")
    with pytest.raises(ModelError, match="no GGUF file"):
        load_tokenizer(tmp_path / "absent.gguf")


def test_llamas_rows_are_permuted_there_and_back():
    rows = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    assert np.array_equal(permute(permute(rows, 2), 2, undo=True), rows)
    # ggml's pairs (0, 1), (2, 3) of a head of 12 are rows 0 and 6, 1 and 7 of Transformers' halves.
    assert permute(rows, 2)[:4, 0].tolist() == rows[[0, 6, 1, 7], 0].tolist()


def test_names_of_parameters():
    assert gguf_name("model.layers.7.self_attn.q_proj.weight") == "blk.7.attn_q.weight"
    assert gguf_name("model.layers.7.self_attn.q_proj.bias") == "blk.7.attn_q.bias"
    assert gguf_name("transformer.h.0.weight") is None
