"""Tool specifications in every dialect, in and out.

    json_schema  {"name", "description", "parameters": {"type": "object", ...}}     the internal form
    bfcl         the same with `dict`, `float`, `tuple`, `any` for types
    openai       {"type": "function", "function": {...}}
    bedrock      {"toolSpec": {"name", "description", "inputSchema": {"json": {...}}}}; in: a whole toolConfig too

How BFCL's types stand in JSON Schema, so that nothing is lost on the way back:

    dict  <-> object        float <-> number        any <-> no `type`
    tuple <-> array with `"x-bfcl-type": "tuple"`   (a keyword that JSON Schema validators ignore)

Promise: read_tools(write_tools(tools, d)) == tools for every dialect d; a BFCL specification is written
back as it was read. What the wire carries beyond name, description and schema (`strict`) is not kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from stillroom.errors import ParseError
from stillroom.schema import ToolSpec
from stillroom.toolcalls.limits import DEFAULT_LIMITS, Limits
from stillroom.toolcalls.literals import Scanner

TOOL_DIALECTS: Final = ("json_schema", "bfcl", "openai", "bedrock")
TUPLE_MARK: Final = "x-bfcl-type"

# Keywords whose value is a schema, a list of schemas, or a mapping of names to schemas. Only these are walked:
# a `type` inside `default`, `enum` or `const` is data.
_SCHEMA = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_FROM_BFCL = {"dict": "object", "float": "number"}
_TO_BFCL = {"object": "dict", "number": "float"}
_UNSAFE = re.compile(r"[^a-zA-Z0-9_-]")


def read_tools(value: Any, *, limits: Limits = DEFAULT_LIMITS) -> tuple[ToolSpec, ...]:
    """Tools in any of the dialects, each recognised by its own shape; a list may mix them.

    Args:
        value: one tool, a list of them, `{"tools": [...]}` (a Bedrock toolConfig, an OpenAI request), or such
            a thing as text: JSON, or Python literals as prompts often have them.

    Raises:
        ParseError: says which tool, where in it, and what is wrong. Two tools of one name are an error: no call
            could tell them apart. A required parameter that is not declared is not (see `check_tools`).
    """
    if isinstance(value, str):
        scanner = Scanner(value, limits, json_escapes=True)
        value = scanner.value()
        if scanner.skip_space():
            scanner.fail(f"text after the tools: {scanner.next_words()}")
    if isinstance(value, Mapping) and "tools" in value and "name" not in value:
        value = value["tools"]
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise ParseError(f"tools must be a list of objects, but are {_kind(items)}")
    if len(items) > limits.tools:
        raise ParseError(f"{len(items):,} tools; at most {limits.tools:,} are read")
    tools = tuple(_read_tool(item, f"tools[{index}]", limits) for index, item in enumerate(items))
    seen: dict[str, int] = {}
    for index, tool in enumerate(tools):
        if seen.setdefault(tool.name, index) != index:
            raise ParseError(f"tools[{index}] has the name of tools[{seen[tool.name]}], {tool.name!r}")
    return tools


def write_tools(tools: Sequence[ToolSpec], dialect: str) -> list[dict[str, Any]]:
    """The tools as plain JSON values in `dialect`, one of `TOOL_DIALECTS`.

    Names are written as they are; OpenAI and Bedrock take `[a-zA-Z0-9_-]{1,64}` only, see `safe_name`.

    Raises:
        ValueError: the dialect is unknown.
    """
    if dialect not in _WRITERS:
        raise ValueError(f"unknown dialect {dialect!r}; choose one of {', '.join(TOOL_DIALECTS)}")
    return [_WRITERS[dialect](tool) for tool in tools]


def safe_name(name: str) -> str:
    """The name with every character that OpenAI and Bedrock refuse, such as the dot, as an underscore."""
    return _UNSAFE.sub("_", name)


# -- reading --------------------------------------------------------------------------------------------------


def _read_tool(item: Any, where: str, limits: Limits) -> ToolSpec:
    if not isinstance(item, Mapping):
        raise ParseError(f"{where} must be an object, but is {_kind(item)}")
    for wrapper in ("function", "toolSpec"):
        if isinstance(item.get(wrapper), Mapping):
            item, where = item[wrapper], f"{where}.{wrapper}"
            break
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise ParseError(f"{where}.name must be a text that is not empty, but is {_kind(name)}")
    description = item.get("description")
    if description is not None and not isinstance(description, str):
        raise ParseError(f"{where}.description must be text, but is {_kind(description)}")
    key = next((key for key in ("inputSchema", "input_schema", "parameters") if key in item), "parameters")
    schema, where = item.get(key), f"{where}.{key}"
    if key == "inputSchema" and isinstance(schema, Mapping) and "json" in schema:
        schema, where = schema["json"], f"{where}.json"
    return ToolSpec(name, description or "", _read_parameters(schema, where, limits))


def _read_parameters(schema: Any, where: str, limits: Limits) -> dict[str, Any]:
    if schema is None:
        schema = {}
    if isinstance(schema, bool):
        raise ParseError(f"{where} must be a schema (an object), but is {_kind(schema)}")
    out = _read_schema(schema, where, 0, limits)
    if out.setdefault("type", "object") != "object":
        raise ParseError(f"{where}.type must be 'object' (BFCL: 'dict'), but is {out['type']!r}")
    out.setdefault("properties", {})
    return out


def _read_schema(schema: Any, where: str, depth: int, limits: Limits) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise ParseError(f"{where} must be a schema (an object), but is {_kind(schema)}")
    if depth > limits.depth:
        raise ParseError(f"{where} is nested more than {limits.depth} deep")
    _check_keywords(schema, where)
    out = _walk(schema, lambda inner, path: _read_schema(inner, f"{where}.{path}", depth + 1, limits))
    return _read_type(out)


def _check_keywords(schema: Mapping[str, Any], where: str) -> None:
    """The keywords that everything here relies on must have the shape that JSON Schema gives them."""
    kind = schema.get("type", "any")
    if not isinstance(kind, str) and not (isinstance(kind, list) and all(isinstance(each, str) for each in kind)):
        raise ParseError(f"{where}.type must be the name of a type, but is {_kind(kind)}")
    required = schema.get("required", [])
    # A single `required: true` on a property is an old habit that carries no structure; it is left alone.
    if not isinstance(required, (bool, str)) and not (
        isinstance(required, list) and all(isinstance(each, str) for each in required)
    ):
        raise ParseError(f"{where}.required must be a list of names, but is {_kind(required)}")
    if not isinstance(schema.get("enum", []), list):
        raise ParseError(f"{where}.enum must be a list of values, but is {_kind(schema['enum'])}")
    for key in _NAMED_SCHEMAS:
        named = schema.get(key, {})
        if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named):
            raise ParseError(f"{where}.{key} must be an object of schemas, but is {_kind(schema[key])}")
    for key in _SCHEMAS:
        if not isinstance(schema.get(key, []), list):
            raise ParseError(f"{where}.{key} must be a list of schemas, but is {_kind(schema[key])}")


def _walk(schema: Mapping[str, Any], visit: Callable[[Any, str], Any]) -> dict[str, Any]:
    """A copy of the schema with `visit` applied to each schema directly inside it."""
    out = dict(schema)
    for key in _SCHEMA:
        if isinstance(out.get(key), list):  # `items` as a list, before prefixItems existed
            out[key] = [visit(inner, f"{key}[{index}]") for index, inner in enumerate(out[key])]
        elif key in out:
            out[key] = visit(out[key], key)
    for key in _SCHEMAS:
        if key in out:
            out[key] = [visit(inner, f"{key}[{index}]") for index, inner in enumerate(out[key])]
    for key in _NAMED_SCHEMAS:
        if key in out:
            out[key] = {name: visit(inner, f"{key}.{name}") for name, inner in out[key].items()}
    return out


def _read_type(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema.get("type")
    if isinstance(kind, list):
        return {**schema, "type": [_FROM_BFCL.get(each, each) for each in kind]}
    if kind == "any":
        return {key: value for key, value in schema.items() if key != "type"}
    if kind == "tuple":
        return {**schema, "type": "array", TUPLE_MARK: "tuple"}
    return {**schema, "type": _FROM_BFCL.get(kind, kind)} if isinstance(kind, str) else schema


def _kind(value: Any) -> str:
    """What a value is, for a message. Containers are not shown: a deep one cannot even be printed."""
    if value is None:
        return "missing"
    shown = f" {str(value)[:40]!r}" if isinstance(value, (str, bool, float)) else ""
    return f"{type(value).__name__}{shown}"


# -- writing --------------------------------------------------------------------------------------------------


def _to_bfcl(schema: Any) -> Any:
    if isinstance(schema, bool):
        return schema
    out = _walk(schema, lambda inner, _: _to_bfcl(inner))
    kind = out.get("type")
    if kind is None:
        return {"type": "any", **out}
    if isinstance(kind, list):
        return {**out, "type": [_TO_BFCL.get(each, each) for each in kind]}
    if kind == "array" and out.get(TUPLE_MARK) == "tuple":
        out.pop(TUPLE_MARK)
        return {**out, "type": "tuple"}
    return {**out, "type": _TO_BFCL.get(kind, kind)}


def _plain(schema: Any) -> Any:
    return schema if isinstance(schema, bool) else _walk(schema, lambda inner, _: _plain(inner))


def _function(tool: ToolSpec) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": _plain(tool.parameters)}


def _bedrock(tool: ToolSpec) -> dict[str, Any]:
    # Bedrock refuses an empty description, so none is written.
    described = {"description": tool.description} if tool.description else {}
    return {"toolSpec": {"name": tool.name, **described, "inputSchema": {"json": _plain(tool.parameters)}}}


_WRITERS: Final[dict[str, Callable[[ToolSpec], dict[str, Any]]]] = {
    "json_schema": _function,
    "bfcl": lambda tool: {**_function(tool), "parameters": _to_bfcl(tool.parameters)},
    "openai": lambda tool: {"type": "function", "function": _function(tool)},
    "bedrock": _bedrock,
}
