"""Log-probabilities from servers: llama.cpp's own for real, and the forms in which vLLM and OpenAI write them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.engines import ModelConfig
from stillroom.errors import ConfigError, ModelError, ModelRefused, StillroomError
from stillroom.models import encode_prompt, encode_target, load, load_tokenizer
from stillroom.models.packing import TokenSequence
from stillroom.schema import GenerateParams, Message
from stillroom.teacher.cached import CachedTeacher, fill
from stillroom.teacher.live import LiveTeacher
from stillroom.teacher.served import ServedTeacher
from stillroom.teacher.signal_cache import SignalCache
from stillroom.teacher.tokens import TokenTable, check_same_tokens
from tests.engines.questions import smollm2
from tests.engines.servers import RawServer

QUESTION = (Message("user", "What is the capital of France?"),)
ANSWER = Message("assistant", "Paris, é!")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(smollm2())


def asked(tokenizer, answer: Message = ANSWER) -> TokenSequence:
    prompt = encode_prompt(tokenizer, QUESTION)
    return TokenSequence((*prompt, *encode_target(tokenizer, answer)), len(prompt), "france")


def config(url: str, **further) -> ModelConfig:
    return ModelConfig(engine="openai", url=url, model="served", **further)


# --- llama.cpp's server


@pytest.fixture(scope="module")
def llama_url():
    xllamacpp = pytest.importorskip("xllamacpp")
    options = xllamacpp.CommonParams()
    options.model.path = str(smollm2())
    options.n_parallel, options.n_ctx, options.cpuparams.n_threads = 1, 512, 1
    options.warmup, options.verbosity = False, 0
    server = xllamacpp.Server(options)
    yield f"{server.listening_address}/v1"
    del server


@pytest.fixture(scope="module")
def live():
    return LiveTeacher(load(smollm2()), precision="fp32")


def assert_near(found, wanted) -> None:
    """Most of the mass lies on the same tokens; llama.cpp rounds activations to 8 bits, which moves a tenth at most."""
    for row in range(len(wanted.ids_NK)):
        there, here = (
            dict(zip(t.ids_NK[row].tolist(), np.exp(t.logprobs_NK[row]).tolist(), strict=True)) for t in (found, wanted)
        )
        moved = sum(abs(there.get(index, 0) - here.get(index, 0)) for index in there.keys() | here.keys()) / 2
        assert moved < 0.15


def test_llama_cpp_scores_given_tokens_as_the_same_weights_in_memory_do(tokenizer, llama_url, live, tmp_path):
    sequence = asked(tokenizer)
    with ServedTeacher(config(llama_url), tokenizer, "prefix") as served:
        with SignalCache(tmp_path, served.identity(64)) as cache:
            assert fill(cache, served, [sequence]).asked == 1
            found = cache.read(sequence)
        assert served.identity(64).vocabulary == live.vocabulary
    (wanted,) = live.top_k([sequence], [sequence], 64)
    assert found.ids_NK.shape == (sequence.targets, 64)
    assert_near(found, wanted)
    assert np.abs(np.exp(found.tail_N) - np.exp(wanted.tail_N)).max() < 0.05


def test_llama_cpp_answers_with_the_signal_of_its_own_answer(tokenizer, llama_url, live):
    with ServedTeacher(config(llama_url), tokenizer, "prefix") as served:
        question = (Message("user", "Say only: yes"),)
        answered = asyncio.run(served.answer(question, params=GenerateParams(max_tokens=40, temperature=0), k=20))
    assert answered.message.content == "Yes."
    sequence = answered.sequence
    assert list(sequence.ids) == [*encode_prompt(tokenizer, question), *encode_target(tokenizer, answered.message)]
    assert answered.signal.ids_NK.shape == (sequence.targets, 20)
    assert (answered.signal.ids_NK[:, 0] == sequence.ids[sequence.first_target :]).all()  # it was greedy
    (wanted,) = live.top_k([sequence], [sequence], 20)
    assert_near(answered.signal, wanted)


def test_a_server_that_ignores_what_is_asked_is_refused_with_what_to_do(tokenizer, llama_url):
    for scoring in ("prompt_logprobs", "echo"):
        with (
            ServedTeacher(config(llama_url), tokenizer, scoring) as served,
            pytest.raises(ModelRefused, match=r"'france'(.|\n)*help: choose the `scoring`"),
        ):
            served.top_k([asked(tokenizer)], [asked(tokenizer)], 8)


# --- vLLM and OpenAI, in the forms that they document


def distribution(tokenizer, index: int, most: int) -> list[tuple[int, str, float]]:
    """`index` and its neighbours, geometric."""
    ids = [index, *(i for i in range(1000, 1000 + most) if i != index)][:most]
    return [(i, tokenizer.decode([i]), -0.7 * (place + 1)) for place, i in enumerate(ids)]


def vllm(tokenizer, *, most: int = 20):
    """vLLM's completions: `prompt_logprobs` by id, `echo` by text; refuses more than `most`."""

    def respond(path, data):
        body = json.loads(data)
        wanted = body.get("prompt_logprobs") or body.get("logprobs")
        if wanted > most:
            error = {"error": {"message": f"Requested logprobs of {wanted}, which is greater than max allowed: {most}"}}
            return 400, {}, json.dumps(error).encode()
        tables = [None, *(distribution(tokenizer, index, wanted) for index in body["prompt"][1:])]
        if "prompt_logprobs" in body:
            said = [
                table and {str(i): {"logprob": v, "rank": r, "decoded_token": t} for r, (i, t, v) in enumerate(table)}
                for table in tables
            ]
            choice = {"text": "", "prompt_logprobs": said}
        else:
            texts = [tokenizer.decode([index]) for index in body["prompt"]]
            tops = [table and {text: value for _, text, value in table} for table in tables]
            choice = {"text": "", "logprobs": {"tokens": [*texts, "x"], "top_logprobs": [*tops, {"x": 0.0}]}}
        return 200, {}, json.dumps({"choices": [choice]}).encode()

    return respond


