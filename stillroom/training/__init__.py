"""Teach a student its teacher's answers, or its distribution over them: packed, resumable to the bit.

result = train(loaded, examples, TrainConfig(epochs=3), "runs/a/train")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.training.config import LoraSettings as LoraSettings
    from stillroom.training.config import ObjectiveConfig as ObjectiveConfig
    from stillroom.training.config import OnPolicyConfig as OnPolicyConfig
    from stillroom.training.config import SpectrumSettings as SpectrumSettings
    from stillroom.training.config import TrainConfig as TrainConfig
    from stillroom.training.loop import train as train
    from stillroom.training.rate import measure_rate as measure_rate
    from stillroom.training.result import TrainResult as TrainResult

_HOMES = {
    "LoraSettings": "config",
    "ObjectiveConfig": "config",
    "OnPolicyConfig": "config",
    "SpectrumSettings": "config",
    "TrainConfig": "config",
    "TrainResult": "result",
    "measure_rate": "rate",
    "train": "loop",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
