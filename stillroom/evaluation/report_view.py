"""From a `RunReport` to what the template draws: ordered rows, formatted sentences, charts.

The template only lays out; every choice of what to show, and in what order, is made here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml
from markupsafe import Markup

from stillroom.evaluation import charts, wording
from stillroom.evaluation.headline import headline
from stillroom.evaluation.item_view import item_views
from stillroom.evaluation.report_data import ModelReport, RunReport
from stillroom.evaluation.results import POOLED, Result
from stillroom.evaluation.statistics import GapClosed, Interval

_KIND_COLOURS = 8
_VARIANTS = {"plain": "", "best": "at its best"}


def build(report: RunReport) -> dict[str, Any]:
    """The template's variables."""
    measured = [model for model in report.models if model.plain is not None]
    items, left_out = item_views(report)
    return {
        "report": report,
        "headline": headline(report),
        "level": wording.percent(report.evaluation.confidence),
        "tiles": _tiles(report),
        "gap_chart": _gap_chart(report),
        "accuracy": _accuracy(measured),
        "figures": _figures(report),
        "has_validity": any(row["valid"] is not None for row in _figures(report)["rows"]),
        "roles": {m.name: m.role for m in report.models if m.role != "other"},
        "failures": _failures(measured),
        "speed": _speed(report),
        "loss": charts.curve(report.training.loss, report.training.validation) if report.training else Markup(""),
        "items": items,
        "items_left_out": left_out,
        "filters": _filters(items),
        "config_text": yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True, width=100),
        "n_items": max((len(model.plain.items) for model in measured if model.plain), default=0),
    }


def _tiles(report: RunReport) -> list[dict[str, str]]:
    """The figures that stand beside the headline: label, value, and the small print."""
    tiles = [
        _gap_tile("gap closed", report.gap, report),
        _gap_tile("gap closed, all at their best", report.gap_best, report),
    ]
    student, teacher = report.model("student"), report.model("teacher")
    if student and student.plain:
        value = student.plain.accuracy()
        note = f"{wording.percent(value.low)} to {wording.percent(value.high)} on {value.n:,} items"
        tiles.append({"label": "student's accuracy", "value": wording.percent(value.value), "note": note})
    if student and student.speed:
        note = f"median of {student.speed.calls} unbatched calls"
        if teacher and teacher.speed:
            note += f"; teacher {wording.seconds(teacher.speed.p50.value)}"
        tiles.append({"label": "latency", "value": wording.seconds(student.speed.p50.value), "note": note})
    if student and (student.parameters or student.size_bytes):
        figure = wording.count(student.parameters) if student.parameters else wording.size(student.size_bytes)
        note = f"parameters, {wording.size(student.size_bytes)}" if student.parameters else ""
        if teacher and (teacher.parameters or teacher.size_bytes):
            note += f"; teacher {wording.count(teacher.parameters)}, {wording.size(teacher.size_bytes)}"
        tiles.append({"label": "size", "value": figure, "note": note.lstrip("; ")})
    return tiles


def _gap_tile(label: str, gap: GapClosed | None, report: RunReport) -> dict[str, str]:
    if gap is None:
        return {"label": label, "value": "–", "note": report.gap_best_missing or "not measured in this run"}
    if gap.value is None:
        return {"label": label, "value": "–", "note": gap.reason}
    interval = wording.gap_interval(gap, report.evaluation.confidence)
    note = f"{interval}; {wording.share(gap.base)} → {wording.share(gap.student)} of {wording.share(gap.teacher)}"
    return {"label": label, "value": wording.percent(gap.value), "note": note}


def _gap_chart(report: RunReport) -> Markup:
    results = [model.plain if (model := report.model(role)) else None for role in ("base", "teacher", "student")]
    base, teacher, student = results
    if report.gap is None or base is None or teacher is None or student is None:
        return Markup("")
    return charts.gap_chart(report.gap, base.accuracy(), teacher.accuracy(), student.accuracy())


