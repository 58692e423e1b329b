"""The main path on a tiny student and a real HTTP teacher: whole, resumable, redone exactly where it must be."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from stillroom.artifacts import file_digest, lineage
from stillroom.config import load_config
from stillroom.errors import ConfigError, DataError, ModelError
from stillroom.pipeline import Recipe, distill, plan, record
from stillroom.testing import LocalTeacher
from tests.pipeline.recipe import answer, command, write_recipe

MISSING = [
    ("teacher.model.api_key_env=NO_SUCH_KEY", "the environment variable NO_SUCH_KEY is not set", "export NO_SUCH_KEY"),
    ("teacher.model={engine: llama.cpp, path: nowhere.gguf}", "there is nothing at nowhere.gguf", "check `path`"),
    ("teacher.model={engine: transformers, path: ./nowhere}", "there is nothing at ./nowhere", "check `path`"),
    ("teacher.model={engine: recorded, path: nowhere}", "there is nothing at nowhere", "check `path`"),
    ('teacher.model={engine: recorded, path: "package:nowhere/x"}', "which is not installed", "pip install"),
]
STEPS = ["evaluate-base", "evaluate-student", "evaluate-teacher", "label", "plan", "prepare", "report", "train"]


def weights(out: Path) -> str:
    return file_digest(out / "student" / "model.safetensors")


def built(out: Path) -> dict[str, str]:
    return {path.name.rsplit("-", 1)[0]: path.name for path in (out / "artifacts").iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_student):
    """One whole run: its folder, recipe, teacher and summary."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with LocalTeacher(answer, log=folder / "calls.jsonl") as teacher:
        recipe = write_recipe(folder, tiny_student, teacher.url)
        summary = distill(load_config(Recipe, recipe), folder / "runs" / "short", command="test")
        summary["weights"] = weights(folder / "runs" / "short")
        yield folder, recipe, teacher, summary


def test_a_run_ends_in_a_report_and_a_student(undisturbed):
    folder, _, teacher, summary = undisturbed
    out = folder / "runs" / "short"
    assert sorted(built(out)) == STEPS
    assert summary["items"] == {"train": 24, "test": 12}
    assert set(summary["accuracy"]) == {"base", "teacher", "student"}
    assert summary["accuracy"]["teacher"]["pooled"] == 1.0
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert {"model.safetensors", "config.json", "README.md"} <= {p.name for p in (out / "student").iterdir()}
    assert max(teacher.calls().values()) == 1


def test_the_same_command_again_does_nothing(undisturbed):
    folder, recipe, teacher, summary = undisturbed
    out = folder / "runs" / "short"
    before, calls = built(out), sum(teacher.calls().values())
    again = distill(load_config(Recipe, recipe), out, command="test")
    assert built(out) == before
    assert sum(teacher.calls().values()) == calls
    assert again["accuracy"] == summary["accuracy"]


def test_a_changed_setting_redoes_exactly_what_depends_on_it(undisturbed):
    folder, recipe, _, _ = undisturbed
    out = folder / "runs" / "short"
    before = set((out / "artifacts").iterdir())
    distill(load_config(Recipe, recipe, ["training.epochs=1"]), out, command="test")
    redone = {path.name.rsplit("-", 1)[0] for path in set((out / "artifacts").iterdir()) - before}
    assert redone == {"plan", "train", "evaluate-student", "report"}


