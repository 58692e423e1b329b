"""Evaluating: the same rules for every model, nothing asked twice, and each kind of failure told apart."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from stillroom.engines import AnswerCache
from stillroom.errors import DataError, ModelRefused, ModelUnavailable, NotEnoughData, NotRecorded
from stillroom.evaluation import (
    EvalConfig,
    Result,
    advise,
    answer_cap,
    choose_shots,
    compare,
    evaluate,
    evaluation_requests,
    gap_closed,
)
from stillroom.schema import Completion, Message, ToolCall
from stillroom.testing import ScriptedModel

from .sample import CONFIG, item, items, model

QUESTION = "What will it be like in City0?"


def answered(text: str | Completion | Message, example=None, **more) -> Result:
    example = example or item(0)
    return evaluate(ScriptedModel({example.messages[-1].content: text}), [example], CONFIG, max_tokens=32, **more)


@pytest.mark.parametrize(
    ("text", "kind", "valid"),
    [
        ('[weather_0(city="City0")]', "", True),
        ('weather_0(city="City0", days=2)', "", True),
        ('{"name": "weather_0", "arguments": {"city": "City0"}}', "", True),
        ('<tool_call>{"name": "weather_0", "arguments": {"city": "city0"}}</tool_call>', "", True),
        ('[weather_0(city="Rome")]', "wrong_value", True),
        ("[weather_0(city=3)]", "wrong_type", False),
        ("[weather_0(days=2)]", "missing_parameter", False),
        ('[weather_0(city="City0", hours=1)]', "unexpected_parameter", False),
        ('[climate(city="City0")]', "wrong_function", False),
        ('[weather_0(city="City0"), weather_0(city="City0")]', "wrong_count", True),
        ("It will be sunny.", "no_call", False),
        ("[weather_0(city=", "unparseable", False),
        ("", "no_call", False),
    ],
)
def test_every_answer_is_right_or_fails_for_one_reason(text, kind, valid):
    found = answered(text).items[0]
    assert (found.kind, found.ok, found.valid) == (kind, kind == "", valid)
    assert found.ok or found.detail


def test_words_before_a_call_are_passed_over_unless_calls_must_come_first():
    text, example = 'Here you are: [weather_0(city="City0")]', item(0)
    assert answered(text).items[0].ok
    strict = CONFIG.model_copy(update={"calls_first": True})
    found = evaluate(ScriptedModel({example.messages[-1].content: text}), [example], strict, max_tokens=32).items[0]
    assert (found.ok, found.kind) == (False, "no_call")


def test_calls_of_the_engine_count_like_calls_in_text():
    message = Message("assistant", tool_calls=(ToolCall("weather_0", {"city": "City0"}),))
    assert answered(message).items[0].ok


def test_an_unreadable_answer_that_hit_the_cap_is_cut_off():
    cut = Completion(Message("assistant", "[weather_0(city="), "m", "length", 5, 32)
    assert answered(cut).items[0].kind == "cut_off"


def test_irrelevance_wants_no_call():
    example = dataclasses.replace(item(0), category="irrelevance", expected=None)
    assert answered("None of these helps.", example).items[0].ok
    assert answered('[weather_0(city="City0")]', example).items[0].kind == "called_when_irrelevant"


def test_accuracy_is_by_category_and_pooled():
    test = items(8)
    result = evaluate(model("m", test, 5), test, CONFIG, max_tokens=32)
    assert result.figures() == {"multiple": 0.5, "simple": 0.75, "pooled": 0.625}
    assert result.accuracy("simple").n == 4
    assert result.failures() == {"no_call": 3}
    assert result.validity().value == 0.625


def test_a_result_survives_json_with_whatever_a_model_wrote():
    hostile = 'x\ud800y\x00 [weather_0(city="\ud83d")] \u202e' + "z" * 50_000
    result = answered(hostile)
    again = Result.model_validate_json(result.model_dump_json())
    assert again == result
    assert "\\ud800" in again.items[0].text


def test_nothing_is_asked_twice_when_an_evaluation_is_run_again(tmp_path):
    test = items(6)
    first = model("m", test, 4)
    one = evaluate(first, test, CONFIG, max_tokens=32, answers=tmp_path)
    again = model("m", test, 4)
    two = evaluate(again, test, CONFIG, max_tokens=32, answers=AnswerCache(tmp_path))
    assert len(first.asked) == 6
    assert again.asked == []
    assert two.from_cache == 6
    assert two.items == one.items


def test_an_interrupted_evaluation_keeps_what_it_has(tmp_path):
    test = items(4)
    answers = {example.messages[-1].content: "no" for example in test}
    broken = ScriptedModel({**answers, test[2].messages[-1].content: ModelUnavailable("down")}, "m")
    from stillroom.engines import ask, RetryConfig  # noqa: I001

    with AnswerCache(tmp_path) as cache:
        ask(broken, evaluation_requests(test, CONFIG, max_tokens=32), cache=cache, retry=RetryConfig(attempts=1))
    whole = ScriptedModel(answers, "m")
    evaluate(whole, test, CONFIG, max_tokens=32, answers=tmp_path)
    assert [messages[-1].content for messages in whole.asked] == [test[2].messages[-1].content]


def test_a_refusal_counts_as_wrong_and_a_missing_recording_is_left_out():
    test = items(3)
    prompts = [example.messages[-1].content for example in test]
    outcomes = {prompts[0]: ModelRefused("too long"), prompts[1]: NotRecorded("no answer"), prompts[2]: "x"}
    result = evaluate(ScriptedModel(outcomes), test, CONFIG, max_tokens=32)
    assert [(found.id, found.kind) for found in result.items] == [("item-0", "refused"), ("item-2", "no_call")]
    assert result.unanswered == ("item-1",)
    assert result.accuracy().n == 2


def test_a_model_that_answers_nothing_is_an_error_not_a_zero():
    test = items(2)
    with pytest.raises(NotEnoughData, match="no recorded answer"):
        evaluate(ScriptedModel({e.messages[-1].content: NotRecorded("-") for e in test}), test, CONFIG, max_tokens=8)
    with pytest.raises(ModelRefused, match="bad key"):
        evaluate(
            ScriptedModel({e.messages[-1].content: ModelRefused("bad key") for e in test}), test, CONFIG, max_tokens=8
        )
    with pytest.raises(NotEnoughData, match="no held-out examples"):
        evaluate(ScriptedModel([]), [], CONFIG, max_tokens=8)


def test_an_item_that_cannot_be_scored_is_named_before_anything_is_asked():
    scripted = ScriptedModel({})
    with pytest.raises(DataError, match=r"'item-1' \(items.jsonl:2\) cannot be scored"):
        evaluate(scripted, [item(0), dataclasses.replace(item(1), expected=None)], CONFIG, max_tokens=8)
    assert scripted.asked == []


def test_answer_cap_is_one_and_a_half_times_the_longest_training_answer():
    assert answer_cap([10, 41, 7]) == 62
    assert answer_cap([3]) == 16
    with pytest.raises(NotEnoughData, match="max_tokens"):
        answer_cap([])


def test_at_its_best_every_model_sees_the_same_short_golden_examples_and_is_constrained():
    train = [item(100 + i, split="train") for i in range(6)]
    train += [dataclasses.replace(item(200, split="train"), id="copy", targets=item(200).targets)] * 3
    shots = choose_shots(train, CONFIG)
    assert len(shots) == 2
    assert {shot.category for shot in shots} == {"simple", "multiple"}
    assert choose_shots(list(reversed(train)), CONFIG) == shots
    requests = evaluation_requests(items(2), CONFIG, max_tokens=9, best=True, shots=shots)
    assert all(request.params.constrain and request.params.max_tokens == 9 for request in requests)
    system = requests[0].messages[0]
    assert system.role == "system"
    assert f'[weather_{shots[0].id.split("-")[1]}(city="City' in system.content
    assert requests[0].messages[0] == requests[1].messages[0]
    plain = evaluation_requests(items(1), CONFIG, max_tokens=9, shots=shots)[0]
    assert plain.messages == items(1)[0].messages
    assert not plain.params.constrain


def test_few_shot_examples_keep_to_their_room_and_to_golden_answers():
    train = [item(100, split="train", question="long " * 400), item(101, split="train")]
    assert [shot.id for shot in choose_shots(train, CONFIG)] == ["item-101"]
    assert choose_shots(train, EvalConfig(few_shot_chars=10)) == ()
    assert choose_shots([dataclasses.replace(train[1], targets=())], CONFIG) == ()


def test_comparison_is_paired_on_common_items_only():
    test = items(12)
    good, bad = model("good", test, 10), model("bad", test, 4)
    first = evaluate(good, test, CONFIG, max_tokens=8)
    second = evaluate(bad, test[:8], CONFIG, max_tokens=8)
    found = compare(first, second, CONFIG)
    assert (found.both, found.only_first, found.only_second, found.neither) == (4, 4, 0, 0)
    assert found.p_value == 0.125
    assert found.difference.n == 8
    with pytest.raises(NotEnoughData, match="in common"):
        compare(first, evaluate(model("x", (item(50),), 1), [item(50)], CONFIG, max_tokens=8), CONFIG)


def test_gap_closed_over_results():
    test = items(40)
    base, teacher, student = (
        evaluate(model(n, test, k), test, CONFIG, max_tokens=8) for n, k in zip("bts", (0, 30, 20), strict=True)
    )
    gap = gap_closed(base, teacher, student, CONFIG)
    assert gap.value == pytest.approx(2 / 3)
    assert gap.low < gap.value < gap.high


def results(base: int, teacher: int, base_best: int | None = None, n: int = 100):
    test = items(n)

    def run(name: str, right: int) -> Result:
        return evaluate(model(name, test, right), test, CONFIG, max_tokens=8)

    best = run("base", base_best) if base_best is not None else None
    return advise(run("base", base), run("teacher", teacher), CONFIG, base_best=best)


def test_advice_says_plainly_when_distillation_is_not_worth_it():
    assert results(10, 60).worth_it
    assert "does not lead" in results(60, 50).headline
    assert "could be chance" in results(50, 53).headline
    small = results(5, 90, 88)
    assert not small.worth_it
    assert "few-shot" in small.headline
    tiny = EvalConfig(min_gap=0.2, bootstrap_samples=200)
    test = items(100)
    low, high = (evaluate(model("m", test, right), test, tiny, max_tokens=8) for right in (50, 60))
    assert "less than the least gap" in advise(low, high, tiny).headline


def test_importing_the_room_loads_no_torch_and_no_http():
    code = (
        "import sys, stillroom.evaluation as e; e.EvalConfig, e.evaluate, e.gap_closed;"
        "assert not {'torch', 'transformers', 'httpx', 'numpy', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