@pytest.mark.parametrize("scoring", ["prompt_logprobs", "echo"])
def test_given_tokens_are_scored_in_one_request(tokenizer, scoring):
    sequence = asked(tokenizer, Message("assistant", "Paris is it"))
    with RawServer(vllm(tokenizer)) as server, ServedTeacher(config(server.url), tokenizer, scoring) as served:
        (found,) = served.top_k([sequence], [sequence], 10)
        assert len(server.paths) == 1
    assert (found.ids_NK[:, 0] == sequence.ids[sequence.first_target :]).all()
    assert np.allclose(found.logprobs_NK[:, 0], -0.7)
    rest = 1 - np.exp(found.logprobs_NK.astype(np.float64)).sum(1)
    assert np.allclose(np.exp(found.tail_N), rest, atol=1e-6)


def test_a_server_that_caps_is_asked_for_what_it_gives_and_k_is_what_came_back(tokenizer, tmp_path, capsys):
    sequences = [asked(tokenizer), asked(tokenizer, Message("assistant", "Lyon"))]
    with (
        RawServer(vllm(tokenizer)) as server,
        ServedTeacher(config(server.url, concurrency=1), tokenizer, "prompt_logprobs") as served,
        SignalCache(tmp_path, served.identity(64)) as cache,
    ):
        fill(cache, served, sequences)
        assert len(server.paths) == 3  # the refused one is not repeated for each sequence
        assert cache.read(sequences[0]).ids_NK.shape == (sequences[0].targets, 20)
    assert "going on with 20" in capsys.readouterr().err


def test_resuming_asks_only_for_what_lacks(tokenizer, tmp_path):
    sequences = [asked(tokenizer, Message("assistant", text)) for text in ("Paris", "Lyon", "Nice", "Metz")]
    with (
        RawServer(vllm(tokenizer)) as server,
        ServedTeacher(config(server.url), tokenizer, "prompt_logprobs") as served,
        SignalCache(tmp_path, served.identity(10)) as cache,
    ):
        assert fill(cache, served, sequences[:3]).asked == 3
        assert fill(cache, served, sequences).asked == 1
        assert fill(cache, served, sequences).asked == 0
        assert len(server.paths) == 4


def chat(entries):
    """An OpenAI chat completion of these tokens: (text, bytes, [(text, bytes, logprob)])."""
    content = [
        {
            "token": text, "bytes": list(raw), "logprob": tops[0][2],
            "top_logprobs": [{"token": t, "bytes": list(b), "logprob": v} for t, b, v in tops],
        }
        for text, raw, tops in entries
    ]  # fmt: skip
    message = {"role": "assistant", "content": "".join(text for text, _, _ in entries)}
    body = {"choices": [{"message": message, "finish_reason": "stop", "logprobs": {"content": content}}]}
    return lambda path, data: (200, {}, json.dumps(body).encode())


PARIS = [("Paris", b"Paris", -0.1), ("Lyon", b"Lyon", -3.0), ("\ufffd", b"\xe2\x82", -4.0)]


