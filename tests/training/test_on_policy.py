"""The student's own answers: sampled from the right distribution, as often as asked, scored by themselves, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from stillroom.errors import ConfigError
from stillroom.models.packing import TokenSequence
from stillroom.teacher import LiveTeacher
from stillroom.training import LoraSettings, ObjectiveConfig, OnPolicyConfig, train
from stillroom.training.on_policy import OnPolicy
from stillroom.training.sequences import steps_of_epoch, tokenize
from stillroom.training.step import Stepper
from tests.models.test_packed import VOCABULARY, tiny
from tests.training.test_objective import another
from tests.training.test_train import QUICK, Killed, assert_identical, examples, open_student, weights

PROMPT = (5, 9, 2, 7)
NEVER = frozenset[int]()
FORWARD = ObjectiveConfig(kind="forward_kl")


def source(model, *, end_ids=NEVER, seed=0, longest=200, replay=None, teacher=None, **settings) -> OnPolicy:
    config = OnPolicyConfig(**({"probability": 1.0, "max_tokens": 6} | settings))
    return OnPolicy(config, model, end_ids, seed, longest, [] if replay is None else replay, teacher)


def given(*prompts: tuple[int, ...]) -> list[TokenSequence]:
    return [TokenSequence((*prompt, 1, 1), len(prompt), f"s{index}") for index, prompt in enumerate(prompts)]


def chances(model, prompt, temperature=1.0) -> torch.Tensor:
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / temperature, -1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("temperature", "top_p", "teacher_share"), [(1.0, 1.0, 0.0), (0.5, 1.0, 0.0), (2.0, 0.6, 0.0), (1.0, 1.0, 0.5)]
)
def test_tokens_come_as_often_as_their_distribution_says(kind, temperature, top_p, teacher_share):
    model, teacher = tiny(kind).eval(), tiny("qwen3").eval()
    wanted = chances(model, PROMPT, temperature)
    if teacher_share:
        wanted = (1 - teacher_share) * wanted + teacher_share * chances(teacher, PROMPT)
    if top_p < 1:
        ranked = sorted(range(VOCABULARY), key=lambda token: -wanted[token])
        reach = next(n for n in range(1, VOCABULARY + 1) if float(wanted[ranked[:n]].sum()) >= top_p)
        wanted[ranked[reach:]] = 0
        wanted /= wanted.sum()
    settings = {"temperature": temperature, "top_p": top_p, "teacher_share": teacher_share, "max_tokens": 1}
    draws = 3000
    batch, whose = source(model, teacher=teacher, **settings).batch(0, given(*[PROMPT] * draws))
    assert whose == "sampled"
    counts = torch.bincount(torch.tensor([sequence.ids[-1] for sequence in batch]), minlength=VOCABULARY)
    assert not counts[wanted == 0].any()
    expected = wanted * draws
    excess = ((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum()
    freedom = int((expected > 0).sum()) - 1
    assert excess < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("teacher_share", [0.0, 0.3])
def test_with_the_cache_on_every_token_is_what_the_whole_text_so_far_says(kind, teacher_share):
    model, teacher = tiny(kind).eval(), tiny("llama", num_hidden_layers=1).eval()
    prompts = [PROMPT, (3, 3), (8, 1, 4, 1, 5, 9, 2, 6)]
    cold = {"temperature": 1e-4, "max_tokens": 8, "teacher_share": teacher_share}
    batch, _ = source(model, teacher=teacher, **cold).batch(0, given(*prompts))
    for prompt, sequence in zip(prompts, batch, strict=True):
        ids = prompt
        for _ in range(8):
            mixed = (1 - teacher_share) * chances(model, ids) + teacher_share * chances(teacher, ids)
            ids = (*ids, int(mixed.argmax()))
        assert sequence.ids == ids
        assert sequence.first_target == len(prompt)


def test_answers_end_with_an_end_token_or_at_a_cap():
    model = tiny("llama").eval()
    ends = frozenset(range(0, VOCABULARY, 3))
    batch, _ = source(model, end_ids=ends, max_tokens=20).batch(0, given(*[PROMPT] * 40))
    assert {sequence.targets for sequence in batch} > {1, 2}
    for sequence in batch:
        answer = sequence.ids[sequence.first_target :]
        assert not ends & set(answer[:-1])
        assert answer[-1] in ends or len(answer) == 20
    capped, _ = source(model, max_tokens=20, step_tokens=12).batch(0, given(PROMPT, PROMPT, PROMPT))
    assert [sequence.targets for sequence in capped] == [4, 4, 4]
    short, _ = source(model, max_tokens=20, longest=len(PROMPT) + 2).batch(0, given(PROMPT))
    assert short[0].targets == 2


def test_lambda_says_how_many_steps_are_the_students_own():
    own = source(tiny("llama").eval(), probability=0.3, max_tokens=1)
    batch = given(PROMPT, (1, 2))
    found = [own.batch(step, batch) for step in range(300)]
    assert 60 < sum(whose == "sampled" for _, whose in found) < 120
    assert all(sequences == batch for sequences, whose in found if whose == "given")


def test_draws_depend_on_seed_and_step_alone_and_leave_global_chance_as_it_was():
    model = tiny("llama").train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    draw = lambda seed, step: source(model, seed=seed).batch(step, given(PROMPT, PROMPT))[0]  # noqa: E731
    assert draw(0, 4) == draw(0, 4)
    assert len({str(draw(seed, step)) for seed in (0, 1) for step in (0, 1)}) == 4
    first, second = draw(0, 0)
    assert first.ids != second.ids
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_kept_samples_are_the_newest_and_are_used_again():
    kept: list = []
    config = OnPolicyConfig(probability=1.0, max_tokens=2, replay=6, replay_share=0.5)
    own = OnPolicy(config, tiny("llama").eval(), NEVER, 0, 99, kept)
    sampled: list = []
    for step in range(40):
        before = list(kept)
        batch, whose = own.batch(step, given(PROMPT, (1, 2)))
        if whose == "replayed":
            assert kept == before
            assert all((list(s.ids), s.first_target, s.name) in before for s in batch)
            assert len(batch) == 2
        else:
            sampled += [(list(s.ids), s.first_target, s.name) for s in batch]
            assert kept == sampled[-6:]
    assert 10 < len(sampled) // 2 < 30


def judge(path) -> LiveTeacher:
    """A teacher in memory: the student's architecture with other weights."""
    loaded = open_student(path)
    loaded.model = another(loaded.model)
    return LiveTeacher(loaded, precision="fp32")


