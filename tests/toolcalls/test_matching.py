"""Promises of `match` and `golden_call`. Minimal pairs: each case differs from a right answer in one thing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bfcl_checker import entries, load_theirs, python_calls
from stillroom.errors import DataError
from stillroom.schema import ToolCall, ToolSpec
from stillroom.toolcalls import FAILURE_KINDS, expected_from, golden_call, match, parse_calls, read_tools
from tests.toolcalls.strategies import arguments_of, fuzz_count, tools

DEFECTS = json.loads(Path(__file__).with_name("bfcl_defects.json").read_text(encoding="utf-8"))
needs_bfcl = pytest.mark.skipif(importlib.util.find_spec("bfcl_eval") is None, reason="bfcl-eval is not installed")

TOOLS = read_tools(
    [
        {
            "name": "geo.find",
            "parameters": {
                "type": "dict",
                "required": ["city", "n"],
                "properties": {
                    "city": {"type": "string"},
                    "n": {"type": "integer"},
                    "ratio": {"type": "float"},
                    "deep": {"type": "boolean"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "sizes": {"type": "array", "items": {"type": "float"}},
                    "at": {"type": "tuple", "items": {"type": "float"}},
                    "grid": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
                    "filter": {"type": "dict", "properties": {"kind": {"type": "string"}, "top": {"type": "integer"}}},
                    "rows": {"type": "array", "items": {"type": "dict"}},
                    "data": {"type": "any"},
                    "unused": {"type": "string"},
                },
            },
        },
        {"name": "other", "parameters": {"type": "dict", "required": [], "properties": {"x": {"type": "integer"}}}},
    ]
)
TRUTH = {
    "city": ["San José, CA", "SJ"],
    "n": [3],
    "ratio": ["", 2.0],
    "deep": ["", True],
    "tags": ["", ["a b", "C"]],
    "sizes": ["", [1.5, 2.0]],
    "at": ["", [1.0, 2.0]],
    "grid": ["", [[1, 2], [3]]],
    "filter": ["", {"kind": ["Open-Air"], "top": ["", 5]}],
    "rows": ["", [{"a": [1], "b": ["X"]}, {"a": [2], "b": ["", "Y"]}]],
    "data": ["", "my_data"],
}
RIGHT = {"city": "SJ", "n": 3}


def verdict(arguments, name="geo.find", category="simple", truth=None, **options):
    result = match([ToolCall(name, arguments)], [{"geo.find": truth or TRUTH}], TOOLS, category, **options)
    assert result.ok == (result.kind == "")
    assert result.kind in ("", *FAILURE_KINDS)
    return result


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"city": "san jose ca".replace("e", "é")},
        {"city": "SAN JOSÉ.,/-_*^CA"},
        {"ratio": 2},
        {"ratio": 2.0},
        {"deep": True},
        {"tags": ["AB", "c"]},
        {"tags": []},
        {"sizes": [1.5, 2.0]},
        {"at": [1.0, 2.0]},
        {"grid": [[1, 2], [3]]},
        {"filter": {"kind": "open air"}},
        {"filter": {"top": 5, "kind": "Open-Air"}},
        {"rows": [{"a": 1, "b": "x"}, {"a": 2}]},
        {"data": "MY DATA"},
    ],
)
def test_what_bfcl_accepts_is_right(more):
    assert verdict(RIGHT | more).ok


@pytest.mark.parametrize(
    ("more", "kind", "path"),
    [
        ({"city": "Oslo"}, "wrong_value", "city"),
        ({"city": "San José; CA"}, "wrong_value", "city"),
        ({"city": ["SJ"]}, "wrong_type", "city"),
        ({"city": None}, "wrong_type", "city"),
        ({"n": 4}, "wrong_value", "n"),
        ({"n": 3.0}, "wrong_type", "n"),
        ({"n": "3"}, "wrong_type", "n"),
        ({"n": True}, "wrong_type", "n"),
        ({"ratio": 2.5}, "wrong_value", "ratio"),
        ({"ratio": "2.0"}, "wrong_type", "ratio"),
        ({"ratio": 10**400}, "wrong_type", "ratio"),
        ({"deep": False}, "wrong_value", "deep"),
        ({"deep": 1}, "wrong_type", "deep"),
        ({"tags": ["C", "a b"]}, "wrong_value", "tags"),
        ({"tags": ["a b"]}, "wrong_value", "tags"),
        ({"tags": "a b, C"}, "wrong_type", "tags"),
        ({"sizes": [1.5, 3.0]}, "wrong_value", "sizes"),
        ({"grid": [[1, 2], [4]]}, "wrong_value", "grid"),
        ({"grid": [[1, 2, 3]]}, "wrong_value", "grid"),
        ({"filter": {"kind": "closed"}}, "wrong_value", "filter"),
        ({"filter": {"top": 5}}, "wrong_value", "filter"),
        ({"filter": {"kind": "Open-Air", "top": 6}}, "wrong_value", "filter"),
        ({"filter": {"kind": "Open-Air", "more": 1}}, "wrong_value", "filter"),
        ({"filter": [1]}, "wrong_type", "filter"),
        ({"rows": [{"a": 2}, {"a": 1, "b": "x"}]}, "wrong_value", "rows"),
        ({"rows": [{"a": 1, "b": "x"}]}, "wrong_value", "rows"),
        ({"rows": [{"a": 1}, {"a": 2}]}, "wrong_value", "rows"),
        ({"data": "other"}, "wrong_value", "data"),
        ({"data": 3}, "wrong_type", "data"),
        ({"unused": "x"}, "unexpected_parameter", "unused"),
        ({"nowhere": "x"}, "unexpected_parameter", "nowhere"),
    ],
)
def test_one_thing_wrong_has_its_kind_and_place(more, kind, path):
    result = verdict(RIGHT | more)
    assert (result.kind, result.path) == (kind, f"calls[0].{path}")
    assert "got" in result.detail


@pytest.mark.parametrize("name", ["geo.Find", "find", "geo_find", "other"])
def test_a_wrong_function_is_wrong(name):
    result = verdict(RIGHT, name)
    assert result.kind == "wrong_function"
    assert result.detail == f"wanted geo.find, got {name}"


def test_a_required_parameter_must_be_there_even_where_the_truth_marks_it_optional():
    assert verdict({"n": 3}).kind == "missing_parameter"
    assert verdict({"city": "SJ"}, truth=TRUTH | {"n": ["", 3]}).kind == "missing_parameter"


def test_a_parameter_without_the_optional_mark_must_be_there():
    assert verdict(RIGHT, truth=TRUTH | {"deep": [True]}).kind == "missing_parameter"


def test_a_variable_is_compared_exactly():
    truth = TRUTH | {"n": ["user_n"]}
    assert verdict({"city": "SJ", "n": "user_n"}, truth=truth).ok
    assert verdict({"city": "SJ", "n": "USER_N"}, truth=truth).kind == "wrong_value"
    assert verdict({"city": "SJ", "n": 3}, truth=truth).kind == "wrong_value"


def test_names_without_dots_match_where_the_model_was_shown_them_so():
    assert verdict(RIGHT, "geo_find", underscore_names=True).ok
    assert verdict(RIGHT, "geo.find", underscore_names=True).kind == "wrong_function"
    shown = [ToolSpec("geo_find", "", TOOLS[0].parameters)]
    assert match([ToolCall("geo_find", RIGHT)], [{"geo.find": TRUTH}], shown, "simple", underscore_names=True).ok


A, B = ToolCall("other", {"x": 1}), ToolCall("other", {"x": 2})
TWO = [{"other": {"x": [1]}}, {"other": {"x": [2]}}]


@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        ([A, B], ""),
        ([B, A], ""),
        ([A, A], "wrong_value"),
        ([A], "wrong_count"),
        ([A, B, B], "wrong_count"),
        ([A, ToolCall("geo.find", RIGHT)], "wrong_function"),
        ([], "no_call"),
        (None, "unparseable"),
    ],
)
def test_parallel_calls_match_in_any_order(calls, kind):
    assert match(calls, TWO, TOOLS, "live_parallel").kind == kind
    assert match(calls, TWO, TOOLS, "parallel_multiple").kind == kind


def test_parallel_matching_is_greedy_as_in_bfcl():
    either_first = [{"other": {"x": [1, 2]}}, {"other": {"x": [1]}}]
    assert match([B, A], either_first, TOOLS, "parallel").ok
    assert not match([A, B], either_first, TOOLS, "parallel").ok


@pytest.mark.parametrize("category", ["simple_python", "live_simple", "multiple", "live_multiple"])
def test_single_categories_want_exactly_one_call(category):
    one = [{"other": {"x": [1]}}]
    assert match([A], one, TOOLS, category).ok
    assert match([A, A], one, TOOLS, category).kind == "wrong_count"
    assert match([], one, TOOLS, category).kind == "no_call"
    assert match(None, one, TOOLS, category).kind == "unparseable"


@pytest.mark.parametrize(
    ("category", "calls", "kind"),
    [
        ("irrelevance", (), ""),
        ("live_irrelevance", None, ""),
        ("irrelevance", (A,), "called_when_irrelevant"),
        ("live_relevance", (A,), ""),
        ("live_relevance", (), "no_call"),
        ("live_relevance", None, "unparseable"),
    ],
)
def test_relevance_is_whether_anything_is_called(category, calls, kind):
    assert match(calls, None, TOOLS, category).kind == kind


@pytest.mark.parametrize("expected", [None, "x", [3], [{}], [{"other": {"x": 1}}], [{"a": {}, "b": {}}], [{"no": {}}]])
def test_a_truth_of_another_form_is_the_callers_mistake(expected):
    with pytest.raises(DataError):
        match([A], expected, TOOLS, "simple")


def test_a_golden_call_takes_the_first_value_and_leaves_out_what_may_be():
    truth = [{"geo.find": TRUTH | {"filter": [{"top": ["", 5], "kind": ["Open-Air"]}], "deep": [True, ""]}}]
    (golden,) = golden_call(truth, TOOLS)

    assert golden.name == "geo.find"
    assert golden.arguments == {"city": "San José, CA", "n": 3, "deep": True, "filter": {"kind": "Open-Air"}}
    assert list(golden.arguments) == ["city", "n", "deep", "filter"]
    assert match([golden], truth, TOOLS, "simple").ok


def test_a_golden_call_fills_a_required_parameter_whatever_the_truth_marks():
    (golden,) = golden_call([{"geo.find": {"city": ["", "SJ"], "n": [""]}}], TOOLS)
    assert golden.arguments == {"city": "SJ", "n": ""}


def test_a_right_answer_makes_a_truth_that_accepts_it_and_not_its_alternatives():
    arguments = RIGHT | {"filter": {"kind": ["a", "b"]}, "rows": [{"a": [1]}], "sizes": [1, 2.5], "data": {"k": [1]}}
    truth = expected_from([ToolCall("geo.find", arguments)], TOOLS)

    assert match([ToolCall("geo.find", arguments)], truth, TOOLS, "simple").ok
    assert match(golden_call(truth, TOOLS), truth, TOOLS, "simple").ok
    for wrong in ({"filter": {"kind": "a"}}, {"rows": [{"a": 1}]}, {"sizes": [1, 2]}, {"data": {"k": 1}}):
        assert not match([ToolCall("geo.find", arguments | wrong)], truth, TOOLS, "simple").ok


@settings(max_examples=fuzz_count(30), deadline=None)
@given(data=st.data(), tool=tools)
def test_any_valid_call_makes_a_truth_that_accepts_it(data, tool):
    call = ToolCall(tool.name, data.draw(arguments_of(tool.parameters)))
    truth = expected_from([call, call], [tool])
    assert match([call, call], truth, [tool], "").ok


# Ground truths that accept no answer at all: no acceptable value is listed, or only a parameter that is not declared.
UNSATISFIABLE = {"live_simple_106-63-0", "live_simple_112-68-0", "live_multiple_862-181-3", "live_multiple_964-207-0"}


@needs_bfcl
@pytest.mark.parametrize(
    "category",
    ["simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple", "live_parallel",
     "live_parallel_multiple"],
)  # fmt: skip
def test_every_golden_answer_of_bfcl_is_right_but_for_four_that_nothing_satisfies(category):
    for name, raw, expected in entries(category):
        tools = read_tools(raw)
        assert match(golden_call(expected, tools), expected, tools, category).ok == (name not in UNSATISFIABLE), name


@needs_bfcl
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect["kind"])
def test_each_disagreement_with_bfcl_is_a_defect_of_theirs(defect):
    text = defect["call"].replace("HUGE", "1" + "0" * 350)
    tools, expected, category = read_tools(defect["tools"]), defect["expected"], defect["category"]

    assert load_theirs().check(defect["tools"], python_calls(text), expected, category) == defect["theirs"]
    assert match(parse_calls(text), expected, tools, category).kind == defect["ours"]


def test_a_call_never_makes_matching_raise():
    for value in (10**5000, [[]] * 3, {"a": {"b": [None]}}, "\ud800", float("nan")):
        for key in TRUTH:
            assert not verdict(RIGHT | {key: value}).ok
