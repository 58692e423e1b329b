"""Whatever a model, a judge or a data set writes: a verdict, never an exception outside the project's own tree."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.evaluation.classification import Classification, read_label
from stillroom.evaluation.differences import mark_calls
from stillroom.evaluation.function_calling import FunctionCalling
from stillroom.evaluation.judging import read_verdict
from stillroom.evaluation.measuring import _item
from stillroom.evaluation.results import ItemResult
from stillroom.evaluation.wording import visible
from stillroom.schema import Completion, Message, to_dict

from .sample import item

EXAMPLES = int(os.environ.get("STILLROOM_FUZZ_EXAMPLES", "150"))
some = settings(max_examples=EXAMPLES, deadline=None)

PIECES = ["[weather_0(", 'city="City0"', "city=", ")]", "}", '{"name":', "<tool_call>", "VERDICT: ", "4", "spam", ","]
fragments = st.sampled_from([*PIECES, "\ud800", "\u202e", "1e999", "[" * 50])
text = st.one_of(st.text(), st.lists(fragments, max_size=12).map("".join))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


@given(text, st.sampled_from(["stop", "length"]))
@some
def test_any_text_gets_a_verdict_that_can_be_stored(answer, finish):
    completion = Completion(Message("assistant", answer), "m", finish)
    verdict = FunctionCalling().score([item(0)], [completion])[0]
    assert verdict.ok or verdict.kind
    stored = _item(item(0), completion, verdict)
    assert ItemResult.model_validate_json(stored.model_dump_json()).kind == verdict.kind


@given(text)
@some
def test_any_text_is_read_as_labels_and_verdicts(answer):
    assert set(read_label(answer, ["spam", "ham"])) <= {"spam", "ham"}
    assert read_verdict(answer) in (None, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)
    verdict = Classification(["spam", "ham"]).score([item(0)], [Completion(Message("assistant", answer), "m")])[0]
    assert verdict.kind
    shown, _ = visible(answer, 40)
    shown.encode()


@given(json_values, st.lists(st.dictionaries(st.sampled_from(["name", "arguments", "x"]), json_values), max_size=3))
@some
def test_any_answer_is_laid_beside_any_expectation(expected, calls):
    calls = [{**call, "arguments": call["arguments"]} for call in calls if isinstance(call.get("arguments"), dict)]
    mark_calls(ItemResult(id="x", calls=tuple(calls), expected=expected), [to_dict(tool) for tool in item(1).tools])
