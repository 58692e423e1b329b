"""What an evaluation found: one `ItemResult` per question, and the `Result` they add up to.

Plain frozen data that survives a round trip through JSON, so a result is an artifact and a report needs no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from stillroom.evaluation.config import Task
from stillroom.evaluation.statistics import Interval, mean_interval, wilson

Variant = Literal["plain", "best"]
POOLED = "pooled"


class ItemResult(BaseModel, frozen=True, extra="forbid"):
    """One question, one model's answer, and the verdict.

    Attributes:
        text: the answer's text. calls: what was read from it, or the calls that the engine returned.
        ok: counts as right. score: the task's own measure in 0..1; 1 or 0 where right is all there is.
        valid: the calls fit the tools' schemas (right or wrong); None where the task knows no such thing.
        kind: why it failed, from a small taxonomy; empty when it is right. detail, path: the first difference.
        label: classification: the label that was read, or None.
        expected: what counts as right, as the example has it.
        latency_s: seconds from request to last token; None where answers were computed side by side.
    """

    id: str
    category: str = ""
    text: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    ok: bool = False
    score: float = 0.0
    valid: bool | None = None
    kind: str = ""
    detail: str = ""
    path: str = ""
    label: str | None = None
    expected: Any = None
    input_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str = "stop"
    cost_usd: float = 0.0
    latency_s: float | None = None


class Result(BaseModel, frozen=True, extra="forbid"):
    """One model on one set of items.

    Attributes:
        variant: `plain`, or `best` (few-shot, constrained).
        max_tokens: the cap on an answer. shots: ids of the examples shown.
        unanswered: ids that a recorded model has no answer for; they are not counted anywhere.
        seconds: wall time of this measuring. from_cache: answers that were found stored, and took none of it.
        extra: further figures of the task (F1, ROUGE-L, the judge's own failures).
    """

    model: str
    task: Task = "function_calling"
    variant: Variant = "plain"
    items: tuple[ItemResult, ...] = ()
    unanswered: tuple[str, ...] = ()
    max_tokens: int = 0
    shots: tuple[str, ...] = ()
    constrained: bool = False
    seconds: float = 0.0
    from_cache: int = 0
    confidence: float = 0.95
    extra: dict[str, Any] = {}

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories in the order they are first met."""
        return tuple(dict.fromkeys(item.category for item in self.items))

    def select(self, category: str = POOLED) -> tuple[ItemResult, ...]:
        """The items of a category, or all of them."""
        return tuple(item for item in self.items if category in (POOLED, item.category))

    def accuracy(self, category: str = POOLED) -> Interval:
        """Share of right answers with its Wilson interval.

        Free text without a pass mark has graded scores; then the mean score with a bootstrap interval.
        """
        items = self.select(category)
        if graded(items):
            return mean_interval([item.score for item in items], confidence=self.confidence)
        return wilson(sum(item.ok for item in items), len(items), confidence=self.confidence)

    def validity(self, category: str = POOLED) -> Interval | None:
        """Share of answers that fit their schema; None where the task knows no validity."""
        known = [item.valid for item in self.select(category) if item.valid is not None]
        return wilson(sum(known), len(known), confidence=self.confidence) if known else None

    def failures(self, category: str = POOLED) -> dict[str, int]:
        """How many items failed for each reason, most frequent first."""
        return dict(Counter(item.kind for item in self.select(category) if item.kind).most_common())

    def figures(self) -> dict[str, float]:
        """Accuracy by category and pooled, as the command's last line shows it."""
        return {name: self.accuracy(name).value for name in (*sorted(c for c in self.categories if c), POOLED)}

    @property
    def cost_usd(self) -> float:
        """What the answers cost, whenever they were asked for."""
        return sum(item.cost_usd for item in self.items)

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(item.output_tokens for item in self.items)


def graded(items: Sequence[ItemResult]) -> bool:
    """True where scores are more than right and wrong."""
    return any(item.score != float(item.ok) for item in items)
