"""How fast one model answers one question at a time, and what memory the process holds.

Calls are made one after the other with nothing cached. Percentiles carry their sample size: p95 needs 30 calls
and p99 1,000, or it is not shown. The time to the first token is that of a call cut after one token, which means
the same for every engine, on prompts that the engine has not just read.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from stillroom import telemetry
from stillroom.engines.asking import run_async
from stillroom.errors import ConfigError, NotEnoughData
from stillroom.evaluation.config import EvalConfig
from stillroom.evaluation.results import Result
from stillroom.evaluation.statistics import Interval, median_interval, percentile
from stillroom.schema import ChatModel, Example, GenerateParams

LEAST_CALLS = 30
LEAST_CALLS_P99 = 1000


class Speed(BaseModel, frozen=True, extra="forbid"):
    """Latency over unbatched calls.

    Attributes:
        calls: how many. latencies_s: each of them, in order.
        p50: the median with its interval. p95_s; p99_s: None under 1,000 calls.
        output_tokens_per_s: all output tokens over all seconds, reading of the prompts included.
        first_token_s: median over `first_token_calls` calls cut after one token; None if none were made.
        mean_input_tokens, mean_output_tokens: what a call took on average.
        memory_bytes: the process's resident memory after the calls; None for a model elsewhere.
    """

    calls: int
    latencies_s: tuple[float, ...]
    p50: Interval
    p95_s: float
    p99_s: float | None
    output_tokens_per_s: float
    first_token_s: float | None
    first_token_calls: int
    mean_input_tokens: float
    mean_output_tokens: float
    memory_bytes: int | None = None


def measure_speed(
    model: ChatModel,
    examples: Sequence[Example],
    config: EvalConfig = EvalConfig(),
    *,
    max_tokens: int,
    in_process: bool = False,
) -> Speed | None:
    """Time `config.latency_calls` unbatched calls; None when the config asks for none.

    Items are taken in order and again from the start when they run out.

    Args:
        in_process: the model runs in this process, so its memory is this process's.

    Raises:
        ConfigError: between 1 and 29 calls: too few for a p95. NotEnoughData: no examples. ModelError: a call failed.
    """
    if config.latency_calls == 0:
        return None
    if config.latency_calls < LEAST_CALLS:
        raise ConfigError(
            f"evaluation.latency_calls is {config.latency_calls}; a p95 needs at least {LEAST_CALLS} calls.\n"
            "help: raise it, or set it to 0 to leave latency out."
        )
    if not examples:
        raise NotEnoughData("there are no examples to measure latency on.")
    return run_async(_measure(model, examples, config, max_tokens, in_process))


async def _measure(
    model: ChatModel, examples: Sequence[Example], config: EvalConfig, max_tokens: int, in_process: bool
) -> Speed:
    full, one = GenerateParams(max_tokens=max_tokens, seed=config.seed), GenerateParams(max_tokens=1, seed=config.seed)
    warm, calls, firsts = config.warmup_calls, config.latency_calls, config.first_token_calls
    seconds: list[float] = []
    first_seconds: list[float] = []
    inputs = outputs = 0
    with telemetry.progress(f"latency {model.name}", warm + calls + firsts, "calls") as bar:
        for index in range(warm + calls + firsts):
            example = examples[index % len(examples)]
            params = full if index < warm + calls else one
            started = time.perf_counter()
            completion = await model.generate(example.messages, example.tools, params)
            taken = time.perf_counter() - started
            if index >= warm + calls:
                first_seconds.append(taken)
            elif index >= warm:
                seconds.append(taken)
                inputs += completion.input_tokens
                outputs += completion.output_tokens
            bar.advance()
    speed = _summary(seconds, inputs, outputs, config.confidence)
    return speed.model_copy(
        update={
            "first_token_s": percentile(first_seconds, 0.5) if first_seconds else None,
            "first_token_calls": len(first_seconds),
            "memory_bytes": process_memory_bytes() if in_process else None,
        }
    )


def speed_of_answers(result: Result) -> Speed | None:
    """Latency as the answers of an evaluation had it, at no further cost; None where fewer than 30 say theirs.

    For an endpoint, whose requests do not share one computer with each other as far as its user can see.
    """
    timed = [(i.latency_s, i.input_tokens, i.output_tokens) for i in result.items if i.latency_s is not None]
    if len(timed) < LEAST_CALLS:
        return None
    seconds, inputs, outputs = zip(*timed, strict=True)
    return _summary(list(seconds), sum(inputs), sum(outputs), result.confidence)


def _summary(seconds: list[float], inputs: int, outputs: int, confidence: float) -> Speed:
    calls = len(seconds)
    return Speed(
        calls=calls,
        latencies_s=tuple(seconds),
        p50=median_interval(seconds, confidence=confidence),
        p95_s=percentile(seconds, 0.95),
        p99_s=percentile(seconds, 0.99) if calls >= LEAST_CALLS_P99 else None,
        output_tokens_per_s=outputs / sum(seconds) if sum(seconds) else 0.0,
        first_token_s=None,
        first_token_calls=0,
        mean_input_tokens=inputs / calls,
        mean_output_tokens=outputs / calls,
    )


def process_memory_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not tell the present value."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
