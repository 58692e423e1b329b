"""The prompt-insights page: one HTML file from `templates/insights.html.jinja`, everything escaped."""

from __future__ import annotations

from importlib import resources
from typing import Any

from stillroom.data.insights import Insights


def render(insights: Insights) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("stillroom.data").joinpath("templates/insights.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(insights=insights, rows=_rows(insights), worst=_worst_files(insights))


def _rows(insights: Insights) -> list[dict[str, Any]]:
    """One row per reason: rejections first, the most frequent first."""
    ordered = sorted(insights.by_reason.items(), key=lambda pair: (pair[0].is_warning, -pair[1], pair[0].value))
    return [{"reason": reason, "count": count, "samples": insights.samples[reason]} for reason, count in ordered]


def _worst_files(insights: Insights) -> list[tuple[str, int, int]]:
    files = [(file, good, bad) for file, (good, bad) in insights.by_file.items()]
    return sorted(files, key=lambda each: (-each[2], each[0]))[:50]
