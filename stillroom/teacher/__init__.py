"""Targets for training: `label` asks the teacher what no one has answered yet, `fill` what else it might have said.

labelled, report = label(examples, model, config, answers)

with SignalCache("signals", teacher.identity(top_k=64)) as cache:     # LiveTeacher or ServedTeacher
    fill(cache, teacher, sequences)
    train(..., teacher=CachedTeacher(cache))                           # or the LiveTeacher itself
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.teacher.cached import CachedTeacher, fill
    from stillroom.teacher.config import TeacherConfig
    from stillroom.teacher.labelling import LabelReport, label, normalise, params_of, requests_of
    from stillroom.teacher.live import LiveTeacher
    from stillroom.teacher.served import ServedTeacher
    from stillroom.teacher.signal_cache import SignalCache
    from stillroom.teacher.terms import check_terms
    from stillroom.teacher.tokens import check_same_tokens

_WHERE = {
    "CachedTeacher": "cached",
    "LabelReport": "labelling",
    "LiveTeacher": "live",
    "ServedTeacher": "served",
    "SignalCache": "signal_cache",
    "TeacherConfig": "config",
    "check_same_tokens": "tokens",
    "check_terms": "terms",
    "fill": "cached",
    "label": "labelling",
    "normalise": "labelling",
    "params_of": "labelling",
    "requests_of": "labelling",
}

__all__ = [
    "CachedTeacher",
    "LabelReport",
    "LiveTeacher",
    "ServedTeacher",
    "SignalCache",
    "TeacherConfig",
    "check_same_tokens",
    "check_terms",
    "fill",
    "label",
    "normalise",
    "params_of",
    "requests_of",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
