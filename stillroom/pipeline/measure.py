"""`stillroom evaluate`: the measuring alone, for any model and any labelled records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillroom.config import build_config, resolve_path
from stillroom.engines import ModelConfig, open_model
from stillroom.errors import ConfigError, NotEnoughData
from stillroom.evaluation import EvalConfig, Interval, Result, Speed, evaluate, measure_speed
from stillroom.schema import Example, canonical_json, digest
from stillroom.storage import write_atomic


def evaluate_model(
    model: str,
    data: Path,
    *,
    task: str = "function_calling",
    engine: str | None = None,
    model_id: str | None = None,
    limit: int | None = None,
    max_tokens: int = 256,
    chat_template: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Score one model; returns `text` for people and the figures for the last line.

    Args:
        model: a folder, a GGUF file, a hub id or an http(s) URL. engine: None goes by what `model` is.
        limit: measure only so many items, chosen by a hash of their content.
        out: also write every item's verdict there, as JSON.

    Raises:
        ConfigError: the model and engine do not fit. NotEnoughData: no record can be scored.
    """
    config = build_config(EvalConfig, {"task": task, "best": False}, "--task")
    examples = _scorable(data, limit)
    opened = open_model(_model_config(model, engine, model_id, chat_template))
    try:
        result = evaluate(opened, examples, config, max_tokens=max_tokens)
        speed = measure_speed(opened, examples, config, max_tokens=max_tokens)
    finally:
        opened.close()
    if out is not None:
        write_atomic(out, result.model_dump_json(indent=1))
    return {"text": _table(result, speed), **_figures(result, speed)}


def _model_config(model: str, engine: str | None, model_id: str | None, chat_template: str | None) -> ModelConfig:
    chosen = engine or ("openai" if model.startswith(("http://", "https://")) else _local_engine(model))
    if chosen == "openai":
        return ModelConfig(engine="openai", url=model, model=model_id or "default")
    if chosen not in ("transformers", "llama.cpp"):
        raise ConfigError(f"--engine {chosen!r} cannot open {model!r}; use transformers, llama.cpp or openai.")
    return ModelConfig(engine=chosen, path=str(resolve_path(model)), chat_template=chat_template)  # type: ignore[arg-type]


def _local_engine(model: str) -> str:
    return "llama.cpp" if model.endswith(".gguf") else "transformers"


def _scorable(data: Path, limit: int | None) -> list[Example]:
    """The records that say what is right: BFCL's answers, or a golden answer as the one expected call."""
    from stillroom.data import read

    found = [example for example in read(data) if isinstance(example, Example)]
    scorable = [example for example in map(_with_expected, found) if example.expected is not None]
    if not scorable:
        raise NotEnoughData(
            f"none of the {len(found)} records in {data} says what the right answer is.\n"
            "help: give records that end with the assistant's answer, or BFCL questions with possible_answer/ beside."
        )
    scorable.sort(key=lambda example: digest(canonical_json(example.id)))
    return scorable[:limit]


def _with_expected(example: Example) -> Example:
    from dataclasses import replace

    golden = next((target.message for target in example.targets if target.origin == "golden"), None)
    if example.expected is not None or golden is None:
        return example
    if not golden.tool_calls:
        return replace(example, expected=golden.content)
    calls = [{call.name: {key: [value] for key, value in call.arguments.items()}} for call in golden.tool_calls]
    return replace(example, expected=calls)


def _table(result: Result, speed: Speed | None) -> str:
    lines = [f"{result.model}: {len(result.items)} items, answers of at most {result.max_tokens} tokens"]
    for name in (*result.categories, "pooled"):
        lines.append(f"  {name or 'all':<24} {_interval(result.accuracy(name))}")
    lines += [f"  failed: {kind:<16} {count}" for kind, count in result.failures().items()]
    if speed:
        lines.append(
            f"  latency p50 {speed.p50.value:.2f} s, p95 {speed.p95_s:.2f} s over {speed.calls} unbatched calls; "
            f"{speed.output_tokens_per_s:.1f} output tokens/s"
        )
    return "\n".join(lines)


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3f}  (95% {interval.low:.3f} to {interval.high:.3f}, n = {interval.n})"


def _figures(result: Result, speed: Speed | None) -> dict[str, Any]:
    return {
        "model": result.model,
        "items": len(result.items),
        "accuracy": result.figures(),
        "interval": [result.accuracy().low, result.accuracy().high],
        "failures": result.failures(),
        "latency_s": {"p50": speed.p50.value, "p95": speed.p95_s, "calls": speed.calls} if speed else None,
        "output_tokens_per_s": speed.output_tokens_per_s if speed else None,
    }
