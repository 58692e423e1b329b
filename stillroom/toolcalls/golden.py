"""From BFCL's ground truth to one concrete right answer, and from an answer known to be right to a ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.schema import ToolCall, ToolSpec
from stillroom.toolcalls.matching import find_tool, read_truth, required_of


def golden_call(expected: Sequence[Mapping[str, Mapping[str, Any]]], tools: Sequence[ToolSpec]) -> tuple[ToolCall, ...]:
    """The first acceptable value of every parameter; one whose first is "" (may be left out) is left out,
    and so is one that may be left out and is not declared.

    `match` accepts the result, except where a ground truth accepts nothing at all (an empty list of acceptable
    values, a parameter that the tool does not declare): BFCL has a few of these.

    Raises:
        DataError: the ground truth does not fit the tools or has another form.
    """
    return tuple(_call(name, answer, find_tool(name, tools)) for name, answer in read_truth(expected))


def expected_from(calls: Sequence[ToolCall], tools: Sequence[ToolSpec]) -> list[dict[str, dict[str, list[Any]]]]:
    """The ground truth that accepts these calls and, as `match` compares values, no others.

    In BFCL's form objects list the acceptable values of each key where objects are declared, so it takes more than
    a list around each argument: a list inside an object would be read as alternatives.

    Raises:
        DataError: a call is of a tool that is not among `tools`.
    """
    expected = []
    for call in calls:
        declared = find_tool(call.name, tools).parameters.get("properties") or {}
        wrapped = {key: [_accepting(value, declared.get(key, {}))] for key, value in call.arguments.items()}
        expected.append({call.name: wrapped})
    return expected


def _call(name: str, answer: Mapping[str, Any], tool: ToolSpec) -> ToolCall:
    declared = tool.parameters.get("properties") or {}
    required = required_of(tool.parameters)
    arguments: dict[str, Any] = {}
    for parameter in _declared_first(answer, declared):
        schema = declared.get(parameter, {})
        acceptable = answer[parameter]
        if parameter not in declared and "" in acceptable:
            continue
        if parameter in required:
            acceptable = [value for value in acceptable if value != ""] or _empty(acceptable, schema)
        if acceptable and (acceptable[0] != "" or parameter in required):
            arguments[parameter] = _value(acceptable[0], schema)
    return ToolCall(name, arguments)


def _empty(acceptable: Sequence[Any], schema: Mapping[str, Any]) -> list[Any]:
    """What a required parameter holds when its only acceptable value is "": nothing, in its own type."""
    return [[]] if acceptable and schema.get("type") == "array" else list(acceptable)


def _value(acceptable: Any, schema: Mapping[str, Any]) -> Any:
    """One value; where objects are declared, those of the ground truth list the acceptable values of each key."""
    if schema.get("type") == "object" and isinstance(acceptable, Mapping):
        return _object(acceptable, schema)
    items = schema.get("items")
    if isinstance(acceptable, list) and isinstance(items, Mapping) and items.get("type") == "object":
        return [_object(each, items) if isinstance(each, Mapping) else each for each in acceptable]
    return acceptable


def _object(acceptable: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key in _declared_first(acceptable, schema.get("properties") or {}):
        values = acceptable[key]
        if not isinstance(values, list):
            out[key] = values
        elif values and values[0] != "":
            out[key] = values[0]
    return out


def _declared_first(keys: Mapping[str, Any], declared: Mapping[str, Any]) -> list[str]:
    """The keys in the order in which they are declared, which is also the grammar's; then the rest."""
    return [*(key for key in declared if key in keys), *(key for key in keys if key not in declared)]


def _accepting(value: Any, schema: Mapping[str, Any]) -> Any:
    """One value as the ground truth writes it; the inverse of `_value`."""
    if schema.get("type") == "object" and isinstance(value, Mapping):
        return {key: [item] for key, item in value.items()}
    items = schema.get("items")
    if isinstance(value, list) and isinstance(items, Mapping) and items.get("type") == "object":
        return [{key: [item] for key, item in each.items()} if isinstance(each, Mapping) else each for each in value]
    return value
