"""What a recipe will do and take, before anything is spent.

Everything is counted where it can be counted (records, calls, prompt tokens) and measured where it cannot
(a few real training steps and answers on this machine). Estimates say that they are; the report sets the
actual figures beside them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stillroom.config import resolve_path
from stillroom.engines import ModelConfig
from stillroom.errors import ConfigError, LicenseConflict
from stillroom.pipeline.config import Recipe
from stillroom.schema import Example

GPU_GIB = {
    "t4": 16, "l4": 24, "a10g": 24, "rtx4090": 24, "rtx5090": 32, "l40s": 48, "a100-40gb": 40,
    "a100-80gb": 80, "h100": 80, "h200": 141, "b200": 180, "mi300x": 192,
}  # fmt: skip
"""Memory of GPUs that can be asked for by name, in GiB."""

GUESSED_ANSWER_TOKENS = 64
"""Tokens of a teacher's answer where no golden answer tells."""

SAMPLE = 32
"""Training prompts that the rate is measured on, as far as they fit one step."""

REMOTE = ("openai", "bedrock")
_AWS = "the region of the AWS environment"


@dataclass(frozen=True, slots=True)
class Plan:
    """What will happen.

    Attributes:
        text: for people. figures: the same as JSON values, for the report and for scripts.
    """

    text: str
    figures: dict[str, Any] = field(default_factory=dict)


def plan(recipe: Recipe, *, gpu: str | None = None, measure: bool = True, prepared: Any = None) -> Plan:
    """Count, measure briefly, and say it.

    Args:
        prepared: the splits and their report, where they have been made already (`stillroom.data.Prepared`).
        gpu: a name of `GPU_GIB`; None asks about this machine.
        measure: train and answer for a few seconds to foretell the time; otherwise no time is foretold.

    Raises:
        ConfigError: no such GPU. DataError: the data cannot be prepared as the recipe asks.
    """
    if gpu is not None and gpu.lower() not in GPU_GIB:
        raise ConfigError(f"--gpu {gpu!r} is not known; known are {', '.join(GPU_GIB)}.")
    from stillroom.data import prepare
    from stillroom.models import encode_prompt, encode_target, load

    loaded = load(str(resolve_path(recipe.student.path)), chat_template=recipe.student.chat_template)
    if prepared is None:
        prepared = prepare(recipe.data, recipe.seed, lambda m, t: len(encode_prompt(loaded.tokenizer, m, t)))
    sizes = _Sizes.of(
        prepared.train,
        prepared.test,
        lambda example: len(encode_prompt(loaded.tokenizer, example.messages, example.tools)),
        lambda message: len(encode_target(loaded.tokenizer, message)),
    )
    figures: dict[str, Any] = {
        "records": _records(prepared),
        "teacher": _calls(recipe, sizes),
        "training": _training(recipe, sizes),
        "memory": _memory(recipe, loaded, gpu),
        "leaves_the_machine": leaves_the_machine(recipe),
        "licences": licences(recipe),
        "missing": missing(recipe),
    }
    if measure:
        figures["seconds"] = _time(recipe, loaded, prepared, figures)
    return Plan(_text(recipe, figures), figures)


def leaves_the_machine(recipe: Recipe) -> list[dict[str, str]]:
    """Every endpoint that something is sent to, and what is sent."""
    told = [
        (recipe.teacher.model, "the prompts and tools of unlabelled training records and of the held-out items"),
        (recipe.evaluation.judge.model, "the held-out prompts, their references and every model's answers to them"),
    ]
    return [
        {"to": model.url or f"AWS Bedrock in {model.region or _AWS}", "what": what, "model": model.model or ""}
        for model, what in told
        if model is not None and model.engine in REMOTE
    ]


def missing(recipe: Recipe) -> list[str]:
    """What the models lack to be opened, and what to do: a file, a key, a package."""
    from stillroom.engines import obstacle

    models = {
        "student": recipe.student.as_model(recipe.student.path),
        "teacher": recipe.teacher.model,
        "judge": recipe.evaluation.judge.model,
    }
    found = {role: obstacle(model) for role, model in models.items() if model is not None}
    return [f"{role}: {why}" for role, why in found.items() if why]


