"""A grammar of exactly the valid calls, for constrained decoding.

The text is GBNF, llama.cpp's notation; llguidance reads the same text (`llguidance.grammar_from("gbnf", text)`)
and turns it into a token mask for a Hugging Face tokenizer. It admits what `render_calls` writes: parameters in
their declared order, required ones always, optional ones or not, enums as literals, one space after "," and ":".

Promise: every text that it admits is read by `parse_calls` and passes `validate_calls`, unless it repeats a key
in an object that declares none, which no grammar can forbid; every rendered valid call is admitted, except for
numbers of more than 18 digits. Size and time are linear in the specification.

llguidance splits text into lexemes by the longest match and never goes back, so two lexemes that may start at one
place must not be such that one is a beginning of the other: a comma is therefore written together with the key after
it. One case is left: of alternatives (`anyOf`) that are lists or objects alike, it may lose some; llama.cpp does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from stillroom.errors import DataError
from stillroom.schema import ToolSpec
from stillroom.toolcalls.literals import NAME
from stillroom.toolcalls.render import LONE_SURROGATE, check_value, render_value
from stillroom.toolcalls.shapes import (
    ANY,
    Field,
    List,
    Literal,
    Plain,
    Record,
    Reference,
    Shape,
    Union,
    compile_parameters,
)

MOST_REPEATS: Final = 500
"""List bounds beyond it are not enforced: engines write repetitions out one by one."""

# What no string literal of the notation may hold as it is.
_SPECIAL = re.compile(r'["\\\x00-\x1f\x7f]')

_SCALARS: Final = {
    # Control characters are written as JSON writes them; half surrogate pairs cannot be written at all.
    "string": r'"\"" ( [^"\\\x00-\x1f] | "\\" ["\\bfnrt] | "\\u00" [01] [0-9a-f] )* "\""',
    "integer": r'"-"? ( "0" | [1-9] [0-9]{0,17} )',
    # Two digits of exponent keep every number within a float.
    "number": r'"-"? ( "0" | [1-9] [0-9]{0,17} ) ( "." [0-9]{1,18} )? ( [eE] [-+]? [0-9]{1,2} )?',
}


@dataclass(frozen=True, slots=True)
class _Dialect:
    """How a dialect writes what the others write differently."""

    words: Mapping[Any, str]
    value: Callable[[Any], str]
    opening: str
    closing: str
    between: str


_PYTHON_WORDS: Final = {True: "True", False: "False", None: "None"}
_JSON_WORDS: Final = {True: "true", False: "false", None: "null"}


def _json_value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_DIALECTS: Final = {
    "python": _Dialect(_PYTHON_WORDS, render_value, "[", "]", ", "),
    "json": _Dialect(_JSON_WORDS, _json_value, "[", "]", ", "),
    "hermes": _Dialect(_JSON_WORDS, _json_value, "<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n"),
}


class _Part(NamedTuple):
    """A field as it is written where it comes first, and after another one."""

    alone: str
    after: str
    required: bool


def grammar(tools: Sequence[ToolSpec], dialect: str = "python", *, most_calls: int = 1) -> str:
    """GBNF whose root is the text of one valid call, or of up to `most_calls`.

    Args:
        tools: what may be called; with none, the only text is the empty list `[]`.
        dialect: `python`, `json` or `hermes`.
        most_calls: more than one for prompts that ask for parallel calls.

    Raises:
        ValueError: the dialect is unknown, or `most_calls` is below 1.
        DataError: a tool's name or a value of an enum cannot be written.
    """
    if dialect not in _DIALECTS:
        raise ValueError(f"unknown dialect {dialect!r}; choose one of {', '.join(_DIALECTS)}")
    if most_calls < 1:
        raise ValueError(f"most_calls must be at least 1, but is {most_calls}")
    if not tools:
        return f"root ::= {_quoted('[]')}\n"
    writer = _Writer(_DIALECTS[dialect], calls_as_python=dialect == "python")
    names = [writer.tool(index, tool) for index, tool in enumerate(tools)]
    style = writer.dialect
    more = f" ( {_quoted(style.between)} call ){{0,{most_calls - 1}}}" if most_calls > 1 else ""
    writer.rules["call"] = " | ".join(names)
    root = f"root ::= {_quoted(style.opening)} call{more} {_quoted(style.closing)}\n"
    return root + "".join(f"{name} ::= {body}\n" for name, body in writer.rules.items())


class _Writer:
    """Collects rules. Every method that writes a shape returns an expression to use in another rule."""

    def __init__(self, dialect: _Dialect, *, calls_as_python: bool) -> None:
        self.dialect, self.calls_as_python = dialect, calls_as_python
        self.rules: dict[str, str] = {}
        self.references: dict[str, str] = {}

    def tool(self, index: int, tool: ToolSpec) -> str:
        """The rule of one tool's calls."""
        name = f"t{index}"
        if self.calls_as_python and not NAME.fullmatch(tool.name):
            raise DataError(f"the tool name {tool.name!r} cannot be written as a Python call; use the json dialect.")
        compiled = compile_parameters(tool.parameters)
        self.references = {key: f"{name}-d{number}" for number, key in enumerate(compiled.named)}
        if self.calls_as_python:
            body = self._fields(compiled.root, name, call=True)
            self.rules[name] = " ".join(filter(None, [_quoted(f"{tool.name}("), body, _quoted(")")]))
        else:
            start = f'{{"name": {_json_value(tool.name)}, "arguments": '
            self.rules[name] = f"{_quoted(start)} {self._record(compiled.root, name)} {_quoted('}')}"
        for key, shape in compiled.named.items():
            rule = self.references[key]
            self.rules[rule] = self._shape(shape, f"{rule}-x")
        return name

    # -- shapes -------------------------------------------------------------------------------------------

    def _shape(self, shape: Shape, name: str) -> str:
        if isinstance(shape, Plain):
            return self._plain(shape.kind)
        if isinstance(shape, Literal):
            for value in shape.values:
                check_value(value, "a value of an enum")
            return _either([_quoted(self.dialect.value(value)) for value in shape.values])
        if isinstance(shape, Union):
            if ANY in shape.shapes:
                return self._plain("any")
            return _either([self._shape(each, f"{name}-{index}") for index, each in enumerate(shape.shapes)])
        if isinstance(shape, Reference):
            return self.references.get(shape.name) or self._plain("any")
        if isinstance(shape, List):
            return self._list(shape, name)
        return self._record(shape, name)

    def _plain(self, kind: str) -> str:
        if kind == "null":
            return _quoted(self.dialect.words[None])
        if kind == "boolean":
            return _either([_quoted(self.dialect.words[True]), _quoted(self.dialect.words[False])])
        if kind in _SCALARS:
            self.rules.setdefault(kind, _SCALARS[kind])
            return kind
        if "value" not in self.rules:
            self.rules["value"] = ""  # taken before it is written, since lists and objects hold values
            scalars = [self._plain(each) for each in ("string", "number", "boolean", "null")]
            items, pairs = self._list(List(ANY), "value"), self._record(Record((), ANY), "value")
            self.rules["value"] = " | ".join([*scalars, items, pairs])
        return "value"

    def _list(self, shape: List, name: str) -> str:
        if shape.most == 0:
            return _quoted("[]")
        item = self._named(f"{name}-i", self._shape(shape.items, f"{name}-i"))
        least = min(max(shape.least - 1, 0), MOST_REPEATS)
        most = "" if shape.most is None or shape.most > MOST_REPEATS else max(shape.most - 1, least)
        body = f"{item} ( {_quoted(', ')} {item} ){{{least},{most}}}"
        return _around("[", f"( {body} )?" if shape.least == 0 else body, "]")

    def _record(self, shape: Record, name: str) -> str:
        return _around("{", self._fields(shape, name), "}")

    # -- fields: of a call or of an object ----------------------------------------------------------------

    def _fields(self, shape: Record, name: str, *, call: bool = False) -> str:
        """The fields in order, optional ones or not, with ", " between those that are there; may be nothing."""
        parts = [self._field(field, f"{name}-f{index}", call) for index, field in enumerate(shape.fields)]
        if shape.others is not None:
            parts.append(self._others(shape.others, f"{name}-o", call))
        first = next((index for index, part in enumerate(parts) if part.required), None)
        if first is None:
            return self._all_optional(parts, name)
        before = [f"( {part.alone} {_quoted(', ')} )?" for part in parts[:first]]
        after = [part.after if part.required else f"( {part.after} )?" for part in parts[first + 1 :]]
        return " ".join([*before, parts[first].alone, *after])

    def _all_optional(self, parts: Sequence[_Part], name: str) -> str:
        """Any of the parts in order: the first that is there, then the tails after it, each a rule of its own."""
        tail = ""
        starts: list[str] = []
        for index in range(len(parts) - 1, -1, -1):
            follow = f" ( {tail} )?" if tail else ""
            starts.insert(0, f"{parts[index].alone}{follow}")
            if index > 0:
                rest = f" | {tail}" if tail else ""
                self.rules[f"{name}-r{index}"] = f"{parts[index].after}{follow}{rest}"
                tail = f"{name}-r{index}"
        return f"( {' | '.join(starts)} )?" if starts else ""

    def _field(self, field: Field, name: str, call: bool) -> _Part:
        key, closing = f"{_json_value(field.name)}: ", ""
        if call:
            plain = NAME.fullmatch(field.name) is not None
            key, closing = (f"{field.name}=", "") if plain else (f"**{{{key}", f" {_quoted('}')}")
        value = self._named(f"{name}-v", self._shape(field.shape, name)) + closing
        return _Part(f"{_quoted(key)} {value}", f"{_quoted(', ' + key)} {value}", field.required)

    def _others(self, shape: Shape, name: str, call: bool) -> _Part:
        """One or more fields of any name."""
        key, after = ("any-name", "next-name") if call else ("any-key", "next-key")
        body = f"[a-zA-Z_] [a-zA-Z0-9_]* {_quoted('=')}" if call else f"{self._plain('string')} {_quoted(': ')}"
        self.rules.setdefault(key, body)
        self.rules.setdefault(after, f"{_quoted(', ')} {body}")
        value = self._named(f"{name}-v", self._shape(shape, name))
        more = f"( {after} {value} )*"
        return _Part(f"{key} {value} {more}", f"{after} {value} {more}", False)

    def _named(self, name: str, body: str) -> str:
        """A rule for an expression that is used more than once; one that is a rule's name already stays it."""
        if body in self.rules:
            return body
        self.rules[name] = body
        return name


def _either(alternatives: Sequence[str]) -> str:
    return alternatives[0] if len(alternatives) == 1 else f"( {' | '.join(alternatives)} )"


def _around(opening: str, body: str, closing: str) -> str:
    return " ".join(filter(None, [_quoted(opening), body, _quoted(closing)]))


def _quoted(text: str) -> str:
    """Text as a literal of the notation."""
    if LONE_SURROGATE.search(text):
        raise DataError(f"half a surrogate pair, which is not text, stands in a name or an enum: {text[:40]!r}.")
    return '"' + _SPECIAL.sub(lambda found: _ESCAPES.get(found.group(), f"\\x{ord(found.group()):02x}"), text) + '"'


_ESCAPES: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
