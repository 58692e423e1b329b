"""Streamed answers put back together: what a streaming call logged, as the plain call would have.

A log holds either the assembled object or the list of its events, for both streaming operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from stillroom.data.jsontext import decode
from stillroom.data.reasons import Reason, Reject, excerpt
from stillroom.data.shapes import a_mapping, type_name

JSON_DEPTH = 64


def assembled(body: Any) -> dict[str, Any]:
    """An answer's body as one object, whichever way it was logged.

    Raises:
        Reject: the events are of no known model, or do not fit together.
    """
    if isinstance(body, dict):
        return body
    if not isinstance(body, list) or not body:
        message = f"output.outputBodyJson must be an object or a list of events, not {type_name(body)}"
        raise Reject(Reason.WRONG_TYPE, message)
    events = [a_mapping(event, f"output.outputBodyJson[{i}]") for i, event in enumerate(body)]
    if len(events) == 1 and "output" in events[0]:
        return events[0]
    if any("contentBlockDelta" in event or "messageStart" in event for event in events):
        return _converse(events)
    if any(event.get("type") in ("message_start", "content_block_delta") for event in events):
        return _anthropic(events)
    if all("generation" in event for event in events):
        return {"generation": _joined(events, "generation"), "stop_reason": _last(events, "stop_reason")}
    if all("outputText" in event for event in events):
        reason = _last(events, "completionReason")
        return {"results": [{"outputText": _joined(events, "outputText"), "completionReason": reason}]}
    if any("completion" in event for event in events):
        return {"completion": _joined(events, "completion"), "stop_reason": _last(events, "stop_reason")}
    if all("outputs" in event for event in events):
        parts = [_first(event["outputs"]) for event in events]
        return {"outputs": [{"text": _joined(parts, "text"), "stop_reason": _last(parts, "stop_reason")}]}
    if any("choices" in event for event in events):
        return _choices(events)
    raise Reject(Reason.UNKNOWN_BODY, f"streamed events with the members {excerpt(', '.join(events[0])) or '(none)'}")


def _converse(events: list[dict[str, Any]]) -> dict[str, Any]:
    texts: dict[Any, list[str]] = defaultdict(list)
    uses: dict[Any, dict[str, Any]] = {}
    stop = None
    for event in events:
        if start := _inner(event, "contentBlockStart"):
            if use := _inner(_inner(start, "start"), "toolUse"):
                uses[_index(start, "contentBlockIndex")] = dict(use)
        elif block := _inner(event, "contentBlockDelta"):
            delta = _inner(block, "delta")
            text = delta.get("text", _inner(delta, "toolUse").get("input", ""))
            texts[_index(block, "contentBlockIndex")].append(text if isinstance(text, str) else "")
        elif "messageStop" in event:
            stop = _inner(event, "messageStop").get("stopReason")
    content = [_block(uses.get(index), "".join(texts[index]), "toolUse") for index in sorted({*texts, *uses})]
    return {"output": {"message": {"role": "assistant", "content": content}}, "stopReason": stop}


def _anthropic(events: list[dict[str, Any]]) -> dict[str, Any]:
    texts: dict[Any, list[str]] = defaultdict(list)
    uses: dict[Any, dict[str, Any]] = {}
    stop = None
    for event in events:
        kind = event.get("type")
        if kind == "content_block_start":
            block = _inner(event, "content_block")
            if block.get("type") == "tool_use":
                uses[_index(event, "index")] = dict(block)
            elif isinstance(block.get("text"), str):
                texts[_index(event, "index")].append(block["text"])
        elif kind == "content_block_delta":
            delta = _inner(event, "delta")
            text = delta.get("text", delta.get("partial_json", ""))
            texts[_index(event, "index")].append(text if isinstance(text, str) else "")
        elif kind == "message_delta":
            stop = _inner(event, "delta").get("stop_reason", stop)
    content = []
    for index in sorted({*texts, *uses}):
        text = "".join(texts[index])
        content.append(_block(uses[index], text, "input") if index in uses else {"type": "text", "text": text})
    return {"content": [part for part in content if part.get("text") != ""], "stop_reason": stop}


def _block(use: dict[str, Any] | None, text: str, member: str) -> dict[str, Any]:
    """A content block: text, or a tool use whose input came as pieces of JSON text."""
    if use is None:
        return {"text": text}
    try:
        arguments = decode(text.encode("utf-8", "surrogatepass"), depth=JSON_DEPTH) if text.strip() else {}
    except Reject as error:
        raise Reject(Reason.BAD_TOOL_CALL, f"the streamed tool input is not JSON: {error.message}") from None
    filled = {**use, "input": arguments}
    return {"toolUse": filled} if member == "toolUse" else filled


def _choices(events: list[dict[str, Any]]) -> dict[str, Any]:
    """OpenAI's chunks: text deltas or, for completions, text."""
    parts = [_first(event["choices"]) for event in events if event.get("choices")]
    if any(_inner(part, "delta").get("tool_calls") for part in parts):
        raise Reject(Reason.UNKNOWN_BODY, "streamed tool calls in OpenAI's form")
    texts = [text for part in parts if isinstance(text := _inner(part, "delta").get("content", part.get("text")), str)]
    stop = _last(parts, "finish_reason") or _last(parts, "stop_reason")
    return {"choices": [{"message": {"role": "assistant", "content": "".join(texts)}, "finish_reason": stop}]}


def _joined(parts: list[dict[str, Any]], name: str) -> str:
    return "".join(text for part in parts if isinstance(text := part.get(name), str))


def _last(parts: list[dict[str, Any]], name: str) -> Any:
    return next((part[name] for part in reversed(parts) if part.get(name)), None)


def _first(items: Any) -> dict[str, Any]:
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def _inner(event: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = event.get(name)
    return value if isinstance(value, dict) else {}


def _index(event: Mapping[str, Any], name: str) -> int:
    value = event.get(name, 0)
    return value if isinstance(value, int) else 0
