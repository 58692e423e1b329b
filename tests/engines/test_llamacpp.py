"""llama.cpp inside this process, on the real SmolLM2 GGUF."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from stillroom.engines import ModelConfig, ask, open_model
from stillroom.engines.templates import ChatTemplate
from stillroom.errors import ModelError, ModelRefused
from stillroom.schema import Completion, GenerateParams, Message
from tests.engines.questions import DOTTED, WEATHER, question, smollm2

pytest.importorskip("xllamacpp")
FRANCE = question("What is the capital of France?", max_tokens=12)


@pytest.fixture(scope="module")
def model():
    with open_model(ModelConfig(engine="llama.cpp", path=str(smollm2()), threads=1, context=1024)) as opened:
        yield opened


def generate(model, request):
    return asyncio.run(model.generate(request.messages, request.tools, request.params))


def test_it_answers_with_counts_and_is_quiet(model, capfd):
    answer = generate(model, FRANCE)
    assert answer.message.content.strip()
    assert answer.finish_reason in ("stop", "length")
    assert 10 < answer.input_tokens < 60
    assert 0 < answer.output_tokens <= 12
    assert answer.latency_s > 0
    assert capfd.readouterr() == ("", "")


def test_greedy_answers_are_the_same_each_time_whatever_came_between(model):
    first = generate(model, FRANCE).message
    generate(model, question("Count to ten.", max_tokens=4))
    assert generate(model, FRANCE).message == first


def test_an_answer_that_is_cut_says_so(model):
    answer = generate(model, question("Tell me a long story.", max_tokens=3))
    assert (answer.finish_reason, answer.output_tokens) == ("length", 3)


def test_stop_strings_end_the_answer(model):
    whole = generate(model, FRANCE).message.content
    stop = whole[2:5]
    cut = generate(model, question(FRANCE.messages[0].content, max_tokens=12, stop=(stop,)))
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_tools_are_shown_as_text_to_a_template_that_lacks_them(model):
    assert model.tool_format == "python"
    prompt = model.prompt(question("?", DOTTED).messages, (DOTTED,))
    assert "math.add" in prompt
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>assistant\n")


def test_constrained_answers_are_valid_calls(model):
    from stillroom.toolcalls import parse_calls, validate_calls

    answer = generate(model, question("Add 2 and 3.", DOTTED, WEATHER, max_tokens=60, constrain=True))
    assert not validate_calls(parse_calls(answer.message.content), (DOTTED, WEATHER))


def test_a_prompt_that_does_not_fit_is_refused_with_what_to_do(model):
    with pytest.raises(ModelRefused, match="`context`"):
        generate(model, question("word " * 3000))
    assert isinstance(ask(model, [question("word " * 3000), FRANCE])[1], Completion)


def test_a_template_of_ours_can_be_given():
    config = ModelConfig(engine="llama.cpp", path=str(smollm2()), threads=1, context=512, chat_template="chatml-tools")
    with open_model(config) as model:
        assert model.tool_format == "native"
        assert "math.add(a: int, b: int): Add two numbers" in model.prompt(question("?").messages, (DOTTED,))
        assert generate(model, question("Add 1 and 2", DOTTED, max_tokens=2)).output_tokens == 2


def test_native_tools_are_refused_where_the_template_would_drop_them():
    with pytest.raises(ModelError, match="does not mention tools"):
        open_model(ModelConfig(engine="llama.cpp", path=str(smollm2()), tool_format="native"))


def test_the_identity_covers_weights_and_prompt_format(model):
    assert model.digest == hashlib.sha256(smollm2().read_bytes()).hexdigest()
    assert model.parts["tools"] != "native"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"nope" * 100])
def test_a_damaged_file_is_a_model_error(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        open_model(ModelConfig(engine="llama.cpp", path=str(path)))


def test_a_truncated_model_is_a_model_error(tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(smollm2().read_bytes()[:20_000_000])
    with pytest.raises(ModelError, match="cannot load"):
        open_model(ModelConfig(engine="llama.cpp", path=str(path)))


def test_the_same_prompt_as_transformers_renders(model):
    source = "{% for m in messages %}{{ bos_token }}[{{ m.role }}]{{ m.content }}{% endfor %}{{ tools | tojson }}"
    template = ChatTemplate(source, bos="<s>")
    assert template.render((Message("user", "<é>"),), (DOTTED,)).startswith('<s>[user]<é>[{"type": "function"')


def test_a_closed_model_says_so():
    opened = open_model(ModelConfig(engine="llama.cpp", path=str(smollm2()), threads=1, context=256))
    opened.close()
    opened.close()
    with pytest.raises(ModelError, match="closed"):
        asyncio.run(opened.generate((Message("user", "x"),), (), GenerateParams()))
