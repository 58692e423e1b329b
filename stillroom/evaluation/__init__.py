"""Measuring models on held-out items, and the page that shows what a run achieved.

    evaluate        one model's answers on the examples, scored: a Result
    compare         two Results on the same items: difference, interval, exact p-value
    gap_closed      what share of the gap from base to teacher the student closed, with its interval
    advise          before any training: is the gap worth closing?
    measure_speed   latency, output rate and memory over unbatched calls
    write_report    one offline report.html, with report.json beside it
    write_card      the student's model card

Importing this room loads neither torch nor an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.evaluation.advising import Advice, advise
    from stillroom.evaluation.cards import CardFacts, write_card
    from stillroom.evaluation.comparing import Comparison, compare, gap_closed
    from stillroom.evaluation.config import EvalConfig, JudgeConfig
    from stillroom.evaluation.few_shot import choose_shots
    from stillroom.evaluation.latency import Speed, measure_speed, speed_of_answers
    from stillroom.evaluation.measuring import answer_cap, check_items, evaluate, evaluation_requests
    from stillroom.evaluation.report import write_report
    from stillroom.evaluation.report_data import (
        DataReport,
        LicenceRow,
        LineageRow,
        ModelReport,
        PlanRow,
        PromptView,
        RejectionRow,
        RunReport,
        TrainingReport,
        prompt_views,
    )
    from stillroom.evaluation.results import ItemResult, Result
    from stillroom.evaluation.statistics import GapClosed, Interval

_WHERE = {
    "Advice": "advising",
    "CardFacts": "cards",
    "Comparison": "comparing",
    "DataReport": "report_data",
    "EvalConfig": "config",
    "GapClosed": "statistics",
    "Interval": "statistics",
    "ItemResult": "results",
    "JudgeConfig": "config",
    "LicenceRow": "report_data",
    "LineageRow": "report_data",
    "ModelReport": "report_data",
    "PlanRow": "report_data",
    "PromptView": "report_data",
    "RejectionRow": "report_data",
    "Result": "results",
    "RunReport": "report_data",
    "Speed": "latency",
    "TrainingReport": "report_data",
    "advise": "advising",
    "answer_cap": "measuring",
    "check_items": "measuring",
    "choose_shots": "few_shot",
    "compare": "comparing",
    "evaluate": "measuring",
    "evaluation_requests": "measuring",
    "gap_closed": "comparing",
    "measure_speed": "latency",
    "prompt_views": "report_data",
    "speed_of_answers": "latency",
    "write_card": "cards",
    "write_report": "report",
}

__all__ = [
    "Advice",
    "CardFacts",
    "Comparison",
    "DataReport",
    "EvalConfig",
    "GapClosed",
    "Interval",
    "ItemResult",
    "JudgeConfig",
    "LicenceRow",
    "LineageRow",
    "ModelReport",
    "PlanRow",
    "PromptView",
    "RejectionRow",
    "Result",
    "RunReport",
    "Speed",
    "TrainingReport",
    "advise",
    "answer_cap",
    "check_items",
    "choose_shots",
    "compare",
    "evaluate",
    "evaluation_requests",
    "gap_closed",
    "measure_speed",
    "prompt_views",
    "speed_of_answers",
    "write_card",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
