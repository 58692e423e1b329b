"""Classification and free text through the same main path, the latter with a judge behind a URL."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from stillroom.config import load_config
from stillroom.pipeline import Recipe, distill, plan
from stillroom.testing import LocalTeacher
from tests.conftest import write_jsonl

WORDS = ["parcel", "refund", "password", "invoice", "weather", "train", "garden", "piano"]


def record(index: int, right: str | None) -> dict:
    messages = [{"role": "user", "content": f"Ticket {index}: my {WORDS[index % 8]} number {index} is late."}]
    return {"messages": [*messages, {"role": "assistant", "content": right}] if right else messages}


def write_recipe(folder: Path, student: Path, url: str, right: str, evaluation: dict) -> Path:
    train = write_jsonl(folder / "prompts.jsonl", [record(i, right if i % 5 == 0 else None) for i in range(20)])
    held_out = write_jsonl(folder / "held_out.jsonl", [record(i, right) for i in range(100, 108)])
    recipe = {
        "name": "task",
        "data": {
            "sources": [
                {"path": str(train), "format": "openai", "role": "train"},
                {"path": str(held_out), "format": "openai", "role": "evaluate"},
            ],
            "train": 20,
            "test": 8,
            "minimum": 10,
            "near_duplicates": None,
        },
        "teacher": {
            "model": {"engine": "openai", "url": url, "model": "local", "license": "Apache-2.0"},
            "max_tokens": 32,
        },
        "student": {"path": str(student), "gguf": False, "export_dtype": "float32"},
        "training": {"epochs": 1, "tokens_per_step": 512},
        "evaluation": {"latency_calls": 0, **evaluation},
    }
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_classification_end_to_end(tmp_path, tiny_student):
    with LocalTeacher(lambda body: "late") as teacher:
        evaluation = {"task": "classification", "labels": ["late", "lost"]}
        recipe = load_config(Recipe, write_recipe(tmp_path, tiny_student, teacher.url, "late", evaluation))
        summary = distill(recipe, tmp_path / "run")
    assert summary["accuracy"]["teacher"]["pooled"] == 1.0
    assert summary["items"] == {"train": 20, "test": 8}
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "f1" in json.dumps(figures).lower()


def test_free_text_with_a_judge_end_to_end(tmp_path, tiny_student):
    def judge(body: dict) -> str:
        teachers = "We are sorry" in str(body["messages"]).split("<answer")[1].split("</answer")[0]
        return f"Polite.\nVERDICT: {5 if teachers else 1}"

    with LocalTeacher(lambda body: "We are sorry; it is on its way.") as teacher, LocalTeacher(judge) as judging:
        judged_by = {"engine": "openai", "url": judging.url, "model": "judge", "license": "Apache-2.0"}
        evaluation = {"task": "text", "best": False, "judge": {"model": judged_by}}
        recipe = load_config(Recipe, write_recipe(tmp_path, tiny_student, teacher.url, "Sorry, soon.", evaluation))
        found = plan(recipe, measure=False).figures["leaves_the_machine"]
        assert [row["to"] for row in found] == [teacher.url, judging.url]
        summary = distill(recipe, tmp_path / "run")
        asked = sum(judging.calls().values())
        # Another run pays the judge for nothing that it has judged.
        distill(recipe, tmp_path / "again")
        assert sum(judging.calls().values()) == asked
    assert summary["accuracy"]["teacher"]["pooled"] == 1.0
    assert summary["accuracy"]["base"]["pooled"] == 0.0
