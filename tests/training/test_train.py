"""The training loop: it learns, reports, saves, resumes to the bit, and refuses nonsense."""

from __future__ import annotations

import json

import pytest
import torch

from stillroom.checkpoint import Checkpointer
from stillroom.errors import CheckpointError, NotEnoughData, StillroomError
from stillroom.models import load
from stillroom.schema import Example, Message, Target, ToolCall, ToolSpec
from stillroom.training import LoraSettings, SpectrumSettings, TrainConfig, measure_rate, train
from stillroom.training.loop import learning_rate
from stillroom.training.sequences import steps_of_epoch, tokenize
from stillroom.training.step import Stepper

TOOL = ToolSpec("add", "Adds.", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
QUICK = TrainConfig(epochs=2, tokens_per_step=600, row_tokens=300, learning_rate=1e-2, save_every_steps=1)


def example(index: int, *, answers: int = 1) -> Example:
    answer = Target(Message("assistant", "", (ToolCall("add", {"n": index}),)), "teacher", "a teacher")
    return Example(f"e{index}", (Message("user", f"Please add {index}."),), (TOOL,), (answer,) * answers)


def examples(count: int = 12) -> list[Example]:
    return [example(index) for index in range(count)]


def open_student(path):
    return load(path, chat_template="chatml-tools")


def weights(loaded) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Killed(BaseException):
    """Stands for a kill inside this process; the real one is in test_kill.py."""


def test_it_learns_and_says_how_it_went(tiny_student, tmp_path):
    loaded = open_student(tiny_student)
    config = QUICK.model_copy(update={"epochs": 6})
    result = train(loaded, examples(), config, tmp_path, validation=examples(3))

    assert result.losses[-1] < result.losses[0] / 2
    assert result.validation_losses == sorted(result.validation_losses, reverse=True)
    assert len(result.validation_losses) == 6
    sequences, _ = tokenize(loaded, examples(), 2048)
    assert result.tokens == 6 * sum(len(s.ids) for s in sequences)
    assert result.scored_tokens == 6 * sum(s.targets for s in sequences)
    assert result.steps == len(result.losses)
    assert result.peak_memory_bytes > 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, result.steps + 1))
    assert [line["loss"] for line in lines] == result.losses
    assert json.loads(json.dumps(result.to_dict()))["precision"] in ("fp32", "bf16")


def test_the_first_loss_is_transformers_own(tiny_student, tmp_path):
    loaded = open_student(tiny_student)
    sequences, _ = tokenize(loaded, examples(), 2048)
    (batch,) = steps_of_epoch(sequences, QUICK.model_copy(update={"tokens_per_step": 10**6}), seed=3, epoch=0)
    total = 0.0
    for sequence in batch:
        ids = torch.tensor(sequence.ids)[None]
        labels = ids.clone()
        labels[:, : sequence.first_target] = -100
        with torch.no_grad():
            total += float(loaded.model(input_ids=ids, labels=labels).loss) * sequence.targets
    one_step = QUICK.model_copy(update={"tokens_per_step": 10**6, "epochs": 1, "precision": "fp32"})
    result = train(loaded, examples(), one_step, tmp_path, seed=3)
    assert result.losses == pytest.approx([total / sum(s.targets for s in batch)], rel=1e-5)


@pytest.mark.parametrize(
    "update",
    [
        {},
        {"method": "lora", "lora": LoraSettings(r=4, dropout=0.2)},
        {"method": "lora", "lora": LoraSettings(r=4, base="nf4")},
        {"freeze_layers": 1},
        {"spectrum": SpectrumSettings(top=50)},
        {"order": "short_first"},
    ],
    ids=["full", "lora with dropout", "lora over nf4", "frozen layers", "spectrum", "short first"],
)
def test_interrupted_at_any_step_it_ends_in_the_same_bits(tiny_student, tmp_path, monkeypatch, update):
    config = QUICK.model_copy(update=update)
    undisturbed = open_student(tiny_student)
    wanted = train(undisturbed, examples(), config, tmp_path / "undisturbed", validation=examples(2), seed=1)

    real_step = Stepper.step
    for stop_after in (0, 1, 3):  # each start gets a few steps further
        steps_left = [stop_after]

        def step(self, *args, left=steps_left, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real_step(self, *args, **kwargs)

        monkeypatch.setattr(Stepper, "step", step)
        with pytest.raises(Killed):
            train(open_student(tiny_student), examples(), config, tmp_path / "killed", validation=examples(2), seed=1)
    monkeypatch.setattr(Stepper, "step", real_step)
    resumed = open_student(tiny_student)
    found = train(resumed, examples(), config, tmp_path / "killed", validation=examples(2), seed=1)

    assert_identical(weights(resumed), weights(undisturbed))
    assert found.losses == wanted.losses
    assert found.validation_losses == wanted.validation_losses
    assert found.resumed_at == [1, 4]
    logged = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, wanted.steps + 1))

    again = open_student(tiny_student)  # a finished run is not trained further
    assert train(again, examples(), config, tmp_path / "killed", validation=examples(2), seed=1).losses == wanted.losses
    assert_identical(weights(again), weights(undisturbed))


def test_tensorboard_holds_each_step_once_after_a_resumption(tiny_student, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = QUICK.model_copy(update={"save_every_steps": 2, "epochs": 2})
    real_step, steps_left = Stepper.step, [3]

    def step(self, *args, **kwargs):
        if steps_left[0] == 0:
            raise Killed
        steps_left[0] -= 1
        return real_step(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(Killed):
        train(open_student(tiny_student), examples(), config, tmp_path)
    monkeypatch.setattr(Stepper, "step", real_step)
    result = train(open_student(tiny_student), examples(), config, tmp_path)
    assert result.resumed_at == [2]  # step 3 was logged, lost, and done again
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, result.steps + 1))


