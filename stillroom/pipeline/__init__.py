"""The main path: steps that resume by content, and `distill`, the whole system on one screen."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.pipeline.config import Recipe as Recipe
    from stillroom.pipeline.config import StudentConfig as StudentConfig
    from stillroom.pipeline.distillation import distill as distill
    from stillroom.pipeline.distillation import record as record
    from stillroom.pipeline.measure import evaluate_model as evaluate_model
    from stillroom.pipeline.planning import plan as plan

_HOMES = {
    "Recipe": "config",
    "StudentConfig": "config",
    "distill": "distillation",
    "evaluate_model": "measure",
    "plan": "planning",
    "record": "distillation",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
