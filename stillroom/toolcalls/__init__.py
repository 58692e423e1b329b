"""Tool specifications and tool calls: read every dialect, render, validate, match as syntax trees.

    specs.py     JSON Schema, BFCL, OpenAI and Bedrock tools -> ToolSpec, and back
    parse.py     an answer's text -> ToolCall; hostile text raises ParseError and nothing else
    literals.py  the scanner beneath it: values written as JSON or as Python literals
    render.py    ToolCall -> canonical text; parse(render(calls)) == calls
    validate.py  does a call fit its specification, right or wrong
    matching.py  is it the right call, as BFCL defines it; each failure has a kind
    golden.py    one concrete right answer out of a ground truth, and a ground truth out of a right answer
    gbnf.py      a GBNF grammar of exactly the valid calls, for constrained decoding

Promise: no evaluation of text, bounded time and memory, no import beyond the standard library
and layers below, so the room loads in milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.toolcalls.gbnf import grammar
    from stillroom.toolcalls.golden import expected_from, golden_call
    from stillroom.toolcalls.limits import Limits
    from stillroom.toolcalls.literals import CallParseError
    from stillroom.toolcalls.matching import FAILURE_KINDS, Match, match
    from stillroom.toolcalls.parse import CALL_DIALECTS, may_begin_calls, parse_calls
    from stillroom.toolcalls.render import render_calls
    from stillroom.toolcalls.specs import TOOL_DIALECTS, read_tools, safe_name, write_tools
    from stillroom.toolcalls.validate import Problem, check_tools, validate_calls

__all__ = [
    "CALL_DIALECTS",
    "FAILURE_KINDS",
    "TOOL_DIALECTS",
    "CallParseError",
    "Limits",
    "Match",
    "Problem",
    "check_tools",
    "expected_from",
    "golden_call",
    "grammar",
    "match",
    "may_begin_calls",
    "parse_calls",
    "read_tools",
    "render_calls",
    "safe_name",
    "validate_calls",
    "write_tools",
]

_HOME = {
    "CALL_DIALECTS": "parse",
    "FAILURE_KINDS": "matching",
    "TOOL_DIALECTS": "specs",
    "CallParseError": "literals",
    "Limits": "limits",
    "Match": "matching",
    "Problem": "validate",
    "check_tools": "validate",
    "expected_from": "golden",
    "golden_call": "golden",
    "grammar": "gbnf",
    "match": "matching",
    "may_begin_calls": "parse",
    "parse_calls": "parse",
    "read_tools": "specs",
    "render_calls": "render",
    "safe_name": "specs",
    "validate_calls": "validate",
    "write_tools": "specs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # No module here may be named like a public function: importing it would shadow the function.
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