def test_a_damaged_checkpoint_is_passed_over_only_with_a_word(tiny_student, tmp_path, monkeypatch, capsys):
    wanted = open_student(tiny_student)
    train(wanted, examples(), QUICK, tmp_path / "wanted")
    loaded = open_student(tiny_student)
    train(loaded, examples(), QUICK, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    newest = Checkpointer(root).steps()[-1]
    file = root / f"step-{newest:08d}" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()

    resumed = open_student(tiny_student)
    train(resumed, examples(), QUICK, tmp_path / "run")
    said = capsys.readouterr().err
    assert f"step {newest}" in said
    assert "is damaged" in said
    assert f"continuing from step {newest - 1}" in said
    assert (root / f"step-{newest:08d}.damaged").is_dir()
    assert_identical(weights(resumed), weights(wanted))


@pytest.mark.parametrize("change", ["data", "seed", "settings"])
def test_the_checkpoint_of_another_run_is_refused(tiny_student, tmp_path, change):
    train(open_student(tiny_student), examples(), QUICK, tmp_path)
    data = examples(5) if change == "data" else examples()
    config = QUICK.model_copy(update={"learning_rate": 0.5}) if change == "settings" else QUICK
    with pytest.raises(CheckpointError, match="another run"):
        train(open_student(tiny_student), data, config, tmp_path, seed=int(change == "seed"))


def test_how_often_it_is_saved_does_not_make_it_another_run(tiny_student, tmp_path):
    train(open_student(tiny_student), examples(), QUICK, tmp_path)
    train(
        open_student(tiny_student),
        examples(),
        QUICK.model_copy(update={"save_every_s": 1.0, "keep_latest": 1}),
        tmp_path,
    )


@pytest.mark.parametrize("base", ["fp32", "int8", "nf4"])
def test_merged_adapters_answer_as_the_adapted_model_did(tiny_student, tmp_path, base):
    loaded = open_student(tiny_student)
    exact = QUICK.model_copy(update={"precision": "fp32"})  # bf16 rounds merged weights and adapters differently
    config = exact.model_copy(update={"method": "lora", "lora": LoraSettings(r=4, base=base)})
    result = train(loaded, examples(), config, tmp_path, validation=examples(3))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert type(loaded.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert result.trained_parameters < sum(p.numel() for p in loaded.model.parameters())
    sequences, _ = tokenize(loaded, examples(3), 2048)
    assert Stepper(loaded.model, exact).evaluate(sequences) == pytest.approx(result.validation_losses[-1], rel=1e-5)


def test_frozen_layers_and_embedding_stay_as_they_were(tiny_student, tmp_path):
    loaded = open_student(tiny_student)
    before = weights(loaded)
    train(loaded, examples(), QUICK.model_copy(update={"freeze_layers": 1}), tmp_path)
    after = weights(loaded)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("model.layers.1.", "model.norm"))}


def test_every_target_is_learnt_and_long_ones_are_left_out_by_name(tiny_student, tmp_path, capsys):
    loaded = open_student(tiny_student)
    long = Example("much too long", (Message("user", "word " * 400),), (), example(1).targets)
    mixed = [example(0, answers=2), long, Example("unlabelled", (Message("user", "hm"),))]
    result = train(loaded, mixed, QUICK.model_copy(update={"max_sequence_tokens": 600, "epochs": 1}), tmp_path)
    sequences, _ = tokenize(loaded, [example(0)], 2048)
    assert result.tokens == 2 * len(sequences[0].ids)
    assert {entry["id"] for entry in result.skipped} == {"much too long", "unlabelled"}
    assert "much too long" in capsys.readouterr().err
    with pytest.raises(NotEnoughData, match="no target"):
        train(loaded, mixed[2:], QUICK, tmp_path / "other")


def test_a_loss_that_is_not_finite_stops_the_run(tiny_student, tmp_path):
    loaded = open_student(tiny_student)
    with torch.no_grad():
        loaded.model.model.norm.weight[0] = float("nan")
    with pytest.raises(StillroomError, match=r"not a finite number.*\n.*learning_rate"):
        train(loaded, examples(), QUICK, tmp_path)


def test_the_schedule_rises_then_falls_to_its_floor():
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.1, min_ratio=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11
    constant = config.model_copy(update={"schedule": "constant"})
    assert {learning_rate(step, 100, constant) for step in range(10, 100)} == {1.0}


def test_steps_hold_the_budget_and_every_sequence_once(tiny_student):
    sequences, _ = tokenize(open_student(tiny_student), examples(30), 2048)
    for epoch in range(3):
        steps = list(steps_of_epoch(sequences, QUICK, seed=5, epoch=epoch))
        assert sorted(s.name for step in steps for s in step) == sorted(s.name for s in sequences)
        assert all(sum(len(s.ids) for s in step) <= QUICK.tokens_per_step for step in steps)
        assert steps == list(steps_of_epoch(sequences, QUICK, seed=5, epoch=epoch))
    assert list(steps_of_epoch(sequences, QUICK, 5, 0)) != list(steps_of_epoch(sequences, QUICK, 5, 1))


def test_measuring_the_rate_leaves_the_student_as_it_was(tiny_student):
    loaded = open_student(tiny_student)
    before = weights(loaded)
    assert measure_rate(loaded, QUICK, [range(5, 40), range(5, 60)], answer_tokens=4) > 0
    assert_identical(weights(loaded), before)
    assert all(p.grad is None for p in loaded.model.parameters())
