"""`stillroom evaluate`: the measuring alone, for any model and any labelled records or held-out items of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillroom.artifacts import lineage
from stillroom.config import build_config, resolve_path
from stillroom.engines import ModelConfig, Price, open_model
from stillroom.errors import ConfigError, NotEnoughData
from stillroom.evaluation import EvalConfig, Interval, Result, Speed, evaluate, measure_speed
from stillroom.pipeline.steps import read_examples, read_json
from stillroom.schema import Example, canonical_json, digest
from stillroom.storage import write_atomic


def evaluate_model(
    model: str,
    data: Path,
    *,
    task: str | None = None,
    engine: str | None = None,
    model_id: str | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    chat_template: str | None = None,
    price: Price = Price(),
    out: Path | None = None,
) -> dict[str, Any]:
    """Score one model; returns `text` for people and the figures for the last line.

    Args:
        model: a folder, a GGUF file, a hub id or an http(s) URL. engine: None goes by what `model` is.
        data: labelled records, or the folder of a finished run: then its held-out items, by its rules.
        task, max_tokens: None takes those of the run, else function calling and 256.
        limit: measure only so many items, chosen by a hash of their content.
        price: what its tokens cost.
        out: also write every item's verdict there, as JSON.

    Raises:
        ConfigError: the model and engine do not fit. NotEnoughData: no record can be scored.
        ArtifactError: `data` is the folder of a run that did not finish.
    """
    examples, config, cap = _of_run(data) if (data / "recipe.json").exists() else (_scorable(data), EvalConfig(), 256)
    config = build_config(EvalConfig, config.model_dump() | ({"task": task} if task else {}), "--task")
    cap = max_tokens or cap
    examples = sorted(examples, key=lambda example: digest(canonical_json(example.id)))[:limit]
    opened = open_model(_model_config(model, engine, model_id, chat_template, price))
    try:
        result = evaluate(opened, examples, config, max_tokens=cap)
        local = opened.config.engine in ("transformers", "llama.cpp")
        speed = measure_speed(opened, examples, config, max_tokens=cap, in_process=local)
    finally:
        opened.close()
    if out is not None:
        write_atomic(out, result.model_dump_json(indent=1))
    return {"text": _table(result, speed), **_figures(result, speed, price)}


def _of_run(folder: Path) -> tuple[list[Example], EvalConfig, int]:
    """The held-out items of a finished run, the settings that it measured by, and its cap on an answer."""
    finished = lineage(folder / "report.html")
    parents, rules = finished["parents"], EvalConfig(**finished["config"]["recipe"]["evaluation"])
    cap = read_json(Path(parents["labelled"]["path"], "cap.json"))["cap"]
    return read_examples(Path(parents["data"]["path"], "test.jsonl")), rules, cap


def _model_config(
    model: str, engine: str | None, model_id: str | None, chat_template: str | None, price: Price
) -> ModelConfig:
    chosen = engine or ("openai" if model.startswith(("http://", "https://")) else _local_engine(model))
    if chosen == "openai":
        return ModelConfig(engine="openai", url=model, model=model_id or "default", price=price)
    if chosen not in ("transformers", "llama.cpp"):
        raise ConfigError(f"--engine {chosen!r} cannot open {model!r}; use transformers, llama.cpp or openai.")
    path = str(resolve_path(model))
    return ModelConfig(engine=chosen, path=path, chat_template=chat_template, price=price)  # type: ignore[arg-type]


def _local_engine(model: str) -> str:
    return "llama.cpp" if model.endswith(".gguf") else "transformers"


def _scorable(data: Path) -> list[Example]:
    """The records that say what is right: BFCL's answers, or a golden answer as the one expected call."""
    from stillroom.data import read

    found = [example for example in read(data) if isinstance(example, Example)]
    scorable = [example for example in found if example.expected is not None]
    if not scorable:
        raise NotEnoughData(
            f"none of the {len(found)} records in {data} says what the right answer is.\n"
            "help: give records that end with the assistant's answer, or BFCL questions with possible_answer/ beside."
        )
    return scorable


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
        if speed.memory_bytes:
            lines.append(f"  memory {speed.memory_bytes / 2**30:.2f} GiB")
    return "\n".join(lines)


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3f}  (95% {interval.low:.3f} to {interval.high:.3f}, n = {interval.n})"


def _figures(result: Result, speed: Speed | None, price: Price) -> dict[str, Any]:
    return {
        "model": result.model,
        "items": len(result.items),
        "accuracy": result.figures(),
        "interval": [result.accuracy().low, result.accuracy().high],
        "failures": result.failures(),
        "latency_s": {"p50": speed.p50.value, "p95": speed.p95_s, "calls": speed.calls} if speed else None,
        "output_tokens_per_s": speed.output_tokens_per_s if speed else None,
        "memory_bytes": speed.memory_bytes if speed else None,
        "usd_per_million": price.model_dump() if price.stated else None,
        "usd": sum(item.cost_usd for item in result.items) if price.stated else None,
    }
