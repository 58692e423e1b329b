"""The report as data and as text: complete, truthful in every degenerate case, and with nothing raw in it."""

from __future__ import annotations

import json
import re

import pytest

from stillroom.evaluation import RunReport, write_report
from stillroom.evaluation.differences import mark_calls, wanted_calls
from stillroom.evaluation.headline import headline
from stillroom.evaluation.report import render
from stillroom.evaluation.results import ItemResult
from stillroom.evaluation.statistics import GapClosed
from stillroom.evaluation.wording import fraction, seconds, size, visible

from .sample import HOSTILE, item, items, run_report, tool


@pytest.fixture(scope="module")
def report() -> RunReport:
    return run_report()


def test_both_files_are_written_and_the_data_reads_back(tmp_path, report):
    path = write_report(tmp_path / "out", report)
    assert path == tmp_path / "out" / "report.html"
    assert RunReport.model_validate_json((tmp_path / "out" / "report.json").read_text()) == report


def test_every_section_stands_and_nothing_refers_outside(report):
    page = render(report)
    for anchor in ("accuracy", "failures", "side-by-side", "speed", "before", "training", "data", "plan", "reproduce"):
        assert f'<section id="{anchor}">' in page
    for text in ("stillroom distill recipes/sample.yaml", "bad_json", "epochs: 3", "Apache-2.0", "0123456789abcdef"):
        assert text in page
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page)
    assert not re.search(r"url\(|@import", page)
    assert "style=" not in page


def test_missing_parts_leave_their_sections_out(report):
    student = report.model("student").model_copy(update={"speed": None, "best": None, "size_bytes": None})
    bare = RunReport(title="t", command="c", created="now", models=(student,))
    page = render(bare)
    assert "The student reaches 0.50" in page
    for anchor in ("speed", "before", "training", "data", "plan", "side-by-side"):
        assert f'<section id="{anchor}">' not in page
    assert "no measured student" in render(RunReport(title="t", command="c", created="now", models=()))


def gap(value, low, high, reason="", teacher=0.5, student=0.3) -> GapClosed:
    known = {"value": value, "low": low, "high": high, "reason": reason, "n": 240, "samples": 9}
    return GapClosed(base=0.0, teacher=teacher, student=student, **known)


@pytest.mark.parametrize(
    ("found", "start"),
    [
        (gap(0.71, 0.52, 0.93), "The student closes 71% of the gap to its teacher (95% interval 52% to 93%): "),
        (gap(1.2, 0.9, 1.5, student=0.6), "The student passes its teacher: 0.60 against 0.50"),
        (gap(-0.2, -0.5, 0.1, student=0.0), "Training made the student worse"),
        (gap(None, None, None, "no lead", teacher=0.0), "The teacher does not lead the base student"),
        (
            gap(0.6, 0.2, None, "uncertain"),
            "The student closes 60% of the gap to its teacher (95% interval from 20%, not",
        ),
        (gap(0.6, None, None, "why"), "The student closes 60% of the gap to its teacher (no 95% interval: why)"),
    ],
)
def test_the_headline_is_no_stronger_than_its_figures(report, found, start):
    sentence = headline(report.model_copy(update={"gap": found}))
    assert sentence.startswith(start)
    assert "on 240 held-out items" in sentence
    assert "a quarter of its parameters (125M against 500M)" in sentence


def test_hostile_text_is_nowhere_raw():
    examples = (item(0, question=HOSTILE), *items(4)[1:])
    base = run_report(examples=examples, student=HOSTILE, base=HOSTILE)
    hostile = base.model_copy(
        update={
            "title": HOSTILE,
            "command": HOSTILE,
            "notes": (HOSTILE,),
            "config": {HOSTILE: HOSTILE},
            "environment": {HOSTILE: HOSTILE},
            "models": tuple(model.model_copy(update={"name": HOSTILE + model.role}) for model in base.models),
        }
    )
    page = render(hostile)
    assert "<img" not in page
    assert page.count("<script>") == 1
    assert page.count("</script>") == 1
    assert "{{ 7*7 }}" in page


def test_hidden_characters_are_shown_and_long_text_is_cut_with_a_note():
    assert visible("a\u202eb\x00c\ud800\n", 50) == ("a\\u202eb\\u0000c\\ud800\n", "")
    text, note = visible("x" * 1000, 10)
    assert text == "x" * 10
    assert note.startswith("990 more characters")


def marks(calls, expected, *tools) -> list:
    shown = [{"name": t.name, "description": "", "parameters": dict(t.parameters)} for t in tools]
    found = mark_calls(ItemResult(id="x", calls=tuple(calls), expected=expected), shown)
    return [(c.name, c.mark, [(a.name, a.mark) for a in c.arguments]) for c in found]


def test_differences_are_marked_argument_by_argument_by_the_matchers_own_rules():
    f, g = tool("f"), tool("g")
    wanted = [{"f": {"city": ["New York", "NYC"], "days": [3]}}]
    call = {"name": "f", "arguments": {"city": "new york.", "days": 4, "unit": "C"}}
    assert marks([call], wanted, f) == [("f", "same", [("city", "same"), ("days", "wrong"), ("unit", "extra")])]
    assert marks([{"name": "f", "arguments": {"days": 3}}], wanted, f)[0][2] == [("days", "same"), ("city", "missing")]
    assert marks([{"name": "g", "arguments": {"city": "x"}}], wanted, f, g) == [("g", "wrong", [("city", "same")])]
    two = [*wanted, {"g": {"city": ["Rome"]}}]
    right = {"name": "g", "arguments": {"city": "Rome"}}
    assert marks([right], two, f, g) == [("g", "same", [("city", "same")]), ("f", "missing", [])]
    assert marks([right, right], [two[1]], f, g)[1][1] == "extra"
    assert wanted_calls(wanted)[0].arguments[0].value == '"New York" or "NYC"'


def test_marks_survive_whatever_was_expected_or_answered():
    for expected in (None, "text", 3, [], [3], [{"f": 3}], [{"f": {"a": 3}}], [{}]):
        for call in ({}, {"name": 3, "arguments": None}, {"name": "f", "arguments": {"a": [float("inf")]}}):
            mark_calls(ItemResult(id="x", calls=(call,), expected=expected), [])


def test_many_items_are_cut_to_those_that_matter_and_the_rest_is_counted(report):
    few = report.model_copy(update={"evaluation": report.evaluation.model_copy(update={"report_items": 3})})
    page = render(few)
    assert page.count("<article ") == 3
    assert "21 further items stand in report.json" in page


def test_report_json_holds_plain_json(tmp_path, report):
    write_report(tmp_path, report)
    assert set(json.loads((tmp_path / "report.json").read_text())) == set(RunReport.model_fields)


def test_numbers_read_well():
    assert [seconds(x) for x in (None, 0.0384, 1.239, 59.94, 725, 10_920)] == [
        "–",
        "38 ms",
        "1.24 s",
        "59.9 s",
        "12 min 5 s",
        "3 h 2 min",
    ]
    assert [size(x) for x in (None, 12, 269_000_000, 1.5e9)] == ["–", "12 B", "269 MB", "1.5 GB"]
    assert [fraction(x) for x in (0.27, 0.5, 0.08, 0.9)] == ["a quarter", "half", "1/12", "90%"]
