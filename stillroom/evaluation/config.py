"""Settings of an evaluation. What is measured, and how; never what was found."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from stillroom.engines.config import ModelConfig

Task = Literal["function_calling", "classification", "text"]

DEFAULT_RUBRIC = """Score the answer from 1 to 5.
5: correct, complete and follows every instruction. 4: correct with a small flaw. 3: partly correct.
2: mostly wrong or unhelpful. 1: wrong, empty or off the subject.
Judge what is said, not how long it is: more words never earn a higher score."""


class JudgeConfig(BaseModel, frozen=True, extra="forbid"):
    """How a judge, which is any chat model, scores free text."""

    model: ModelConfig | None = None
    """Who judges; None scores by ROUGE-L alone. Its answers are cached as the teacher's are."""

    rubric: str = Field(default=DEFAULT_RUBRIC, min_length=1)
    """What each score from 1 to 5 means."""

    pass_score: float = Field(default=4.0, ge=1, le=5)
    """The mean verdict from which an answer counts as right."""

    max_tokens: int = Field(default=256, ge=1)
    """Room for a verdict."""

    max_answer_chars: int = Field(default=6000, ge=100)
    """Answers longer than this are shown to the judge cut, and said to be cut."""


class EvalConfig(BaseModel, frozen=True, extra="forbid"):
    """What is measured on the held-out items, and by what rules. The same rules hold for every model."""

    task: Task = "function_calling"
    """What an answer is: tool calls, a label, or free text."""

    labels: tuple[str, ...] = ()
    """Classification: the labels that exist; empty takes those of the items."""

    judge: JudgeConfig = JudgeConfig()
    """Free text: who judges, and how."""

    answer_cap_ratio: float = Field(default=1.5, gt=0)
    """Answers are cut at this many times the longest training answer, in tokens, for every model alike."""

    calls_first: bool = False
    """Function calling: a call counts only where it begins the answer, as in BFCL's own scoring; by default words
    before it are passed over. An answer that begins with words is then not written to its end: much time is spared."""

    best: bool = True
    """Measure each model a second time at its best: with few-shot examples, and calls constrained to the schema."""

    few_shot: int = Field(default=2, ge=0, le=16)
    """Examples shown at its best; they come from the training split's golden answers, the same for every model."""

    few_shot_chars: int = Field(default=1200, ge=0)
    """Room for all shown examples together; fewer than `few_shot` are shown where they do not fit."""

    constrain: bool = True
    """At its best, restrict the answer to valid calls of the given tools (function calling only)."""

    concurrency: int | None = Field(default=None, ge=1)
    """Questions in flight; by default what suits the model's engine."""

    latency_calls: int = Field(default=30, ge=0)
    """Unbatched calls that latency is measured over; 0 leaves latency out, fewer than 30 are refused."""

    first_token_calls: int = Field(default=10, ge=0)
    """Further calls, cut after one token, that the time to the first token is measured over."""

    warmup_calls: int = Field(default=2, ge=0)
    """Calls before the measured ones, not counted."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of every interval."""

    bootstrap_samples: int = Field(default=10_000, ge=200)
    """Resamples of the items for intervals that have no closed form."""

    min_gap: float = Field(default=0.05, ge=0, lt=1)
    """A teacher that leads the base by less than this is not worth distilling."""

    seed: int = 0
    """Of the bootstrap, and of generation where an engine samples."""

    report_items: int = Field(default=600, ge=0)
    """Items shown side by side in the report, failures first; the rest stands in report.json."""
