"""Calls near a right one: what `benchmarks.matcher_vs_bfcl` compares the two matchers on.

A call is `(name, arguments)` with plain Python values; tuples are kept as such, since BFCL's checker sees them.
Every generator yields `(label, value)` and is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stillroom.schema import ToolSpec

Call = tuple[str, dict[str, Any]]

MOST_ALTERNATIVES = 6
"""Acceptable values tried per parameter; a few ground truths list dozens of spellings."""


def answers(golden: Sequence[Call], expected: Sequence[dict[str, Any]], tools: Sequence[ToolSpec]) -> Iterator[Any]:
    """The golden answer, every acceptable alternative, and every mutation: `(label, [call, ...])`."""
    calls = list(golden)
    yield "golden", calls
    yield from _whole(calls)
    for index, call in enumerate(calls):
        truth = next(iter(expected[index].values()))
        for label, changed in _one(call, truth, tools):
            yield label, [*calls[:index], changed, *calls[index + 1 :]]


def _whole(calls: list[Call]) -> Iterator[tuple[str, list[Call]]]:
    yield "no calls", []
    yield "last call dropped", calls[:-1]
    yield "first call twice more", [*calls, calls[0]]
    yield "first call in place of all", [calls[0]] * len(calls)
    yield "calls reversed", calls[::-1]
    yield "calls rotated", calls[1:] + calls[:1]
    if len(calls) > 1:
        names = [name for name, _ in calls]
        shifted = zip(names[1:] + names[:1], calls, strict=True)
        yield "names rotated over arguments", [(name, arguments) for name, (_, arguments) in shifted]


def _one(call: Call, truth: dict[str, list[Any]], tools: Sequence[ToolSpec]) -> Iterator[tuple[str, Call]]:
    name, arguments = call
    yield from ((f"name: {label}", (other, arguments)) for label, other in _names(name, tools))
    yield "extra parameter", (name, {**arguments, "no_such_parameter": 1})
    yield "arguments reversed", (name, dict(reversed(arguments.items())))
    yield "no arguments", (name, {})
    for key in arguments:
        yield "parameter dropped", (name, {other: value for other, value in arguments.items() if other != key})
        renamed = {f"{key}_" if other == key else other: value for other, value in arguments.items()}
        yield "parameter renamed", (name, renamed)
        yield from ((label, (name, {**arguments, key: value})) for label, value in mutations(arguments[key]))
    for key, acceptable in truth.items():
        for value in acceptable[:MOST_ALTERNATIVES]:
            yield "alternative", (name, {**arguments, key: _first_choice(value)})
            yield "alternative as it stands", (name, {**arguments, key: value})
    yield from _absent(call, truth, tools)


def _names(name: str, tools: Sequence[ToolSpec]) -> Iterator[tuple[str, str]]:
    yield "upper case", name.upper()
    yield "underscores for dots", name.replace(".", "_")
    yield "last part", name.split(".")[-1]
    yield "misspelt", name + "s"
    yield from (("another tool", tool.name) for tool in tools[:3] if tool.name != name)


def _absent(call: Call, truth: dict[str, list[Any]], tools: Sequence[ToolSpec]) -> Iterator[tuple[str, Call]]:
    """Parameters that the golden answer leaves out, given after all."""
    name, arguments = call
    tool = next(tool for tool in tools if tool.name == name)
    declared = (tool.parameters.get("properties") or {}).items()
    for key, schema in declared:
        if key in arguments:
            continue
        for value in ("", None, 0, 1.5, True, [], {}, ["a"], schema.get("default"), "dontcare"):
            yield "absent parameter given", (name, {**arguments, key: value})


def _first_choice(value: Any) -> Any:
    """A ground truth's object as an answer gives it: one value for each key, those that may be left out included."""
    if isinstance(value, dict) and value and all(isinstance(each, list) for each in value.values()):
        return {key: next((each for each in choices if each != ""), "") for key, choices in value.items()}
    if isinstance(value, list):
        return [_first_choice(item) for item in value]
    return value


# -- one value ------------------------------------------------------------------------------------------------


def mutations(value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Values near this one: other types first, then the same type with another value, then changes inside."""
    yield from _other_types(value)
    if isinstance(value, bool):
        yield "boolean negated", not value
    elif isinstance(value, str):
        yield from _texts(value)
    elif isinstance(value, (int, float)):
        yield from (("number changed", changed) for changed in (value + 1, -value, value * 1000, value + 0.5))
    elif isinstance(value, list):
        yield from _lists(value, depth)
    elif isinstance(value, dict):
        yield from _objects(value, depth)


def _other_types(value: Any) -> Iterator[tuple[str, Any]]:
    yield "null", None
    yield "empty text", ""
    yield "in a list", [value]
    yield "in a tuple", (value,)
    yield "in an object", {"value": value}
    yield "as text", str(value)
    yield "empty list", []
    yield "empty object", {}
    yield "true", True
    if isinstance(value, (int, float)):
        yield "as float", float(value)
        yield "as integer", int(value)
        yield "as boolean", bool(value)
        yield "huge integer", 10**400
    if isinstance(value, str):
        yield "text to number", float(value) if value.replace(".", "", 1).isdigit() else len(value)
    if isinstance(value, list):
        yield "list to tuple", tuple(value)
        yield "list to text", ", ".join(map(str, value))
        yield "list to its first item", value[0] if value else 0
    if isinstance(value, dict):
        yield "object to its keys", list(value)
        yield "object in a list", [value, value]


def _texts(text: str) -> Iterator[tuple[str, str]]:
    yield "case", text.upper()
    yield "case", text.swapcase()
    yield "spaces removed", text.replace(" ", "")
    yield "punctuation ignored by BFCL", f" {text[:1]}-{text[1:]}.,/_*^ "
    yield "punctuation not ignored", text + "!"
    yield "punctuation not ignored", text.replace(",", ";") + ";"
    yield "quotes", f"'{text}'"
    yield "quotes", text.replace("'", '"')
    yield "text longer", text + " extra"
    yield "text shorter", text[:-1]
    yield "line break", text + "\n"


def _lists(items: list[Any], depth: int) -> Iterator[tuple[str, Any]]:
    yield "items reversed", items[::-1]
    yield "last item dropped", items[:-1]
    yield "last item twice", items + items[-1:]
    yield "item null", [None, *items[1:]]
    yield "items as text", [str(item) for item in items]
    yield "items as float", [float(item) if type(item) is int else item for item in items]
    yield "items as integer", [int(item) if type(item) is float else item for item in items]
    yield "items as tuples", [tuple(item) if isinstance(item, list) else (item,) for item in items]
    yield "list one deeper", [items]
    if depth < 2:
        for index in sorted({0, len(items) - 1} & set(range(len(items)))):
            for label, changed in mutations(items[index], depth + 1):
                yield f"item: {label}", [*items[:index], changed, *items[index + 1 :]]


def _objects(value: dict[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    yield "keys reversed", dict(reversed(value.items()))
    yield "extra key", {**value, "no_such_key": 1}
    yield "keys in upper case", {key.upper(): item for key, item in value.items()}
    for key in value:
        yield "key dropped", {other: item for other, item in value.items() if other != key}
        if depth < 2:
            for label, changed in mutations(value[key], depth + 1):
                yield f"key: {label}", {**value, key: changed}
