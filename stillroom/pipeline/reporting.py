"""The last step: what the run found, as one page, one JSON file, and the student with its model card."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from stillroom import __version__
from stillroom.artifacts import Artifact
from stillroom.config import resolve_path
from stillroom.engines import Price
from stillroom.evaluation import (
    CardFacts,
    DataReport,
    LicenceRow,
    LineageRow,
    ModelReport,
    PlanRow,
    RejectionRow,
    Result,
    RunReport,
    TrainingReport,
    compare,
    gap_closed,
    prompt_views,
    write_card,
    write_report,
)
from stillroom.evaluation.headline import headline
from stillroom.pipeline import steps
from stillroom.pipeline.planning import leaves_the_machine, licences, money
from stillroom.pipeline.steps import Run, read_json

REPORT_ROOMS = ("evaluation", "pipeline", "schema")
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "xllamacpp", "gguf")


def report(
    run: Run,
    measured: dict[str, Artifact],
    data: Artifact,
    labelled: Artifact,
    student: Artifact,
    planned: Artifact,
    advice: Any,
    *,
    command: str,
) -> Artifact:
    """Write report.html, report.json, summary.json and student/ with its card."""
    recipe = run.recipe
    inputs: dict[str, Artifact | str] = {
        **measured,
        "data": data,
        "labelled": labelled,
        "train": student,
        "plan": planned,
    }

    def build(folder: Path, work: Path) -> None:
        found = {name: steps.read_result(artifact) for name, artifact in measured.items()}
        page = RunReport(
            title=recipe.name,
            command=command,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            version=__version__,
            seconds=sum(artifact.seconds for artifact in run.made.values()),
            models=_models(run, measured, found, student),
            **_gaps(run, found),
            advice=advice,
            comparisons=_comparisons(run, found),
            prompts=prompt_views(steps.read_examples(data.path / "test.jsonl")),
            data=_data(data, labelled),
            items_train=_lines(labelled.path / "train.jsonl"),
            items_validation=_lines(data.path / "validation.jsonl"),
            training=_training(student),
            plan=_plan(planned, run, labelled, student),
            lineage=_lineage(run),
            licences=tuple(
                LicenceRow(what=r["what"], name=r["name"], license=r["license"], terms=r.get("terms", ""))
                for r in licences(recipe)
            ),
            config=steps.plain(recipe),
            evaluation=recipe.evaluation,
            environment=_environment(),
            notes=_notes(run),
        )
        write_report(folder, page)
        shutil.copytree(student.path / "student", folder / "student", copy_function=os.link)
        write_card(folder / "student", page, _card(run, folder / "student", labelled))
        steps.write_json(folder / "summary.json", _summary(page, found))

    config = {"recipe": steps.plain(recipe), "command": command}
    return run.step("report", inputs=inputs, config=config, rooms=REPORT_ROOMS, build=build)


def _models(
    run: Run, measured: dict[str, Artifact], found: dict[str, Result], student: Artifact
) -> tuple[ModelReport, ...]:
    recipe, teacher = run.recipe, run.recipe.teacher.model
    trained = read_json(student.path / "training.json")
    size = sum(file.stat().st_size for file in (student.path / "student").glob("*.safetensors"))
    base = ModelReport(
        role="base",
        name=recipe.student.name or Path(recipe.student.path).name,
        engine="transformers",
        digest=measured["base"].parents.get("model", ""),
        parameters=trained.get("parameters"),
        size_bytes=_size(recipe.student.path),
        license=recipe.student.license,
        input_per_million=_known(recipe.student.price).get("input"),
        output_per_million=_known(recipe.student.price).get("output"),
        plain=found["base"],
        best=found.get("base-best"),
    )
    asked = ModelReport(
        role="teacher",
        name=found["teacher"].model,
        engine=teacher.engine,
        license=teacher.license,
        terms=teacher.terms,
        input_per_million=_known(teacher.price).get("input"),
        output_per_million=_known(teacher.price).get("output"),
        plain=found["teacher"],
        best=found.get("teacher-best"),
        speed=steps.read_speed(measured["teacher"]),
    )
    speed = steps.read_speed(measured["student"])
    learnt = base.model_copy(
        update={
            "role": "student",
            "name": f"{base.name}, distilled",
            "digest": measured["student"].parents.get("model", ""),
            "size_bytes": size,
            "memory_bytes": speed.memory_bytes if speed else None,
            "plain": found["student"],
            "best": found.get("student-best"),
            "speed": speed,
        }
    )
    return base, asked, learnt


def _known(price: Price) -> dict[str, float]:
    """The price where the recipe gives one; a report shows no figure otherwise."""
    if not price.stated:
        return {}
    return {"input": price.input_per_million, "output": price.output_per_million}


def _gaps(run: Run, found: dict[str, Result]) -> dict[str, Any]:
    config = run.recipe.evaluation
    plain = gap_closed(found["base"], found["teacher"], found["student"], config)
    if not config.best:
        return {"gap": plain, "gap_best_missing": "the recipe does not measure the models at their best"}
    if "teacher-best" not in found:
        return {"gap": plain, "gap_best_missing": "the recorded teacher has no answers at its best to these prompts"}
    best = gap_closed(found["base-best"], found["teacher-best"], found["student-best"], config)
    return {"gap": plain, "gap_best": best}


def _comparisons(run: Run, found: dict[str, Result]) -> tuple[Any, ...]:
    pairs = [
        ("student", "base"),
        ("teacher", "student"),
        ("student-best", "base-best"),
        ("teacher-best", "student-best"),
    ]
    return tuple(
        compare(found[one], found[other], run.recipe.evaluation)
        for one, other in pairs
        if one in found and other in found
    )


def _data(data: Artifact, labelled: Artifact) -> DataReport:
    found = read_json(data.path / "report.json")
    examples = steps.read_examples(labelled.path / "train.jsonl")
    origins = [example.targets[0].origin for example in examples]
    repeats = {e.id: e.metadata.get("repeats", 1) for e in examples if e.targets[0].origin == "golden"}
    asked = read_json(labelled.path / "report.json")
    dropped = ", ".join(f"{count} {reason}" for reason, count in asked["dropped"].items())
    return DataReport(
        read=found["accepted"] + found["repeats_dropped"] + sum(found["rejected"].values()),
        accepted=found["accepted"],
        rejected=_reasons(found["rejected"], found["rejections"]),
        warnings=_reasons(found["warnings"], []),
        repeats=found["repeats_dropped"],
        near_duplicates=found["near_duplicates"]["removed"],
        shared_tools=found["held_out_tools"]["in_training"],
        splits={name: split["total"] for name, split in found["splits"].items()},
        categories={name: {k: v for k, v in split.items() if k != "total"} for name, split in found["splits"].items()},
        targets={origin: origins.count(origin) for origin in sorted(set(origins))},
        upsampled={"golden": sum(repeats.values())},
        notes=(f"Teacher's answers left out of training: {dropped}.",) if dropped else (),
    )


def _reasons(counts: dict[str, int], samples: list[dict[str, Any]]) -> tuple[RejectionRow, ...]:
    """One row per reason, with the first record that it befell."""
    rows = []
    for code, count in sorted(counts.items(), key=lambda pair: -pair[1]):
        first = next((sample for sample in samples if sample.get("reasonCode", sample.get("code")) == code), {})
        where = f"{Path(first['file']).name}:{first['line']}" if "file" in first else ""
        rows.append(
            RejectionRow(
                code=code, count=count, message=first.get("message", ""), help=first.get("help", ""), example=where
            )
        )
    return tuple(rows)


def _training(student: Artifact) -> TrainingReport:
    import json

    trained = read_json(student.path / "training.json")
    rows = [json.loads(line) for line in (student.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = {
        "steps": f"{trained['steps']}",
        "tokens": f"{trained['tokens']:,}",
        "tokens per second": f"{trained['tokens_per_s']:.0f}",
        "precision": str(trained["precision"]),
        "peak memory": f"{trained['peak_memory_bytes'] / 2**30:.2f} GiB",
        "time": f"{trained['seconds']:.0f} s",
    }
    return TrainingReport(
        loss=tuple((row["step"], row["loss"]) for row in rows if "loss" in row),
        validation=tuple((row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row),
        facts=facts,
    )


def _plan(planned: Artifact, run: Run, labelled: Artifact, student: Artifact) -> tuple[PlanRow, ...]:
    """The plan's figures beside what they came to."""
    figures, trained = read_json(planned.path / "plan.json"), read_json(student.path / "training.json")
    asked = read_json(labelled.path / "report.json")
    measuring = sum(a.seconds for name, a in run.made.items() if name.startswith("evaluate"))
    calls = (
        asked["asked"]
        + asked["cached"]
        + sum(len(steps.read_result(a).items) for name, a in run.made.items() if name.startswith("evaluate-teacher"))
    )
    spent = asked["usd"] + sum(
        steps.read_result(a).cost_usd for name, a in run.made.items() if name.startswith("evaluate-teacher")
    )
    rows = [
        PlanRow(what="teacher calls", planned=f"at most {figures['teacher']['calls']}", actual=str(calls)),
        PlanRow(
            what="spent on the teacher",
            planned=money(figures["teacher"]["usd"]),
            actual=money(spent if run.recipe.teacher.model.price.stated else None),
        ),
        PlanRow(what="training tokens", planned=f"{figures['training']['tokens']:,}", actual=f"{trained['tokens']:,}"),
        PlanRow(
            what="memory of the training",
            planned=f"{figures['memory']['training_gib']:.2f} GiB",
            actual=f"{trained['peak_memory_bytes'] / 2**30:.2f} GiB",
        ),
    ]
    if "seconds" in figures:
        rows += [
            PlanRow(
                what="training", planned=f"{figures['seconds']['training']} s", actual=f"{trained['seconds']:.0f} s"
            ),
            PlanRow(what="measuring", planned=f"{figures['seconds']['measuring']} s", actual=f"{measuring:.0f} s"),
        ]
    return tuple(rows)


