"""Models that answer: `open_model` opens one, `ask` puts many questions to it, safely and once.

Nothing heavy is imported until an engine is opened.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.engines.asking import AskStats, Request, ask, ask_async
    from stillroom.engines.base import Engine
    from stillroom.engines.budget import Budget
    from stillroom.engines.cache import AnswerCache, answer_key
    from stillroom.engines.config import BudgetConfig, ModelConfig, Price, RetryConfig
    from stillroom.engines.opening import obstacle, open_model
    from stillroom.engines.recording import Entry, ModelInfo, write_recording

_WHERE = {
    "AnswerCache": "cache",
    "AskStats": "asking",
    "Budget": "budget",
    "BudgetConfig": "config",
    "Engine": "base",
    "Entry": "recording",
    "ModelConfig": "config",
    "ModelInfo": "recording",
    "Price": "config",
    "Request": "asking",
    "RetryConfig": "config",
    "answer_key": "cache",
    "ask": "asking",
    "ask_async": "asking",
    "obstacle": "opening",
    "open_model": "opening",
    "write_recording": "recording",
}

__all__ = [
    "AnswerCache",
    "AskStats",
    "Budget",
    "BudgetConfig",
    "Engine",
    "Entry",
    "ModelConfig",
    "ModelInfo",
    "Price",
    "Request",
    "RetryConfig",
    "answer_key",
    "ask",
    "ask_async",
    "obstacle",
    "open_model",
    "write_recording",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
