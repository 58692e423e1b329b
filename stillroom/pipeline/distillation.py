"""The whole system on one screen: prompts in, a measured student out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from stillroom import telemetry
from stillroom.artifacts import Artifact
from stillroom.errors import ModelError, NotEnoughData
from stillroom.evaluation import advise, check_items
from stillroom.pipeline import steps
from stillroom.pipeline.config import Recipe
from stillroom.pipeline.planning import missing
from stillroom.pipeline.reporting import report
from stillroom.pipeline.steps import Run
from stillroom.storage import write_atomic


def distill(recipe: Recipe, out: Path, *, command: str = "") -> dict[str, Any]:
    """Run every step that is missing, and return the summary that the command prints.

    Raises:
        LicenseConflict, ConfigError, NotEnoughData, ModelError, BudgetExceeded: before or where it happens;
            what was done until then is kept.
    """
    started = time.monotonic()
    check_before_work(recipe)
    run = Run.at(recipe, out)
    with run.store.lock(), run:
        write_atomic(out / "recipe.json", recipe.model_dump_json(indent=1))
        data = steps.prepare(run)
        check_items(steps.read_examples(data.path / "test.jsonl"), recipe.evaluation)
        planned = steps.foretell(run, data)
        labelled = steps.label(run, data)
        before = measure_both(run, "base", labelled, data) | measure_both(run, "teacher", labelled, data)
        advice = weigh(run, before)
        if recipe.requires_gap and not advice.worth_it:
            return stopped(advice, started)
        student = steps.train(run, labelled, data)
        after = measure_both(run, "student", labelled, data, student)
        made = report(run, {**before, **after}, data, labelled, student, planned, advice, command=command)
        show(out, made)
    return {
        **steps.read_json(made.path / "summary.json"),
        **places(out),
        "seconds": round(time.monotonic() - started, 1),
    }


def check_before_work(recipe: Recipe) -> None:
    """Return where nothing shows yet that would end the run later.

    Raises:
        LicenseConflict: the terms forbid the run. ModelError: a file, a key or a package of a model is missing.
    """
    from stillroom.teacher import check_terms

    check_terms(recipe.teacher)
    if lacking := missing(recipe):
        raise ModelError("\n".join(lacking))


def measure_both(
    run: Run, role: str, labelled: Artifact, data: Artifact, student: Artifact | None = None
) -> dict[str, Artifact]:
    """The role's measurement plain and, unless the recipe says no, at its best; one that has no answers is left out."""
    recipe = run.recipe
    models = {
        "base": recipe.student.as_model(recipe.student.path),
        "teacher": recipe.teacher.model,
        "student": recipe.student.as_model(str(student.path / "student")) if student else None,
    }
    model = models[role]
    assert model is not None
    found = {role: steps.measure(run, role, model, labelled, data, best=False, speed=role == "student")}
    if recipe.evaluation.best:
        try:
            found[f"{role}-best"] = steps.measure(run, role, model, labelled, data, best=True, speed=False)
        except NotEnoughData as error:
            if model.engine != "recorded":
                raise
            # Other prompts give other examples to show, which nobody was recorded with; the plain figures still stand.
            telemetry.note(f"{role} at its best is left out: {str(error).splitlines()[0]}")
    run.close_models()
    return found


def weigh(run: Run, before: dict[str, Artifact]) -> Any:
    """What the gap between teacher and base says, told before any training."""
    results = {name: steps.read_result(artifact) for name, artifact in before.items()}
    advice = advise(
        results["base"],
        results["teacher"],
        run.recipe.evaluation,
        base_best=results.get("base-best"),
        teacher_best=results.get("teacher-best"),
    )
    telemetry.note(advice.headline)
    return advice


def stopped(advice: Any, started: float) -> dict[str, Any]:
    """The summary of a run that its own recipe stopped before training."""
    return {
        "headline": advice.headline,
        "trained": False,
        "details": list(advice.details),
        "seconds": round(time.monotonic() - started, 1),
    }


def record(recipe: Recipe, out: Path, to: Path) -> dict[str, Any]:
    """Ask the teacher everything that a run of this recipe needs, and write the answers as invocation logs."""
    from stillroom.pipeline.recording import open_resumed, write_answers

    check_before_work(recipe)
    run = Run.at(recipe, out)
    run.opener = lambda config: open_resumed(config, to)
    with run.store.lock(), run:
        data = steps.prepare(run)
        check_items(steps.read_examples(data.path / "test.jsonl"), recipe.evaluation)
        labelled = steps.label(run, data)
        measure_both(run, "teacher", labelled, data)
        return write_answers(run, data, labelled, to)


def show(out: Path, made: Artifact) -> None:
    """Put the report and the student where people look for them; links, so nothing is stored twice."""
    for name in ("report.html", "report.json", "student"):
        link = out / name
        temporary = out / f".{name}.link"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(made.path / name, out))
        os.replace(temporary, link)


def places(out: Path) -> dict[str, str]:
    return {"report": str(out / "report.html"), "student": str(out / "student")}
