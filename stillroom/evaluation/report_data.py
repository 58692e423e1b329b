"""Everything a report shows, as plain frozen data: report.json is this, report.html is drawn from this.

The pipeline fills it; nothing here measures or computes more than totals. A missing part leaves its section out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from stillroom.evaluation.advising import Advice
from stillroom.evaluation.comparing import Comparison
from stillroom.evaluation.config import EvalConfig
from stillroom.evaluation.latency import Speed
from stillroom.evaluation.results import Result
from stillroom.evaluation.statistics import GapClosed
from stillroom.schema import Example, Message, to_dict

Role = Literal["base", "teacher", "student", "other"]
ROLES: tuple[Role, ...] = ("base", "teacher", "student")


class ModelReport(BaseModel, frozen=True, extra="forbid"):
    """One model: what it is, what it costs, how it did.

    Attributes:
        role: base, teacher, student, or other (a further arm shown beside them).
        size_bytes: of its weights. memory_bytes: resident while it answered.
        input_per_million, output_per_million: US dollars, from the recipe; None where it has no price.
        plain, best: its results; None where it was not measured that way.
    """

    role: Role
    name: str
    engine: str = ""
    digest: str = ""
    parameters: int | None = None
    size_bytes: int | None = None
    memory_bytes: int | None = None
    license: str = ""
    terms: str = ""
    input_per_million: float | None = None
    output_per_million: float | None = None
    plain: Result | None = None
    best: Result | None = None
    speed: Speed | None = None


class PromptView(BaseModel, frozen=True, extra="forbid"):
    """A held-out item as a reader sees it."""

    id: str
    category: str
    prompt: str
    tools: tuple[dict[str, Any], ...] = ()
    source: str = ""


class RejectionRow(BaseModel, frozen=True, extra="forbid"):
    """A reason for which records were rejected or warned of, how often, and the first place."""

    code: str
    count: int
    message: str = ""
    help: str = ""
    example: str = ""


class DataReport(BaseModel, frozen=True, extra="forbid"):
    """The prompt insights: what was read, what was refused and why, how it was divided.

    Attributes:
        splits: split -> records. categories: split -> category -> records.
        targets: origin of the training answers -> how many (golden ones after upsampling are in `upsampled`).
        near_duplicates: training prompts removed for lying too near to a held-out one.
        shared_tools: tool names found in both training and held-out prompts; 0 where the split keeps them apart.
    """

    read: int = 0
    accepted: int = 0
    rejected: tuple[RejectionRow, ...] = ()
    warnings: tuple[RejectionRow, ...] = ()
    repeats: int = 0
    near_duplicates: int = 0
    shared_tools: int | None = None
    splits: dict[str, int] = {}
    categories: dict[str, dict[str, int]] = {}
    targets: dict[str, int] = {}
    upsampled: dict[str, int] = {}
    notes: tuple[str, ...] = ()


class TrainingReport(BaseModel, frozen=True, extra="forbid"):
    """How the training went.

    Attributes:
        loss: (step, mean loss in nats per scored token). validation: the same on the validation split.
    """

    loss: tuple[tuple[int, float], ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    facts: dict[str, str] = {}


class PlanRow(BaseModel, frozen=True, extra="forbid"):
    """One figure that the plan foretold, and what it came to."""

    what: str
    planned: str
    actual: str


class LineageRow(BaseModel, frozen=True, extra="forbid"):
    """One step that this run rests on."""

    step: str
    key: str
    parents: tuple[str, ...] = ()
    seconds: float | None = None
    reused: bool = False
    path: str = ""


class LicenceRow(BaseModel, frozen=True, extra="forbid"):
    """A licence that holds for something that went into the student."""

    what: str
    name: str
    license: str
    terms: str = ""
    source: str = ""


class RunReport(BaseModel, frozen=True, extra="forbid"):
    """A whole run.

    Attributes:
        command: reproduces it. created: UTC, ISO 8601. seconds: of the whole run.
        gap, gap_best: with all three plain, and all three at their best; None where they could not be measured.
        comparisons: paired comparisons to show. prompts: the held-out items, by the results' ids.
        config: the resolved recipe. environment: versions and hardware.
        notes: sentences that a reader must know, such as where the teacher's answers come from.
    """

    title: str
    command: str
    created: str
    models: tuple[ModelReport, ...]
    version: str = ""
    seconds: float | None = None
    items_train: int | None = None
    items_validation: int | None = None
    gap: GapClosed | None = None
    gap_best: GapClosed | None = None
    gap_best_missing: str = ""
    advice: Advice | None = None
    comparisons: tuple[Comparison, ...] = ()
    prompts: tuple[PromptView, ...] = ()
    data: DataReport | None = None
    training: TrainingReport | None = None
    plan: tuple[PlanRow, ...] = ()
    lineage: tuple[LineageRow, ...] = ()
    licences: tuple[LicenceRow, ...] = ()
    config: dict[str, Any] = {}
    evaluation: EvalConfig = EvalConfig()
    environment: dict[str, str] = {}
    notes: tuple[str, ...] = ()

    def model(self, role: Role) -> ModelReport | None:
        """The first model in a role, or None."""
        return next((model for model in self.models if model.role == role), None)


def prompt_views(examples: Sequence[Example]) -> tuple[PromptView, ...]:
    """What the report needs to show the held-out items."""
    return tuple(
        PromptView(
            id=example.id,
            category=example.category,
            prompt=_conversation(example.messages),
            tools=tuple(to_dict(tool) for tool in example.tools),
            source=example.source,
        )
        for example in examples
    )


def _conversation(messages: Sequence[Message]) -> str:
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)
