"""Scoring of free text: ROUGE-L against a reference, and a judge where one is given.

With a judge an answer is right when the mean verdict reaches `judge.pass_score`; an answer that the judge failed on
falls back to nothing: it counts as wrong, kind `judge_failed`, and is counted beside the figures. Without one the
score is ROUGE-L's F-measure, graded, and "right" means an exact match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from stillroom.errors import ConfigError, DataError
from stillroom.evaluation.config import EvalConfig
from stillroom.evaluation.judging import Judged, judge_answers
from stillroom.evaluation.results import ItemResult
from stillroom.evaluation.scoring import CUT_OFF, Verdict
from stillroom.schema import ChatModel, Completion, Example

EMPTY, JUDGED_LOW, JUDGE_FAILED, DIFFERS = "empty", "judged_low", "judge_failed", "differs"
_WORD = re.compile(r"\w+")


class FreeText:
    """ROUGE-L and a judge.

    Args:
        judge: who judges; None scores by ROUGE-L alone.
        answers: where the judge's verdicts are cached.
    """

    def __init__(self, config: EvalConfig, *, judge: ChatModel | None = None, answers: Any = None) -> None:
        self.config, self.judge, self.answers = config, judge, answers

    def check(self, examples: Sequence[Example]) -> None:
        """Every example has a reference, unless a judge scores without."""
        for example in examples:
            if self.judge is None and not (isinstance(example.expected, str) and example.expected.strip()):
                raise DataError(
                    f"held-out example {example.id!r} ({example.source or 'unknown source'}) has no reference text.\n"
                    "help: give every held-out record its reference, or a judge."
                )

    def score(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per answer, in order."""
        texts = [completion.message.content for completion in completions]
        judged: Sequence[Judged | None] = [None] * len(texts)
        if self.judge is not None:
            judged = judge_answers(self.judge, examples, texts, self.config.judge, answers=self.answers)
        rows = zip(examples, completions, judged, strict=True)
        return [self._verdict(example, completion, found) for example, completion, found in rows]

    def extra(self, items: Sequence[ItemResult]) -> dict[str, Any]:
        """Mean ROUGE-L where there are references, and how often the judge failed."""
        scored = [rouge_l(item.expected, item.text) for item in items if isinstance(item.expected, str)]
        out: dict[str, Any] = {"rouge_l": sum(scored) / len(scored)} if scored else {}
        if self.judge is not None:
            out["judge"] = self.judge.name
            out["judge_failures"] = sum(item.kind == JUDGE_FAILED for item in items)
        return out

    def _verdict(self, example: Example, completion: Completion, judged: Judged | None) -> Verdict:
        text = completion.message.content.strip()
        cut = CUT_OFF if completion.finish_reason == "length" else ""
        if not text:
            return Verdict(False, 0.0, cut or EMPTY, "the answer is empty")
        if self.judge is not None:
            return self._judged(judged, cut)
        score = rouge_l(example.expected, text)
        same = text == example.expected.strip()
        return Verdict(same, 1.0 if same else score, "" if same else cut or DIFFERS)

    def _judged(self, judged: Judged | None, cut: str) -> Verdict:
        if judged is None or judged.score is None:
            return Verdict(False, 0.0, JUDGE_FAILED, judged.reason if judged else "", cost_usd=_cost(judged))
        ok = judged.score >= self.config.judge.pass_score
        detail = f"{judged.score:g} of 5: {judged.reason}"
        return Verdict(ok, float(ok), "" if ok else cut or JUDGED_LOW, detail, cost_usd=judged.cost_usd)


def rouge_l(reference: str, text: str) -> float:
    """F-measure of the longest common subsequence of words, 0 to 1, without stemming.

    Equal to `rouge_score`'s `rougeL` on ASCII text, whose tokens are `[a-z0-9]+`; ours are words in any script.

    Raises:
        ConfigError: rapidfuzz is not installed.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    try:
        from rapidfuzz.distance import LCSseq
    except ImportError:
        raise ConfigError("ROUGE-L needs rapidfuzz.\nhelp: pip install 'stillroom[text]'") from None
    wanted, given = _words(reference), _words(text)
    if not wanted or not given:
        return 0.0
    common = LCSseq.similarity(wanted, given)
    return 2.0 * common / (len(wanted) + len(given))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold().replace("_", " "))


def _cost(judged: Judged | None) -> float:
    return judged.cost_usd if judged else 0.0
