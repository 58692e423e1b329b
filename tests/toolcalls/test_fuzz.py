"""Hostile text: a `ParseError` or a result, never anything else; and never long."""

from __future__ import annotations

import contextlib
import json

import pytest

from stillroom.errors import ParseError
from stillroom.schema import ToolCall
from stillroom.toolcalls import CALL_DIALECTS, parse_calls, read_tools, render_calls, validate_calls
from stillroom.toolcalls.literals import NAME
from tests.toolcalls.strategies import fuzz_count, hostile_texts

TOOLS = read_tools({"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}})


def fuzz(count: int, seed: int) -> int:
    """How many of the texts were calls; whatever was read must survive rendering, validation and JSON."""
    read = 0
    for text in hostile_texts(count, seed):
        for dialect in CALL_DIALECTS:
            calls = calls_or_error(text, dialect)
            if isinstance(calls, ParseError):
                assert 0 <= calls.position <= len(text)
                continue
            read += 1
            validate_calls(calls, TOOLS)
            json.dumps([dict(call.arguments) for call in calls], allow_nan=False).encode()
            assert parse_calls(render_calls(calls, "json"), "json") == calls
            if all(NAME.fullmatch(call.name) for call in calls):  # JSON may name a tool as Python cannot
                assert parse_calls(render_calls(calls), "python") == calls
        with contextlib.suppress(ParseError):
            read_tools(text)
    return read


def calls_or_error(text: str, dialect: str) -> tuple[ToolCall, ...] | ParseError:
    try:
        return parse_calls(text, dialect)
    except ParseError as error:
        return error


def test_hostile_text_raises_parse_errors_only():
    assert fuzz(fuzz_count(1_500), seed=1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_hostile_text_raises_parse_errors_only_in_full(seed):
    assert fuzz(fuzz_count(25_000), seed=100 + seed) > 0


BIG = 300_000


@pytest.mark.parametrize(
    "text",
    [
        "a" * BIG,
        "a." * BIG,
        "a-" * BIG,
        "[" * BIG,
        "[ " * BIG,
        "[\n" * BIG,
        "[a" * BIG,
        "\n" * BIG + "a" * BIG,
        "a\n" * BIG,
        "(" * BIG,
        "f(" * BIG,
        "{" * BIG,
        "{\n" * BIG,
        '{"name"' * BIG,
        '"' * BIG,
        "[f(a=" + "\\" * BIG,
        "[f(a='" + "\\x" * BIG,
        "[f(a=" + "-" * BIG,
        "[f(a=" + "9" * BIG,
        "[f(a=" + "9_" * BIG,
        "[f(a=1" + " " * BIG,
        "[f(a=" + "1," * BIG,
        "[f(" + "a=1," * BIG,
        "[f(a=" + "'x'" * BIG,
        "<tool_call>" * BIG,
        "<tool_call>{}</tool_call>" * (BIG // 8),
        "<function=" * BIG,
        "<function=f>" * (BIG // 4),
        "```" * BIG,
        "``` " * BIG,
        "<think>" * BIG,
        "f()\n" * BIG,
        "3" * BIG + "(",
        "٣" * BIG + "a(",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_long_hostile_text_ends_in_linear_time(text):
    """Quadratic time here would take hours, and the suite's time limit would end it."""
    for dialect in CALL_DIALECTS:
        with pytest.raises(ParseError):
            parse_calls(text[:999_999], dialect)


def test_nesting_beyond_the_interpreters_stack_is_an_error():
    for opening in ("[", "(", '{"a": ', "[("):
        with pytest.raises(ParseError):
            parse_calls(f"[f(a={opening * 100_000})]", "python")
        with pytest.raises(ParseError):
            read_tools(opening * 100_000)


def test_tools_nested_in_memory_beyond_the_limit_are_an_error():
    schema: dict = {"type": "string"}
    for _ in range(5_000):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(ParseError, match="deep"):
        read_tools({"name": "f", "parameters": schema})
    deep: list = []
    for _ in range(5_000):
        deep = [deep]
    for bad in ({"name": deep}, {"name": "f", "description": deep}, {"name": "f", "parameters": deep}, deep):
        with pytest.raises(ParseError):
            read_tools(bad)
