"""The teacher's answers of a run, written down so that the run can be repeated without the teacher.

What a recording holds already is not asked again: add prompts to a recipe, record into the same folder, and only
the new ones are put to the teacher.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom import __version__, telemetry
from stillroom.artifacts import Artifact
from stillroom.engines import AnswerCache, Entry, ModelConfig, Request, answer_key, open_model, write_recording
from stillroom.engines.recorded import MANIFEST, RecordedModel
from stillroom.engines.recording import ModelInfo
from stillroom.errors import NotRecorded
from stillroom.evaluation import choose_shots, evaluation_requests
from stillroom.pipeline.steps import Run, located, read_examples, read_json
from stillroom.schema import Completion, Example, GenerateParams, Message, ToolSpec, prompt_digest
from stillroom.teacher import requests_of


class Resumed:
    """A live teacher whose recorded answers are given again in place of asking it.

    Answers that were cut are asked anew: they may have been cut at another length.
    """

    def __init__(self, teacher: Any, recorded: RecordedModel) -> None:
        self._teacher, self._recorded = teacher, recorded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    async def generate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: GenerateParams = GenerateParams()
    ) -> Completion:
        """The recorded answer, else the teacher's."""
        try:
            found = self._recorded.lookup(prompt_digest(messages, tools, constrain=params.constrain))
        except NotRecorded:
            found = None
        if found is not None and found.finish_reason != "length":
            return found
        completion: Completion = await self._teacher.generate(messages, tools, params)
        return completion


def open_resumed(config: ModelConfig, folder: Path) -> Any:
    """The teacher, behind what `folder` recorded of exactly this one: same weights or endpoint, same prompt format."""
    teacher = open_model(config)
    if not (folder / MANIFEST).exists():
        return teacher
    details = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("details") or {}
    if {name: value for name, value in details.items() if name != "stillroom"} != teacher.parts:
        telemetry.note(f"{folder} holds answers of another model or prompt format; all are asked anew")
        return teacher
    return Resumed(teacher, RecordedModel(ModelConfig(engine="recorded", path=str(folder))))


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