def _accuracy(models: Sequence[ModelReport]) -> dict[str, Any]:
    """Groups of bars: one per category and one for all items, in the same order of models."""
    names = list(dict.fromkeys(c for model in models if model.plain for c in model.plain.categories if c))
    names = [*sorted(names), POOLED] if len(names) != 1 else [POOLED]
    table = {name: [(m, m.plain.accuracy(name)) for m in models if m.plain and m.plain.select(name)] for name in names}
    top = min(1.0, charts.scale_top([value.high for rows in table.values() for _, value in rows]))

    def row(model: ModelReport, value: Interval) -> dict[str, Any]:
        bar = charts.interval_bar(model.role, value, top)
        return {"role": model.role, "name": model.name, "value": value, "bar": bar}

    groups = [{"name": name, "rows": [row(*each) for each in rows]} for name, rows in table.items() if rows]
    return {"groups": groups, "axis": charts.axis(top)}


def _figures(report: RunReport) -> dict[str, Any]:
    """Every accuracy and validity with its n: a row per model and variant."""
    pairs = [(model, result) for model in report.models for result in (model.plain, model.best) if result is not None]
    names = sorted({name for _, result in pairs for name in result.categories if name})
    names = [*names, POOLED] if len(names) > 1 else [POOLED]
    rows = [
        {
            "role": model.role,
            "name": model.name,
            "variant": _VARIANTS[result.variant],
            "values": [result.accuracy(name) if result.select(name) else None for name in names],
            "valid": result.validity(),
            "tokens": result.output_tokens / max(1, len(result.items)),
            "cut": sum(item.finish_reason == "length" for item in result.items),
            "unanswered": len(result.unanswered),
            "extra": _extra(result),
        }
        for model, result in pairs
    ]
    return {"names": names, "rows": rows}


def _extra(result: Result) -> list[str]:
    return [f"{name.replace('_', ' ')} {value:.2f}" for name, value in result.extra.items() if isinstance(value, float)]


def _failures(models: Sequence[ModelReport]) -> dict[str, Any]:
    """Stacked shares per model, and the counts behind them; rare kinds share a colour but keep their row."""
    total: Counter[str] = Counter()
    for model in models:
        total.update(model.plain.failures() if model.plain else {})
    kinds = [kind for kind, _ in total.most_common()]
    css = {kind: f"k{i + 1}" if i < _KIND_COLOURS else "k0" for i, kind in enumerate(kinds)}
    rows = []
    for model in models:
        assert model.plain is not None
        counts, right = model.plain.failures(), sum(item.ok for item in model.plain.items)
        parts = [("right", right, "right"), *((css[k], counts[k], wording.failure(k)) for k in kinds if counts.get(k))]
        rows.append(
            {
                "role": model.role,
                "name": model.name,
                "n": len(model.plain.items),
                "right": right,
                "counts": [counts.get(kind, 0) for kind in kinds],
                "bar": charts.stacked_bar(parts),
            }
        )
    names = [{"name": wording.failure(kind), "css": css[kind], "index": i} for i, kind in enumerate(kinds)]
    return {"kinds": names, "rows": rows}


def _speed(report: RunReport) -> dict[str, Any]:
    """Latency strips on one scale, and a row of costs per model."""
    timed = [model for model in report.models if model.speed is not None]
    top = charts.scale_top([max(m.speed.latencies_s) for m in timed if m.speed])
    strips = [
        {
            "role": model.role,
            "name": model.name,
            "strip": charts.strip(model.role, model.speed.latencies_s, model.speed.p50, model.speed.p95_s, top),
        }
        for model in timed
        if model.speed
    ]
    rows = [model for model in report.models if model.speed or model.size_bytes or model.input_per_million is not None]
    return {"strips": strips, "axis": charts.axis(top), "rows": rows, "top": top}


def _filters(items: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, str, int]]]:
    """Options of the filters as (value, label, count), only those that occur."""

    def options(key: str, labels: dict[str, str] | None = None) -> list[tuple[str, str, int]]:
        counts = Counter(item[key] for item in items if item[key])
        return [(value, (labels or {}).get(value, wording.failure(value)), n) for value, n in counts.most_common()]

    who = {
        "teacher": "teacher right, student wrong",
        "student": "student right, teacher wrong",
        "both": "both right",
        "neither": "both wrong",
        "right": "student right",
        "wrong": "student wrong",
    }
    return {"who": options("who", who), "kind": options("kind"), "category": options("category")}
