"""The fakes that we ship keep what they promise."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request

import pytest

from stillroom.errors import ModelError, ModelUnavailable
from stillroom.schema import ChatModel, Message, ToolCall, ToolSpec, prompt_digest
from stillroom.testing import LocalTeacher, ScriptedModel

EMPTY = {"type": "object", "properties": {}}


def post(url: str, body: dict, **headers: str) -> tuple[int, dict, dict]:
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, dict(response.headers), json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.load(error)


def test_a_scripted_model_is_a_chat_model():
    model = ScriptedModel({"hi": "hello", "busy": ModelUnavailable("later")})
    assert isinstance(model, ChatModel)
    assert asyncio.run(model.generate((Message("user", "hi"),))).message.content == "hello"
    with pytest.raises(ModelUnavailable):
        asyncio.run(model.generate((Message("user", "busy"),)))
    with pytest.raises(ModelError, match="no answer to 'what'"):
        asyncio.run(model.generate((Message("user", "what"),)))
    assert len(model.asked) == 3


def test_a_local_teacher_counts_by_prompt_in_a_file_that_outlives_it(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": EMPTY}}
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    with LocalTeacher({"hi": Message("assistant", "", (ToolCall("f", {"a": 1}),))}, log=tmp_path / "log") as teacher:
        _, _, first = post(teacher.url, body)
        _, _, second = post(teacher.url, body)
    assert first == second
    assert first["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    key = prompt_digest((Message("user", "hi"),), (ToolSpec("f", "", EMPTY),))
    assert LocalTeacher({}, log=tmp_path / "log").calls() == {key: 2}


def test_a_local_teacher_fails_as_told():
    body = {"messages": [{"role": "user", "content": "hi"}]}
    with LocalTeacher({"hi": "x"}, fail_first=1, retry_after="3", api_key="k") as teacher:
        assert post(teacher.url, body)[0] == 401
        status, headers, _ = post(teacher.url, body, Authorization="Bearer k")
        assert (status, headers["Retry-After"]) == (429, "3")
        assert post(teacher.url, body, Authorization="Bearer k")[0] == 200
        assert post(teacher.url, {"messages": 3}, Authorization="Bearer k")[0] == 400
