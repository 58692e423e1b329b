"""Promises of `read_tools`, `write_tools` and `check_tools`."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from stillroom.errors import ParseError
from stillroom.schema import ToolSpec
from stillroom.toolcalls import TOOL_DIALECTS, check_tools, read_tools, safe_name, write_tools
from tests.toolcalls.strategies import fuzz_count, tool_lists

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = ToolSpec("weather.now", "Weather.", PARAMETERS)


@settings(max_examples=fuzz_count(30), deadline=None)
@given(tools=tool_lists)
@pytest.mark.parametrize("dialect", TOOL_DIALECTS)
def test_what_is_written_is_read_back_unchanged(dialect, tools):
    written = write_tools(tools, dialect)

    assert read_tools(written) == tools
    assert read_tools(json.dumps(written)) == tools


@settings(max_examples=fuzz_count(30), deadline=None)
@given(tools=tool_lists)
def test_every_dialect_leads_to_every_other(tools):
    current = tools
    for dialect in (*TOOL_DIALECTS, *TOOL_DIALECTS[::-1]):
        current = read_tools(write_tools(current, dialect))
    assert current == tools


BFCL = {
    "name": "f",
    "description": "Does it.",
    "parameters": {
        "type": "dict",
        "required": ["a"],
        "properties": {
            "a": {"type": "float", "default": {"type": "dict"}},
            "b": {"type": "tuple", "items": {"type": "float"}, "description": "Two."},
            "c": {"type": "any", "description": "Anything.", "optional": True},
            "d": {"type": "dict", "properties": {"type": {"type": "string", "enum": ["float", "dict"]}}},
            "e": {"type": "array", "items": {"type": "tuple", "items": {"type": "any"}}},
        },
    },
}


def test_bfcl_is_written_back_as_it_was_read():
    assert write_tools(read_tools([BFCL]), "bfcl") == [BFCL]


def test_bfcl_types_become_json_schema_and_data_stays_as_it_is():
    properties = read_tools(BFCL)[0].parameters["properties"]

    assert properties["a"] == {"type": "number", "default": {"type": "dict"}}
    assert properties["b"]["type"] == "array"
    assert properties["b"]["items"] == {"type": "number"}
    assert "type" not in properties["c"]
    assert properties["d"]["properties"]["type"]["enum"] == ["float", "dict"]


@pytest.mark.parametrize(
    "value",
    [
        {"name": "weather.now", "description": "Weather.", "parameters": PARAMETERS},
        {"type": "function", "function": {"name": "weather.now", "description": "Weather.", "parameters": PARAMETERS}},
        {"type": "function", "name": "weather.now", "description": "Weather.", "parameters": PARAMETERS},
        {"toolSpec": {"name": "weather.now", "description": "Weather.", "inputSchema": {"json": PARAMETERS}}},
        {"name": "weather.now", "description": "Weather.", "input_schema": PARAMETERS},
        {"tools": [{"name": "weather.now", "description": "Weather.", "inputSchema": {"json": PARAMETERS}}]},
        "[{'name': 'weather.now', 'description': 'Weather.', 'parameters': " + str(PARAMETERS) + "}]",
        json.dumps({"name": "weather.now", "description": "Weather.", "parameters": PARAMETERS}),
    ],
)  # fmt: skip
def test_every_shape_of_a_tool_is_recognised(value):
    assert read_tools(value) == (WEATHER,)


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"type": "dict"}, {"properties": {}}])
def test_a_tool_without_parameters_takes_none(parameters):
    assert read_tools({"name": "f", "parameters": parameters}) == (ToolSpec("f"),)
    assert read_tools({"name": "f"}) == (ToolSpec("f"),)


def test_no_tools_are_no_tools():
    assert read_tools([]) == ()
    assert write_tools((), "openai") == []


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (3, "tools must be a list"),
        ("x", "'x' is a bare name"),
        ("[] []", "text after the tools"),
        ([3], r"tools\[0\] must be an object"),
        ([{}], r"tools\[0\]\.name must be a text"),
        ([{"name": ""}], r"tools\[0\]\.name"),
        ([{"name": "f", "description": 3}], r"tools\[0\]\.description must be text"),
        ([{"name": "f", "parameters": 3}], r"tools\[0\]\.parameters must be a schema"),
        ([{"name": "f", "parameters": True}], r"tools\[0\]\.parameters must be a schema"),
        ([{"name": "f", "parameters": {"type": "string"}}], r"parameters\.type must be 'object'"),
        ([{"name": "f", "parameters": {"properties": []}}], r"parameters\.properties must be an object"),
        ([{"name": "f", "parameters": {"properties": {"a": 3}}}], r"parameters\.properties\.a must be a schema"),
        ([{"name": "f", "parameters": {"properties": {"a": {"type": 3}}}}], r"properties\.a\.type must be the name"),
        ([{"name": "f", "parameters": {"properties": {"a": {"enum": "x"}}}}], r"properties\.a\.enum must be a list"),
        ([{"name": "f", "parameters": {"required": [1]}}], r"parameters\.required must be a list"),
        ([{"name": "f", "parameters": {"anyOf": {}}}], r"parameters\.anyOf must be a list"),
        ([{"name": "f"}, {"name": "f"}], r"tools\[1\] has the name of tools\[0\]"),
        ([{"toolSpec": {"name": "f", "inputSchema": {"json": 3}}}], r"toolSpec\.inputSchema\.json must be a schema"),
        ([{"type": "function", "function": {"name": 3}}], r"tools\[0\]\.function\.name"),
    ],
)
def test_an_error_names_the_tool_and_the_place(value, where):
    with pytest.raises(ParseError, match=where):
        read_tools(value)


def test_bedrock_gets_no_empty_description():
    assert "description" not in write_tools([ToolSpec("f")], "bedrock")[0]["toolSpec"]


def test_a_safe_name_is_what_openai_and_bedrock_take():
    assert safe_name("math.factorial") == "math_factorial"
    assert safe_name("get-weather_2") == "get-weather_2"
    assert safe_name("a b/é") == "a_b__"


def test_writing_does_not_share_what_it_was_given():
    tools = read_tools(BFCL)
    write_tools(tools, "openai")[0]["function"]["parameters"]["properties"]["d"]["properties"].clear()
    assert write_tools(tools, "bfcl") == [BFCL]


def test_an_unknown_dialect_is_the_callers_mistake():
    with pytest.raises(ValueError, match="choose one of"):
        write_tools([], "xml")


def test_doubtful_specifications_are_told():
    tools = read_tools(
        {
            "name": "f",
            "parameters": {
                "type": "dict",
                "required": ["city"],
                "properties": {
                    "n": {"type": "integer", "enum": ["1", "2"]},
                    "in": {"type": "array", "items": {"type": "dict", "required": ["x"], "properties": {}}},
                },
            },
        }
    )
    assert [(problem.kind, problem.path) for problem in check_tools(tools)] == [
        ("undeclared_required", "tools[0].parameters.required"),
        ("enum_of_wrong_type", "tools[0].parameters.properties.n.enum"),
        ("undeclared_required", "tools[0].parameters.properties.in.items.required"),
    ]
    assert check_tools([WEATHER]) == []
