"""Promises of `validate_calls`: a valid call, right or wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.schema import ToolCall, ToolSpec
from stillroom.toolcalls import read_tools, validate_calls
from tests.toolcalls.strategies import arguments_of, fuzz_count, tools

TOOL = read_tools(
    {
        "name": "f",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "ratio": {"type": "number"},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
                "where": {"type": "object", "properties": {"zip": {"type": "integer"}}, "required": ["zip"]},
                "free": {"type": "object"},
                "any": {"description": "whatever"},
                "maybe": {"type": ["integer", "null"]},
                "either": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/node"}]},
                "odd": {"type": "integer", "enum": ["1", "2"]},
                "days_of": {"type": "array", "items": {"type": "string"}, "enum": ["Mon", "Tue"]},
            },
            "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
        },
    }
)
VALID = {
    "city": "Paris", "days": 3, "ratio": 2, "unit": "C", "tags": ["a"], "where": {"zip": 1}, "free": {"x": [None]},
    "any": [1, {"k": 2}], "maybe": None, "either": {"next": {"next": {}}}, "odd": 7, "days_of": ["Mon"],
}  # fmt: skip


def test_a_valid_call_has_no_problems():
    assert validate_calls([ToolCall("f", VALID)], TOOL) == []


@pytest.mark.parametrize(
    ("changed", "kind", "path"),
    [
        ({"days": 3.0}, "wrong_type", "calls[0].days"),
        ({"days": True}, "wrong_type", "calls[0].days"),
        ({"days": "3"}, "wrong_type", "calls[0].days"),
        ({"ratio": "x"}, "wrong_type", "calls[0].ratio"),
        ({"ratio": True}, "wrong_type", "calls[0].ratio"),
        ({"unit": "K"}, "wrong_value", "calls[0].unit"),
        ({"tags": []}, "wrong_value", "calls[0].tags"),
        ({"tags": ["a", "b", "c"]}, "wrong_value", "calls[0].tags"),
        ({"tags": ["a", 1]}, "wrong_type", "calls[0].tags[1]"),
        ({"tags": "a"}, "wrong_type", "calls[0].tags"),
        ({"where": {}}, "missing_parameter", "calls[0].where.zip"),
        ({"where": {"zip": 1, "x": 2}}, "unexpected_parameter", "calls[0].where.x"),
        ({"where": {"zip": "1"}}, "wrong_type", "calls[0].where.zip"),
        ({"where": [1]}, "wrong_type", "calls[0].where"),
        ({"maybe": "x"}, "wrong_type", "calls[0].maybe"),
        ({"either": 3}, "wrong_type", "calls[0].either"),
        ({"either": {"next": {"next": 3}}}, "wrong_type", "calls[0].either.next.next"),
        ({"days_of": ["Sun"]}, "wrong_value", "calls[0].days_of[0]"),
        ({"no": 1}, "unexpected_parameter", "calls[0].no"),
    ],
)
def test_one_change_is_one_problem_with_its_place(changed, kind, path):
    problems = validate_calls([ToolCall("f", VALID | changed)], TOOL)
    assert [(problem.kind, problem.path) for problem in problems] == [(kind, path)]


def test_unknown_tools_and_missing_parameters_are_told_for_every_call():
    problems = validate_calls([ToolCall("f", {}), ToolCall("g", {})], TOOL)
    assert [(problem.kind, problem.path) for problem in problems] == [
        ("missing_parameter", "calls[0].city"),
        ("unknown_tool", "calls[1]"),
    ]


def test_additional_properties_open_a_tool():
    schema = {"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}}
    tool = ToolSpec("f", "", schema)
    assert validate_calls([ToolCall("f", {"x": 1})], [tool]) == []
    assert validate_calls([ToolCall("f", {"x": "1"})], [tool])[0].kind == "wrong_type"


def test_a_definition_that_is_only_itself_admits_anything():
    loop = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, **loop}
    assert validate_calls([ToolCall("f", {"x": 1})], [ToolSpec("f", "", schema)]) == []


@settings(max_examples=fuzz_count(30), deadline=None)
@given(data=st.data(), tool=tools)
def test_what_a_schema_admits_is_valid(data, tool):
    arguments = data.draw(arguments_of(tool.parameters))
    assert validate_calls([ToolCall(tool.name, arguments)], [tool]) == []
