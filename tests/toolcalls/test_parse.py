"""Promises of `parse_calls` and `render_calls`."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from stillroom.errors import DataError, ParseError
from stillroom.schema import ToolCall, canonical_json, to_dict
from stillroom.toolcalls import CallParseError, Limits, may_begin_calls, parse_calls, render_calls
from tests.toolcalls.strategies import call_lists, fuzz_count

F = ToolCall("f", {"a": 1})
G = ToolCall("g", {"b": "x"})
DIALECTS = ("python", "json", "hermes", "llama")


@settings(max_examples=fuzz_count(30), deadline=None)
@given(calls=call_lists)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_rendered_is_read_back_unchanged(dialect, calls):
    text = render_calls(calls, dialect)

    for read_as in (dialect, "auto"):
        again = parse_calls(text, read_as)
        assert again == calls
        # As JSON text too, in which True is not 1 and 1 is not 1.0.
        assert [canonical_json(to_dict(call)) for call in again] == [canonical_json(to_dict(call)) for call in calls]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[f(a=1)]", (F,)),
        ("f(a=1)", (F,)),
        ("  [ f ( a = 1 , ) , g(b='x') , ]  ", (F, G)),
        ("f(a=1), g(b='x')", (F, G)),
        ("f(a=1)\ng(b='x')", (F, G)),
        ("f(a=1); g(b='x')", (F, G)),
        ("[]", ()),
        ("[f()]", (ToolCall("f", {}),)),
        ("[math.factorial(n=-5)]", (ToolCall("math.factorial", {"n": -5}),)),
        ("[get-weather(Content-Type='a')]", (ToolCall("get-weather", {"Content-Type": "a"}),)),
        ("[f(año=1)]", (ToolCall("f", {"año": 1}),)),
        ('[f(**{"a b": 1}, c=2)]', (ToolCall("f", {"a b": 1, "c": 2}),)),
        ("[f(a=(1, 2), b=(3,), c=(4), d=())]", (ToolCall("f", {"a": [1, 2], "b": [3], "c": 4, "d": []}),)),
        ("[f(a=True, b=false, c=None, d=null)]", (ToolCall("f", {"a": True, "b": False, "c": None, "d": None}),)),
        ("[f(a=1e3, b=-.5, c=2., d=+7, e=1_0)]", (ToolCall("f", {"a": 1e3, "b": -0.5, "c": 2.0, "d": 7, "e": 10}),)),
        ("[f(a={'k': {'n': [1]}})]", (ToolCall("f", {"a": {"k": {"n": [1]}}}),)),
        (r"[f(a='it\'s', b='\x41\101\u00e9\d\/')]", (ToolCall("f", {"a": "it's", "b": r"AAé\d\/"}),)),
        (r'[f(a="\ud83d\ude00")]', (ToolCall("f", {"a": "😀"}),)),
        ('[f(a="""x "y"\nz""", b=\'\')]', (ToolCall("f", {"a": 'x "y"\nz', "b": ""}),)),
    ],
)  # fmt: skip
def test_python_text_is_read(text, expected):
    assert parse_calls(text, "python") == expected
    assert parse_calls(text) == expected


@pytest.mark.parametrize(
    ("dialect", "text", "expected"),
    [
        ("json", '{"name": "f", "arguments": {"a": 1}}', (F,)),
        ("json", '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "input": {"b": "x"}}]', (F, G)),
        ("json", "[{'name': 'f', 'arguments': {'a': 1}}]", (F,)),
        ("json", '{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', (F,)),
        ("json", '{"toolUse": {"toolUseId": "1", "name": "f", "input": {"a": 1}}}', (F,)),
        ("json", '{"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}', (F,)),
        ("json", '{"name": "f"}', (ToolCall("f", {}),)),
        ("json", '{"name": "f", "arguments": null}', (ToolCall("f", {}),)),
        ("json", r'{"name": "f", "arguments": {"a": "\/\u00e9"}}', (ToolCall("f", {"a": "/é"}),)),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', (F,)),
        ("hermes", 'Now: <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call> ok', (F,)),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', (F,)),
        ("llama", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "input": {"b": "x"}}', (F, G)),
        ("llama", '<|python_tag|>f(a=1)', (F,)),
        ("llama", '{"name": "f", "parameters": {"a": 1}}', (F,)),
        ("llama", '<function=f>{"a": 1}</function>', (F,)),
    ],
)  # fmt: skip
def test_every_dialect_is_read_and_recognised(dialect, text, expected):
    assert parse_calls(text, dialect) == expected
    assert parse_calls(text, "auto") == expected


@pytest.mark.parametrize(
    "text",
    [
        "Sure, I will: [f(a=1)]",
        "[f(a=1)] gives the weather.",
        "```python\n[f(a=1)]\n```",
        "Here:\n```json\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n```\nAnything else?",
        "```\nf(a=1)",
        "I call\nf(a=1)\nand wait.",
        "Use `[f(a=1)]`.",
        "<think>maybe g(b=2)?\n[g(b=2)]</think>\n[f(a=1)]",
    ],
)  # fmt: skip
def test_words_around_one_group_of_calls_are_passed_over(text):
    assert parse_calls(text) == (F,)


def test_tags_and_fences_inside_a_string_mean_nothing():
    inside = "<tool_call>{}</tool_call> ```python\n[g(b=1)]\n``` <|python_tag|>"
    call = ToolCall("f", {"a": inside})
    assert parse_calls(render_calls([call])) == (call,)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "no_call"),
        ("I cannot help with that.", "no_call"),
        ("Paris (the capital) is nice.", "no_call"),
        ("[1] says so.", "no_call"),
        ("Use get_weather(city='Paris') for that.", "no_call"),
        ("<think>f(a=1)", "no_call"),
        ("[f(a=1)] or [g(b=2)]", "ambiguous"),
        ("[f(1)]", "positional_argument"),
        ("[f('x', a=1)]", "positional_argument"),
        ("[f(a=x)]", "bare_name"),
        ("[f(a=g(b=1))]", "bare_name"),
        ("[f(a=data['x'])]", "bare_name"),
        ("[f(a=nan)]", "bare_name"),
        ("[f(a=1, a=2)]", "duplicate"),
        ('[f(a={"k": 1, "k": 2})]', "duplicate"),
        ("[f(a=1", "syntax"),
        ("[f(a=1 + 2)]", "syntax"),
        ("[f(a=1/3)]", "syntax"),
        ("[f(a='x\ny')]", "syntax"),
        ("[f(a='x)]", "syntax"),
        ("[f(a=007)]", "syntax"),
        ("[f(a=1e999)]", "syntax"),
        ("[f(a={1, 2})]", "syntax"),
        ("[f(a={1: 2})]", "syntax"),
        ("[f(a=['x' 'y'])]", "syntax"),
        ("[f(a='\\ud800')]", "syntax"),
        ("[f(a='\ud800')]", "syntax"),
        ("<function=\ud800>{}</function>", "no_call"),
        ("[f(a=1), 3]", "syntax"),
        ('{"name": "f", "arguments": [1]}', "syntax"),
        ('{"name": "f", "arguments": "{\\"a\\": x}"}', "bare_name"),
        ('{"arguments": {}}', "syntax"),
        ('{"tool_calls": [{"tool_calls": []}]}', "syntax"),
        ("[f(a=" + "9" * 401 + ")]", "too_large"),
        ("[f(a=" + "[" * 100 + "]" * 100 + ")]", "too_large"),
        ("[" + "f()," * 200 + "]", "too_large"),
    ],
)
def test_what_is_no_call_is_refused_with_its_kind(text, kind):
    with pytest.raises(CallParseError) as caught:
        parse_calls(text)
    assert caught.value.kind == kind
    assert 0 <= caught.value.position <= len(text)


@pytest.mark.parametrize(("text", "position"), [("[f(a=1, b=oops)]", 10), ("[f(a=1) g()]", 8), ("  [f(a='x)]", 7)])
def test_an_error_says_where(text, position):
    with pytest.raises(ParseError) as caught:
        parse_calls(text, "python")
    assert caught.value.position == position


def test_limits_bound_length_depth_values_and_calls():
    text = "[f(a=[1, [2]]), g()]"
    parse_calls(text, limits=Limits(text_chars=20, depth=2, calls=2, values=4))
    for limits in (Limits(text_chars=19), Limits(depth=1), Limits(calls=1), Limits(values=3)):
        with pytest.raises(CallParseError) as caught:
            parse_calls(text, limits=limits)
        assert caught.value.kind == "too_large"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {"a", "b"}, b"x", "\ud800", object()])
def test_what_is_not_json_is_not_rendered(value):
    with pytest.raises(DataError, match="argument of call 0"):
        render_calls([ToolCall("f", {"a": [value]})])


def test_no_calls_render_to_what_reads_as_none():
    assert parse_calls(render_calls([], "python")) == parse_calls(render_calls([], "json")) == ()


def test_a_name_that_python_cannot_hold_is_refused_there_and_written_in_json():
    call = ToolCall("a b", {})
    with pytest.raises(DataError, match="cannot be written"):
        render_calls([call], "python")
    assert parse_calls(render_calls([call], "json")) == (call,)


def test_an_unknown_dialect_is_the_callers_mistake():
    with pytest.raises(ValueError, match="choose one of"):
        parse_calls("[]", "xml")
    with pytest.raises(ValueError, match="choose one of"):
        render_calls([], "xml")


@settings(max_examples=fuzz_count(30), deadline=None)
@given(calls=call_lists)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_may_begin_at_every_step_of_writing_them(dialect, calls):
    text = render_calls(calls, dialect)
    assert all(may_begin_calls(text[:length]) for length in range(len(text) + 1))


@pytest.mark.parametrize("text", ["", "\n [", "get", "get_weather(", " a.b(x=", "<think>", "```json", "To"])
def test_what_may_become_calls_is_given_time(text):
    assert may_begin_calls(text)


@pytest.mark.parametrize("text", ["Here is", "get weather", "Sure.\n", "Sure, [f()]", "(f())", "def f(a):", "f: [g()]"])
def test_what_begins_with_words_is_known_at_once(text):
    assert not may_begin_calls(text)
