"""OpenAI's chat completions as JSON: our records to a request body, a response body to our records.

Promise: whatever a server answers, `read_answer` returns an answer or raises ModelError; it raises
nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.engines.names import SafeNames
from stillroom.errors import ModelError
from stillroom.schema import Message, ToolCall, ToolSpec

SHOWN_CHARS = 300
_FINISH = {"length": "length", "max_tokens": "length", "content_filter": "refused"}


@dataclass(frozen=True, slots=True)
class WireAnswer:
    """What a response said; token counts are None where the server gave none."""

    message: Message
    finish_reason: str
    input_tokens: int | None
    output_tokens: int | None


def write_messages(messages: Sequence[Message], names: SafeNames) -> list[dict[str, Any]]:
    """The conversation for the wire. Calls get ids in order, and tool results answer them in that order."""
    out: list[dict[str, Any]] = []
    waiting: list[str] = []
    made = 0
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            waiting = [f"call_{made + index}" for index in range(len(message.tool_calls))]
            made += len(waiting)
            turn["tool_calls"] = [
                {"id": name, "type": "function", "function": _write_call(call, names)}
                for name, call in zip(waiting, message.tool_calls, strict=True)
            ]
        if message.role == "tool":
            turn["tool_call_id"] = waiting.pop(0) if waiting else f"call_{max(0, made - 1)}"
        out.append(turn)
    return out


def _write_call(call: ToolCall, names: SafeNames) -> dict[str, Any]:
    return {"name": names.wire(call.name), "arguments": json.dumps(call.arguments, ensure_ascii=False)}


def read_answer(body: Any, names: SafeNames) -> WireAnswer:
    """The first choice of a chat completion.

    Raises:
        ModelError: the body has another shape; shows what came.
    """
    choices = body.get("choices") if isinstance(body, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise ModelError(f"the answer is no chat completion (no choices[0].message): {shown(body)}")
    text = _text(message.get("content"), body)
    calls, broken = _calls(message.get("tool_calls"), names, body)
    if broken:
        # The model's own mistake, kept as it was said: a wrong answer, but an answer.
        text, calls = "\n".join([*([text] if text else []), *broken]), ()
    finish = _FINISH.get(str(choice.get("finish_reason")), "tool_calls" if calls else "stop")
    usage = body.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    return WireAnswer(
        Message("assistant", text, calls), finish, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    )


def _text(content: Any, body: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        return "".join(text for text in texts if isinstance(text, str))
    raise ModelError(f"the answer's content is neither text nor parts: {shown(body)}")


def _calls(value: Any, names: SafeNames, body: Any) -> tuple[tuple[ToolCall, ...], list[str]]:
    """The calls, and the text of those whose arguments are not a JSON object."""
    if value is None:
        return (), []
    functions = [item.get("function") if isinstance(item, Mapping) else None for item in _list(value, body)]
    calls, broken = [], []
    for function in functions:
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ModelError(f"a tool call in the answer has no function name: {shown(body)}")
        name, arguments = names.own(function["name"]), function.get("arguments")
        parsed = _arguments(arguments)
        if parsed is None:
            broken.append(json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False))
        else:
            calls.append(ToolCall(name, parsed))
    return tuple(calls), broken


def _arguments(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            return None
    return dict(value) if isinstance(value, Mapping) else {} if value is None else None


def _list(value: Any, body: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ModelError(f"the answer's tool_calls are no list: {shown(body)}")
    return value


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def error_text(text: str) -> str:
    """The server's own words out of an error body, or the beginning of the body."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return shown(text)
    for path in (("error", "message"), ("message",), ("error",), ("detail",)):
        value = body
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, str) and value:
            return shown(value)
    return shown(text)


def shown(value: Any) -> str:
    """The beginning of what came, on one line, for a message."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            value = repr(type(value))
    line = " ".join(value[: SHOWN_CHARS * 2].split())
    return line[:SHOWN_CHARS] + ("..." if len(value) > SHOWN_CHARS else "")


def schema_of_calls(tools: Sequence[ToolSpec]) -> dict[str, Any]:
    """A JSON schema of `{"calls": [{"name", "arguments"}]}` for servers that constrain by `response_format`."""
    one = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": dict(tool.parameters)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    calls = {"type": "array", "minItems": 1, "items": {"anyOf": one}}
    return {"type": "object", "properties": {"calls": calls}, "required": ["calls"], "additionalProperties": False}


def with_calls_of_schema(answer: WireAnswer) -> WireAnswer:
    """The answer with its text, in the form of `schema_of_calls`, read as calls; unchanged where it is not."""
    try:
        items = json.loads(answer.message.content)["calls"]
        calls = tuple(ToolCall(str(item["name"]), dict(item["arguments"])) for item in items)
    except (ValueError, RecursionError, KeyError, TypeError):
        return answer  # cut off, for instance
    finish = answer.finish_reason if answer.finish_reason == "length" else "tool_calls"
    return WireAnswer(Message("assistant", "", calls), finish, answer.input_tokens, answer.output_tokens)
