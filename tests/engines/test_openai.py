"""Any OpenAI-compatible URL: what is sent, what is understood, and what no server can do to us."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import gzip
import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.engines import AnswerCache, ModelConfig, RetryConfig, ask, open_model
from stillroom.engines.names import SafeNames
from stillroom.engines.openai import retry_after
from stillroom.engines.openai_wire import read_answer
from stillroom.errors import ModelError, ModelRefused, ModelUnavailable
from stillroom.schema import Completion, GenerateParams, Message, ToolCall
from stillroom.testing import LocalTeacher
from tests.engines.questions import DOTTED, WEATHER, question, questions
from tests.engines.servers import RawServer

FUZZ = int(os.environ.get("STILLROOM_FUZZ_EXAMPLES", "300"))


def config(url: str, **fields: object) -> ModelConfig:
    return ModelConfig(engine="openai", url=url, model="m", **fields)  # type: ignore[arg-type]


def answer_of(url: str, request=None, **fields):
    request = request or question("hi")
    with open_model(config(url, **fields)) as model:
        return asyncio.run(model.generate(request.messages, request.tools, request.params))


def body_sent(request, **fields):
    with LocalTeacher(lambda body: "fine") as teacher:
        answer_of(teacher.url, request, **fields)
        return teacher.requests[0]


def test_tools_go_out_and_calls_come_back_under_their_own_names():
    reply = Message(
        "assistant", "", (ToolCall("math_add", {"a": 1, "b": 2}), ToolCall("get_weather", {"city": "Oslo"}))
    )
    with LocalTeacher(lambda body: reply) as teacher:
        answer = answer_of(teacher.url, question("?", WEATHER, DOTTED, max_tokens=9))
        (sent,) = teacher.requests
    assert answer.message.tool_calls == (
        ToolCall("math.add", {"a": 1, "b": 2}),
        ToolCall("get_weather", {"city": "Oslo"}),
    )
    assert (answer.finish_reason, answer.model) == ("tool_calls", "m")
    assert answer.latency_s > 0
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["get_weather", "math_add"]
    assert (sent["max_tokens"], sent["temperature"], sent["seed"], sent["model"]) == (9, 0.0, 0, "m")


def test_a_conversation_with_calls_is_sent_with_matching_ids():
    request = question("?", DOTTED)
    calls = (ToolCall("math.add", {"a": 1, "b": 2}), ToolCall("math.add", {"a": 3, "b": 4}))
    history = (Message("assistant", "", calls), Message("tool", "3"), Message("tool", "7"), Message("user", "and?"))
    sent = body_sent(question("x", DOTTED).__class__((*request.messages, *history), (DOTTED,)))["messages"]
    assert [call["id"] for call in sent[1]["tool_calls"]] == [turn["tool_call_id"] for turn in sent[2:4]]
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": 2}
    assert sent[1]["tool_calls"][0]["function"]["name"] == "math_add"


def test_the_python_form_sends_tools_as_text_only():
    sent = body_sent(question("?", DOTTED), tool_format="python")
    assert "tools" not in sent
    assert "math.add" in sent["messages"][0]["content"]
    assert "[func_name(param=value, ...)]" in sent["messages"][0]["content"]


@pytest.mark.parametrize(
    ("supports", "member"),
    [("grammar", "grammar"), ("strict_tools", "tool_choice"), ("json_schema", "response_format")],
)
def test_constrained_requests_use_what_the_server_supports(supports, member):
    sent = body_sent(question("?", DOTTED, constrain=True), supports=[supports])
    assert member in sent
    assert ("tools" in sent) == (supports == "strict_tools")


def test_constrained_requests_are_refused_rather_than_ignored():
    with pytest.raises(ModelRefused, match="supports"):
        body_sent(question("?", DOTTED, constrain=True))


def test_an_answer_by_json_schema_is_read_as_calls():
    text = json.dumps({"calls": [{"name": "math.add", "arguments": {"a": 1, "b": 2}}]})
    with LocalTeacher(lambda body: text) as teacher:
        answer = answer_of(teacher.url, question("?", DOTTED, constrain=True), supports=["json_schema"])
    assert answer.message == Message("assistant", "", (ToolCall("math.add", {"a": 1, "b": 2}),))


def test_extra_body_and_headers_are_passed_on(monkeypatch):
    monkeypatch.setenv("TENANT", "blue")
    with RawServer(lambda path, body: (200, {}, b"{}")) as server, pytest.raises(ModelError):
        answer_of(f"{server.url}/v1/", headers={"X-Tenant": "$TENANT"}, extra_body={"top_k": 3})
    assert server.headers[0]["X-Tenant"] == "blue"
    assert server.paths == ["/v1/chat/completions"]
    assert body_sent(question("?"), extra_body={"top_k": 3})["top_k"] == 3


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")

    def leak(path, body):
        return 401, {}, b'{"error": {"message": "Incorrect API key provided: sk-very-secret."}}'

    with RawServer(leak) as server, pytest.raises(ModelRefused) as caught:
        answer_of(server.url, api_key_env="TEACHER_KEY")
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "Incorrect API key provided: [key]" in str(caught.value)
    assert "sk-very" not in str(caught.value)
    assert "TEACHER_KEY" in str(caught.value)


def test_a_key_that_is_not_set_is_said_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ModelError, match="TEACHER_KEY is not set"):
        open_model(config("http://127.0.0.1:1", api_key_env="TEACHER_KEY"))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "", "file:///etc/passwd"])
def test_only_http_urls_are_opened(url):
    with pytest.raises((ModelError, ValueError)):
        open_model(config(url))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 302])
def test_what_will_not_work_later_is_refused_with_the_servers_words(status):
    headers = {"Location": "http://127.0.0.1:1/elsewhere"} if status == 302 else {}
    with RawServer(lambda path, body: (status, headers, b'{"error": {"message": "because"}}')) as server:
        with pytest.raises(ModelRefused, match=f"{status}.*because"):
            answer_of(server.url)
        assert len(server.paths) == 1


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_what_may_work_later_says_when(status):
    respond = (status, {"Retry-After": "7"}, b"<html>busy</html>")
    expected = pytest.raises(ModelUnavailable, match=f"{status}.*busy")
    with RawServer(lambda path, body: respond) as server, expected as caught:
        answer_of(server.url)
    assert caught.value.retry_after_s == 7


def test_a_used_up_quota_is_no_throttling():
    body = b'{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'
    with RawServer(lambda path, _: (429, {}, body)) as server, pytest.raises(ModelRefused, match="quota"):
        answer_of(server.url)


def test_no_server_no_answer():
    with pytest.raises(ModelUnavailable, match="cannot be reached"):
        answer_of("http://127.0.0.1:9/v1")


def test_a_server_that_drips_is_given_up_after_timeout_s():
    def drip(path, body):
        time.sleep(2)
        return 200, {}, b"{}"

    with RawServer(drip) as server, pytest.raises(ModelUnavailable, match=r"within 0.2 s"):
        answer_of(server.url, timeout_s=0.2)


def test_an_endless_answer_is_not_read_to_its_end():
    expected = pytest.raises(ModelError, match="more than 100,000 bytes")
    with RawServer(lambda path, body: (200, {}, b" " * 50_000_000)) as server, expected:
        answer_of(server.url, max_response_bytes=100_000)


def test_a_compressed_bomb_is_bounded_by_its_expanded_size():
    bomb = gzip.compress(b" " * 50_000_000)
    headers = {"Content-Encoding": "gzip", "Content-Length": str(len(bomb))}
    expected = pytest.raises(ModelError, match="more than 100,000 bytes")
    with RawServer(lambda path, body: (200, headers, bomb)) as server, expected:
        answer_of(server.url, max_response_bytes=100_000)


def test_a_damaged_compression_is_an_error_of_ours():
    headers = {"Content-Encoding": "gzip", "Content-Length": "4"}
    with RawServer(lambda path, body: (200, headers, b"nope")) as server, pytest.raises(ModelError, match="damaged"):
        answer_of(server.url)


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE html><title>Sign in</title>", b"", b"null", b"[]", b'"text"', b"{}", b'{"choices": []}',
        b'{"choices": [null]}', b'{"choices": [{"message": 3}]}', b'{"choices": [{"message": {"content": 3}}]}',
        b'{"choices": {"0": {}}}', b"\xff\xfe\x00", b"[" * 100_000,
        b'{"choices": [{"message": {"tool_calls": [{"function": {}}]}}]}',
        b'{"choices": [{"message": {"tool_calls": "f()"}}]}',
    ],
)  # fmt: skip
def test_what_is_no_completion_is_shown(body):
    with RawServer(lambda path, _: (200, {}, body)) as server, pytest.raises(ModelError) as caught:
        answer_of(server.url)
    # What is no JSON may be a gateway's page, and is asked for again; a wrong answer in JSON is an answer.
    no_json = body.startswith((b"<", b"\xff", b"[[")) or not body
    assert type(caught.value) is (ModelUnavailable if no_json else ModelError)
    assert len(str(caught.value)) < 1000


def test_arguments_that_are_no_json_are_kept_as_the_models_words():
    call = {"id": "c", "type": "function", "function": {"name": "math_add", "arguments": '{"a": 1,'}}
    body = {"choices": [{"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    answer = read_answer(body, SafeNames([DOTTED]))
    assert answer.message.tool_calls == ()
    assert json.loads(answer.message.content) == {"name": "math.add", "arguments": '{"a": 1,'}


def test_a_server_that_counts_nothing_is_estimated():
    reply = {"choices": [{"message": {"content": "word " * 30}}]}
    with LocalTeacher(lambda body: reply) as teacher:
        answer = answer_of(teacher.url, question("long " * 300), price={"input_per_million": 1e6})
    assert 200 < answer.input_tokens < 2000
    assert 10 < answer.output_tokens < 200
    assert answer.cost_usd == pytest.approx(answer.input_tokens)


def test_content_in_parts_and_finish_reasons_are_read():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    for said, meant in (("length", "length"), ("content_filter", "refused"), ("stop", "stop"), (None, "stop")):
        body = {"choices": [{"message": {"content": parts}, "finish_reason": said}]}
        answer = read_answer(body, SafeNames(()))
        assert (answer.message.content, answer.finish_reason) == ("ab", meant)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "message", "content", "tool_calls", "function", "name", "arguments", "usage", "prompt_tokens",
             "completion_tokens", "finish_reason", "type", "text"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=FUZZ, deadline=None)
@given(body=json_values, message=json_values, usage=json_values)
def test_any_json_is_an_answer_or_a_model_error(body, message, usage):
    for candidate in (body, {"choices": [{"message": message}], "usage": usage}, {"choices": [message]}):
        with contextlib.suppress(ModelError):
            answer = read_answer(candidate, SafeNames(()))
            assert isinstance(answer.message.content, str)


def test_retry_after_is_read_in_both_forms():
    now = 1_800_000_000.0
    assert retry_after("12") == 12
    assert retry_after("1.5") == 1.5
    assert retry_after(email.utils.formatdate(now + 90, usegmt=True), now) == 90
    assert retry_after(email.utils.formatdate(now - 90, usegmt=True), now) == 0
    for nonsense in (None, "", "soon", "-3", "9" * 400, "Wed, 99 Foo 2026 00:00:00 GMT", "nan"):
        assert retry_after(nonsense) is None


def test_throttled_labelling_ends_with_every_answer_once(tmp_path):
    with LocalTeacher(lambda body: "fine", fail_first=5, retry_after="0.05", log=tmp_path / "log") as teacher:
        with open_model(config(teacher.url)) as model, AnswerCache(tmp_path / "cache") as cache:
            answers = ask(model, questions(30), cache=cache, retry=RetryConfig(base_s=0.01))
        assert all(isinstance(answer, Completion) for answer in answers)
        assert sum(teacher.calls(429).values()) == 5
        assert set(teacher.calls().values()) == {1}


def test_one_model_serves_many_event_loops_and_closes_quietly():
    with LocalTeacher(lambda body: "fine") as teacher:
        model = open_model(config(teacher.url))
        for _ in range(3):
            assert asyncio.run(model.generate((Message("user", "x"),), (), GenerateParams())).message.content == "fine"
        model.close()
        model.close()


def test_a_body_that_is_no_json_is_asked_for_again():
    bodies = iter([b"<html>Gateway says hello</html>", b'{"choices": [{"mess'])
    right = json.dumps({"choices": [{"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}]})

    def respond(path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return 200, {}, next(bodies, right.encode())

    with RawServer(respond) as server, open_model(config(server.url)) as model:
        (found,) = ask(model, [question("hi")], retry=RetryConfig(base_s=0))
    assert not isinstance(found, ModelError)
    assert found.message.content == "yes"
