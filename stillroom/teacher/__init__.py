"""Targets for training: `label` asks the teacher what no one has answered yet."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.teacher.config import TeacherConfig
    from stillroom.teacher.labelling import LabelReport, label, normalise, params_of, requests_of
    from stillroom.teacher.terms import check_terms

_WHERE = {
    "LabelReport": "labelling",
    "TeacherConfig": "config",
    "check_terms": "terms",
    "label": "labelling",
    "normalise": "labelling",
    "params_of": "labelling",
    "requests_of": "labelling",
}

__all__ = ["LabelReport", "TeacherConfig", "check_terms", "label", "normalise", "params_of", "requests_of"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
