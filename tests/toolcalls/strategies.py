"""What the tests of this room draw from: JSON values, calls, specifications and hostile text."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from stillroom.schema import ToolCall, ToolSpec

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**17), 10**17),
    st.floats(allow_nan=False, allow_infinity=False),
    text,
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
_words = st.sampled_from(["f", "get_weather", "Content-Type", "_x", "class", "año", "a1", "B"])
names = _words | st.tuples(_words, _words).map(".".join)
calls = st.builds(ToolCall, names, st.dictionaries(names | text, json_values, max_size=4))
call_lists = st.lists(calls, min_size=1, max_size=4).map(tuple)

_scalar_schemas = st.sampled_from(
    [{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")] + [{}, {"description": "any"}]
) | st.lists(text, min_size=1, max_size=3).map(lambda values: {"type": "string", "enum": values})


def _compound(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        inner.map(lambda items: {"type": "array", "items": items}),
        inner.map(lambda items: {"type": "array", "items": items, "x-bfcl-type": "tuple"}),
        object_schemas(inner),
        inner.map(lambda each: {"type": "object", "additionalProperties": each}),
        # Alternatives that are lists or objects alike are the one thing of which llguidance may lose some.
        st.tuples(inner, _scalar_schemas).map(lambda each: {"anyOf": list(each)}),
    )


@st.composite
def object_schemas(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(names | text, inner, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {"type": "object", "properties": properties, "required": required}


schemas = st.recursive(_scalar_schemas, _compound, max_leaves=6)
tools = st.builds(ToolSpec, names, text, object_schemas(schemas))
tool_lists = st.lists(tools, min_size=1, max_size=3, unique_by=lambda tool: tool.name).map(tuple)


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema of the kinds above admits."""
    if "anyOf" in schema:
        return st.one_of([values_of(each) for each in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return st.lists(values_of(schema["items"]), max_size=3)
    if kind == "object":
        if schema.get("properties"):
            return arguments_of(schema)
        return st.dictionaries(text, values_of(schema.get("additionalProperties", {})), max_size=3)
    return {
        "string": text,
        "integer": st.integers(-(10**17), 10**17),
        "number": st.integers(-999, 999) | st.floats(-1e6, 1e6).map(lambda value: round(value, 3)),
        "boolean": st.booleans(),
        "null": st.none(),
        None: st.sampled_from([None, True, 3, 2.5, "x", [1, "a"], {"k": [None]}]),
    }[kind]


@st.composite
def arguments_of(draw: st.DrawFn, schema: dict[str, Any]) -> dict[str, Any]:
    """Arguments in their declared order: the required ones, and some of the others."""
    return {
        name: draw(values_of(inner))
        for name, inner in schema["properties"].items()
        if name in schema["required"] or draw(st.booleans())
    }


# -- hostile text ---------------------------------------------------------------------------------------------

SEEDS = (
    '[get_weather(city="Paris", days=3, detail={"a": [1, 2.5, None], \'b\': (True, false)})]',
    'math.factorial(n=-5), f(x="\\u00e9\\n\\ud83d\\ude00", y=1e-5)',
    '[{"name": "f", "arguments": {"a": [1, {"b": null}]}}, {"name": "g", "parameters": {}}]',
    '{"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]}',
    'Sure!\n<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call><tool_call>{"name": "g"}</tool_call>',
    '<|python_tag|>{"name": "f", "parameters": {"q": "\\"z\\""}}; {"name": "g", "parameters": {"n": 1.0}}',
    '<function=f>{"a": 1}</function>',
    '<think>f(a=2)</think>\nI will call this:\n```python\n[f(a=1, **{"b c": 2})]\n```\nDone.',
    '[f(a="""x "quoted"\nline""", b=\'it\\\'s\')]',
)
_PIECES = (
    *"[](){}\"'\\,:=.;-+*_ \n\t\r`<>|#@",
    *("\x00", "\ud800", "\udfff", "\u2028", "\ufeff", "é", "漢", "🙂", "٣", "\x85"),
    *("None", "True", "null", "NaN", "-Infinity", "1e999", "0x1f", "007", "9" * 500, "f(", "f(a=", "a.b.c("),
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "<function=f>", "```", "```json\n", "<think>", "</think>"),
    *("\\u", "\\ud83d", "\\U00110000", "\\x", "\\N{DASH}", "**{", '{"name": "f", "arguments": ', '"""', "lambda: 0"),
    *("[" * 200, "(" * 200, '{"a":' * 200, "[[" * 40 + "]]" * 40, "__import__('os').system('true')"),
)


def hostile_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Random bytes, random pieces, and mutated valid texts; the same ones for the same seed."""
    draw = random.Random(seed)
    for index in range(count):
        kind = index % 4
        if kind == 0:
            raw = draw.randbytes(draw.randrange(1, 60))
            yield raw.decode("utf-8", draw.choice(["replace", "surrogateescape", "ignore"]))
        elif kind == 1:
            yield "".join(draw.choices(_PIECES, k=draw.randrange(1, 12)))
        else:
            yield _mutated(draw.choice(SEEDS), draw, times=draw.randrange(1, 5))


def _mutated(base: str, draw: random.Random, times: int) -> str:
    for _ in range(times):
        at, other = draw.randrange(len(base) + 1), draw.randrange(len(base) + 1)
        low, high = min(at, other), max(at, other)
        base = draw.choice(
            (
                base[:at] + draw.choice(_PIECES) + base[at:],
                base[:low] + base[high:],
                base[:low] + base[low:high] * 2 + base[high:],
                base[:at] + chr(draw.randrange(0x110000)) + base[at + 1 :],
                base[:at],
            )
        )
    return base


def fuzz_count(default: int) -> int:
    """How many inputs to try: STILLROOM_FUZZ_EXAMPLES where it is set."""
    return int(os.environ.get("STILLROOM_FUZZ_EXAMPLES", default))
