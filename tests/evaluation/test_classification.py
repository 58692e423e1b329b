"""Labels are read from text as a person would, and figures agree with scikit-learn's definitions."""

from __future__ import annotations

import random

import pytest

from stillroom.errors import DataError
from stillroom.evaluation import EvalConfig, evaluate
from stillroom.evaluation.classification import classification_figures, read_label
from stillroom.schema import Example, Message
from stillroom.testing import ScriptedModel

LABELS = ("spam", "not spam", "needs_review")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("spam", ["spam"]),
        ("  **Spam**.", ["spam"]),
        ("Label: not spam", ["not spam"]),
        ("The answer is needs review", ["needs_review"]),
        ("This is clearly not spam, I think.", ["not spam"]),
        ("It is spam, or maybe it needs review", ["needs_review", "spam"]),
        ("spammy", []),
        ("", []),
        ("x" * 100_000, []),
    ],
)
def test_a_label_is_read_from_text(text, found):
    assert sorted(read_label(text, LABELS)) == found


def test_figures_by_hand():
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("b", None), ("c", "a")]
    found = classification_figures(pairs, ["a", "b", "c"])
    assert found["labels"]["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "n": 2}
    assert found["labels"]["c"]["f1"] == 0
    assert found["macro_precision"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["micro_precision"] == 2 / 4
    assert found["micro_recall"] == 2 / 5


def test_figures_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(5)
    labels = ["a", "b", "c", "d"]
    pairs = [(rng.choice(labels), rng.choice([*labels[:3], None])) for _ in range(200)]
    ours = classification_figures(pairs, labels)
    wanted, read = [w for w, _ in pairs], [r or "none" for _, r in pairs]
    for average in ("macro", "micro"):
        theirs = metrics.precision_recall_fscore_support(wanted, read, labels=labels, average=average, zero_division=0)
        assert [ours[f"{average}_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(theirs[:3])


def example(index: int, label: object, text: str) -> Example:
    return Example(f"e{index}", (Message("user", text),), expected=label, category="mail", source=f"mail.csv:{index}")


def test_evaluating_labels_counts_each_kind_of_failure():
    config = EvalConfig(task="classification", labels=LABELS)
    answers = {"1": "Spam!", "2": "spam", "3": "spam or needs review", "4": "I cannot say"}
    wanted = ["spam", "not spam", "spam", "spam"]
    examples = [example(i, label, text) for i, (label, text) in enumerate(zip(wanted, answers, strict=True))]
    result = evaluate(ScriptedModel(answers), examples, config, max_tokens=8, best=True)
    assert result.accuracy().value == 0.25
    assert result.failures() == {"wrong_label": 1, "ambiguous": 1, "no_label": 1}
    assert result.validity().value == 0.5
    assert result.extra["micro_recall"] == 0.25
    assert not result.constrained


def test_items_without_a_label_or_with_a_strange_one_are_named():
    config = EvalConfig(task="classification", labels=("a", "b"))
    with pytest.raises(DataError, match=r"'e7' \(mail.csv:7\) has no label"):
        evaluate(ScriptedModel({}), [example(7, None, "?")], config, max_tokens=8)
    with pytest.raises(DataError, match=r"labels c occur in the data"):
        evaluate(ScriptedModel({}), [example(7, "c", "?")], config, max_tokens=8)
    same = EvalConfig(task="classification", labels=("a b", "A_b"))
    with pytest.raises(DataError, match="differ only in case"):
        evaluate(ScriptedModel({}), [example(7, "a b", "?")], same, max_tokens=8)
