"""Targets for training: the teacher answers every prompt that has no target yet.

Golden and recorded targets are left as they are. An answer is asked for once and kept in the answer
cache; run again after a kill, only what is missing is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stillroom.engines.asking import AskStats, Request, ask
from stillroom.engines.budget import Budget
from stillroom.engines.cache import AnswerCache
from stillroom.errors import ModelError, ParseError
from stillroom.schema import ChatModel, Completion, Example, GenerateParams, Message, Target, ToolSpec
from stillroom.teacher.config import TeacherConfig


@dataclass
class LabelReport:
    """What labelling did.

    Attributes:
        model: the teacher's name.
        examples: how many were given; `labelled` of them had targets before.
        asked: unique prompts that the teacher answered now. cached: that had been answered before.
        kept: examples that got a target. dropped: those that did not, by reason: `failed`, `not_recorded`,
            `empty`, `cut`, `unparseable`, `invalid`.
        parsed: kept answers that are tool calls.
        errors: the first few messages of what failed.
        input_tokens, output_tokens, usd: of all answers used, whenever they were paid for.
        spent_usd, spent_tokens: of this run alone. seconds: how long asking took.
    """

    model: str
    examples: int = 0
    labelled: int = 0
    asked: int = 0
    cached: int = 0
    kept: int = 0
    parsed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    spent_tokens: int = 0
    spent_usd: float = 0.0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def label(
    examples: Sequence[Example],
    model: ChatModel,
    config: TeacherConfig,
    cache: AnswerCache | None = None,
    *,
    title: str = "label",
) -> tuple[tuple[Example, ...], LabelReport]:
    """Give every example a target, in the examples' order; those whose answer is not kept are left out.

    Args:
        examples: those that have targets are passed through untouched.
        model: the teacher, opened from `config.model`.
        config: bounds, and which answers to keep.
        cache: where answers are stored; None keeps none (they are then lost on a kill).
        title: what the progress line is called.

    Raises:
        BudgetExceeded, ModelError: see `engines.ask`; or no prompt at all was answered.
    """
    report = LabelReport(model.name, examples=len(examples))
    open_ones = [example for example in examples if not example.targets]
    report.labelled = len(examples) - len(open_ones)
    answers = _answers(open_ones, model, config, cache, title, report)
    labelled: list[Example] = []
    dropped: Counter[str] = Counter()
    waiting = iter(answers)
    for example in examples:
        if example.targets:
            labelled.append(example)
            continue
        target, reason = _target(next(waiting), example.tools, config, report)
        if target is None:
            dropped[reason] += 1
        else:
            labelled.append(replace(example, targets=(target,)))
    report.dropped = dict(sorted(dropped.items()))
    return tuple(labelled), report


def normalise(text: str, tools: Sequence[ToolSpec]) -> Message:
    """A text answer as a message: its calls in `tool_calls` where it is calls, else the text as it is."""
    if not tools:
        return Message("assistant", text)
    from stillroom.toolcalls import parse_calls

    try:
        return Message("assistant", "", tuple(parse_calls(text)))
    except ParseError:
        return Message("assistant", text)


def params_of(config: TeacherConfig) -> GenerateParams:
    """How the teacher is asked."""
    return GenerateParams(config.max_tokens, config.temperature, config.seed, constrain=config.constrain)


def requests_of(examples: Sequence[Example], config: TeacherConfig) -> list[Request]:
    """The questions that `label` asks for `examples`: one each, those with targets left out."""
    params = params_of(config)
    return [Request(example.messages, example.tools, params) for example in examples if not example.targets]


def _answers(
    examples: Sequence[Example],
    model: ChatModel,
    config: TeacherConfig,
    cache: AnswerCache | None,
    title: str,
    report: LabelReport,
) -> list[Completion | ModelError]:
    if not examples:
        return []
    stats = AskStats()
    budget = Budget(config.budget.max_tokens, config.budget.max_usd)
    answers = ask(
        model,
        requests_of(examples, config),
        cache=cache,
        concurrency=config.concurrency,
        budget=budget,
        retry=config.retry,
        label=title,
        stats=stats,
    )
    report.asked, report.cached, report.seconds = stats.answered, stats.cached, round(stats.seconds, 3)
    report.spent_tokens, report.spent_usd = stats.tokens, stats.usd
    for answer in answers:
        if isinstance(answer, ModelError):
            if len(report.errors) < 5:
                report.errors.append(str(answer))
        else:
            report.input_tokens += answer.input_tokens
            report.output_tokens += answer.output_tokens
            report.usd += answer.cost_usd
    errors = [answer for answer in answers if isinstance(answer, ModelError)]
    if len(errors) == len(answers):
        raise errors[0]  # nothing was answered at all: its message says why and what to do
    return answers


def _target(
    answer: Completion | ModelError, tools: Sequence[ToolSpec], config: TeacherConfig, report: LabelReport
) -> tuple[Target | None, str]:
    """The target that an answer gives, or None and the reason why it gives none."""
    from stillroom.errors import NotRecorded

    if isinstance(answer, ModelError):
        return None, "not_recorded" if isinstance(answer, NotRecorded) else "failed"
    message = answer.message
    if answer.finish_reason == "length":
        return None, "cut"
    if not message.content.strip() and not message.tool_calls:
        return None, "empty"
    if not message.tool_calls:
        message = normalise(message.content, tools)
    if tools and config.keep != "all":
        if not message.tool_calls:
            return None, "unparseable"
        if config.keep == "valid" and not _valid(message, tools):
            return None, "invalid"
    report.kept += 1
    report.parsed += bool(message.tool_calls)
    return Target(message, "teacher", answer.model), ""


def _valid(message: Message, tools: Sequence[ToolSpec]) -> bool:
    from stillroom.toolcalls import validate_calls

    return not validate_calls(message.tool_calls, tools)
