"""Tool calls as text in one canonical form per dialect, which `parse_calls` reads back unchanged.

    python   [get_weather(city="Paris", days=3, units=None)]
    json     [{"name": "get_weather", "arguments": {"city": "Paris"}}]
    hermes   <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>, one below the other
    llama    <|python_tag|>{"name": ..., "parameters": ...}, several divided by "; "

Strings stand in double quotes with JSON's escapes, which mean the same in Python, so one learnt form serves both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from stillroom.errors import DataError
from stillroom.schema import ToolCall
from stillroom.toolcalls.limits import DEFAULT_LIMITS
from stillroom.toolcalls.literals import NAME

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def render_calls(calls: Sequence[ToolCall], dialect: str = "python") -> str:
    """The calls as text; `parse_calls(render_calls(calls, d), d) == calls` for every one that this accepts.

    No calls are `[]` in python and json, and nothing at all in hermes and llama, which have no such form.

    Raises:
        DataError: a value is not JSON (NaN, an infinity, an object whose keys are not strings, half a surrogate
            pair), is nested too deep to be read back, or a name cannot be written in the dialect.
        ValueError: the dialect is unknown.
    """
    if dialect not in _WRITERS:
        raise ValueError(f"unknown dialect {dialect!r}; choose one of {', '.join(_WRITERS)}")
    for number, call in enumerate(calls):
        check_value(dict(call.arguments), f"argument of call {number} ({call.name})", 0)
    return _WRITERS[dialect](calls)


def render_value(value: Any) -> str:
    """One JSON value as a Python literal. The value must have been checked."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{render_value(key)}: {render_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(render_value(item) for item in value) + "]"
    return repr(value)


def check_value(value: Any, where: str, depth: int = 0) -> None:
    """Raise DataError for what no dialect can carry, naming where it stands."""
    if depth > DEFAULT_LIMITS.depth:
        raise DataError(f"{where} is nested more than {DEFAULT_LIMITS.depth} deep and could not be read back.")
    if isinstance(value, str):
        if LONE_SURROGATE.search(value):
            raise DataError(f"{where} holds half a surrogate pair, which is not text: {value[:40]!r}.")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise DataError(f"{where} has the key {key!r}; the keys of an object must be strings.")
            check_value(key, where, depth)
            check_value(item, f"{where}, {key[:40]!r}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_value(item, f"{where}, item {index}", depth + 1)
    elif isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise DataError(f"{where} is {value}, which JSON does not have.")
    elif not (value is None or isinstance(value, (bool, int))):
        raise DataError(f"{where} is a {type(value).__name__}, which JSON does not have.")


def _python(calls: Sequence[ToolCall]) -> str:
    return "[" + ", ".join(_python_call(call) for call in calls) + "]"


def _python_call(call: ToolCall) -> str:
    if not NAME.fullmatch(call.name):
        raise DataError(
            f"the tool name {call.name!r} cannot be written as a Python call: use letters, digits, '_', '-' and '.'."
        )
    plain = [f"{key}={render_value(value)}" for key, value in call.arguments.items() if NAME.fullmatch(key)]
    other = {key: value for key, value in call.arguments.items() if not NAME.fullmatch(key)}
    if other:
        plain.append(f"**{render_value(other)}")
    return f"{call.name}({', '.join(plain)})"


def _json(calls: Sequence[ToolCall]) -> str:
    return _dumps([{"name": call.name, "arguments": call.arguments} for call in calls])


def _hermes(calls: Sequence[ToolCall]) -> str:
    bodies = (_dumps({"name": call.name, "arguments": call.arguments}) for call in calls)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def _llama(calls: Sequence[ToolCall]) -> str:
    bodies = [_dumps({"name": call.name, "parameters": call.arguments}) for call in calls]
    return "<|python_tag|>" + "; ".join(bodies) if bodies else ""


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=dict)


_WRITERS: Final[dict[str, Callable[[Sequence[ToolCall]], str]]] = {
    "python": _python,
    "json": _json,
    "hermes": _hermes,
    "llama": _llama,
}
