"""Everything that a run needs to go on where it was: weights, optimizer, random state, history."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from stillroom.checkpoint import Checkpointer, Save
from stillroom.errors import CheckpointCorrupt, CheckpointError
from stillroom.models.packing import TokenSequence
from stillroom.schema import digest
from stillroom.telemetry import note
from stillroom.training.on_policy import Replayed
from stillroom.training.step import Stepper, StepReport

VERSION = 3
"""Raised when the arithmetic of training changes, so that an older checkpoint is not continued differently."""

UNIMPORTANT = ("save_every_s", "save_every_steps", "keep_latest", "save_behind", "stop_if_saving_fails")
"""Settings that may change between a kill and a resumption."""


@dataclass
class Run:
    """How far a run is, one line of figures for every step so far, and the student's samples that are kept."""

    fingerprint: str
    step: int = 0
    seconds: float = 0.0
    done: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    replay: list[Replayed] = field(default_factory=list)

    def add(self, report: StepReport, epoch: int, rate: float, step_s: float) -> dict[str, float]:
        """Count a step; its line in the history."""
        line = {
            "loss": report.loss,
            "learning_rate": rate,
            "gradient_norm": report.gradient_norm,
            "epoch": epoch + 1,
            "tokens": report.tokens,
            "scored_tokens": report.scored_tokens,
            "step_s": step_s,
            "tokens_per_s": report.tokens / step_s,
        }
        self.step += 1
        self.history.append(line)
        return line


def fingerprint(
    loaded: Any, sequences: list[TokenSequence], held_out: list[TokenSequence], stepper: Stepper, seed: int
) -> str:
    """What makes two runs the same run: start, data, settings, teacher."""
    return digest(
        {
            "version": VERSION,
            "weights": loaded.digest,
            "data": [[list(s.ids), s.first_target] for s in (*sequences, *held_out)],
            "config": _settings(stepper),
            "seed": seed,
            "precision": stepper.precision.name,
            **({"teacher": stepper.teacher.digest} if stepper.teacher else {}),
        }
    )


def _settings(stepper: Stepper) -> dict[str, Any]:
    """The settings that count. Those that came later are left out where they say nothing, so that older runs go on."""
    settings = stepper.config.model_dump(mode="json", exclude=set(UNIMPORTANT))
    for name in ("train_layers", "spectrum", "on_policy"):
        if settings[name] is None:
            del settings[name]
    if settings["lora"]["base"] == "fp32":
        del settings["lora"]["base"]
    if not stepper.teacher:
        del settings["objective"]
    return settings


def save(checkpointer: Checkpointer, stepper: Stepper, run: Run) -> Save:
    """Save the state after `run.step` steps, behind training's back; a finished run needs no optimizer any more."""
    state = state_of(stepper, run)
    if run.done:
        del state["optimizer"]
    return checkpointer.save(run.step, state, metrics={"loss": run.history[-1]["loss"]} if run.history else {})


def restore(checkpointer: Checkpointer, stepper: Stepper, run: Run) -> None:
    """Go back to the newest checkpoint, if there is one; a damaged one is set aside, and said to be.

    Raises:
        CheckpointError: the checkpoint is of another run.
    """
    state = state_of(stepper, run)
    while steps := checkpointer.steps():
        try:
            checkpointer.load(into=state)
        except CheckpointCorrupt as error:
            aside = checkpointer.set_aside(steps[-1])
            going_on = f"continuing from step {steps[-2]}" if len(steps) > 1 else "starting again from step 0"
            note(f"{error}\nIt was set aside as {aside}; {going_on}.")
            continue
        values = state["run"]
        if values["fingerprint"] != run.fingerprint:
            raise CheckpointError(
                f"{checkpointer.root} holds a checkpoint of another run (other data, weights or settings).\n"
                "help: give each run a directory of its own, or delete this one to start again."
            )
        run.step, run.seconds, run.done = values["step"], values["seconds"], values["done"]
        run.history = json.loads(values["history"])
        run.replay[:] = [(ids, first, name) for ids, first, name in json.loads(values.get("replay", "[]"))]
        run.resumed_at = values["resumed_at"] if run.done else [*values["resumed_at"], run.step]
        torch.set_rng_state(state["random"])
        if not run.done:
            note(f"training resumes at step {run.step}")
        return


def state_of(stepper: Stepper, run: Run) -> dict[str, Any]:
    """What a checkpoint of a run holds."""
    moments = {name: stepper.optimizer.state[parameter] for name, parameter in stepper.trained.items()}
    values = {
        "fingerprint": run.fingerprint,
        "step": run.step,
        "seconds": run.seconds,
        "done": run.done,
        # One text: a leaf for each figure of each step would be thousands of items.
        "history": json.dumps(run.history),
        "resumed_at": run.resumed_at,
    }
    if stepper.config.on_policy is not None:
        values["replay"] = json.dumps(run.replay)
    return {
        "weights": {name: p.detach() for name, p in stepper.trained.items()},
        "optimizer": moments,
        "random": torch.get_rng_state(),
        "run": values,
    }
