"""What a recipe's objective means, and training towards a teacher's distribution in memory and as a top-k."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from stillroom.errors import CheckpointError, ConfigError
from stillroom.models import load
from stillroom.models.packed import hidden_states
from stillroom.models.packing import Packed, TokenSequence
from stillroom.models.precision import Precision
from stillroom.models.products import Products
from stillroom.models.signals import Listed, Projected, TopK
from stillroom.schema import Example, Message, Target, ToolCall, ToolSpec
from stillroom.teacher import CachedTeacher, LiveTeacher, SignalCache
from stillroom.training import ObjectiveConfig, OnPolicyConfig, TrainConfig, measure_rate, train
from stillroom.training.sequences import tokenize
from stillroom.training.step import Stepper

TOOL = ToolSpec("add", "Adds.", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
QUICK = TrainConfig(epochs=2, tokens_per_step=600, row_tokens=300, learning_rate=1e-2, precision="fp32")
FORWARD = ObjectiveConfig(kind="forward_kl")
EVERY_KIND = (
    "forward_kl", "reverse_kl", "adaptive_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation",
    "symmetric",
)  # fmt: skip


def examples(count: int = 12) -> list[Example]:
    def example(index: int) -> Example:
        target = Target(Message("assistant", "", (ToolCall("add", {"n": index}),)), "teacher", "a teacher")
        return Example(f"e{index}", (Message("user", f"Please add {index}."),), (TOOL,), (target,))

    return [example(index) for index in range(count)]


def another(model: torch.nn.Module) -> torch.nn.Module:
    """The model, frozen, with other weights: larger ones, since a student begins near the uniform distribution."""
    torch.manual_seed(1)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)
    return model


class Teacher:
    """The student's own architecture with other weights; dense."""

    digest = "another student"

    def __init__(self, loaded) -> None:
        self.model = another(copy.deepcopy(loaded.model))
        self.products = Products(Precision("fp32", True, "test"))

    def signal(self, packed: Packed, sequences) -> Projected:
        with torch.no_grad():
            hidden_SE = hidden_states(self.model, packed, self.products)
        return Projected(hidden_SE, self.model.get_output_embeddings().weight, self.products)


class Cached:
    """The same teacher's whole distribution, computed for each sequence alone and gathered for a packed row."""

    digest = "cached"
    model = None

    def __init__(self, teacher: Teacher, sequences: list[TokenSequence]) -> None:
        self.logprobs_of = {}
        for sequence in sequences:
            with torch.no_grad():
                logits_TV = teacher.model(torch.tensor(sequence.ids)[None]).logits[0]
            self.logprobs_of[sequence.ids] = torch.log_softmax(logits_TV[sequence.first_target - 1 : -1], -1)

    def signal(self, packed: Packed, sequences) -> Listed:
        whose = zip(packed.sequence_S.tolist(), packed.target_S.tolist(), strict=True)
        logprobs_SV = torch.stack([self.logprobs_of[sequences[place].ids][target] for place, target in whose])
        count = logprobs_SV.shape[1]
        return Listed(TopK(torch.arange(count).repeat(len(logprobs_SV), 1), logprobs_SV), count)


def open_student(path):
    return load(path, chat_template="chatml-tools")


def with_objective(**settings) -> TrainConfig:
    return QUICK.model_copy(update={"objective": ObjectiveConfig(**settings)})


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_training_brings_the_student_nearer_to_its_teacher(tiny_student, tmp_path, kind):
    loaded = open_student(tiny_student)
    result = train(loaded, examples(), with_objective(kind=kind), tmp_path, teacher=Teacher(loaded))
    assert result.losses[-1] < 0.7 * result.losses[0]


