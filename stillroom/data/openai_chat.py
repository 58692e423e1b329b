"""Chat records as OpenAI's fine-tuning and stored completions have them.

One object per line: `messages` with the roles system, developer, user, assistant and tool, and where
there are tools, `tools` and the assistant's `tool_calls` (their arguments as JSON text). The
assistant's message at the end is the golden answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillroom.data.answers import example_of
from stillroom.data.config import ReadLimits
from stillroom.data.jsontext import decode
from stillroom.data.reasons import Reason, Reject, excerpt
from stillroom.data.shapes import a_list, a_mapping, a_string, no_others, parsed_tools, type_name
from stillroom.schema import Example, Message, ToolCall, ToolSpec

RECORD = frozenset({"messages", "tools", "functions", "metadata", "id", "model"})
REQUEST = frozenset({"parallel_tool_calls", "tool_choice", "function_call", "response_format"})
ROLES: dict[str, Any] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def to_example(record: Mapping[str, Any], limits: ReadLimits, category: str, source: str) -> Example:
    """One record.

    Raises:
        Reject: with the reason and the path of the member at fault.
    """
    no_others(record, RECORD | REQUEST)
    messages, tools = conversation(record, limits)
    if not limits.multi_turn and sum(turn.role == "user" for turn in messages) > 1:
        raise Reject(Reason.MULTI_TURN, "has more than one user message; the student takes one")
    metadata = a_mapping(record.get("metadata") or {}, "metadata")
    identity = a_string(record, "id") if record.get("id") else None
    return example_of(messages, tools, category, source, origin="golden", identity=identity, metadata=metadata)


def conversation(record: Mapping[str, Any], limits: ReadLimits) -> tuple[list[Message], tuple[ToolSpec, ...]]:
    """The messages and tools of a record or a request body."""
    items = a_list(record, "messages")
    if not items:
        raise Reject(Reason.NO_MESSAGES, "messages is empty")
    messages = [message(item, f"messages[{i}]", limits) for i, item in enumerate(items)]
    _check_order(messages)
    return messages, _tools(record)


def message(value: Any, where: str, limits: ReadLimits) -> Message:
    """One message; `where` is its path in errors."""
    entry = a_mapping(value, where)
    role = ROLES.get(given := a_string(entry, "role", where))
    if role is None:
        raise Reject(Reason.BAD_ROLE, f"{where}.role is {excerpt(given)!r}; valid: {', '.join(ROLES)}")
    calls = _calls(entry, where, limits)
    if calls and role != "assistant":
        raise Reject(Reason.BAD_TOOL_CALL, f"{where}: only the assistant may call tools")
    content = _content(entry.get("content"), f"{where}.content")
    if role != "tool" and not calls and not content.strip():
        if entry.get("refusal"):
            raise Reject(Reason.CALL_FAILED, f"{where} is a refusal")
        reason = Reason.BLANK_TEXT if "content" in entry else Reason.MISSING_FIELD
        raise Reject(reason, f"{where}.content is {'blank' if 'content' in entry else 'missing'}")
    return Message(role, content, calls)


def _content(value: Any, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise Reject(Reason.WRONG_TYPE, f"{where} must be a string or a list of parts, not {type_name(value)}")
    texts = []
    for position, item in enumerate(value):
        path = f"{where}[{position}]"
        part = a_mapping(item, path)
        kind = a_string(part, "type", path)
        if kind not in TEXT_PARTS:
            raise Reject(Reason.NON_TEXT, f"{path} is of the kind {excerpt(kind)}")
        texts.append(a_string(part, "text", path))
    return "\n".join(texts)


def _calls(entry: Mapping[str, Any], where: str, limits: ReadLimits) -> tuple[ToolCall, ...]:
    if entry.get("function_call"):  # the form before `tool_calls`
        return (_call(entry["function_call"], f"{where}.function_call", limits),)
    if entry.get("tool_calls") is None:
        return ()
    found = []
    for position, item in enumerate(a_list(entry, "tool_calls", where)):
        path = f"{where}.tool_calls[{position}]"
        call = a_mapping(item, path)
        if call.get("type", "function") != "function":
            raise Reject(Reason.BAD_TOOL_CALL, f"{path}.type is {excerpt(call['type'])!r}; only function is read")
        found.append(_call(call.get("function"), f"{path}.function", limits))
    return tuple(found)


def _call(value: Any, where: str, limits: ReadLimits) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise Reject(Reason.BAD_TOOL_CALL, f"{where} has no name")
    arguments = value.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = decode((arguments.strip() or "{}").encode("utf-8", "surrogatepass"), depth=limits.depth)
        except Reject as error:
            raise Reject(Reason.BAD_TOOL_CALL, f"{where}.arguments is not JSON: {error.message}") from None
    if not isinstance(arguments, dict):
        raise Reject(Reason.BAD_TOOL_CALL, f"{where}.arguments must be a JSON object, not {type_name(arguments)}")
    return ToolCall(value["name"], arguments)


def _tools(record: Mapping[str, Any]) -> tuple[ToolSpec, ...]:
    if record.get("tools") is not None:
        return parsed_tools(a_list(record, "tools"), "tools")
    if record.get("functions") is not None:
        return parsed_tools(a_list(record, "functions"), "functions")
    return ()


def _check_order(messages: list[Message]) -> None:
    """System first if at all; an assistant answers someone; a tool's result follows a call."""
    before = "start"
    called = False
    for position, turn in enumerate(messages):
        role = turn.role
        wrong = (
            (role == "system" and before not in ("start", "system"))
            or (role == "assistant" and before in ("start", "system", "assistant"))
            or (role == "tool" and not called)
        )
        if wrong:
            message = f"messages[{position}] is the {role}'s, out of turn after the {before}"
            raise Reject(Reason.ROLES_NOT_ALTERNATING, message)
        called = bool(turn.tool_calls) or (called and role == "tool")
        before = role
