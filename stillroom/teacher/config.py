"""Who labels the prompts, within what bounds, and which answers are learnt from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from stillroom.engines.config import BudgetConfig, ModelConfig, RetryConfig


class TeacherConfig(BaseModel, frozen=True, extra="forbid"):
    """The teacher of a run. Its name, licence, terms and price stand in `model`."""

    model: ModelConfig
    """Who answers."""

    keep: Literal["all", "parseable", "valid"] = "all"
    """Which answers become targets where tools are given: `all`, the teacher's mistakes included; `parseable`,
    those that are calls; `valid`, calls that the tools' schemas allow. Empty and cut-off ones never do."""

    max_tokens: int = Field(default=256, ge=1)
    """Tokens that one answer may take."""

    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token each time."""

    seed: int = 0
    """For sampling at a temperature above 0, where the engine honours one."""

    constrain: bool = False
    """Restrict answers to valid calls of the tools given."""

    budget: BudgetConfig = BudgetConfig()
    """What labelling may spend, over all runs that share the answer cache."""

    concurrency: int | None = Field(default=None, ge=1)
    """Requests under way at once; by default what suits the engine."""

    retry: RetryConfig = RetryConfig()
    """When a request is tried again, and when labelling gives up."""

    acknowledge_terms: str = ""
    """Why the run is allowed although licence or terms seem to forbid it; recorded with the run."""

    @model_validator(mode="after")
    def _money_is_counted(self) -> Self:
        if self.budget.max_usd is not None and not self.model.price.stated:
            raise ValueError(
                "budget.max_usd bounds nothing while no price is stated; add to `model` "
                "`price: {input_per_million: ..., output_per_million: ...}`, or use budget.max_tokens"
            )
        return self
