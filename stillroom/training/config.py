"""What is trained, how long, and how often it is saved."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class LoraSettings(BaseModel, frozen=True, extra="forbid"):
    """Low-rank adapters beside frozen weights; used when `method` is `lora`. Source: arXiv:2106.09685."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""

    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / r."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get adapters."""


class TrainConfig(BaseModel, frozen=True, extra="forbid"):
    """Sequence distillation: cross-entropy on the tokens of the answers, nothing else."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the examples."""

    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak of the schedule."""

    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""

    min_ratio: float = Field(default=0.1, ge=0, le=1)
    """The schedule ends at this share of the peak."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; vectors such as norms are never decayed."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averages of gradient and squared gradient."""

    clip_norm: float = Field(default=1.0, gt=0)
    """The gradient's norm is cut to this."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label's mass that is spread over the vocabulary."""

    tokens_per_step: int = Field(default=2048, ge=1)
    """Token budget of one optimizer step, prompts included; a step has at least one sequence."""

    row_tokens: int = Field(default=1024, ge=1)
    """Token budget of one packed row, which bounds memory; a step is computed row by row."""

    max_sequence_tokens: int = Field(default=2048, ge=2)
    """A longer prompt with its answer is left out and reported, never cut."""

    order: Literal["shuffle", "short_first"] = "shuffle"
    """`short_first` sorts the first epoch by length and shuffles the others."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Format of matrix products over fp32 weights; `auto` is bf16 where the hardware multiplies it."""

    method: Literal["full", "lora"] = "full"
    """Train every weight, or adapters that are merged at the end."""

    lora: LoraSettings = LoraSettings()
    """Adapters, if `method` is `lora`."""

    freeze_layers: int = Field(default=0, ge=0)
    """So many of the lowest layers stay as they are, and so does the embedding (the output head too, where tied)."""

    save_every_s: float = Field(default=120.0, gt=0)
    """Seconds of training between checkpoints."""

    save_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, instead of seconds."""

    keep_latest: int = Field(default=2, ge=1)
    """Checkpoints to retain."""

    save_behind: bool = False
    """Copy the state behind the next forward and backward pass, and hold up only the optimizer's step until that is
    done; otherwise training waits for the copy."""

    stop_if_saving_fails: bool = False
    """End the training when a checkpoint cannot be saved, instead of showing it and going on."""
