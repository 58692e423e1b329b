"""`evaluate`: put every held-out question to a model, and score the answers.

Answers go through `engines.ask`, so each is stored when it arrives: an evaluation that was interrupted asks only
for what is missing. Rules are the same for every model: the same items, the same cap on an answer, greedy decoding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stillroom.engines import AnswerCache, AskStats, Request, ask
from stillroom.errors import ModelError, ModelRefused, NotEnoughData, NotRecorded
from stillroom.evaluation.config import EvalConfig
from stillroom.evaluation.few_shot import with_shots
from stillroom.evaluation.results import ItemResult, Result
from stillroom.evaluation.scoring import REFUSED, Scorer, Verdict, scorer_for
from stillroom.evaluation.wording import clean
from stillroom.schema import ChatModel, Completion, Example, GenerateParams

_MINIMUM_CAP = 16


def answer_cap(training_answer_tokens: Iterable[int], config: EvalConfig = EvalConfig()) -> int:
    """Tokens that an answer may take: `answer_cap_ratio` times the longest training answer, rounded up.

    Raises:
        NotEnoughData: there is no training answer to take the length from.
    """
    longest = max(training_answer_tokens, default=0)
    if longest == 0:
        raise NotEnoughData(
            "no training answer to take the answer cap from.\n"
            "help: give max_tokens where a model is evaluated without a training set."
        )
    return max(_MINIMUM_CAP, math.ceil(config.answer_cap_ratio * longest))


def check_items(examples: Sequence[Example], config: EvalConfig) -> None:
    """Return where the task can score every example. Asks nobody, so that a run knows before it spends anything.

    Raises:
        NotEnoughData, DataError, ConfigError: as `evaluate`.
    """
    _check(examples, scorer_for(config, judge=config.judge.model))


def _check(examples: Sequence[Example], scorer: Scorer) -> None:
    if not examples:
        raise NotEnoughData("there are no held-out examples to evaluate on.\nhelp: set `data.test` to their number.")
    scorer.check(examples)


def evaluate(
    model: ChatModel,
    examples: Sequence[Example],
    config: EvalConfig = EvalConfig(),
    *,
    max_tokens: int,
    answers: Any = None,
    best: bool = False,
    shots: Sequence[Example] = (),
    judge: ChatModel | None = None,
    budget: Any = None,
    label: str | None = None,
) -> Result:
    """Score one model on the examples.

    Args:
        max_tokens: cap on an answer (`answer_cap`), the same for every model.
        answers: folder or `engines.AnswerCache` that stores each answer as it arrives; None stores nothing.
        best: show `shots` in the prompt and, for function calling, constrain calls to the schema.
        shots: training examples from `choose_shots`, the same for every model; used only with `best`.
        judge: free text: the model that judges.
        budget: `engines.Budget` for a paid model.
        label: what the progress line says.

    An item that the model refuses counts as wrong (kind `refused`). An item that a recorded model has no answer
    for is left out and listed in `Result.unanswered`.

    Raises:
        NotEnoughData: there are no examples, or a recorded model answers none of them.
        DataError: an example cannot be scored by the task.
        ModelUnavailable: the endpoint stayed down; run again to go on.
        ModelRefused: every item was refused.
    """
    scorer = scorer_for(config, judge=judge, answers=answers)
    _check(examples, scorer)
    started = time.monotonic()
    requests = evaluation_requests(examples, config, max_tokens=max_tokens, best=best, shots=shots)
    cache, stats = AnswerCache(answers) if isinstance(answers, str | Path) else answers, AskStats()
    found = ask(
        model,
        requests,
        cache=cache,
        concurrency=config.concurrency,
        budget=budget,
        label=label or f"evaluate {model.name}",
        stats=stats,
    )
    answered, unanswered = _sort_out(model, examples, found)
    items = _items(scorer, answered)
    return Result(
        model=model.name,
        task=config.task,
        variant="best" if best else "plain",
        items=items,
        unanswered=unanswered,
        max_tokens=max_tokens,
        shots=tuple(shot.id for shot in shots) if best else (),
        constrained=requests[0].params.constrain,
        seconds=time.monotonic() - started,
        from_cache=stats.cached,
        confidence=config.confidence,
        extra=scorer.extra(items),
    )


def evaluation_requests(
    examples: Sequence[Example],
    config: EvalConfig = EvalConfig(),
    *,
    max_tokens: int,
    best: bool = False,
    shots: Sequence[Example] = (),
) -> list[Request]:
    """The questions that `evaluate` asks, one per example: what must be recorded for a recorded teacher to answer."""
    calls = config.task == "function_calling"
    params = GenerateParams(
        max_tokens=max_tokens,
        seed=config.seed,
        constrain=calls and best and config.constrain,
        calls_first=calls and config.calls_first,
    )
    shown = tuple(shots) if best else ()
    return [Request(with_shots(example.messages, shown, config.task), example.tools, params) for example in examples]


def _sort_out(
    model: ChatModel, examples: Sequence[Example], found: Sequence[Completion | ModelError]
) -> tuple[list[tuple[Example, Completion | ModelRefused]], tuple[str, ...]]:
    """Answers and refusals by example, and the ids without a recorded answer; anything else is raised."""
    answered: list[tuple[Example, Completion | ModelRefused]] = []
    unanswered: list[str] = []
    for example, outcome in zip(examples, found, strict=True):
        if isinstance(outcome, Completion | ModelRefused):
            answered.append((example, outcome))
        elif isinstance(outcome, NotRecorded):
            unanswered.append(example.id)
        else:
            raise outcome
    if not answered:
        raise NotEnoughData(
            f"{model.name} has no recorded answer for any of the {len(examples)} held-out items.\n"
            "help: record them with the label step, or evaluate a live model."
        )
    refusals = [outcome for _, outcome in answered if isinstance(outcome, ModelRefused)]
    if len(refusals) == len(answered):
        raise refusals[0]
    return answered, tuple(unanswered)


def _items(scorer: Scorer, answered: Sequence[tuple[Example, Completion | ModelRefused]]) -> tuple[ItemResult, ...]:
    given = [(example, outcome) for example, outcome in answered if isinstance(outcome, Completion)]
    verdicts = iter(scorer.score([example for example, _ in given], [completion for _, completion in given]))
    items = []
    for example, outcome in answered:
        if isinstance(outcome, Completion):
            items.append(_item(example, outcome, next(verdicts)))
        else:
            items.append(_refused(example, outcome))
    return tuple(items)


def _item(example: Example, completion: Completion, verdict: Verdict) -> ItemResult:
    return ItemResult(
        id=example.id,
        category=example.category,
        text=clean(completion.message.content),
        calls=tuple(clean(verdict.calls)),
        ok=verdict.ok,
        score=verdict.score,
        valid=verdict.valid,
        kind=verdict.kind,
        detail=clean(verdict.detail),
        path=clean(verdict.path),
        label=verdict.label,
        expected=example.expected,
        input_tokens=completion.input_tokens,
        output_tokens=completion.output_tokens,
        finish_reason=completion.finish_reason,
        cost_usd=completion.cost_usd + verdict.cost_usd,
        latency_s=completion.latency_s,
    )


def _refused(example: Example, error: ModelRefused) -> ItemResult:
    return ItemResult(
        id=example.id,
        category=example.category,
        kind=REFUSED,
        detail=clean(str(error)),
        valid=False if example.tools else None,
        expected=example.expected,
        finish_reason="refused",
    )
