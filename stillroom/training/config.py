"""What is trained, how long, and how often it is saved."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import BaseModel, Field, model_validator

Divergence = Literal[
    "forward_kl", "reverse_kl", "adaptive_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]
"""Ways to compare the student's next-token distribution with its teacher's; see `stillroom.models.divergences`."""

LAYERS = r"^\d+(-\d+)?(,\d+(-\d+)?)*$"
"""Layer ranges as text: `12-29`, or `0-3,28`."""


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

    base: Literal["fp32", "int8", "nf4"] = "fp32"
    """Format of the frozen linear layers under the adapters: 4, 1 or 0.56 bytes a weight. Packed ones are unpacked
    for each product, on any device; adapters are merged into what they were trained on (QLoRA, arXiv:2305.14314)."""


class SpectrumSettings(BaseModel, frozen=True, extra="forbid"):
    """Train the weight matrices with the highest signal-to-noise ratio. Source: arXiv:2406.06623."""

    top: float = Field(default=25.0, gt=0, le=100)
    """Percent of the matrices of each kind (`mlp.up_proj`, for instance), rounded up; embedding and head besides."""


class OnPolicyConfig(BaseModel, frozen=True, extra="forbid"):
    """Steps whose answers the student samples itself, for a teacher in memory to judge."""

    probability: float = Field(default=0.5, gt=0, le=1)
    """Lambda: share of the steps that are the student's own. Source: GKD, arXiv:2306.13649."""

    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; the objective has a temperature of its own."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""

    max_tokens: int = Field(default=256, ge=1)
    """Cap on one answer."""

    step_tokens: int = Field(default=8192, ge=1)
    """Cap on the sampled tokens of one step; where it binds, each answer may have an equal part of it."""

    replay: int = Field(default=0, ge=0)
    """So many sampled sequences are kept, the newest."""

    replay_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the student's own steps that use kept sequences again. Source: DistiLLM, arXiv:2402.03898."""

    teacher_share: float = Field(default=0.0, ge=0, lt=1)
    """Alpha: each token is sampled from so much of the teacher and the rest of the student, which keeps samples from
    drifting into text that neither would write; 0.2 in MiniLLM, arXiv:2306.08543. Not weighted by importance."""

    @model_validator(mode="after")
    def _replay_needs_room(self) -> Self:
        if self.replay_share and not self.replay:
            raise ValueError("replay_share uses kept sequences, and replay: 0 keeps none; raise replay")
        return self


class ObjectiveConfig(BaseModel, frozen=True, extra="forbid"):
    """What is minimised on each token of the answers, all of them weighing the same."""

    kind: Literal["sequence", Divergence, "symmetric", "mix"] = "sequence"
    """`sequence` is cross-entropy with the answers; `symmetric` (1 - reverse_share) forward + reverse_share reverse KL;
    `mix` takes `weights`; each other one is that divergence from the teacher alone."""

    weights: dict[Literal["sequence", Divergence], float] = {}
    """The parts of a `mix`, e.g. `{forward_kl: 0.7, sequence: 0.3}`."""

    reverse_share: float = Field(default=0.5, ge=0, le=1)
    """The reverse KL's part of `symmetric`."""

    beta: float = Field(default=0.5, ge=0, le=1)
    """The teacher's weight in the mixture of `jsd`: 0 is forward, 1 reverse KL."""

    beta_normalised: bool = False
    """Divide `jsd` by beta (1 - beta), so that its gradient does not fade near 0 and 1."""

    mu: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's mass that is the head in `adaptive_kl`."""

    skew: float = Field(default=0.1, gt=0, lt=1)
    """How much of the other side the skew divergences mix in."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides both sides' logits before the divergences; has nothing to do with the temperature of sampling."""

    temperature_squared: bool = False
    """Multiply the divergences by temperature squared, which keeps the size of their gradient."""

    tail: Literal["bucket", "renormalise"] = "bucket"
    """What a teacher's top-k leaves out: one more token that has all of it, or nothing on either side."""

    chunk_rows: int | None = Field(default=None, ge=1)
    """Rows of logits at a time; by default what is fastest and fits in the memory that is free."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's distribution is looked at."""
        return self.kind != "sequence"

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if (self.kind == "mix") != bool(self.weights):
            raise ValueError(
                f"kind={self.kind} and weights={self.weights}: weights belong to kind=mix, which needs them"
            )
        if self.weights and (set(self.weights) == {"sequence"} or min(self.weights.values()) <= 0):
            raise ValueError(
                f"weights={self.weights}: each is above 0, and one is of {', '.join(get_args(Divergence))}"
            )
        if self.kind == "sequence" and (self.temperature != 1 or self.temperature_squared):
            raise ValueError("temperature and temperature_squared have no meaning with kind=sequence")
        return self


class TrainConfig(BaseModel, frozen=True, extra="forbid"):
    """How a student is trained; by default sequence distillation: cross-entropy on the tokens of the answers."""

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

    objective: ObjectiveConfig = ObjectiveConfig()
    """What is minimised."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label's mass that is spread over the vocabulary, with objective.kind=sequence."""

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

    train_layers: str | None = Field(default=None, pattern=LAYERS)
    """Only these layers are trained, counted from 0: `12-29`, or `0-3,28-29`. The embedding is trained with layer 0,
    final norm and output head with the last one; a tied head goes with the embedding."""

    spectrum: SpectrumSettings | None = None
    """Train only the matrices that a Spectrum scan of the student chooses, with embedding and output head."""

    on_policy: OnPolicyConfig | None = None
    """Have the student write some of the answers."""

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

    @model_validator(mode="after")
    def _refuse_contradictory_objectives(self) -> Self:
        kind = self.objective.kind
        if self.label_smoothing and self.objective.needs_teacher:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} and objective.kind={kind}: "
                "a teacher's distribution takes the place of smoothed labels"
            )
        if self.on_policy and not self.objective.needs_teacher:
            raise ValueError(
                f"on_policy and objective.kind={kind}: without a teacher that judges them, a student learns nothing "
                "from its own answers; set objective.kind to forward_kl, for instance"
            )
        return self

    @model_validator(mode="after")
    def _refuse_contradictory_choices(self) -> Self:
        chosen = {
            "freeze_layers": self.freeze_layers > 0,
            "train_layers": self.train_layers is not None,
            "spectrum": self.spectrum is not None,
        }
        named = [name for name, given in chosen.items() if given]
        if len(named) > 1:
            raise ValueError(f"{named[0]} and {named[1]} both say what is trained; give one of them")
        if self.spectrum is not None and self.method == "lora":
            raise ValueError("spectrum chooses whole matrices, and method: lora trains none; give one of them")
        if self.lora.base != "fp32" and self.method != "lora":
            raise ValueError(f"lora.base: {self.lora.base} is frozen, so it needs method: lora, not {self.method}")
        return self


def layers_in(text: str) -> frozenset[int]:
    """The layers that `train_layers` names."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)
