"""Two or three results on the same items: differences, their significance, and the share of the gap closed."""

from __future__ import annotations

from pydantic import BaseModel

from stillroom.errors import NotEnoughData
from stillroom.evaluation import statistics
from stillroom.evaluation.config import EvalConfig
from stillroom.evaluation.results import POOLED, ItemResult, Result, graded
from stillroom.evaluation.statistics import GapClosed, Interval

SIGNIFICANT = 0.05


class Comparison(BaseModel, frozen=True, extra="forbid"):
    """First minus second, on the items that both answered.

    Attributes:
        both, only_first, only_second, neither: items by who was right.
        p_value: that there is no difference; McNemar's exact test, or sign flips for graded scores.
    """

    first: str
    second: str
    category: str
    first_value: float
    second_value: float
    difference: Interval
    p_value: float
    test: str
    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def significant(self) -> bool:
        """The p-value is below 0.05."""
        return self.p_value < SIGNIFICANT


def compare(first: Result, second: Result, config: EvalConfig = EvalConfig(), *, category: str = POOLED) -> Comparison:
    """Paired comparison of two models on their common items.

    Raises:
        NotEnoughData: no item was answered by both.
    """
    a, b = paired(first, second, category=category)
    n, right = len(a), [(x.ok, y.ok) for x, y in zip(a, b, strict=True)]
    only_first, only_second = right.count((True, False)), right.count((False, True))
    if graded(a) or graded(b):
        difference, p_value = statistics.paired_mean_difference(
            [x.score for x in a], [y.score for y in b],
            confidence=config.confidence, samples=config.bootstrap_samples, seed=config.seed,
        )  # fmt: skip
        test = "sign flips"
    else:
        difference = statistics.paired_difference(only_first, only_second, n, confidence=config.confidence)
        p_value, test = statistics.mcnemar_exact(only_first, only_second), "McNemar exact"
    return Comparison(
        first=first.model,
        second=second.model,
        category=category,
        first_value=sum(x.score for x in a) / n,
        second_value=sum(y.score for y in b) / n,
        difference=difference,
        p_value=p_value,
        test=test,
        both=right.count((True, True)),
        only_first=only_first,
        only_second=only_second,
        neither=right.count((False, False)),
    )


def gap_closed(
    base: Result, teacher: Result, student: Result, config: EvalConfig = EvalConfig(), *, category: str = POOLED
) -> GapClosed:
    """The share of the gap that the student closed, over the items that all three answered.

    Raises:
        NotEnoughData: no item was answered by all three.
    """
    columns = paired(base, teacher, student, category=category)
    scores = [[item.score for item in column] for column in columns]
    return statistics.gap_closed(
        *scores, confidence=config.confidence, samples=config.bootstrap_samples, seed=config.seed
    )


def paired(*results: Result, category: str = POOLED) -> list[list[ItemResult]]:
    """The items that every result has, in the first one's order, one list per result.

    Raises:
        NotEnoughData: they share no item.
    """
    tables = [{item.id: item for item in result.select(category)} for result in results]
    common = [name for name in tables[0] if all(name in table for table in tables[1:])]
    if not common:
        names = ", ".join(result.model for result in results)
        raise NotEnoughData(f"{names} have no answered item in common ({category}), so they cannot be compared.")
    return [[table[name] for name in common] for table in tables]