def licences(recipe: Recipe) -> list[dict[str, str]]:
    """Licence and terms of everything that goes into the student, with a conflict where words say one."""
    from stillroom.teacher import check_terms

    try:
        acknowledged, conflict = check_terms(recipe.teacher), ""
    except LicenseConflict as error:
        acknowledged, conflict = None, str(error)
    teacher = recipe.teacher.model
    rows = [
        {
            "what": "teacher",
            "name": teacher.name or teacher.model or "",
            "license": teacher.license,
            "terms": teacher.terms,
        },
        {"what": "student", "name": recipe.student.name or recipe.student.path, "license": recipe.student.license},
    ]
    rows[0] |= {"conflict": conflict} if conflict else {"acknowledged": acknowledged} if acknowledged else {}
    rows += [{"what": "data", "name": source.path, "license": source.license or ""} for source in recipe.data.sources]
    return rows


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Tokens, in the student's tokens: of prompts to ask, of training sequences, of golden answers."""

    ask: list[int]
    test: list[int]
    sequences: list[int]
    answer: float

    @classmethod
    def of(cls, train: Sequence[Example], test: Sequence[Example], prompt: Any, target: Any) -> _Sizes:
        golden = [target(example.targets[0].message) for example in train if example.targets]
        answer = sum(golden) / len(golden) if golden else GUESSED_ANSWER_TOKENS
        prompts = [prompt(example) for example in train]
        repeats = [example.metadata.get("repeats", 1) for example in train]
        return cls(
            ask=[size for size, example in zip(prompts, train, strict=True) if not example.targets],
            test=[prompt(example) for example in test],
            sequences=[
                size + round(answer) for size, count in zip(prompts, repeats, strict=True) for _ in range(count)
            ],
            answer=answer,
        )


def _records(prepared: Any) -> dict[str, int]:
    return {
        "train_unlabelled": sum(not example.targets for example in prepared.train),
        "train_labelled": sum(bool(example.targets) for example in prepared.train),
        "validation": len(prepared.validation),
        "test": len(prepared.test),
        "rejected": sum(prepared.report["rejected"].values()),
        "near_duplicates_removed": prepared.report["near_duplicates"]["removed"],
    }


def _calls(recipe: Recipe, sizes: _Sizes) -> dict[str, Any]:
    """Upper bounds: what the answer cache holds already costs nothing, and is known once the teacher is opened."""
    price = recipe.teacher.model.price
    variants = 2 if recipe.evaluation.best else 1
    calls = len(sizes.ask) + variants * len(sizes.test)
    asked = sum(sizes.ask) + variants * sum(sizes.test)
    shown = recipe.evaluation.few_shot_chars // 4 * len(sizes.test) if recipe.evaluation.best else 0
    output = round(calls * sizes.answer)
    return {
        "calls": calls,
        "input_tokens": asked + shown,
        "output_tokens": output,
        "usd": round(price.usd(asked + shown, output), 4) if price.stated else None,
        "budget_usd": recipe.teacher.budget.max_usd,
        "paid": recipe.teacher.model.engine in REMOTE,
    }


