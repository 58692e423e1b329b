"""The held-out items side by side: prompt, what was wanted, and what each model answered."""

from __future__ import annotations

from collections import Counter
from typing import Any

from stillroom.evaluation import differences, wording
from stillroom.evaluation.few_shot import signature
from stillroom.evaluation.report_data import PromptView, RunReport
from stillroom.evaluation.results import ItemResult
from stillroom.schema import ToolSpec

PROMPT_CHARS = 3000
ANSWER_CHARS = 1500
_ORDER = {"teacher": 0, "wrong": 0, "neither": 1, "student": 2, "both": 3, "right": 3}


def item_views(report: RunReport) -> tuple[list[dict[str, Any]], int]:
    """Items for the page, those first that the teacher got right and the student wrong; and how many were left out."""
    columns = {
        model.role: {item.id: item for item in model.plain.items}
        for model in reversed(report.models)
        if model.plain and model.role != "other"
    }
    student, teacher = columns.get("student", {}), columns.get("teacher", {})
    prompts = {prompt.id: prompt for prompt in report.prompts}
    # Within a group the categories take turns, so that the first cards show what there is.
    met: Counter[tuple[str, str]] = Counter()
    ranked = []
    for name, item in student.items():
        if name in prompts:
            who = _who(item, teacher.get(name))
            ranked.append((_ORDER[who], met[who, item.category], name))
            met[who, item.category] += 1
    shown = sorted(ranked)[: report.evaluation.report_items]
    views = [_view(prompts[name], {role: items.get(name) for role, items in columns.items()}) for *_, name in shown]
    return views, len(ranked) - len(views)


def _view(prompt: PromptView, answers: dict[str, ItemResult | None]) -> dict[str, Any]:
    student, teacher = answers["student"], answers.get("teacher")
    assert student is not None
    text, cut = wording.visible(prompt.prompt, PROMPT_CHARS)
    tools = [ToolSpec(tool["name"], tool.get("description", ""), tool.get("parameters") or {}) for tool in prompt.tools]
    calls = differences.wanted_calls(student.expected)
    plain_wanted = student.expected if isinstance(student.expected, str) else ""
    return {
        "id": prompt.id,
        "category": prompt.category,
        "kind": student.kind,
        "who": _who(student, teacher),
        "prompt": text,
        "prompt_cut": cut,
        "tools": [wording.visible(f"{signature(tool)}  {tool.description}", 600)[0] for tool in tools],
        "wanted": calls,
        "wanted_text": wording.visible(plain_wanted or ("" if calls else "no call"), ANSWER_CHARS)[0],
        "answers": [
            _answer(role, item, prompt) for role in ("teacher", "student", "base") if (item := answers.get(role))
        ],
    }


def _who(student: ItemResult, teacher: ItemResult | None) -> str:
    if teacher is None:
        return "right" if student.ok else "wrong"
    return {(True, True): "both", (True, False): "student", (False, True): "teacher"}.get(
        (student.ok, teacher.ok), "neither"
    )


def _answer(role: str, item: ItemResult, prompt: PromptView) -> dict[str, Any]:
    text, cut = wording.visible(item.text, ANSWER_CHARS)
    calls = differences.mark_calls(item, prompt.tools) if item.calls else ()
    return {
        "role": role,
        "ok": item.ok,
        "valid": item.valid,
        "kind": item.kind,
        "detail": "" if any(map(differences.differs, calls)) else wording.visible(item.detail, 400)[0],
        "calls": calls,
        "text": text,
        "cut": cut,
        "show_text": not calls,
        "capped": item.finish_reason == "length",
        "score": item.score if item.score not in (0.0, 1.0) else None,
        "label": item.label,
    }
