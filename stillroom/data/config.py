"""Settings of the data room: where records come from, how they are split, and how much a file may ask for."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from stillroom.data.filters import check_filter

Format = Literal["auto", "bedrock", "openai", "invocation_logs", "bfcl"]


class ReadLimits(BaseModel, frozen=True, extra="forbid"):
    """What one file may ask of the reader. What goes beyond is rejected with a reason, and never held in memory."""

    line_bytes: int | None = Field(default=None, ge=64)
    """Longest line, in bytes. None: 180 KiB for bedrock (a documented limit of that service), 1 MiB for the others."""

    body_bytes: int = Field(default=25_000_000, gt=0)
    """Largest request or response body that an invocation log stores beside itself, in bytes after expansion."""

    depth: int = Field(default=64, ge=4, le=200)
    """Levels of nesting in one record."""

    total_bytes: int = Field(default=2**30, gt=0)
    """Bytes of one data set after expansion; the hosted service takes at most 1 GB."""

    expansion_ratio: int = Field(default=300, ge=2)
    """How many times its size a compressed file may become, once it passed 16 MiB. Real logs reach 10 to 60."""

    multi_turn: bool = True
    """Whether records with several questions are taken. The hosted service takes them for few students."""


class SourceConfig(BaseModel, frozen=True, extra="forbid"):
    """One file or folder of records."""

    path: str
    """File or folder; `package:NAME/file` for a file of an installed package."""

    format: Format = "auto"
    """How to read it; `auto` looks at the first record of each file."""

    category: str | None = None
    """The group that results are shown by; None: what the records or the file's name say."""

    answers: str | None = None
    """BFCL: the answers file; None: the file of that name in `possible_answer/` beside the questions."""

    where: dict[str, Any] | None = None
    """Metadata filter with one operator, as `requestMetadataFilters` has it: `{equals: {project: Support}}`."""

    model: str | None = None
    """Invocation logs: take only records of this model (id, ARN or profile); others are rejected."""

    use_answers: bool = True
    """Whether answers in the source may be learnt from; if not, they only score (BFCL) or are left out."""

    license: str | None = None
    """Licence of the data, as an SPDX identifier where there is one; carried into reports and model card."""

    role: Literal["train", "evaluate", "any"] = "any"
    """Which side of the split the records may go to."""


class GoldenConfig(BaseModel, frozen=True, extra="forbid"):
    """How much of the known right answers is shown in training; the teacher answers the rest."""

    fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of the training records with a known right answer that show it."""

    upsample: int = Field(default=1, ge=1)
    """How often a golden record counts; written to its `metadata["repeats"]`, which training honours."""


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """Which records there are, and which of them train, validate and test."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Read in this order; the order changes nothing but which file a repeat is reported for."""

    train: int | None = Field(default=None, ge=1)
    """Training records; None: all that remain."""

    validation: int = Field(default=0, ge=0)
    """Records that settings are chosen on."""

    test: int = Field(default=0, ge=0)
    """Records that are scored once, at the end."""

    balance: bool = False
    """Equal shares per category. Exact in validation and test; in training as far as the records go."""

    group_by: Literal["none", "tools"] = "none"
    """`tools`: no tool name of validation or test occurs in training, nor one of test in validation."""

    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt with its tools, in the student's tokens; longer ones are rejected."""

    golden: GoldenConfig = GoldenConfig()
    """The mix of golden and teacher answers."""

    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    """Similarity from which a training prompt is removed because a held-out one is like it; None: keep all."""

    minimum: int = Field(default=100, ge=1)
    """Accepted records below which nothing is started."""

    limits: ReadLimits = ReadLimits()
    """What one file may ask for."""

    @model_validator(mode="after")
    def _filters_are_well_formed(self) -> Self:
        for source in self.sources:
            if source.where is not None:
                check_filter(source.where)
        return self
