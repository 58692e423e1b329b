"""What a schema admits, as a small tree that validation and the grammar both walk.

JSON Schema says one thing in many ways; the shapes below say each in one. Promise: any schema that
`read_tools` accepts becomes a shape, in time linear in its size; what is not understood (a pattern, a
condition, an unknown type) admits more than it should, never less.

Two readings of ours, where JSON Schema leaves more open than a tool means: an object that declares properties has
no others unless `additionalProperties` says so, and an `enum` whose values do not fit the declared type
(BFCL has them) speaks of a list's items if they fit those, and of nothing otherwise.

Named tuples, not dataclasses: making eight of those took longer than the rest of this room's import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple


class Plain(NamedTuple):
    """Any value of one of JSON's scalar types: `string`, `integer`, `number`, `boolean`, `null`, or `any` at all."""

    kind: str


class Literal(NamedTuple):
    """One of these values."""

    values: tuple[Any, ...]


class List(NamedTuple):
    """A list; `most` is None where its length is not bounded."""

    items: Shape
    least: int = 0
    most: int | None = None


class Field(NamedTuple):
    """One declared property."""

    name: str
    shape: Shape
    required: bool


class Record(NamedTuple):
    """An object: its declared properties in order, and the shape of any others (None: there are no others)."""

    fields: tuple[Field, ...]
    others: Shape | None


class Union(NamedTuple):
    """Any of these."""

    shapes: tuple[Shape, ...]


class Reference(NamedTuple):
    """The shape of that name in `Shapes.named`; how a schema refers to itself."""

    name: str


Shape = Plain | Literal | List | Record | Union | Reference

ANY: Final = Plain("any")
_SCALARS: Final = ("string", "integer", "number", "boolean", "null")


class Shapes(NamedTuple):
    """A schema's shape, and the shapes that it refers to by name."""

    root: Record
    named: Mapping[str, Shape]


def compile_parameters(schema: Mapping[str, Any]) -> Shapes:
    """The shape of a tool's `parameters`; the root is always a record, closed unless it says otherwise."""
    definitions = {
        f"#/{key}/{name}": inner
        for key in ("$defs", "definitions")
        if isinstance(schema.get(key), Mapping)
        for name, inner in schema[key].items()
    }
    named = {name: _shape(inner, definitions) for name, inner in definitions.items()}
    properties = schema.get("properties")
    fields = _fields(properties, schema, definitions) if isinstance(properties, Mapping) else ()
    extra = schema.get("additionalProperties", False)
    return Shapes(Record(fields, None if extra is False else _shape(extra, definitions)), _without_loops(named))


def fits(value: Any, kind: str) -> bool:
    """Whether a value has one of JSON Schema's scalar types; True is no integer, an integer is a number."""
    if kind == "number":
        return type(value) in (int, float)
    wanted = {"string": str, "integer": int, "boolean": bool, "null": type(None)}[kind]
    return type(value) is wanted


def _shape(schema: Any, definitions: Mapping[str, Any]) -> Shape:
    if not isinstance(schema, Mapping):
        return ANY
    if "$ref" in schema:
        target = schema["$ref"]
        return Reference(target) if isinstance(target, str) and target in definitions else ANY
    if "const" in schema:
        return Literal((schema["const"],))
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return Union(tuple(_shape(inner, definitions) for inner in schema[key]))
    kinds = schema.get("type")
    if isinstance(kinds, list) and kinds:
        return Union(tuple(_typed({**schema, "type": kind}, kind, definitions) for kind in kinds))
    return _typed(schema, kinds if isinstance(kinds, str) else None, definitions)


def _typed(schema: Mapping[str, Any], kind: str | None, definitions: Mapping[str, Any]) -> Shape:
    enum: Sequence[Any] = schema.get("enum") or ()
    if kind in _SCALARS:
        fitting = tuple(value for value in enum if fits(value, str(kind)))
        return Literal(fitting) if fitting else Plain(str(kind))
    if kind == "array":
        return _list(schema, enum, definitions)
    if kind == "object":
        return _record(schema, definitions)
    return Literal(tuple(enum)) if enum else ANY


def _list(schema: Mapping[str, Any], enum: Sequence[Any], definitions: Mapping[str, Any]) -> Shape:
    fitting = tuple(value for value in enum if isinstance(value, list))
    if fitting:
        return Literal(fitting)
    items = _shape(schema.get("items"), definitions)
    if enum and isinstance(items, Plain) and items.kind in _SCALARS:
        wanted = tuple(value for value in enum if fits(value, items.kind))
        items = Literal(wanted) if wanted else items
    return List(items, _count(schema.get("minItems")) or 0, _count(schema.get("maxItems")))


def _record(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Record:
    properties = schema.get("properties")
    fields = _fields(properties, schema, definitions) if isinstance(properties, Mapping) else ()
    extra = schema.get("additionalProperties", not fields)
    return Record(fields, None if extra is False else _shape(extra, definitions))


def _fields(
    properties: Mapping[str, Any], schema: Mapping[str, Any], definitions: Mapping[str, Any]
) -> tuple[Field, ...]:
    required = schema.get("required")
    names = required if isinstance(required, list) else ()
    return tuple(Field(name, _shape(inner, definitions), name in names) for name, inner in properties.items())


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _without_loops(named: Mapping[str, Shape]) -> dict[str, Shape]:
    """A definition that is nothing but a reference to itself, through others or unions, admits anything."""
    return {name: ANY if _loops(name, named) else shape for name, shape in named.items()}


def _loops(start: str, named: Mapping[str, Shape]) -> bool:
    waiting, seen = [named[start]], set()
    while waiting:
        shape = waiting.pop()
        if isinstance(shape, Union):
            waiting.extend(shape.shapes)
        elif isinstance(shape, Reference) and shape.name not in seen:
            if shape.name == start:
                return True
            seen.add(shape.name)
            waiting.append(named[shape.name])
    return False
