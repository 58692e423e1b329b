"""Bedrock's Converse as JSON: our records to requests and responses, and back.

Source: the service's public API model (Converse, botocore's `bedrock-runtime`). Tool results stand in a
user's turn and turns alternate, so neighbours of one role are merged when written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.engines.names import SafeNames
from stillroom.engines.openai_wire import WireAnswer, shown
from stillroom.errors import ModelError
from stillroom.schema import GenerateParams, Message, ToolCall, ToolSpec, canonical_json

_TO_FINISH = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "guardrail_intervened": "refused",
    "content_filtered": "refused",
}
_TO_STOP = {"length": "max_tokens", "tool_calls": "tool_use", "refused": "content_filtered"}


def write_request(
    messages: Sequence[Message], tools: Sequence[ToolSpec], params: GenerateParams, names: SafeNames
) -> dict[str, Any]:
    """A Converse request without its modelId."""
    from stillroom.toolcalls import write_tools

    body: dict[str, Any] = {"messages": _turns(messages, names)}
    system = [{"text": message.content} for message in messages if message.role == "system"]
    if system:
        body["system"] = system
    body["inferenceConfig"] = {"maxTokens": params.max_tokens, "temperature": params.temperature}
    if params.stop:
        body["inferenceConfig"]["stopSequences"] = list(params.stop)
    if tools:
        body["toolConfig"] = {"tools": write_tools(names.tools(tools), "bedrock")}
        if params.constrain:
            body["toolConfig"]["toolChoice"] = {"any": {}}
    return body


def _turns(messages: Sequence[Message], names: SafeNames) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    waiting: list[str] = []
    made = 0
    for message in messages:
        if message.role == "system":
            continue
        blocks: list[dict[str, Any]] = [{"text": message.content}] if message.content else []
        if message.role == "tool":
            name = waiting.pop(0) if waiting else f"call_{max(0, made - 1)}"
            blocks = [{"toolResult": {"toolUseId": name, "content": [{"text": message.content}]}}]
        elif message.tool_calls:
            waiting = [f"call_{made + index}" for index in range(len(message.tool_calls))]
            made += len(waiting)
            pairs = zip(waiting, message.tool_calls, strict=True)
            blocks += [{"toolUse": _use(name, call, names)} for name, call in pairs]
        role = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return turns


def _use(name: str, call: ToolCall, names: SafeNames) -> dict[str, Any]:
    return {"toolUseId": name, "name": names.wire(call.name), "input": dict(call.arguments)}


def read_request(body: Any) -> tuple[tuple[Message, ...], tuple[ToolSpec, ...]]:
    """Messages and tools of a logged Converse request, as the readers of `data` give them.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it has another shape.
    """
    from stillroom.toolcalls import read_tools

    texts = [block["text"] for block in body.get("system") or () if "text" in block]
    messages = [Message("system", "\n".join(texts))] if texts else []
    for turn in body["messages"]:
        for block in turn["content"]:
            if "toolResult" in block:
                parts = [part.get("text") or canonical_json(part["json"]) for part in block["toolResult"]["content"]]
                messages.append(Message("tool", "\n".join(parts)))
        own = _read_blocks(turn["content"], SafeNames(()))
        if own.content or own.tool_calls:
            messages.append(Message(turn["role"], own.content, own.tool_calls))
    return tuple(messages), read_tools(body["toolConfig"]) if body.get("toolConfig") else ()


def read_response(body: Any, names: SafeNames) -> WireAnswer:
    """The answer in a Converse response.

    Raises:
        ModelError: the body has another shape; shows what came.
    """
    try:
        content = body["output"]["message"]["content"]
        message = _read_blocks(content, names)
        usage = body.get("usage") or {}
        counts = [usage.get("inputTokens"), usage.get("outputTokens")]
        finish = _TO_FINISH.get(str(body.get("stopReason")), "tool_calls" if message.tool_calls else "stop")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"the answer is no Converse response ({error!r}): {shown(body)}") from error
    given, written = (count if isinstance(count, int) and count >= 0 else None for count in counts)
    return WireAnswer(message, finish, given, written)


def _read_blocks(content: Any, names: SafeNames) -> Message:
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise TypeError("content is no list of blocks")
    texts = [block["text"] for block in content if isinstance(block.get("text"), str)]
    uses = [block["toolUse"] for block in content if "toolUse" in block]
    calls, broken = [], []
    for use in uses:
        if isinstance(use.get("input"), Mapping):
            calls.append(ToolCall(names.own(str(use["name"])), dict(use["input"])))
        else:  # the model's own mistake, kept as it was said
            broken.append(json.dumps({"name": names.own(str(use["name"])), "arguments": use.get("input")}))
    return Message("assistant", "\n".join(texts + broken), tuple(calls) if not broken else ())


def write_response(
    message: Message, finish_reason: str, input_tokens: int, output_tokens: int, latency_s: float | None
) -> dict[str, Any]:
    """A Converse response body."""
    blocks: list[dict[str, Any]] = [{"text": message.content}] if message.content else []
    blocks += [
        {"toolUse": {"toolUseId": f"call_{index}", "name": call.name, "input": dict(call.arguments)}}
        for index, call in enumerate(message.tool_calls)
    ]
    return {
        "output": {"message": {"role": "assistant", "content": blocks}},
        "stopReason": _TO_STOP.get(finish_reason, "end_turn"),
        "usage": {
            "inputTokens": input_tokens,
            "outputTokens": output_tokens,
            "totalTokens": input_tokens + output_tokens,
        },
        "metrics": {"latencyMs": round((latency_s or 0.0) * 1000)},
    }