def test_a_recipe_can_cut_its_student_down(undisturbed):
    folder, recipe, teacher, _ = undisturbed
    calls = sum(teacher.calls().values())
    settings = ["student.prune.layers=1", "student.prune.vocabulary=from-data"]
    summary = distill(load_config(Recipe, recipe, settings), folder / "runs" / "pruned", command="test")
    config = json.loads((folder / "runs" / "pruned" / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert set(summary["accuracy"]) == {"base", "teacher", "student"}
    assert sum(teacher.calls().values()) == calls


def test_another_run_pays_nothing_again(undisturbed):
    folder, recipe, teacher, summary = undisturbed
    calls = sum(teacher.calls().values())
    distill(load_config(Recipe, recipe), folder / "runs" / "second", command="test")
    assert sum(teacher.calls().values()) == calls
    assert weights(folder / "runs" / "second") == summary["weights"]


def test_lineage_of_the_student_reaches_the_data(undisturbed):
    folder, *_ = undisturbed
    tree = lineage(folder / "runs" / "short" / "student")
    train = tree["parents"]["train"]
    assert train["step"] == "train"
    sources = train["parents"]["labelled"]["parents"]["data"]["parents"]
    assert any(role.endswith("prompts.jsonl") for role in sources)


def test_the_plan_says_what_leaves_the_machine_and_what_it_takes(undisturbed):
    _, recipe, teacher, _ = undisturbed
    found = plan(load_config(Recipe, recipe), measure=False)
    assert found.figures["records"]["train_unlabelled"] == 19
    assert found.figures["records"]["train_labelled"] == 5
    assert found.figures["teacher"]["calls"] == 19 + 12
    assert found.figures["leaves_the_machine"][0]["to"] == teacher.url
    assert teacher.url in found.text
    assert plan(load_config(Recipe, recipe), gpu="h200", measure=False).figures["memory"]["fits"]


def test_recording_again_asks_only_what_the_recording_lacks(tmp_path, tiny_student):
    """First half of the prompts, then all, with nothing but the recording kept; then a run without any teacher."""
    with LocalTeacher(answer, log=tmp_path / "calls.jsonl") as teacher:
        recipe = write_recipe(tmp_path, tiny_student, teacher.url)
        first = record(load_config(Recipe, recipe, ["data.train=12"]), tmp_path / "a" / "run", tmp_path / "kept")
        assert first["recorded"] == sum(teacher.calls().values())
        again = record(load_config(Recipe, recipe), tmp_path / "b" / "run", tmp_path / "kept")
        assert again["recorded"] == sum(teacher.calls().values()) > first["recorded"]
        assert max(teacher.calls().values()) == 1
    recorded = ["teacher.model={engine: recorded, path: " + str(tmp_path / "kept") + ", license: Apache-2.0}"]
    summary = distill(load_config(Recipe, recipe, [*recorded, "evaluation.best=true"]), tmp_path / "c" / "run")
    assert summary["accuracy"]["teacher"]["pooled"] == 1.0
    # The recording has no answers to prompts with examples before them: those figures are left out, the others stand.
    assert "student-best" in summary["accuracy"]
    assert "teacher-best" not in summary["accuracy"]
    assert summary["gap_closed_best"] is None


def test_the_plan_says_what_is_missing_before_anything_is_asked(undisturbed, monkeypatch):
    _, recipe, _, _ = undisturbed
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for setting, what, to_do in MISSING:
        found = plan(load_config(Recipe, recipe, [setting]), measure=False)
        assert what in found.figures["missing"][0]
        assert what in found.text
        assert to_do in found.text
    assert plan(load_config(Recipe, recipe), measure=False).figures["missing"] == []


@pytest.mark.parametrize(("setting", "what", "to_do"), MISSING)
@pytest.mark.parametrize("start", [distill, lambda recipe, out: record(recipe, out, out / "answers")])
def test_what_is_missing_ends_a_run_before_any_work(undisturbed, tmp_path, monkeypatch, start, setting, what, to_do):
    _, recipe, teacher, _ = undisturbed
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    calls = teacher.calls()
    with pytest.raises(ModelError, match=f"(?s){what}.*help: .*{to_do}"):
        start(load_config(Recipe, recipe, [setting]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert teacher.calls() == calls


@pytest.mark.parametrize(
    ("setting", "what"),
    [("data.test=0", "no held-out examples"), ("evaluation.task=classification", "no label to expect")],
)
def test_items_that_cannot_be_scored_end_a_run_before_the_teacher_is_asked(undisturbed, tmp_path, setting, what):
    _, recipe, teacher, _ = undisturbed
    calls = teacher.calls()
    with pytest.raises(DataError, match=what):
        distill(load_config(Recipe, recipe, [setting]), tmp_path / "run")
    assert teacher.calls() == calls


def test_an_objective_that_needs_the_teachers_distribution_is_refused_with_the_recipe(undisturbed):
    _, recipe, _, _ = undisturbed
    with pytest.raises(ConfigError, match=r"(?s)training.objective.kind=forward_kl.*teacher.model.engine=openai"):
        load_config(Recipe, recipe, ["training.objective.kind=forward_kl"])


def test_a_price_that_nobody_stated_is_not_zero_dollars(undisturbed):
    _, recipe, _, _ = undisturbed
    found = plan(load_config(Recipe, recipe), measure=False)
    assert found.figures["teacher"]["usd"] is None
    assert "no price is stated" in found.text
    assert "USD" not in found.text
    priced = load_config(Recipe, recipe, ["teacher.model.price={input_per_million: 1000, output_per_million: 2000}"])
    found = plan(priced, measure=False)
    assert found.figures["teacher"]["usd"] > 0
    assert f"USD {found.figures['teacher']['usd']:.2f}" in found.text


def test_the_report_shows_no_dollars_where_no_price_is_stated(undisturbed):
    folder, *_ = undisturbed
    rows = json.loads((folder / "runs" / "short" / "report.json").read_text())["plan"]
    (spent,) = [row for row in rows if row["what"] == "spent on the teacher"]
    assert (spent["planned"], spent["actual"]) == ("no price is stated", "no price is stated")


def test_a_bound_in_dollars_needs_a_price(undisturbed):
    _, recipe, _, _ = undisturbed
    with pytest.raises(ConfigError, match="no price is stated"):
        load_config(Recipe, recipe, ["teacher.budget.max_usd=1"])
    price = "teacher.model.price={input_per_million: 1}"
    assert load_config(Recipe, recipe, ["teacher.budget.max_usd=1", price]).teacher.budget.max_usd == 1


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, tiny_student):
    with LocalTeacher(answer, log=tmp_path / "calls.jsonl", delay_s=0.5) as teacher:
        run = command(write_recipe(tmp_path, tiny_student, teacher.url), tmp_path / "runs" / "short")
        process = subprocess.Popen(
            run,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # ignored where the tests run behind a shell
        )
        while not teacher.calls():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command to go on" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_finishes_and_nothing_is_paid_twice(tmp_path, tiny_student, undisturbed, kills):
    """One kill -9 in each of `kills` runs, at moments spread over an undisturbed run; each is run again to its end."""
    reference = undisturbed[3]["weights"]
    moments = random.Random(kills)
    duration = None
    for attempt in range(kills + 1):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with LocalTeacher(answer, log=folder / "calls.jsonl", delay_s=0.02) as teacher:
            run = command(write_recipe(folder, tiny_student, teacher.url), folder / "runs" / "short")
            started = time.monotonic()
            process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            if duration is not None:
                time.sleep(moments.uniform(0.1, 1.0) * duration)
                process.send_signal(signal.SIGKILL)
            process.communicate()
            if duration is None:
                duration = time.monotonic() - started
            done = subprocess.run(run, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            assert json.loads(done.stdout.splitlines()[-1])["items"] == {"train": 24, "test": 12}
            # Two requests are in flight at most, so a kill can lose two answers that were never stored.
            repeated = [digest for digest, count in teacher.calls().items() if count > 1]
            assert len(repeated) <= 2
            assert all(count <= 2 for count in teacher.calls().values())
        assert weights(folder / "runs" / "short") == reference
