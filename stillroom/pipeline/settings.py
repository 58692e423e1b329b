"""Every setting of a recipe, with its type, default and meaning: read from the classes that validate it.

A class's docstring says what a group is for, the text under a field what it does; neither is written twice.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stillroom.errors import ConfigError
from stillroom.pipeline.config import Recipe

_PLAIN = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "anything", NoneType: "null"}
_BOUNDS = (
    (annotated_types.Ge, "ge", "at least"), (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "at most"), (annotated_types.Lt, "lt", "below"),
)  # fmt: skip
LONGEST_DEFAULT = 80


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        name: as `--set` takes it; `[]` stands for each entry of a list.
        kind: what may be given, in words. default: as JSON; "" where a value has to be given.
        text: what it does.
    """

    name: str
    kind: str
    default: str
    text: str


def settings(section: str = "") -> list[Setting]:
    """All settings, or those of one section such as `training` or `teacher.model`, in the order of their classes.

    A group that stands in two places, such as a model, is spelt out in the first and referred to in the second.

    Raises:
        ConfigError: there is no such section; names those that there are.
    """
    found = list(_of(Recipe, "", {}))
    chosen = [each for each in found if not section or f"{each.name}.".startswith((f"{section}.", f"{section}[]."))]
    if not chosen:
        raise ConfigError(f"there are no settings under {section!r}; sections are {', '.join(Recipe.model_fields)}.")
    return chosen


def page(section: str = "") -> str:
    """The settings as Markdown that a terminal shows well, too."""
    lines, heading = ["# Every setting"], ""
    for each in settings(section):
        top = each.name.partition(".")[0]
        if top != heading and "." in each.name:
            heading = top
            lines += ["", f"## {top}"]
        given = f"default {each.default}" if each.default else "required"
        if len(lines) == 1 or not lines[-1].startswith("- "):
            lines.append("")
        lines.append(f"- `{each.name}` ({each.kind}; {given}): {each.text}")
    return "\n".join(lines)


def _of(schema: type[BaseModel], prefix: str, seen: dict[type, str]) -> Iterator[Setting]:
    texts = _texts(schema)
    groups: list[tuple[str, FieldInfo, type[BaseModel]]] = []
    for name, field in schema.model_fields.items():
        group = _group_in(field.annotation)
        if group is None:
            kind = ", ".join([_words(field.annotation), *_limits(field)])
            yield Setting(prefix + name, kind, _default(field), texts[name])
        else:
            groups.append((name, field, group))
    for name, field, group in groups:
        path = f"{prefix}{name}{'[]' if get_origin(field.annotation) is tuple else ''}"
        if group in seen:
            default = _default(field) if field.default is None else "as there"
            yield Setting(path, f"as `{seen[group]}`", default, texts[name])
        else:
            seen[group] = path
            yield from _of(group, f"{path}.", seen)


def _texts(schema: type[BaseModel]) -> dict[str, str]:
    """The text under each field of a class, from its source, in the words of YAML."""
    (body,) = (
        node.body for node in ast.parse(textwrap.dedent(inspect.getsource(schema))).body if hasattr(node, "body")
    )
    pairs = itertools.pairwise(body)
    return {
        field.target.id: " ".join(str(text.value.value).replace("None", "null").split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }  # fmt: skip


def _group_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _group_in(inner))), None)


def _words(annotation: Any) -> str:
    """A type in the words of somebody who writes YAML."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return _either([f"`{value}`" for value in inner])
    if get_origin(annotation) in (Union, UnionType):
        return _either([_words(each) for each in inner])
    if get_origin(annotation) is tuple:
        return f"list of {_words(inner[0])}" if inner[-1] is Ellipsis else f"list of {len(inner)} {_words(inner[0])}s"
    return "mapping" if get_origin(annotation) is dict else _PLAIN[annotation]


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _limits(field: FieldInfo) -> list[str]:
    bounds = [
        f"{words} {getattr(limit, name):,}"
        for limit in field.metadata
        for kind, name, words in _BOUNDS
        if isinstance(limit, kind)
    ]
    return [" and ".join(bounds)] if bounds else []


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    default = json.dumps(field.default)
    return f"`{default}`" if len(default) <= LONGEST_DEFAULT else f"`{default[:LONGEST_DEFAULT]}...`"
