"""What every task shares: a `Scorer` turns examples and answers into verdicts.

`scorer_for(config)` chooses by task. Scorers see whole batches, since a judge asks its own model for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stillroom.errors import ConfigError
from stillroom.evaluation.config import EvalConfig
from stillroom.evaluation.results import ItemResult
from stillroom.schema import Completion, Example

CUT_OFF = "cut_off"
"""Failure kind of every task: the answer ran into the token cap before it was complete."""

REFUSED = "refused"
"""Failure kind of every task: the model refused, or could not take, the request."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scorer says of one answer; the fields are those of `ItemResult`."""

    ok: bool
    score: float
    kind: str = ""
    detail: str = ""
    path: str = ""
    valid: bool | None = None
    calls: tuple[dict[str, Any], ...] = ()
    label: str | None = None
    cost_usd: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


class Scorer(Protocol):
    """A task's rule for right and wrong."""

    def check(self, examples: Sequence[Example]) -> None:
        """Raise DataError for examples that this task cannot score."""
        ...

    def score(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per answer, in order."""
        ...

    def extra(self, items: Sequence[ItemResult]) -> dict[str, Any]:
        """Further figures of the task over all items, such as F1 or ROUGE-L."""
        ...


def scorer_for(config: EvalConfig, *, judge: Any = None, answers: Any = None) -> Scorer:
    """The scorer of the configured task.

    Args:
        judge: free text: a ChatModel that scores answers by `config.judge`; None scores by ROUGE-L alone.
        answers: where the judge's verdicts are cached.

    Raises:
        ConfigError: a judge is given to a task that has none.
    """
    if judge is not None and config.task != "text":
        raise ConfigError(f"a judge scores free text only, but evaluation.task is {config.task!r}.")
    if config.task == "function_calling":
        from stillroom.evaluation.function_calling import FunctionCalling

        return FunctionCalling(config.calls_first)
    if config.task == "classification":
        from stillroom.evaluation.classification import Classification

        return Classification(config.labels)
    from stillroom.evaluation.free_text import FreeText

    return FreeText(config, judge=judge, answers=answers)
