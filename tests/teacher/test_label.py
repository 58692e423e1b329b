"""Labelling: only what has no target is asked, and only what is wanted is learnt from."""

from __future__ import annotations

import pytest

from stillroom.engines import AnswerCache
from stillroom.errors import BudgetExceeded, ModelError, ModelRefused, NotRecorded
from stillroom.schema import Completion, Example, Message, Target, ToolCall, ToolSpec
from stillroom.teacher import TeacherConfig, label, normalise
from stillroom.testing import ScriptedModel

TOOL = ToolSpec("add", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
MODEL = {"engine": "openai", "url": "http://127.0.0.1:9", "model": "any"}


def config(**fields) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": MODEL, **fields})


def example(name: str, text: str = "", *, tools=(TOOL,), targets=()) -> Example:
    return Example(name, (Message("user", text or name),), tools, targets)


GOLDEN = Target(Message("assistant", "", (ToolCall("add", {"a": 0}),)), "golden")


def test_golden_examples_are_untouched_and_the_order_stays():
    golden = example("g", targets=(GOLDEN,))
    model = ScriptedModel(lambda messages, tools: "[add(a=1)]")
    labelled, report = label([example("a"), golden, example("b")], model, config())
    assert [one.id for one in labelled] == ["a", "g", "b"]
    assert labelled[1] is golden
    assert labelled[0].targets == (
        Target(Message("assistant", "", (ToolCall("add", {"a": 1}),)), "teacher", "scripted"),
    )
    assert (report.examples, report.labelled, report.asked, report.kept, report.parsed) == (3, 1, 2, 2, 2)
    assert len(model.asked) == 2


ANSWERS = {
    "right": "[add(a=1)]",
    "prose": "I would add them.",
    "invalid": "[add(b='x')]",
    "empty": "  \n",
    "cut": Completion(Message("assistant", "[add(a=1"), "scripted", "length"),
    "lost": ModelRefused("no"),
    "unrecorded": NotRecorded("no"),
    "native": Message("assistant", "", (ToolCall("add", {"a": 2}),)),
}


@pytest.mark.parametrize(
    ("keep", "kept", "dropped"),
    [
        ("all", ["right", "prose", "invalid", "native"], {}),
        ("parseable", ["right", "invalid", "native"], {"unparseable": 1}),
        ("valid", ["right", "native"], {"unparseable": 1, "invalid": 1}),
    ],
)
def test_which_answers_are_kept(keep, kept, dropped):
    labelled, report = label([example(name) for name in ANSWERS], ScriptedModel(ANSWERS), config(keep=keep))
    assert [one.id for one in labelled] == kept
    assert report.dropped == {"cut": 1, "empty": 1, "failed": 1, "not_recorded": 1} | dropped
    assert report.kept == len(kept)
    assert len(report.errors) == 2


def test_text_that_is_no_call_stays_as_the_teacher_said_it():
    labelled, _ = label([example("prose")], ScriptedModel(ANSWERS), config())
    assert labelled[0].targets[0].message == Message("assistant", "I would add them.")


def test_without_tools_an_answer_is_text_even_if_it_looks_like_a_call():
    labelled, _ = label([example("right", tools=())], ScriptedModel(ANSWERS), config(keep="valid"))
    assert labelled[0].targets[0].message == Message("assistant", "[add(a=1)]")


@pytest.mark.parametrize(
    "text",
    ["[add(a=1)]", "add(a=1)", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
     '```json\n{"name": "add", "arguments": {"a": 1}}\n```'],
)  # fmt: skip
def test_every_dialect_becomes_the_same_call(text):
    assert normalise(text, (TOOL,)) == Message("assistant", "", (ToolCall("add", {"a": 1}),))


def test_labelled_again_nothing_is_asked(tmp_path):
    examples = [example(f"e{index}") for index in range(5)]
    with AnswerCache(tmp_path) as cache:
        first, _ = label(examples, ScriptedModel(lambda m, t: "[add(a=1)]"), config(), cache)
        silent = ScriptedModel([])
        second, report = label(examples, silent, config(), cache)
    assert first == second
    assert (report.asked, report.cached, report.spent_tokens) == (0, 5, 0)
    assert report.output_tokens > 0


def test_the_recipes_budget_holds(tmp_path):
    with AnswerCache(tmp_path) as cache, pytest.raises(BudgetExceeded):
        label([example(f"e{index}") for index in range(50)], ScriptedModel(lambda m, t: "[add(a=1)]"),
              config(budget={"max_tokens": 120}, max_tokens=50), cache)  # fmt: skip


def test_no_answer_at_all_is_an_error():
    with pytest.raises(NotRecorded, match="never"):
        label([example("a"), example("b")], ScriptedModel(lambda m, t: NotRecorded("never")), config())


def test_labelled_examples_need_no_teacher():
    golden = example("g", targets=(GOLDEN,))
    labelled, report = label([golden], ScriptedModel([]), config())
    assert labelled == (golden,)
    assert report.to_dict()["labelled"] == 1


def test_what_fails_in_between_is_counted_with_its_words():
    answers = {"a": "[add(a=1)]", "b": ModelError("html")}
    _, report = label([example("a"), example("b")], ScriptedModel(answers), config())
    assert (report.dropped, report.errors) == ({"failed": 1}, ["html"])
