"""A recipe: everything that one distillation is made from, as one YAML file."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from stillroom.data.config import DataConfig
from stillroom.engines.config import ModelConfig, Price
from stillroom.evaluation.config import EvalConfig
from stillroom.models.config import PruneConfig
from stillroom.teacher.config import TeacherConfig
from stillroom.training.config import TrainConfig


class StudentConfig(BaseModel, frozen=True, extra="forbid"):
    """The small model that learns."""

    path: str
    """A Transformers directory, a GGUF file or a hub id; `package:NAME/file` for one that a package carries."""

    name: str | None = None
    """What reports call it; by default the file's or directory's name."""

    chat_template: str | None = "chatml-tools"
    """How conversations and tools become a prompt, in training and ever after: a template that we ship, a `.jinja`
    file, or null for the model's own, which then has to know tools."""

    prune: PruneConfig | None = None
    """Cut the model down before training; its data is the labelled training set. The report's base is the whole one."""

    license: str = ""
    """Licence of the weights; carried into the student's model card."""

    price: Price = Price()
    """What its tokens cost where it will run, for the comparison in the report."""

    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Format of the exported safetensors."""

    gguf: bool = True
    """Also write a GGUF for llama.cpp and Ollama."""

    def as_model(self, path: str) -> ModelConfig:
        """How weights of this student are opened, wherever they lie."""
        return ModelConfig(
            engine="transformers",
            path=path,
            name=self.name,
            chat_template=self.chat_template,
            license=self.license,
            price=self.price,
        )


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """One distillation, from prompts to a measured student."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Names the run's folder, `runs/<name>`, unless --out says otherwise."""

    seed: int = 0
    """Of the split, the order of training and the intervals."""

    data: DataConfig
    """Which records there are, and which train, validate and test."""

    teacher: TeacherConfig
    """Who answers the unlabelled prompts."""

    student: StudentConfig
    """Who learns."""

    training: TrainConfig = TrainConfig()
    """How it learns."""

    evaluation: EvalConfig = EvalConfig()
    """How all three are measured."""

    requires_gap: bool = False
    """Stop before training when the measured gap says that distillation is not worth it."""

    @model_validator(mode="after")
    def _objective_has_its_teacher(self) -> Self:
        if self.training.objective.needs_teacher:
            raise ValueError(
                f"training.objective.kind={self.training.objective.kind} compares with the teacher's distribution, and "
                f"of teacher.model.engine={self.teacher.model.engine} a recipe takes answers alone; "
                "set training.objective.kind=sequence"
            )
        return self
