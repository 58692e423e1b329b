"""Records of every format, for the tests of `stillroom.data`."""

from __future__ import annotations

import json
from typing import Any


def bedrock(text: str = "why is the sky blue", answer: str | None = None, **more: Any) -> dict[str, Any]:
    """A record of bedrock-conversation-2024."""
    messages = [{"role": "user", "content": [{"text": text}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"text": answer}]})
    return {"schemaVersion": "bedrock-conversation-2024", "messages": messages, **more}


def tool(name: str, *parameters: str) -> dict[str, Any]:
    """A tool that takes these texts, all of them required."""
    properties = {each: {"type": "string"} for each in parameters}
    schema = {"type": "dict", "properties": properties, "required": list(parameters)}
    return {"name": name, "description": "", "parameters": schema}


def bfcl(identity: str, text: str, *tools: str) -> dict[str, Any]:
    """A BFCL question."""
    return {
        "id": identity,
        "question": [[{"role": "user", "content": text}]],
        "function": [tool(name, "query") for name in tools or (f"tool_{identity}",)],
    }


def answer_to(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to a BFCL question: its first tool, asked for the first word."""
    word = question["question"][0][0]["content"].split()[0]
    return {"id": question["id"], "ground_truth": [{question["function"][0]["name"]: {"query": [word]}}]}


def openai(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An OpenAI chat record."""
    return {"messages": list(messages) or [{"role": "user", "content": "hello"}], **more}


def log(
    request: dict[str, Any] | None = None,
    response: Any = None,
    operation: str = "Converse",
    model: str = "qwen.qwen2-5-7b-instruct-v1:0",
    **more: Any,
) -> dict[str, Any]:
    """An invocation log record."""
    return {
        "schemaType": "ModelInvocationLog",
        "schemaVersion": "1.0",
        "timestamp": "2026-05-04T12:00:00Z",
        "requestId": "9a6c1b2e-3f64-4e0e-8c5e-5b1f1f0f7a11",
        "operation": operation,
        "modelId": model,
        "input": {"inputContentType": "application/json", "inputBodyJson": asked() if request is None else request},
        "output": {"outputContentType": "application/json", "outputBodyJson": said() if response is None else response},
        **more,
    }


def asked(text: str = "What is the weather in Oslo?", **more: Any) -> dict[str, Any]:
    """A Converse request."""
    return {"messages": [{"role": "user", "content": [{"text": text}]}], **more}


def said(text: str = "Rain.", stop: str = "end_turn") -> dict[str, Any]:
    """A Converse response."""
    return {"output": {"message": {"role": "assistant", "content": [{"text": text}]}}, "stopReason": stop}


def line(record: Any) -> bytes:
    """A record as a line."""
    return json.dumps(record).encode() + b"\n"
