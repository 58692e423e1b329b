"""A small run with everything in it: items, scripted models, their results, and a report made of them."""

from __future__ import annotations

from typing import Any

from stillroom.evaluation import (
    DataReport,
    EvalConfig,
    LicenceRow,
    LineageRow,
    ModelReport,
    PlanRow,
    RejectionRow,
    RunReport,
    TrainingReport,
    advise,
    choose_shots,
    compare,
    evaluate,
    gap_closed,
    measure_speed,
    prompt_views,
)
from stillroom.schema import Example, Message, Target, ToolCall, ToolSpec
from stillroom.testing import ScriptedModel
from stillroom.toolcalls import render_calls

CONFIG = EvalConfig(bootstrap_samples=400, first_token_calls=2)
HOSTILE = '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">"\'>{{ 7*7 }}'


def tool(name: str) -> ToolSpec:
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    return ToolSpec(name, "Weather of a city.", {"type": "object", "properties": properties, "required": ["city"]})


def item(index: int, *, question: str = "", split: Any = "test") -> Example:
    """One question with one right answer: `weather_<index>(city="City<index>")`, days 2 or left out."""
    category = "simple" if index % 2 == 0 else "multiple"
    name, city = f"weather_{index}", f"City{index}"
    tools = (tool(name),) if category == "simple" else (tool(name), tool(f"other_{index}"))
    answer = Message("assistant", tool_calls=(ToolCall(name, {"city": city}),))
    return Example(
        id=f"item-{index}",
        messages=(Message("user", question or f"What will it be like in {city}?"),),
        tools=tools,
        targets=(Target(answer, "golden"),),
        expected=[{name: {"city": [city], "days": ["", 2]}}],
        category=category,
        split=split,
        source=f"items.jsonl:{index + 1}",
    )


def items(n: int) -> tuple[Example, ...]:
    return tuple(item(index) for index in range(n))


def model(name: str, examples: tuple[Example, ...], right: int, wrong: str = "I do not know.") -> ScriptedModel:
    """Answers the first `right` items rightly and the others with the text `wrong`."""
    answers = {
        example.messages[-1].content: render_calls(example.targets[0].message.tool_calls) if i < right else wrong
        for i, example in enumerate(examples)
    }
    return ScriptedModel(answers, name)


def run_report(n: int = 24, *, examples: tuple[Example, ...] | None = None, **wrong: str) -> RunReport:
    """A whole report; `wrong` gives the wrong answer's text by role."""
    test = examples or items(n)
    n = len(test)
    rights = {"base": 0, "teacher": n * 3 // 4, "student": n // 2}
    defaults = {
        "base": "Weather is nice.",
        "teacher": "[weather_1(city=",
        "student": '[weather_1(city="Nowhere", x=1)]',
    }
    models = {
        role: model(f"{role}-model", test, right, wrong.get(role, defaults[role])) for role, right in rights.items()
    }
    shots = choose_shots([item(100 + i, split="train") for i in range(4)], CONFIG)
    plain = {role: evaluate(m, test, CONFIG, max_tokens=64) for role, m in models.items()}
    best = {role: evaluate(m, test, CONFIG, max_tokens=64, best=True, shots=shots) for role, m in models.items()}
    parts = tuple(
        ModelReport(
            role=role,  # type: ignore[arg-type]
            name=m.name,
            engine="scripted",
            digest="ab" * 32,
            parameters=500_000_000 if role == "teacher" else 125_000_000,
            size_bytes=10**9,
            plain=plain[role],
            best=best[role],
            speed=measure_speed(m, test, CONFIG, max_tokens=64, in_process=True),
        )
        for role, m in models.items()
    )
    return RunReport(
        title="sample",
        command="stillroom distill recipes/sample.yaml",
        created="2025-01-01T00:00:00Z",
        version="0.0.0",
        seconds=12.5,
        models=parts,
        gap=gap_closed(plain["base"], plain["teacher"], plain["student"], CONFIG),
        gap_best=gap_closed(best["base"], best["teacher"], best["student"], CONFIG),
        advice=advise(plain["base"], plain["teacher"], CONFIG, base_best=best["base"], teacher_best=best["teacher"]),
        comparisons=(compare(plain["student"], plain["base"], CONFIG),),
        prompts=prompt_views(test),
        data=DataReport(
            read=30,
            accepted=28,
            near_duplicates=2,
            shared_tools=0,
            splits={"train": 4, "test": n},
            targets={"golden": 4},
            rejected=(RejectionRow(code="bad_json", count=2, message="not JSON", help="fix it", example="a.jsonl:3"),),
        ),
        training=TrainingReport(loss=tuple((i, 2.0 / i) for i in range(1, 30)), facts={"steps": "29"}),
        plan=(PlanRow(what="teacher calls", planned="4", actual="4"),),
        lineage=(LineageRow(step="train", key="0123456789abcdef", parents=("fedcba",), seconds=3.0),),
        licences=(LicenceRow(what="teacher", name="teacher-model", license="Apache-2.0"),),
        config={"training": {"epochs": 3}},
        evaluation=CONFIG,
        environment={"python": "3"},
    )
