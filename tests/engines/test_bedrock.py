"""Bedrock's Converse through the real boto3, against a local server that speaks it."""

from __future__ import annotations

import asyncio
import json

import pytest

from stillroom.engines import ModelConfig, Request, ask, open_model
from stillroom.errors import ModelError, ModelRefused, ModelUnavailable
from stillroom.schema import GenerateParams, Message, ToolCall
from tests.engines.questions import DOTTED, WEATHER, question
from tests.engines.servers import RawServer

pytest.importorskip("boto3")

TEXT = {"text": "Let me see."}
USE = {"toolUse": {"toolUseId": "t1", "name": "math_add", "input": {"a": 1, "b": 2}}}


@pytest.fixture(autouse=True)
def credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def reply(*content, stop="end_turn", **more):
    usage = {"inputTokens": 11, "outputTokens": 7, "totalTokens": 18}
    body = {"output": {"message": {"role": "assistant", "content": list(content)}}, "stopReason": stop}
    return json.dumps({**body, "usage": usage, "metrics": {"latencyMs": 5}, **more}).encode()


def converse(respond, request=None, **fields):
    """The answer, and the requests as (path, body)."""
    seen = []

    def answer(path, body):
        seen.append((path, json.loads(body)))
        return respond

    request = request or question("1+2?", DOTTED)
    with RawServer(answer) as server:
        config = ModelConfig(
            engine="bedrock", model="amazon.nova-micro-v1:0", url=server.url, region="us-east-1", **fields
        )
        with open_model(config) as model:
            return asyncio.run(model.generate(request.messages, request.tools, request.params)), seen


def json_reply(status, body, **headers):
    return status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}, body


def test_tools_go_out_and_calls_come_back_under_their_own_names():
    price = {"input_per_million": 1e6, "output_per_million": 2e6}
    request = Request(
        (Message("system", "Be brief."), Message("user", "1+2?")),
        (DOTTED, WEATHER),
        GenerateParams(max_tokens=9, stop=("X",)),
    )
    answer, ((path, body),) = converse(json_reply(200, reply(TEXT, USE, stop="tool_use")), request, price=price)
    assert answer.message == Message("assistant", "Let me see.", (ToolCall("math.add", {"a": 1, "b": 2}),))
    assert (answer.finish_reason, answer.input_tokens, answer.output_tokens) == ("tool_calls", 11, 7)
    assert answer.cost_usd == pytest.approx(25)
    assert answer.latency_s > 0
    assert path == "/model/amazon.nova-micro-v1%3A0/converse"
    assert body["system"] == [{"text": "Be brief."}]
    assert body["inferenceConfig"] == {"maxTokens": 9, "temperature": 0.0, "stopSequences": ["X"]}
    assert [tool["toolSpec"]["name"] for tool in body["toolConfig"]["tools"]] == ["math_add", "get_weather"]
    assert body["toolConfig"]["tools"][0]["toolSpec"]["inputSchema"]["json"] == DOTTED.parameters


def test_turns_alternate_and_results_answer_their_calls():
    calls = (ToolCall("math.add", {"a": 1, "b": 2}), ToolCall("math.add", {"a": 3, "b": 4}))
    history = (
        Message("user", "?"),
        Message("assistant", "", calls),
        Message("tool", "3"),
        Message("tool", "7"),
        Message("user", "so?"),
    )
    _, ((_, body),) = converse(json_reply(200, reply(TEXT)), Request(history, (DOTTED,)))
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    uses = [block["toolUse"]["toolUseId"] for block in body["messages"][1]["content"]]
    results = [block["toolResult"]["toolUseId"] for block in body["messages"][2]["content"] if "toolResult" in block]
    assert uses == results


def test_constrained_and_extra_fields_are_sent():
    request = question("?", DOTTED, constrain=True)
    _, ((_, body),) = converse(json_reply(200, reply(USE)), request, extra_body={"top_k": 3})
    assert body["toolConfig"]["toolChoice"] == {"any": {}}
    assert body["additionalModelRequestFields"] == {"top_k": 3}


def test_the_python_form_sends_tools_as_text():
    _, ((_, body),) = converse(json_reply(200, reply(TEXT)), tool_format="python")
    assert "toolConfig" not in body
    assert "math.add" in body["system"][0]["text"]
    with pytest.raises(ModelRefused, match="native"):
        converse(json_reply(200, reply(TEXT)), question("?", DOTTED, constrain=True), tool_format="python")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "ValidationException", ModelRefused),
        (403, "AccessDeniedException", ModelRefused),
        (404, "ResourceNotFoundException", ModelRefused),
        (408, "ModelTimeoutException", ModelUnavailable),
        (429, "ThrottlingException", ModelUnavailable),
        (429, "ModelNotReadyException", ModelUnavailable),
        (500, "InternalServerException", ModelUnavailable),
        (503, "ServiceUnavailableException", ModelUnavailable),
    ],
)
def test_errors_keep_the_services_words_and_are_tried_once_by_boto3(status, code, kind):
    calls = []

    def respond(path, body):
        calls.append(path)
        return json_reply(status, b'{"message":"because"}', **{"x-amzn-ErrorType": code, "Retry-After": "4"})

    with RawServer(respond) as server:
        config = ModelConfig(engine="bedrock", model="a.model", url=server.url, region="us-east-1")
        with open_model(config) as model, pytest.raises(kind, match=f"{code}: because") as caught:
            asyncio.run(model.generate((Message("user", "?"),)))
    assert len(calls) == 1
    if kind is ModelUnavailable:
        assert caught.value.retry_after_s == 4


@pytest.mark.parametrize(
    "body", [b"<html>", b"", b"null", b"[]", b"{}", b'{"output": 3}', b'{"output": {"message": {"content": [3]}}}']
)
def test_what_is_no_converse_response_is_a_model_error(body):
    with pytest.raises(ModelError):
        converse(json_reply(200, body))


def test_no_server_and_no_credentials(monkeypatch):
    config = ModelConfig(engine="bedrock", model="a.model", url="http://127.0.0.1:9", region="us-east-1", timeout_s=5)
    with open_model(config) as model, pytest.raises(ModelUnavailable):
        asyncio.run(model.generate((Message("user", "?"),)))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with open_model(config) as model, pytest.raises(ModelRefused, match="credentials"):
        asyncio.run(model.generate((Message("user", "?"),)))


def test_many_requests_side_by_side():
    with RawServer(lambda path, body: json_reply(200, reply(TEXT))) as server:
        config = ModelConfig(engine="bedrock", model="a.model", url=server.url, region="us-east-1", concurrency=4)
        with open_model(config) as model:
            assert len(ask(model, [question(f"q{index}") for index in range(20)])) == 20
