"""Records in and out: readers, their report, filters, splits, decontamination. Layer 3, without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.data.config import DataConfig, GoldenConfig, ReadLimits, SourceConfig
    from stillroom.data.insights import Insights, check
    from stillroom.data.reader import read
    from stillroom.data.reasons import DataWarning, Reason, Rejection
    from stillroom.data.selection import Prepared, prepare

_HOME = {
    "DataConfig": "config",
    "DataWarning": "reasons",
    "GoldenConfig": "config",
    "Insights": "insights",
    "Prepared": "selection",
    "ReadLimits": "config",
    "Reason": "reasons",
    "Rejection": "reasons",
    "SourceConfig": "config",
    "check": "insights",
    "prepare": "selection",
    "read": "reader",
}

__all__ = [
    "DataConfig",
    "DataWarning",
    "GoldenConfig",
    "Insights",
    "Prepared",
    "ReadLimits",
    "Reason",
    "Rejection",
    "SourceConfig",
    "check",
    "prepare",
    "read",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"stillroom.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'stillroom.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
