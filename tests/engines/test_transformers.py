"""Many answers side by side are those of each prompt alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace

import pytest

from stillroom.engines import ModelConfig, Request, ask, open_model
from stillroom.errors import ConfigError, ModelError, ModelRefused
from stillroom.schema import Completion, GenerateParams, Message
from tests.engines.questions import DOTTED, WEATHER, question, smollm2


@pytest.fixture(scope="module", params=["llama", "general"])
def model(tiny_student, request):
    """The same model by the decoder written out for its kind, and by its own code."""
    config = ModelConfig(
        engine="transformers", path=str(tiny_student), chat_template="chatml-tools", max_batch=8, device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch, open_model(config) as opened:
        if request.param == "general":
            patch.setattr("stillroom.engines.decoding.is_llama_like", lambda *_: False)
        yield opened


def generate(model, request):
    return asyncio.run(model.generate(request.messages, request.tools, request.params))


def mixed(count: int) -> list[Request]:
    """Prompts and answers of many lengths, half of them with tools, some sampled."""
    return [
        Request(
            (Message("user", "words " * (index % 7) + str(index)),),
            (DOTTED, WEATHER)[: index % 3],
            GenerateParams(max_tokens=1 + index % 9, temperature=0.8 if index % 5 == 0 else 0.0, seed=index),
        )
        for index in range(count)
    ]


def test_batched_answers_are_those_of_each_prompt_alone(model):
    requests = mixed(40)
    together = ask(model, requests)
    alone = [generate(model, request) for request in requests]
    assert [one.message for one in together] == [one.message for one in alone]
    assert [one.output_tokens for one in together] == [one.output_tokens for one in alone]


def test_greedy_answers_are_those_of_transformers_own_generate(model):
    import torch

    from stillroom.models import encode_prompt

    for request in mixed(9):
        if request.params.temperature:
            continue
        ids = torch.tensor([encode_prompt(model.loaded, request.messages, request.tools)])
        theirs = model.loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.params.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        theirs = model.loaded.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
        assert generate(model, request).message.content == theirs


def test_prompts_that_begin_alike_are_answered_as_each_alone(model):
    beginning = (Message("system", "the same examples for all " * 8),)
    requests = [Request((*beginning, *request.messages), request.tools, request.params) for request in mixed(30)]
    alone = [generate(model, request) for request in requests]
    assert [answer.message for answer in ask(model, requests)] == [answer.message for answer in alone]
    same = ask(model, [requests[0]] * 2 + [Request(requests[0].messages, (), GenerateParams(max_tokens=4))])
    assert same[0].message == same[1].message == alone[0].message


def test_an_answer_that_begins_with_words_ends_there_where_only_calls_count(model):
    from stillroom.toolcalls import may_begin_calls

    requests = [question("say", max_tokens=60, temperature=1.0, seed=seed) for seed in range(12)]
    only_calls = [Request(one.messages, (), replace(one.params, calls_first=True)) for one in requests]
    ended = 0
    for whole, cut in zip(ask(model, requests), ask(model, only_calls), strict=True):
        assert whole.message.content.startswith(cut.message.content)
        if cut.output_tokens < whole.output_tokens:
            ended += 1
            assert not may_begin_calls(cut.message.content)
    assert ended  # an untrained model writes anything but calls


def test_latency_is_measured_only_for_a_request_alone(model):
    assert generate(model, question("x", max_tokens=2)).latency_s > 0
    assert all(answer.latency_s is None for answer in ask(model, mixed(12)))


def test_counts_and_ends(model):
    answer = generate(model, question("x", max_tokens=3))
    assert answer.finish_reason in ("stop", "length")
    assert answer.output_tokens <= 3
    assert answer.input_tokens == len("Suser\nxE\nSassistant\n")  # bytes, and S, E for the special tokens


def test_constrained_answers_are_prefixes_of_valid_calls(model):
    from stillroom.toolcalls import parse_calls, validate_calls

    requests = [question(f"{index}", DOTTED, WEATHER, max_tokens=200, constrain=True) for index in range(4)]
    plain = question("plain", DOTTED, max_tokens=5)
    answers = ask(model, [*requests, plain])
    for answer in answers[:4]:
        assert answer.message.content.startswith("[")
        if answer.finish_reason == "stop":
            assert not validate_calls(parse_calls(answer.message.content), (DOTTED, WEATHER))
    assert answers[4].message == generate(model, plain).message


def test_stop_strings_end_the_answer(model):
    whole = generate(model, question("x", max_tokens=30)).message.content
    stop = whole[3:5]
    cut = generate(model, question("x", max_tokens=30, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.message.content == whole[: whole.index(stop)]


def test_a_prompt_beyond_the_models_context_is_refused_and_the_others_are_answered(model):
    answers = ask(model, [question("x" * 5000), question("y", max_tokens=2)])
    assert isinstance(answers[0], ModelRefused)
    assert isinstance(answers[1], Completion)


def test_an_open_model_can_be_used_as_it_is(model):
    from stillroom.engines.transformers import TransformersModel

    config = ModelConfig(engine="transformers", path="unused", name="student")
    with TransformersModel(config, model.loaded) as student:
        assert generate(student, question("x", max_tokens=2)).model == "student"
        assert student.identity != model.identity


def test_without_a_template_nothing_is_guessed(tiny_student):
    with pytest.raises(ConfigError, match="chat_template"):
        open_model(ModelConfig(engine="transformers", path=str(tiny_student)))


def test_nothing_there_is_a_model_error(tmp_path):
    with pytest.raises(ModelError):
        open_model(ModelConfig(engine="transformers", path=str(tmp_path)))


def test_a_cancelled_request_does_not_disturb_its_neighbours(model):
    async def half_cancelled():
        tasks = [asyncio.ensure_future(model.generate(r.messages, r.tools, r.params)) for r in mixed(16)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(half_cancelled())
    assert all(isinstance(result, Completion) for result in results[1::2])
    assert isinstance(generate(model, question("z", max_tokens=1)), Completion)


def test_a_failing_computation_is_a_model_error(tiny_student, model):
    config = ModelConfig(engine="transformers", path=str(tiny_student), chat_template="chatml-tools", device="cpu")
    with open_model(config) as broken:
        broken.loaded.model.model.layers[1].mlp = None
        with pytest.raises(ModelError, match="failed"):
            generate(broken, question("x"))


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_other_llama_like_models_are_computed_as_by_their_own_code(kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stillroom.engines.decoding import write_batch, write_stream
    from stillroom.engines.jobs import Job
    from stillroom.engines.llama import LlamaDecoder, is_llama_like

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=97, num_hidden_layers=3, head_dim=8, sliding_window=None, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases too: at their first values they hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert is_llama_like(model, 100)

    def jobs():
        return [Job([3 + index] * (5 + 7 * index), max_tokens=4 + index) for index in range(9)]

    ours, theirs = jobs(), jobs()
    write_stream(LlamaDecoder(model, 4, 80), ours, frozenset({5}), lambda job: None, 4)
    write_batch(model, theirs, frozenset({5}), lambda job: None)
    assert [job.written for job in ours] == [job.written for job in theirs]


def test_what_is_not_plainly_llama_like_is_left_to_its_own_code(tiny_student):
    import torch
    from transformers import AutoModelForCausalLM

    from stillroom.engines.llama import is_llama_like

    model = AutoModelForCausalLM.from_pretrained(tiny_student)
    assert is_llama_like(model, 100)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    assert not is_llama_like(model, 100)
    model = AutoModelForCausalLM.from_pretrained(tiny_student)
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    assert not is_llama_like(model, 100)


def test_batches_hold_similar_lengths_within_their_budget():
    from stillroom.engines.jobs import plan_batches

    lengths = [5, 100, 7, 90, 300, 6]
    batches = plan_batches(lengths, max_batch=3, batch_tokens=200)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert batches == [[4], [1, 3], [2, 5, 0]]


@pytest.mark.slow
def test_smollm2_answers_alike_alone_and_in_a_batch():
    config = ModelConfig(
        engine="transformers", path=str(smollm2()), chat_template="chatml-tools", device="cpu", dtype="float32"
    )
    requests = [
        question(f"What is the capital of {name}?", max_tokens=16)
        for name in ("France", "Italy, the beautiful", "Peru")
    ]
    with open_model(config) as real:
        together = ask(real, requests)
        assert [one.message for one in together] == [generate(real, request).message for request in requests]
        assert "Paris" in together[0].message.content


def test_a_program_that_forgets_to_close_its_model_ends_well(tiny_student):
    program = (
        "import asyncio, sys; from stillroom.engines import ModelConfig, open_model;"
        "from stillroom.schema import Message;"
        "model = open_model(ModelConfig(engine='transformers', path=sys.argv[1], chat_template='chatml-tools'));"
        "print(asyncio.run(model.generate([Message('user', 'x')])).output_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tiny_student)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