def test_an_answer_without_its_end_of_turn_counts_as_ended(tokenizer):
    with (
        RawServer(chat([("Paris", b"Paris", PARIS)])) as server,
        ServedTeacher(config(server.url), tokenizer, "prefix") as served,
    ):
        answered = asyncio.run(served.answer(QUESTION))
    end = encode_target(tokenizer, Message("assistant", "Paris"))
    assert list(answered.sequence.ids[answered.sequence.first_target :]) == end
    assert answered.signal.ids_NK[1, 0] == end[-1]
    assert answered.signal.logprobs_NK[1].tolist() == [0.0] + [-64.0] * (answered.signal.ids_NK.shape[1] - 1) or (
        math.isclose(answered.signal.logprobs_NK[1, 1], -64, abs_tol=0.01)
    )


def test_tokens_of_another_tokenizer_are_refused_and_the_way_is_named(tokenizer):
    strange = [("zzParisqq", b"zzParisqq", -0.1), ("qqLyon", b"qqLyon", -3.0)]
    with (
        RawServer(chat([("zzParisqq", b"zzParisqq", strange)])) as server,
        ServedTeacher(config(server.url), tokenizer, "prefix") as served,
        pytest.raises(ConfigError, match=r"not the student's(.|\n)*ULD"),
    ):
        asyncio.run(served.answer(QUESTION))


@pytest.mark.parametrize("scoring", ["prompt_logprobs", "echo", "prefix"])
def test_a_server_whose_ids_mean_other_words_is_refused(tokenizer, scoring):
    sequence = asked(tokenizer)

    class Shifted:
        """Says for each id what the next one is."""

        def decode(self, ids):
            return tokenizer.decode([ids[0] + 1])

    def prefix(path, data):
        top = [{"id": 5000, "token": tokenizer.decode([5001]), "logprob": -0.1}]
        return 200, {}, json.dumps({"choices": [{"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}]}).encode()

    respond = prefix if scoring == "prefix" else vllm(Shifted())
    with (
        RawServer(respond) as server,
        ServedTeacher(config(server.url), tokenizer, scoring) as served,
        pytest.raises(ConfigError, match=r"not the student's(.|\n)*ULD"),
    ):
        served.top_k([sequence], [sequence], 8)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 60_000) | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "logprobs", "content", "top_logprobs", "token", "bytes", "id", "logprob", "tokens",
                         "prompt_logprobs", "message", "5"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("scoring", ["prompt_logprobs", "echo", "prefix"])
def test_whatever_a_server_sends_is_an_error_of_ours_or_a_signal(tokenizer, scoring):
    sequence = asked(tokenizer, Message("assistant", "P"))
    box: list = [None]
    with (
        RawServer(lambda path, data: (200, {}, json.dumps(box[0]).encode())) as server,
        ServedTeacher(config(server.url), tokenizer, scoring) as served,
    ):

        @settings(max_examples=60, deadline=None)
        @given(JSON, JSON)
        def check(choice, whole):
            for body in (whole, {"choices": [choice]}):
                box[0] = body
                with contextlib.suppress(StillroomError):
                    served.top_k([sequence], [sequence], 4)

        check()


def test_a_table_knows_every_token_by_its_bytes_or_not_at_all(tokenizer):
    table = TokenTable(tokenizer)
    known = 0
    for index in range(0, len(tokenizer), 7):
        text = tokenizer.decode([index])
        if "\ufffd" in text or index in tokenizer.added_tokens_decoder:
            continue
        assert table.id_of({"token": text, "id": index}) == index
        assert table.id_of({"token": text, "bytes": list(text.encode())}) == index
        known += 1
    assert known > 6000
    assert table.id_of({"token": "\ufffd"}) is None
    assert table.id_of({"token": "token_id:57"}) == 57


def test_tokenizers_are_compared_token_by_token(tokenizer, tiny_student):
    check_same_tokens(tokenizer, load_tokenizer(smollm2(), chat_template="chatml-tools"))
    with pytest.raises(ConfigError, match=r"token \d+ is (.|\n)*ULD"):
        check_same_tokens(tokenizer, load_tokenizer(tiny_student))


def test_a_cached_source_without_a_teacher_names_what_it_lacks(tokenizer, tmp_path):
    from stillroom.errors import ArtifactError
    from stillroom.models.packing import pack

    with ServedTeacher(config("http://127.0.0.1:9"), tokenizer, "prefix") as served:
        identity = served.identity(8)
    with SignalCache(tmp_path, identity) as cache, pytest.raises(ArtifactError, match="'france'"):
        CachedTeacher(cache).signal(pack([asked(tokenizer)]), [asked(tokenizer)])


def test_an_error_of_the_server_names_the_sequence(tokenizer):
    with (
        RawServer(lambda path, data: (401, {}, b"{}")) as server,
        ServedTeacher(config(server.url), tokenizer, "prefix") as served,
        pytest.raises(ModelError, match="'france'"),
    ):
        served.top_k([asked(tokenizer)], [asked(tokenizer)], 8)
