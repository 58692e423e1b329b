"""The student's model card: README.md beside its weights.

It says what the student was made from, under which licences, how it did on which items, and how to run it in
each engine. Front matter follows Hugging Face's model card metadata, so a hub or a tool can read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from stillroom.evaluation.headline import headline
from stillroom.evaluation.report_data import LicenceRow, LineageRow, RunReport
from stillroom.evaluation.results import POOLED, Result
from stillroom.evaluation.wording import clean, count, percent, seconds, share, size
from stillroom.storage import write_atomic


class CardFacts(BaseModel, frozen=True, extra="forbid"):
    """What the card says beyond the report.

    Attributes:
        name: the student's name. base_model: hub id or name of what was trained further.
        license: SPDX id of the student's weights. gguf: the GGUF file's name inside the folder, or None.
        dtype: of the saved weights. max_tokens: the answer cap it was measured with.
    """

    name: str
    base_model: str = ""
    license: str = ""
    gguf: str | None = None
    dtype: str = "float32"
    max_tokens: int = 128
    chat_template_note: str = ""


def write_card(folder: str | Path, report: RunReport, facts: CardFacts) -> Path:
    """Write README.md into the student's folder.

    Returns:
        Its path.
    """
    path = Path(folder) / "README.md"
    write_atomic(path, clean(card(report, facts)))
    return path


def card(report: RunReport, facts: CardFacts) -> str:
    """The card as Markdown."""
    parts = [
        _front_matter(report, facts),
        f"# {_inline(facts.name)}\n\n{_inline(headline(report))}",
        f"Made by Stillroom {report.version} on {report.created} with `{_code(report.command)}`.",
        _use(facts),
        _figures(report),
        _data(report),
        _lineage(report.lineage),
        _licences(report.licences, facts),
        _limits(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: RunReport, facts: CardFacts) -> str:
    student = report.model("student")
    meta: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    meta["tags"] = ["distillation", "stillroom", report.evaluation.task.replace("_", "-")]
    if facts.license:
        meta["license"] = facts.license.lower()
    if facts.base_model:
        meta["base_model"] = facts.base_model
    if student and student.plain:
        metrics = [{"type": "accuracy", "value": round(value, 4)} for value in student.plain.figures().values()]
        names = student.plain.figures()
        dataset = {"type": "held-out", "name": f"{report.title}, {len(student.plain.items)} held-out items"}
        for metric, name in zip(metrics, names, strict=True):
            metric["name"] = name
        task = {"type": "text-generation"}
        meta["model-index"] = [
            {"name": facts.name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
        ]
    return f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---"


def _use(facts: CardFacts) -> str:
    parts = [
        "## Run it\n\n" + (facts.chat_template_note or "The chat template that it was trained with is in the folder."),
        "**Transformers**\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("./student")\n'
        'model = AutoModelForCausalLM.from_pretrained("./student")\n'
        'messages = [{"role": "user", "content": "What is the weather in Paris?"}]\n'
        'weather = {"name": "get_weather", "description": "Weather of a city.", "parameters": {"type": "object",\n'
        '           "properties": {"city": {"type": "string"}}, "required": ["city"]}}\n'
        'tools = [{"type": "function", "function": weather}]\n'
        "inputs = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True,\n"
        '                                       return_tensors="pt", return_dict=True)\n'
        f"output = model.generate(**inputs, max_new_tokens={facts.max_tokens}, do_sample=False)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n```',
        f"**vLLM**\n\n```sh\nvllm serve ./student --dtype {facts.dtype}\n```",
    ]
    if facts.gguf:
        parts += [
            f"**llama.cpp**\n\n```sh\nllama-server -m ./student/{facts.gguf} --jinja\n```",
            "**Ollama**\n\n```sh\n"
            f"printf 'FROM ./{facts.gguf}\\nPARAMETER temperature 0\\n' > student/Modelfile\n"
            "ollama create student -f student/Modelfile && ollama run student\n```",
        ]
    return "\n\n".join(parts)


def _figures(report: RunReport) -> str:
    results = [(m, r) for m in report.models for r in (m.plain, m.best) if r is not None]
    if not results:
        return ""
    names = sorted({name for _, result in results for name in result.categories if name})
    names = [*names, POOLED] if len(names) > 1 else [POOLED]
    level = percent(report.evaluation.confidence)
    lines = [
        f"## Measured\n\nShare of right answers with {level} Wilson intervals; the same held-out items, answer cap and "
        "greedy decoding for every model. None of the items was trained on.",
        "",
        "| model | prompted | " + " | ".join(names) + " | valid | n |",
        "|---|---|" + "---|" * len(names) + "---|---|",
    ]
    for model, result in results:
        cells = [_share(result, name) for name in names]
        valid = result.validity()
        name = f"{model.role}: {_cell(model.name)}"
        how = "plainly" if result.variant == "plain" else "at its best"
        lines.append(
            f"| {name} | {how} | {' | '.join(cells)} | {share(valid.value) if valid else '–'} | {len(result.items)} |"
        )
    student = report.model("student")
    if student and student.speed:
        speed = student.speed
        lines.append(
            f"\nLatency p50 {seconds(speed.p50.value)}, p95 {seconds(speed.p95_s)} over {speed.calls} unbatched calls; "
            f"{speed.output_tokens_per_s:.1f} output tokens/s. {count(student.parameters)} parameters, weights "
            f"{size(student.size_bytes)}."
        )
    return "\n".join(lines)


def _share(result: Result, name: str) -> str:
    if not result.select(name):
        return "–"
    value = result.accuracy(name)
    return f"{share(value.value)} ({share(value.low)}–{share(value.high)})"


def _data(report: RunReport) -> str:
    if report.data is None:
        return ""
    data = report.data
    targets = ", ".join(f"{count} {_inline(origin)}" for origin, count in data.targets.items())
    return (
        f"## Data\n\n{data.accepted:,} of {data.read:,} records were accepted. Splits: "
        f"{', '.join(f'{split} {n:,}' for split, n in data.splits.items())}. "
        f"Training answers: {targets or 'not stated'}. {data.repeats:,} repeats were dropped and "
        f"{data.near_duplicates:,} training prompts removed for lying too near to a held-out one."
    )


def _lineage(rows: Sequence[LineageRow]) -> str:
    if not rows:
        return ""
    lines = [
        f"| {_cell(row.step)} | `{row.key}` | {', '.join(f'`{_code(parent)}`' for parent in row.parents)} |"
        for row in rows
    ]
    return "## Lineage\n\n| step | key | made from |\n|---|---|---|\n" + "\n".join(lines)


def _licences(rows: Sequence[LicenceRow], facts: CardFacts) -> str:
    lines = [
        f"| {_cell(row.what)} | {_cell(row.name)} | {_cell(row.license or 'not stated')} | {_cell(row.terms or '–')} |"
        for row in rows
    ]
    head = f"## Licences\n\nThe student's weights: {_inline(facts.license or 'not stated')}."
    return head + ("\n\n| what | name | licence | terms |\n|---|---|---|---|\n" + "\n".join(lines) if lines else "")


def _limits(report: RunReport) -> str:
    notes = "".join(f"\n- {_inline(note)}" for note in report.notes)
    return (
        "## Limits\n\n- The figures hold for items like the held-out ones; other tools, languages and lengths were not "
        "measured.\n- An answer may be well-formed and wrong: check arguments before anything acts on them." + notes
    )


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|")


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
