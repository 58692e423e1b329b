"""The teacher's answers of a run, written down so that the run can be repeated without the teacher."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from stillroom import __version__
from stillroom.artifacts import Artifact
from stillroom.engines import AnswerCache, Entry, Request, answer_key, write_recording
from stillroom.engines.recording import ModelInfo
from stillroom.evaluation import choose_shots
from stillroom.evaluation.few_shot import with_shots
from stillroom.pipeline.steps import Run, located, read_examples, read_json
from stillroom.schema import Example, GenerateParams
from stillroom.teacher import params_of


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
    found = [(e, Request(e.messages, e.tools, params_of(recipe.teacher))) for e in train if not e.targets]
    cap = read_json(labelled.path / "cap.json")["cap"]
    plain = GenerateParams(max_tokens=cap, seed=recipe.evaluation.seed)
    found += [(example, Request(example.messages, example.tools, plain)) for example in test]
    if recipe.evaluation.best:
        shots = choose_shots(read_examples(labelled.path / "train.jsonl"), recipe.evaluation)
        constrain = recipe.evaluation.constrain and recipe.evaluation.task == "function_calling"
        best = GenerateParams(max_tokens=cap, seed=recipe.evaluation.seed, constrain=constrain)
        found += [(e, Request(with_shots(e.messages, shots, recipe.evaluation.task), e.tools, best)) for e in test]
    return found
