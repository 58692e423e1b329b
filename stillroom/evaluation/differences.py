"""An answer laid beside what was wanted, marked argument by argument.

Whether one argument is right is decided by the same matcher that scores the whole answer, asked about a call of
that argument alone; the marks can therefore not contradict the score's own rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from stillroom.evaluation.results import ItemResult
from stillroom.evaluation.wording import visible
from stillroom.schema import ToolCall, ToolSpec
from stillroom.toolcalls import match

Mark = Literal["same", "wrong", "missing", "extra"]
VALUE_CHARS = 300


class ArgumentMark(BaseModel, frozen=True):
    """One argument: its value as JSON text, its mark, and what was wanted where that differs."""

    name: str
    value: str
    mark: Mark
    wanted: str = ""


class CallMark(BaseModel, frozen=True):
    """One call: its name's mark (`missing`: wanted but not made; `extra`: made but not wanted) and its arguments."""

    name: str
    mark: Mark
    wanted: str = ""
    arguments: tuple[ArgumentMark, ...] = ()


def wanted_calls(expected: Any) -> tuple[CallMark, ...]:
    """What was wanted, each argument with its acceptable values."""
    return tuple(
        CallMark(
            name=name,
            mark="same",
            arguments=tuple(ArgumentMark(name=key, value=choices(values), mark="same") for key, values in args.items()),
        )
        for name, args in _expected_pairs(expected)
    )


def mark_calls(item: ItemResult, tools: Sequence[Mapping[str, Any]]) -> tuple[CallMark, ...]:
    """The calls of one answer against what was expected of it, calls that were not made at the end."""
    open_pairs = _expected_pairs(item.expected)
    schemas = {tool["name"]: tool.get("parameters") or {} for tool in tools}
    marked: list[CallMark] = []
    for call in item.calls:
        name, arguments = str(call.get("name", "")), dict(call.get("arguments") or {})
        pair = next((pair for pair in open_pairs if _same_name(pair[0], name)), None)
        if pair is None and len(open_pairs) == 1 and len(item.calls) == 1:
            wanted, _ = open_pairs.pop()
            marked.append(_call(name, "wrong", wanted, arguments, {}, schemas))
        elif pair is None:
            marked.append(_call(name, "extra", "", arguments, {}, schemas))
        else:
            open_pairs.remove(pair)
            marked.append(_call(name, "same", "", arguments, pair[1], schemas))
    marked += [CallMark(name=name, mark="missing") for name, _ in open_pairs]
    return tuple(marked)


def differs(call: CallMark) -> bool:
    """Something in the call is marked."""
    return call.mark != "same" or any(argument.mark != "same" for argument in call.arguments)


def choices(values: Any) -> str:
    """Acceptable values as text: `5 or "five" or left out`."""
    if not isinstance(values, list | tuple):
        return _text(values)
    shown = [_text(value) for value in values if value != ""]
    return " or ".join([*shown, *(["left out"] if "" in values and shown else [])]) or '""'


def _call(
    name: str, mark: Mark, wanted: str, arguments: Mapping[str, Any], expected: Mapping[str, Any], schemas: Any
) -> CallMark:
    marks = []
    for key, value in arguments.items():
        if mark != "same":
            marks.append(ArgumentMark(name=key, value=_text(value), mark="same"))  # the name is wrong: that is enough
        elif key not in expected:
            marks.append(ArgumentMark(name=key, value=_text(value), mark="extra"))
        elif _right(name, key, value, expected[key], schemas):
            marks.append(ArgumentMark(name=key, value=_text(value), mark="same"))
        else:
            marks.append(ArgumentMark(name=key, value=_text(value), mark="wrong", wanted=choices(expected[key])))
    for key, values in expected.items():
        if key not in arguments and not (isinstance(values, list | tuple) and "" in values):
            marks.append(ArgumentMark(name=key, value="", mark="missing", wanted=choices(values)))
    return CallMark(name=name, mark=mark, wanted=wanted, arguments=tuple(marks))


def _right(name: str, key: str, value: Any, acceptable: Any, schemas: Mapping[str, Any]) -> bool:
    schema: Mapping[str, Any] = next((schema for known, schema in schemas.items() if _same_name(known, name)), {})
    properties = dict(schema.get("properties") or {})
    alone = ToolSpec(name, "", {"type": "object", "properties": {key: properties.get(key, {})}, "required": []})
    return match((ToolCall(name, {key: value}),), [{name: {key: acceptable}}], (alone,), "simple").ok


def _same_name(wanted: str, given: str) -> bool:
    return wanted == given or wanted.replace(".", "_") == given.replace(".", "_")


def _expected_pairs(expected: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(expected, list | tuple):
        return []
    calls = [call for call in expected if isinstance(call, Mapping)]
    pairs = [(str(name), wanted) for call in calls for name, wanted in call.items() if isinstance(wanted, Mapping)]
    return [(name, dict(wanted)) for name, wanted in pairs if all(isinstance(v, list) for v in wanted.values())]


def _text(value: Any) -> str:
    text, cut = visible(json.dumps(value, ensure_ascii=False, default=str), VALUE_CHARS)
    return f"{text}…" if cut else text
