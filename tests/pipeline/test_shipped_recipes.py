"""The recipes that we ship, run for real on a few of their records: a live local teacher, and one behind a URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillroom.config import load_config
from stillroom.pipeline import Recipe, distill
from tests.engines.questions import smollm2

RECIPES = Path(__file__).parents[2] / "recipes"
KEY = "a key of the test"


def few(tiny_student: Path) -> list[str]:
    """Settings that make a run of seconds: a tiny student, a dozen prompts, short answers."""
    return [
        f"student.path={tiny_student}",
        "student.gguf=false",
        "data.max_prompt_tokens=1000",  # the tiny student's tokens are bytes
        "data.train=12",
        "data.validation=2",
        "data.test=4",
        "data.golden.fraction=0.3",
        "teacher.max_tokens=12",
        "training.epochs=1",
        "evaluation.answer_cap_ratio=0.3",
        "evaluation.latency_calls=0",
    ]


def assert_complete(summary: dict, out: Path) -> None:
    assert summary["items"]["test"] == 4
    assert {"base", "teacher", "student"} <= set(summary["accuracy"])
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "student" / "model.safetensors").exists()


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_the_local_teacher_recipe(tmp_path, tiny_student, engine):
    teacher = [f"teacher.model.path={smollm2()}", f"teacher.model.engine={engine}", "teacher.model.name=null"]
    recipe = load_config(Recipe, RECIPES / "local-teacher.yaml", [*few(tiny_student), *teacher])
    assert_complete(distill(recipe, tmp_path / "run"), tmp_path / "run")


@pytest.fixture
def endpoint():
    """llama.cpp's own server on loopback, with a key."""
    xllamacpp = pytest.importorskip("xllamacpp")
    options = xllamacpp.CommonParams()
    options.model.path = str(smollm2())
    options.n_parallel, options.n_ctx = 2, 8192
    options.warmup, options.verbosity, options.port = False, 0, 0
    options.api_keys = [KEY]
    server = xllamacpp.Server(options)
    yield f"{server.listening_address}/v1"
    del server


def test_the_endpoint_recipe(tmp_path, tiny_student, endpoint, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    recipe = load_config(
        Recipe, RECIPES / "endpoint-teacher.yaml", [*few(tiny_student), f"teacher.model.url={endpoint}"]
    )
    assert_complete(distill(recipe, tmp_path / "run"), tmp_path / "run")
