"""Does a call fit its specification? Not: is it right (see matching.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.schema import ToolCall, ToolSpec
from stillroom.toolcalls.shapes import (
    ANY,
    List,
    Literal,
    Plain,
    Record,
    Reference,
    Shape,
    Shapes,
    Union,
    compile_parameters,
    fits,
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One way in which a call or a specification is not valid.

    Attributes:
        kind: `unknown_tool`, `missing_parameter`, `unexpected_parameter`, `wrong_type` or `wrong_value` of a
            call; `undeclared_required`, `enum_of_wrong_type` or `unsafe_name` of a specification.
        path: where: `calls[0].filter.city`, `tools[2].parameters.required`.
        message: what was wanted and what was found.
    """

    kind: str
    path: str
    message: str


def validate_calls(calls: Sequence[ToolCall], tools: Sequence[ToolSpec]) -> list[Problem]:
    """Every problem of every call, in order; an empty list says that the calls are valid.

    Types are exact, except that an integer is a number. Objects that declare properties have no others, unless
    their schema says so. Patterns, formats and conditions are not checked.
    """
    by_name = {tool.name: tool for tool in tools}
    shapes: dict[str, Shapes] = {}
    problems: list[Problem] = []
    for index, call in enumerate(calls):
        path = f"calls[{index}]"
        tool = by_name.get(call.name)
        if tool is None:
            known = ", ".join(by_name) or "none"
            problems.append(Problem("unknown_tool", path, f"no tool is named {call.name!r}; there are: {known}"))
            continue
        if tool.name not in shapes:
            shapes[tool.name] = compile_parameters(tool.parameters)
        compiled = shapes[tool.name]
        problems.extend(_record(call.arguments, compiled.root, compiled.named, path))
    return problems


def check_tools(tools: Sequence[ToolSpec]) -> list[Problem]:
    """What is doubtful in specifications that could be read: each makes some call impossible or ambiguous."""
    problems: list[Problem] = []
    for index, tool in enumerate(tools):
        problems.extend(_check_schema(tool.parameters, f"tools[{index}].parameters"))
    return problems


def _check_schema(schema: Any, path: str) -> Iterator[Problem]:
    if not isinstance(schema, Mapping):
        return
    properties = schema.get("properties")
    declared: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    for name in required if isinstance(required, list) else ():
        if name not in declared:
            yield Problem("undeclared_required", f"{path}.required", f"requires {name!r}, which it does not declare")
    kind, enum = schema.get("type"), schema.get("enum")
    scalar = kind in ("string", "integer", "number", "boolean", "null")
    if enum and scalar and not any(fits(value, str(kind)) for value in enum):
        yield Problem("enum_of_wrong_type", f"{path}.enum", f"no value of the enum is of the declared type {kind!r}")
    for name, inner in declared.items():
        yield from _check_schema(inner, f"{path}.properties.{name}")
    yield from _check_schema(schema.get("items"), f"{path}.items")


def _problems(value: Any, shape: Shape, named: Mapping[str, Shape], path: str) -> list[Problem]:
    while isinstance(shape, Reference):
        shape = named.get(shape.name, ANY)
    if isinstance(shape, Plain):
        if shape.kind == "any" or fits(value, shape.kind):
            return []
        return [_wrong_type(shape.kind, value, path)]
    if isinstance(shape, Literal):
        if any(_same(value, each) for each in shape.values):
            return []
        return [Problem("wrong_value", path, f"wanted one of {list(shape.values)!r:.120}, got {value!r:.80}")]
    if isinstance(shape, List):
        return _list(value, shape, named, path)
    if isinstance(shape, Record):
        return _record(value, shape, named, path)
    return _union(value, shape, named, path)


def _union(value: Any, shape: Union, named: Mapping[str, Shape], path: str) -> list[Problem]:
    """No problem if one alternative has none; else those of the nearest one."""
    attempts: list[list[Problem]] = []
    for each in shape.shapes:
        attempts.append(_problems(value, each, named, path))
        if not attempts[-1]:
            return []
    near = [problems for problems in attempts if problems[0].kind != "wrong_type" or problems[0].path != path]
    return near[0] if near else [Problem("wrong_type", path, f"fits none of its alternatives: {value!r:.80}")]


def _list(value: Any, shape: List, named: Mapping[str, Shape], path: str) -> list[Problem]:
    if not isinstance(value, (list, tuple)):
        return [_wrong_type("array", value, path)]
    if len(value) < shape.least or (shape.most is not None and len(value) > shape.most):
        most = "any number" if shape.most is None else shape.most
        return [Problem("wrong_value", path, f"wanted {shape.least} to {most} items, got {len(value)}")]
    return [
        problem
        for index, item in enumerate(value)
        for problem in _problems(item, shape.items, named, f"{path}[{index}]")
    ]


def _record(value: Any, shape: Record, named: Mapping[str, Shape], path: str) -> list[Problem]:
    if not isinstance(value, Mapping):
        return [_wrong_type("object", value, path)]
    declared = {field.name: field.shape for field in shape.fields}
    out = [
        Problem("missing_parameter", f"{path}.{field.name}", "it is required and missing")
        for field in shape.fields
        if field.required and field.name not in value
    ]
    for key, item in value.items():
        if key not in declared and shape.others is None:
            message = f"there is no such parameter; there are: {', '.join(declared) or 'none'}"
            out.append(Problem("unexpected_parameter", f"{path}.{key}", message))
        else:
            out.extend(_problems(item, declared.get(key, shape.others or ANY), named, f"{path}.{key}"))
    return out


def _same(value: Any, other: Any) -> bool:
    """Equal, where True is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _wrong_type(wanted: str, value: Any, path: str) -> Problem:
    return Problem("wrong_type", path, f"wanted {wanted}, got {type(value).__name__} {value!r:.80}")