def _training(recipe: Recipe, sizes: _Sizes) -> dict[str, int]:
    per_epoch = sum(sizes.sequences)
    return {
        "sequences": len(sizes.sequences),
        "tokens": per_epoch * recipe.training.epochs,
        "steps": -(-per_epoch // recipe.training.tokens_per_step) * recipe.training.epochs,
    }


def _memory(recipe: Recipe, loaded: Any, gpu: str | None) -> dict[str, Any]:
    """Weights, gradients and two moments in fp32, and what a packed step keeps for its backward pass."""
    config = loaded.model.config
    parameters = sum(p.numel() for p in loaded.model.parameters())
    trained = parameters if recipe.training.method == "full" else parameters // 50
    # A layer keeps about 14 hidden-sized and 3 intermediate-sized fp32 rows for each token of a step.
    kept = 14 * config.hidden_size + 3 * config.intermediate_size
    activations = recipe.training.tokens_per_step * config.num_hidden_layers * kept * 4
    needed = parameters * 4 + trained * 12 + activations + 2**30  # the last for the interpreter and its libraries
    available = GPU_GIB[gpu.lower()] * 2**30 if gpu else _machine_bytes()
    return {
        "parameters": parameters,
        "training_gib": round(needed / 2**30, 2),
        "available_gib": round(available / 2**30, 1),
        "on": gpu or "this machine",
        "fits": needed < available,
    }


def _machine_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        return min(total, int(limit)) if limit.isdigit() else total
    except OSError:
        return total


def _time(recipe: Recipe, loaded: Any, prepared: Any, figures: dict[str, Any]) -> dict[str, float]:
    """Seconds of training and measuring on this machine, from one training step and a batch of answers."""
    from stillroom.engines import Request, ask
    from stillroom.engines.transformers import TransformersModel
    from stillroom.models import encode_prompt
    from stillroom.schema import GenerateParams
    from stillroom.training import measure_rate

    per_answer_tokens = max(1, round(figures["teacher"]["output_tokens"] / max(1, figures["teacher"]["calls"])))
    prompts = [encode_prompt(loaded.tokenizer, e.messages, e.tools) for e in prepared.train[:SAMPLE]]
    rate = measure_rate(loaded, recipe.training, prompts, answer_tokens=per_answer_tokens)
    student: ModelConfig = recipe.student.as_model(str(resolve_path(recipe.student.path)))
    sample = prepared.test[:8] or prepared.train[:8]
    params = GenerateParams(max_tokens=per_answer_tokens)
    with TransformersModel(student, loaded) as model:
        started = time.monotonic()
        ask(model, [Request(e.messages, e.tools, params) for e in sample], label="plan: a few answers")
        per_answer = (time.monotonic() - started) / len(sample)
    answers = len(prepared.test) * 2 * (2 if recipe.evaluation.best else 1)  # base and student
    training = figures["training"]["tokens"] / rate
    return {
        "training": round(training),
        "measuring": round(answers * per_answer),
        "training_tokens_per_s": round(rate, 1),
    }


def _text(recipe: Recipe, figures: dict[str, Any]) -> str:
    records, teacher, training, memory = (figures[name] for name in ("records", "teacher", "training", "memory"))
    lines = [
        f"Plan of {recipe.name}",
        f"  records   train {records['train_unlabelled']} unlabelled + {records['train_labelled']} labelled, "
        f"validation {records['validation']}, test {records['test']}; {records['rejected']} rejected, "
        f"{records['near_duplicates_removed']} near-duplicates of held-out prompts removed",
        f"  teacher   {recipe.teacher.model.engine}: at most {teacher['calls']} calls, about "
        f"{teacher['input_tokens']:,} tokens in and {teacher['output_tokens']:,} out, {money(teacher['usd'])}",
        f"  training  {training['sequences']} sequences, {training['tokens']:,} tokens in {training['steps']} steps",
        f"  memory    {memory['training_gib']} GiB of {memory['available_gib']} on {memory['on']}: "
        f"{'fits' if memory['fits'] else 'DOES NOT FIT; lower training.tokens_per_step or use training.method=lora'}",
    ]
    if "seconds" in figures:
        seconds = figures["seconds"]
        lines.append(
            f"  time      about {seconds['training'] / 60:.0f} min of training at "
            f"{seconds['training_tokens_per_s']:.0f} tokens/s and {seconds['measuring'] / 60:.0f} min of measuring on "
            "this machine, the teacher's answers apart"
        )
    lines += [f"  leaves    {row['what']} -> {row['to']}" for row in figures["leaves_the_machine"]] or [
        "  leaves    nothing leaves this machine"
    ]
    lines += [f"  MISSING   {what}".replace("\n", f"\n{'':12}") for what in figures["missing"]]
    for row in figures["licences"]:
        lines.append(
            f"  licence   {row['what']} {row['name']}: {row['license'] or 'not stated'} {row.get('terms', '')}".rstrip()
        )
        if row.get("conflict"):
            lines.append(f"            CONFLICT: {row['conflict']}")
    return "\n".join(lines)


def money(usd: float | None) -> str:
    """US dollars; what has no price in the recipe is not thereby free."""
    return "no price is stated" if usd is None else f"USD {usd:.2f}"