def lines_of(work: Path) -> list[dict]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def test_the_teacher_judges_what_was_sampled_and_a_step_is_normalised_by_it(tiny_student, tmp_path):
    own = OnPolicyConfig(probability=1.0, max_tokens=9)
    config = QUICK.model_copy(update={"epochs": 1, "precision": "fp32", "on_policy": own, "objective": FORWARD})
    loaded, teacher = open_student(tiny_student), judge(tiny_student)
    ends = frozenset({loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")})
    sequences, _ = tokenize(loaded, examples(), 2048)
    first = next(iter(steps_of_epoch(sequences, config, 0, 0)))
    batch, _ = OnPolicy(own, loaded.model, ends, 0, 2048, []).batch(0, first)
    total = 0.0
    for sequence in batch:
        ids, scored = torch.tensor([sequence.ids]), slice(sequence.first_target - 1, -1)
        with torch.no_grad():
            q, p = (torch.log_softmax(m(ids).logits[0, scored].double(), -1) for m in (loaded.model, teacher.model))
        total += float((p.exp() * (p - q)).sum())
    result = train(loaded, examples(), config, tmp_path, teacher=teacher)
    lines = lines_of(tmp_path)
    scored_tokens = sum(sequence.targets for sequence in batch)
    assert lines[0]["scored_tokens"] == scored_tokens != sum(sequence.targets for sequence in first)
    assert lines[0]["loss"] == pytest.approx(total / scored_tokens, rel=1e-5)
    assert (lines[0]["sampled"], lines[0]["replayed"]) == (1.0, 0.0)
    assert result.tokens == sum(line["tokens"] for line in lines)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_interrupted_at_any_step_it_samples_on_to_the_same_bits(tiny_student, tmp_path, monkeypatch, method):
    own = OnPolicyConfig(probability=0.7, max_tokens=8, replay=6, replay_share=0.4, teacher_share=0.2, top_p=0.9)
    config = QUICK.model_copy(
        update={
            "on_policy": own,
            "objective": FORWARD,
            "method": method,
            "lora": LoraSettings(r=2, dropout=0.1),
            "epochs": 3,
        }
    )
    teacher = judge(tiny_student)
    run = lambda loaded, folder: train(loaded, examples(), config, tmp_path / folder, seed=1, teacher=teacher)  # noqa: E731
    undisturbed = open_student(tiny_student)
    wanted = run(undisturbed, "undisturbed")
    lines = lines_of(tmp_path / "undisturbed")
    assert any(line["sampled"] for line in lines)
    assert any(line["replayed"] for line in lines)

    real_step = Stepper.step
    for stop_after in (1, 3, 2):

        def step(self, *args, left=[stop_after], **kwargs):  # noqa: B006
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real_step(self, *args, **kwargs)

        monkeypatch.setattr(Stepper, "step", step)
        with pytest.raises(Killed):
            run(open_student(tiny_student), "killed")
    monkeypatch.setattr(Stepper, "step", real_step)
    resumed = open_student(tiny_student)
    found = run(resumed, "killed")
    assert found.resumed_at == [1, 4, 6]
    assert found.losses == wanted.losses
    assert_identical(weights(resumed), weights(undisturbed))


def test_what_cannot_be_done_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"teacher_share=0\.2"):
        source(tiny("llama"), teacher_share=0.2)
    with pytest.raises(ValidationError, match=r"replay_share.*replay: 0"):
        OnPolicyConfig(replay_share=0.5)
