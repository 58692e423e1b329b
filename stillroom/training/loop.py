"""The training loop: epochs of steps, saved as they go, resumed to the bit.

    work_dir/
    ├── checkpoints/     see stillroom.checkpoint
    ├── metrics.jsonl    a line per step
    ├── spectrum.json    scores of the weight matrices, where `spectrum` chooses what is trained
    └── tensorboard/     the same, where TensorBoard is installed

Promise: killed at any instruction and started again with the same arguments, a run on the CPU ends in the
same weights, losses and metrics as an undisturbed one. A checkpoint of another run is refused.
"""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from stillroom.checkpoint import CheckpointConfig, Checkpointer, Save
from stillroom.engines.transformers import end_ids
from stillroom.errors import CheckpointError
from stillroom.models.packing import TokenSequence
from stillroom.models.signals import TeacherSource
from stillroom.models.spectrum import MatrixScore, cached_scan, layer_matrices
from stillroom.schema import Example
from stillroom.telemetry import Metrics, Progress, note, progress
from stillroom.training.config import TrainConfig
from stillroom.training.objective import check_teacher
from stillroom.training.on_policy import OnPolicy
from stillroom.training.result import TrainResult
from stillroom.training.selection import merged
from stillroom.training.sequences import steps_of_epoch, tokenize
from stillroom.training.state import Run, fingerprint, restore, save, state_of
from stillroom.training.step import Stepper


