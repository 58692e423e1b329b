"""The steps of a distillation, each an artifact: found if it stands, resumed if it was interrupted, else built.

    prepare   -> train.jsonl validation.jsonl test.jsonl report.json
    plan      -> plan.json
    label     -> train.jsonl (with targets) report.json cap.json
    evaluate  -> result.json [speed.json], one artifact per model and variant
    train     -> student/ training.json metrics.jsonl

A step reads its parents' files and nothing else, so its key says everything about it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stillroom import telemetry
from stillroom.artifacts import Artifact, Store, file_digest
from stillroom.config import resolve_path
from stillroom.engines import AnswerCache, ModelConfig, open_model
from stillroom.evaluation import (
    EvalConfig,
    Result,
    Speed,
    answer_cap,
    choose_shots,
    evaluate,
    measure_speed,
    speed_of_answers,
)
from stillroom.models.config import PruneConfig
from stillroom.pipeline.config import Recipe
from stillroom.schema import ChatModel, Example, example_from_dict, to_dict

PREPARE_ROOMS = ("data", "toolcalls", "schema")
LABEL_ROOMS = ("teacher", "engines", "toolcalls", "schema")
MEASURING = (
    "measuring", "scoring", "function_calling", "classification", "free_text", "judging", "few_shot", "latency",
    "results", "statistics", "wording", "config",
)  # fmt: skip
"""Modules of `evaluation` that decide a result; changing the others, which show it, measures nothing anew."""
EVALUATE_ROOMS = (*(f"evaluation/{module}" for module in MEASURING), "engines", "models", "toolcalls", "schema")
TRAIN_ROOMS = ("training", "models", "checkpoint", "toolcalls", "schema")


@dataclass
class Run:
    """One run of a recipe: where its artifacts lie, and the models that it has open.

    Attributes:
        answers: the cache of paid answers, beside the runs, so that no run asks again what another asked.
        made: artifacts by step, as they are found or built.
        opener: how a model is opened.
    """

    recipe: Recipe
    store: Store
    answers: Path
    made: dict[str, Artifact] = field(default_factory=dict)
    opener: Callable[[ModelConfig], ChatModel] = open_model
    _opened: dict[str, ChatModel] = field(default_factory=dict)

    @classmethod
    def at(cls, recipe: Recipe, out: Path) -> Run:
        return cls(recipe, Store(out), out.parent / "answers")

    def step(
        self,
        name: str,
        *,
        inputs: dict[str, Artifact | str],
        config: dict[str, Any],
        rooms: Sequence[str],
        build: Callable[[Path, Path], None],
    ) -> Artifact:
        artifact = self.store.step(name, inputs=inputs, config=config, rooms=rooms, build=build)
        telemetry.note(
            f"{name:<22} {'found' if artifact.reused else 'done'}  ({artifact.seconds:.1f} s)  {artifact.key}"
        )
        self.made[name] = artifact
        return artifact

    def model(self, config: ModelConfig) -> ChatModel:
        """An open model; the same config gives the same one until `close`."""
        key = config.model_dump_json()
        if key not in self._opened:
            self._opened[key] = self.opener(config)
        return self._opened[key]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_models()

    def close_models(self) -> None:
        """Give up all open models: training wants the memory."""
        for model in self._opened.values():
            getattr(model, "close", lambda: None)()
        self._opened.clear()


def prepare(run: Run) -> Artifact:
    """Read every source, split, decontaminate, choose golden records."""
    from stillroom.data import prepare as prepare_data

    recipe = run.recipe
    student = resolve_path(recipe.student.path)
    inputs: dict[str, Artifact | str] = {
        f"source {source.path}": _source_digest(source) for source in recipe.data.sources
    }
    inputs["tokenizer"] = _weights_digest(str(student))

    def build(folder: Path, work: Path) -> None:
        prepared = prepare_data(recipe.data, recipe.seed, _token_counter(recipe))
        for name in ("train", "validation", "test"):
            write_examples(folder / f"{name}.jsonl", getattr(prepared, name))
        write_json(folder / "report.json", prepared.report)

    config = {"data": plain(recipe.data), "seed": recipe.seed, "chat_template": recipe.student.chat_template}
    return run.step("prepare", inputs=inputs, config=config, rooms=PREPARE_ROOMS, build=build)


def foretell(run: Run, data: Artifact) -> Artifact:
    """The plan, before anything is spent, so that the report can set actual figures beside it."""
    from stillroom.data import Prepared
    from stillroom.pipeline.planning import plan

    def build(folder: Path, work: Path) -> None:
        prepared = Prepared(
            train=tuple(read_examples(data.path / "train.jsonl")),
            validation=tuple(read_examples(data.path / "validation.jsonl")),
            test=tuple(read_examples(data.path / "test.jsonl")),
            report=read_json(data.path / "report.json"),
        )
        found = plan(run.recipe, prepared=prepared)
        telemetry.note(found.text)
        write_json(folder / "plan.json", found.figures)

    rooms = ("pipeline/planning", "schema")
    return run.step("plan", inputs={"data": data}, config={"recipe": plain(run.recipe)}, rooms=rooms, build=build)


def label(run: Run, data: Artifact) -> Artifact:
    """Ask the teacher what nobody has answered; golden records keep their answers."""
    from stillroom.teacher import label as label_examples

    recipe = run.recipe
    inputs: dict[str, Artifact | str] = {"data": data, **_model_inputs(recipe.teacher.model)}

    def build(folder: Path, work: Path) -> None:
        from stillroom.models import encode_target, load_tokenizer

        with AnswerCache(run.answers) as cache:
            examples = read_examples(data.path / "train.jsonl")
            labelled, report = label_examples(examples, run.model(located(recipe.teacher.model)), recipe.teacher, cache)
        tokenizer = load_tokenizer(str(resolve_path(recipe.student.path)), chat_template=recipe.student.chat_template)
        lengths = [len(encode_target(tokenizer, example.targets[0].message)) for example in labelled]
        write_examples(folder / "train.jsonl", labelled)
        write_json(folder / "report.json", report.to_dict())
        write_json(
            folder / "cap.json", {"longest": max(lengths, default=0), "cap": answer_cap(lengths, recipe.evaluation)}
        )

    config = {"teacher": plain(recipe.teacher), "answer_cap_ratio": recipe.evaluation.answer_cap_ratio}
    return run.step("label", inputs=inputs, config=config, rooms=LABEL_ROOMS, build=build)


def measure(
    run: Run, role: str, model: ModelConfig, labelled: Artifact, data: Artifact, *, best: bool, speed: bool
) -> Artifact:
    """Score one model on the held-out items, plain or at its best; with `speed`, time calls made one by one too."""
    recipe = run.recipe
    judge = recipe.evaluation.judge.model
    inputs: dict[str, Artifact | str] = {"data": data, "labelled": labelled, **_model_inputs(model)}
    if judge:
        inputs |= _model_inputs(judge, "judge model")

    def build(folder: Path, work: Path) -> None:
        opened = run.model(located(model))
        test = read_examples(data.path / "test.jsonl")
        cap = read_json(labelled.path / "cap.json")["cap"]
        shots = choose_shots(read_examples(labelled.path / "train.jsonl"), recipe.evaluation) if best else ()
        result = evaluate(
            opened,
            test,
            recipe.evaluation,
            max_tokens=cap,
            answers=run.answers if role == "teacher" or judge else work / "answers",  # what was paid for is kept
            best=best,
            shots=shots,
            judge=run.model(located(judge)) if judge else None,
            label=f"{role}{' at its best' if best else ''}",
        )
        write_json(folder / "result.json", result.model_dump(mode="json"))
        if speed:
            timed = measure_speed(opened, test, recipe.evaluation, max_tokens=cap, in_process=True)
        else:
            timed = speed_of_answers(result)
        write_json(folder / "speed.json", timed.model_dump(mode="json") if timed else None)

    config = {"model": plain(model), "evaluation": _measured_by(recipe.evaluation), "best": best, "speed": speed}
    return run.step(
        f"evaluate-{role}{'-best' if best else ''}", inputs=inputs, config=config, rooms=EVALUATE_ROOMS, build=build
    )


def train(run: Run, labelled: Artifact, data: Artifact) -> Artifact:
    """Teach the student the targets, then export it as people use it."""
    recipe = run.recipe
    path = str(resolve_path(recipe.student.path))
    inputs: dict[str, Artifact | str] = {"labelled": labelled, "data": data, "student": _weights_digest(path)}

    def build(folder: Path, work: Path) -> None:
        from stillroom.models import export, load
        from stillroom.training import train as train_student

        run.close_models()
        examples = read_examples(labelled.path / "train.jsonl")
        loaded = load(path, chat_template=recipe.student.chat_template)
        if recipe.student.prune:
            loaded = _pruned(loaded, recipe.student.prune, examples)
        result = train_student(
            loaded,
            examples,
            recipe.training,
            work,
            validation=read_examples(data.path / "validation.jsonl"),
            seed=recipe.seed,
        )
        export(loaded, folder / "student", dtype=recipe.student.export_dtype, gguf=recipe.student.gguf)
        write_json(folder / "training.json", result.to_dict())
        shutil.copy(work / "metrics.jsonl", folder / "metrics.jsonl")

    config = {
        "training": plain(recipe.training),
        "seed": recipe.seed,
        "student": plain(recipe.student) | {"license": None, "price": None, "name": None},
    }
    return run.step("train", inputs=inputs, config=config, rooms=TRAIN_ROOMS, build=build)


def _pruned(loaded: Any, config: PruneConfig, examples: Sequence[Example]) -> Any:
    """The student cut out of `loaded`, by what it will read and write."""
    from stillroom.models import encode_prompt, encode_target, prune

    sequences = [
        [*encode_prompt(loaded, example.messages, example.tools), *encode_target(loaded, target.message)]
        for example in examples
        for target in example.targets
    ]
    return prune(loaded, config, sequences)


def read_result(artifact: Artifact) -> Result:
    return Result.model_validate(read_json(artifact.path / "result.json"))


def read_speed(artifact: Artifact) -> Speed | None:
    found = read_json(artifact.path / "speed.json")
    return Speed.model_validate(found) if found else None


def read_examples(path: Path) -> list[Example]:
    with path.open(encoding="utf-8") as file:
        return [example_from_dict(json.loads(line)) for line in file]


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(to_dict(example), ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def plain(config: BaseModel) -> dict[str, Any]:
    """A config as JSON values, for a key."""
    return config.model_dump(mode="json")


def _token_counter(recipe: Recipe) -> Callable[..., int] | None:
    if recipe.data.max_prompt_tokens is None:
        return None
    from stillroom.models import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(str(resolve_path(recipe.student.path)), chat_template=recipe.student.chat_template)
    return lambda messages, tools: len(encode_prompt(tokenizer, messages, tools))


def _measured_by(config: EvalConfig) -> dict[str, Any]:
    """The settings that a measurement depends on; how the report shows it is not among them."""
    return {k: v for k, v in plain(config).items() if k not in ("report_items", "min_gap", "bootstrap_samples")}


def _model_inputs(model: ModelConfig, role: str = "model") -> dict[str, Artifact | str]:
    """Digest of the files that a local or recorded model is made of; an endpoint has none."""
    return {role: _weights_digest(str(resolve_path(model.path)))} if model.path else {}


def located(model: ModelConfig) -> ModelConfig:
    """The config with `package:` and `~` resolved, as engines open files."""
    return model.model_copy(update={"path": str(resolve_path(model.path))}) if model.path else model


def _weights_digest(path: str) -> str:
    return file_digest(path) if Path(path).exists() else path  # a hub id stands for itself


def _source_digest(source: Any) -> str:
    path = resolve_path(source.path)
    return file_digest(path) if path.exists() else "missing"