def _lineage(run: Run) -> tuple[LineageRow, ...]:
    return tuple(
        LineageRow(
            step=name,
            key=artifact.key,
            parents=tuple(f"{role} {key[:16]}" for role, key in artifact.parents.items()),
            seconds=artifact.seconds,
            reused=artifact.reused,
            path=str(artifact.path),
        )
        for name, artifact in run.made.items()
    )


def _notes(run: Run) -> tuple[str, ...]:
    recipe, notes = run.recipe, []
    if recipe.teacher.model.engine == "recorded":
        notes.append("The teacher's answers were recorded earlier and are replayed; it was not asked in this run.")
    sent = leaves_the_machine(recipe)
    notes += [f"Sent to {row['to']}: {row['what']}." for row in sent] or ["Nothing left this machine."]
    notes.append("Latency is the student's; the base has the same shape and so the same time a token.")
    return tuple(notes)


def _card(run: Run, folder: Path, labelled: Artifact) -> CardFacts:
    recipe = run.recipe
    gguf = next(folder.glob("*.gguf"), None)
    return CardFacts(
        name=recipe.name,
        base_model=recipe.student.name or recipe.student.path,
        license=recipe.student.license,
        gguf=gguf.name if gguf else None,
        dtype=recipe.student.export_dtype,
        max_tokens=read_json(labelled.path / "cap.json")["cap"],
    )


def _summary(page: RunReport, found: dict[str, Result]) -> dict[str, Any]:
    """What the command's last line says, less the places."""
    return {
        "headline": headline(page),
        "accuracy": {name: result.figures() for name, result in found.items()},
        "gap_closed": page.gap.value if page.gap else None,
        "gap_closed_interval": [page.gap.low, page.gap.high] if page.gap else None,
        "gap_closed_best": page.gap_best.value if page.gap_best else None,
        "items": {"train": page.items_train, "test": len(found["student"].items)},
    }


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["processors"] = str(len(os.sched_getaffinity(0)))
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _size(path: str) -> int | None:
    file = resolve_path(path)
    return file.stat().st_size if file.is_file() else None


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