def train(
    loaded: Any,
    examples: Sequence[Example],
    config: TrainConfig,
    work_dir: str | Path,
    *,
    validation: Sequence[Example] = (),
    seed: int = 0,
    teacher: TeacherSource | None = None,
) -> TrainResult:
    """Teach `loaded` the targets of `examples`; resumes by itself from what `work_dir` holds.

    Args:
        loaded: the student, from `stillroom.models.load`, in fp32; `loaded.model` holds the trained weights
            afterwards, with adapters merged into them.
        examples: what to learn: every target of every example, repeated where an example is repeated.
        config: how.
        work_dir: checkpoints and metrics of this run.
        validation: examples whose loss is measured after each epoch; those without a target are passed over.
        seed: order of the examples, and adapters' first values.
        teacher: what the teacher says about each packed row, where `config.objective` compares with it; one in
            memory also samples where `config.on_policy.teacher_share` asks for it.

    Raises:
        NotEnoughData: no example has a target that fits `max_sequence_tokens`.
        ConfigError: `teacher` does not go with `config`, see `check_teacher`; or there are no such layers.
        CheckpointError: `work_dir` holds the checkpoints of another run.
        StillroomError: the loss is not a finite number.
    """
    check_teacher(config, teacher)
    work = Path(work_dir)
    sequences, skipped = tokenize(loaded, examples, config.max_sequence_tokens)
    _report_skipped(skipped)
    held_out = [example for example in validation if example.targets]
    held_out_sequences = tokenize(loaded, held_out, config.max_sequence_tokens)[0] if held_out else []
    torch.manual_seed(seed)
    stepper = Stepper(loaded.model, config, teacher, _scores(loaded, config, work))
    run = Run(fingerprint(loaded, sequences, held_out_sequences, stepper, seed))
    source = _source(loaded, stepper, run, seed)
    stage: Literal["at once", "behind"] = "behind" if config.save_behind else "at once"
    checkpoints = CheckpointConfig(keep_latest=config.keep_latest, stage=stage)
    like = state_of(stepper, run)
    with Checkpointer(work / "checkpoints", like=like, config=checkpoints) as checkpointer:
        checkpointer.guard(stepper.optimizer)
        restore(checkpointer, stepper, run)
        if not run.done:
            _run(stepper, sequences, held_out_sequences, run, checkpointer, work, seed, source)
    loaded.model = merged(stepper.model)
    loaded.model.requires_grad_(True).eval()
    return _result(stepper, run, skipped)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of `step` (from 0) of `steps`: a linear rise over the warm-up, then the schedule down to `min_ratio`."""
    warmup = math.ceil(steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.min_ratio
    return config.learning_rate * (floor + (1 - floor) * falling)


def _scores(loaded: Any, config: TrainConfig, work: Path) -> Sequence[MatrixScore]:
    """Scores of the weights as they came, also after a resumption: the choice must not follow the training."""
    if config.spectrum is None:
        return ()
    return cached_scan(work / "spectrum.json", loaded.digest, layer_matrices(loaded.model))


def _source(loaded: Any, stepper: Stepper, run: Run, seed: int) -> OnPolicy | None:
    """Who writes the answers of a step, where the student does for some."""
    config = stepper.config
    if config.on_policy is None:
        return None
    ends, teacher = end_ids(loaded), stepper.teacher.model if stepper.teacher else None
    return OnPolicy(config.on_policy, stepper.model, ends, seed, config.max_sequence_tokens, run.replay, teacher)


def _run(
    stepper: Stepper,
    sequences: list[TokenSequence],
    held_out: list[TokenSequence],
    run: Run,
    checkpointer: Checkpointer,
    work: Path,
    seed: int,
    source: OnPolicy | None,
) -> None:
    config = stepper.config
    epochs = [list(steps_of_epoch(sequences, config, seed, epoch)) for epoch in range(config.epochs)]
    steps = [(epoch, batch) for epoch, batches in enumerate(epochs) for batch in batches]
    ends = {sum(map(len, epochs[: epoch + 1])) for epoch in range(config.epochs)}
    left = sum(len(sequence.ids) for _, batch in steps[run.step :] for sequence in batch)
    saved_at, saving = time.monotonic(), None
    with _metrics(work, run) as metrics, progress("train", left, "tokens") as bar:
        for epoch, batch in islice(steps, run.step, None):
            started = time.monotonic()
            rate = learning_rate(run.step, len(steps), config)
            batch, whose = source.batch(run.step, batch) if source else (batch, None)
            report = stepper.step(batch, rate)
            line = run.add(report, epoch, rate, time.monotonic() - started)
            if whose:
                line |= {"sampled": float(whose == "sampled"), "replayed": float(whose == "replayed")}
            if run.step in ends and held_out:
                line["validation_loss"] = stepper.evaluate(held_out)
            metrics.log(run.step, **line)
            _show(bar, run, line, len(steps))
            run.seconds += time.monotonic() - started
            if run.step < len(steps) and _due(config, run.step, saved_at):
                saving = _save(checkpointer, stepper, run, saving)
                saved_at = time.monotonic()
        run.done = True
        _save(checkpointer, stepper, run, saving).result()


def _due(config: TrainConfig, step: int, saved_at: float) -> bool:
    if config.save_every_steps is not None:
        return step % config.save_every_steps == 0
    return time.monotonic() - saved_at >= config.save_every_s


def _save(checkpointer: Checkpointer, stepper: Stepper, run: Run, before: Save | None) -> Save:
    """Begin a save; one that failed was shown when it did, and ends training only where that was asked for."""
    started = time.monotonic()
    if before is not None:
        try:
            before.result()
        except CheckpointError:
            if stepper.config.stop_if_saving_fails:
                raise
    begun = save(checkpointer, stepper, run)
    run.seconds += time.monotonic() - started
    return begun


def _show(bar: Progress, run: Run, line: dict[str, float], steps: int) -> None:
    fields: dict[str, Any] = {"step": f"{run.step}/{steps}", "loss": round(line["loss"], 4)}
    if "validation_loss" in line:
        fields["validation_loss"] = round(line["validation_loss"], 4)
    bar.advance(int(line["tokens"]), **fields)


def _metrics(work: Path, run: Run) -> Metrics:
    """Metrics that hold the steps so far exactly once: a killed run may have logged steps that are done again."""
    (work / "metrics.jsonl").unlink(missing_ok=True)
    shutil.rmtree(work / "tensorboard", ignore_errors=True)
    metrics = Metrics(work)
    for step, line in enumerate(run.history, start=1):
        metrics.log(step, **line)
    return metrics


def _report_skipped(skipped: list[dict[str, Any]]) -> None:
    if not skipped:
        return
    reasons = sorted({str(entry["reason"]) for entry in skipped})
    for reason in reasons:
        named = [str(entry["id"]) for entry in skipped if entry["reason"] == reason]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        note(f"training leaves out {len(named)} examples ({reason}): {', '.join(named[:5])}{more}")


def _result(stepper: Stepper, run: Run, skipped: list[dict[str, Any]]) -> TrainResult:
    tokens = int(sum(line["tokens"] for line in run.history))
    in_steps = sum(line["step_s"] for line in run.history)
    cuda = stepper.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return TrainResult(
        steps=run.step,
        tokens=tokens,
        scored_tokens=int(sum(line["scored_tokens"] for line in run.history)),
        losses=[line["loss"] for line in run.history],
        validation_losses=[line["validation_loss"] for line in run.history if "validation_loss" in line],
        seconds=run.seconds,
        tokens_per_s=tokens / in_steps if in_steps else 0.0,
        peak_memory_bytes=peak,
        precision=stepper.precision.name,
        precision_reason=stepper.precision.reason,
        trained_parameters=sum(p.numel() for p in stepper.trained.values()),
        skipped=skipped,
        resumed_at=run.resumed_at,
    )