def test_the_first_loss_is_the_divergence_of_the_two_models_own_logits(tiny_student):
    loaded = open_student(tiny_student)
    teacher = Teacher(loaded)
    sequences, _ = tokenize(loaded, examples(), 2048)
    total = torch.zeros(())
    for sequence in sequences:
        ids, scored = torch.tensor(sequence.ids)[None], slice(sequence.first_target - 1, -1)
        with torch.no_grad():
            q, p = (torch.log_softmax(m(ids).logits[0, scored].double() / 2, -1) for m in (loaded.model, teacher.model))
            labelled = torch.log_softmax(loaded.model(ids).logits[0, scored], -1)
        total = total + (p.exp() * (p - q)).sum() * 0.7 * 4
        total = total - 0.3 * labelled.gather(1, ids[0, sequence.first_target :, None]).sum()
    weights = {"forward_kl": 0.7, "sequence": 0.3}
    config = with_objective(kind="mix", weights=weights, temperature=2.0, temperature_squared=True, chunk_rows=7)
    report = Stepper(loaded.model, config, teacher).step(sequences, 0.0)
    assert report.loss == pytest.approx(float(total) / report.scored_tokens, rel=1e-5)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_signals_gathered_by_sequence_and_target_are_those_of_the_packed_row(tiny_student, kind):
    loaded = open_student(tiny_student)
    teacher = Teacher(loaded)
    sequences, _ = tokenize(loaded, [*examples(), *examples(3)], 2048)
    reports = [
        Stepper(copy.deepcopy(loaded.model), with_objective(kind=kind), source).step(sequences, 0.0)
        for source in (teacher, Cached(teacher, sequences))
    ]
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=1e-5)
    assert reports[1].gradient_norm == pytest.approx(reports[0].gradient_norm, rel=1e-4)


def test_another_teacher_makes_it_another_run(tiny_student, tmp_path):
    loaded = open_student(tiny_student)
    teacher = Teacher(loaded)
    config = QUICK.model_copy(update={"objective": FORWARD})
    wanted = train(open_student(tiny_student), examples(), config, tmp_path, teacher=teacher)
    again = train(open_student(tiny_student), examples(), config, tmp_path, teacher=teacher)
    assert again.losses == wanted.losses
    teacher.digest = "yet another student"
    with pytest.raises(CheckpointError, match="another run"):
        train(open_student(tiny_student), examples(), config, tmp_path, teacher=teacher)


def test_an_objective_and_its_teacher_come_together(tiny_student):
    loaded = open_student(tiny_student)
    with pytest.raises(ConfigError, match=r"objective.kind=reverse_kl .*no teacher"):
        Stepper(loaded.model, with_objective(kind="reverse_kl"))
    with pytest.raises(ConfigError, match=r"objective.kind=sequence does not look"):
        Stepper(loaded.model, QUICK, Teacher(loaded))


def test_samples_are_not_judged_from_a_cache(tiny_student, tmp_path):
    loaded = open_student(tiny_student)
    teacher = LiveTeacher(loaded)
    config = QUICK.model_copy(update={"objective": FORWARD, "on_policy": OnPolicyConfig()})
    with SignalCache(tmp_path / "signals", teacher.identity(8)) as cache:
        for source in (CachedTeacher(cache), CachedTeacher(cache, teacher)):
            with pytest.raises(ConfigError, match=r"training\.on_policy.*CachedTeacher"):
                train(loaded, examples(), config, tmp_path / "train", teacher=source)
    assert not (tmp_path / "train").exists()


def test_the_rate_can_be_measured_before_there_is_a_teacher(tiny_student):
    config = QUICK.model_copy(update={"objective": FORWARD})
    assert measure_rate(open_student(tiny_student), config, [range(5, 40)], answer_tokens=4) > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "mix"}, "kind=mix"),
        ({"kind": "jsd", "weights": {"jsd": 1.0}}, "weights belong to kind=mix"),
        ({"kind": "mix", "weights": {"sequence": 1.0}}, "one is of forward_kl"),
        ({"kind": "mix", "weights": {"jsd": -1.0}}, "above 0"),
        ({"temperature": 2.0}, "no meaning with kind=sequence"),
        ({"kind": "jsd", "beta": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        ObjectiveConfig(**settings)


def test_a_student_that_samples_needs_a_judge():
    with pytest.raises(ValidationError, match=r"on_policy and objective.kind=sequence"):
        TrainConfig(on_policy=OnPolicyConfig())


def test_smoothed_labels_and_a_teacher_are_refused_together():
    with pytest.raises(ValidationError, match=r"label_smoothing=0.1 and objective.kind=forward_kl"):
        TrainConfig(label_smoothing=0.1, objective=FORWARD)
