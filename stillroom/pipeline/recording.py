"""The teacher's answers of a run, written down so that the run can be repeated without the teacher."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from stillroom import __version__
from stillroom.artifacts import Artifact
from stillroom.engines import AnswerCache, Entry, Request, answer_key, write_recording
from stillroom.engines.recording import ModelInfo
from stillroom.evaluation import choose_shots, evaluation_requests
from stillroom.pipeline.steps import Run, located, read_examples, read_json
from stillroom.schema import Example
from stillroom.teacher import requests_of


def write_answers(run: Run, data: Artifact, labelled: Artifact, to: Path) -> dict[str, Any]:
    """Write every answer that label and evaluate got from the teacher; `to` becomes the log's folder."""
    recipe = run.recipe
    model: Any = run.model(located(recipe.teacher.model))
    entries, missing = [], 0
    with AnswerCache(run.answers) as cache:
        for example, request in _requests(run, data, labelled):
            completion = cache.get(answer_key(model.identity, request.messages, request.tools, request.params))
            if completion is None:
                missing += 1
            else:
                entries.append(Entry(example.id, request, completion))
    info = ModelInfo(
        model_id=recipe.teacher.model.name or model.name,
        recorded_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        digest=getattr(getattr(model, "loaded", None), "digest", ""),
        license=recipe.teacher.model.license,
        terms=recipe.teacher.model.terms,
        details={"stillroom": __version__, **getattr(model, "parts", {})},
    )
    run.close_models()
    write_recording(to, entries, info)
    return {"recorded": len(entries), "missing": missing, "folder": str(to)}


def _requests(run: Run, data: Artifact, labelled: Artifact) -> list[tuple[Example, Request]]:
    """The same questions that the steps ask: training prompts, then held-out ones plain and at the teacher's best."""
    recipe = run.recipe
    train, test = read_examples(data.path / "train.jsonl"), read_examples(data.path / "test.jsonl")
    open_ones = [example for example in train if not example.targets]
    found = list(zip(open_ones, requests_of(open_ones, recipe.teacher), strict=True))
    cap = read_json(labelled.path / "cap.json")["cap"]
    shots = choose_shots(read_examples(labelled.path / "train.jsonl"), recipe.evaluation)
    for best in (False, True) if recipe.evaluation.best else (False,):
        asked = evaluation_requests(test, recipe.evaluation, max_tokens=cap, best=best, shots=shots)
        found += zip(test, asked, strict=True)
    return found
