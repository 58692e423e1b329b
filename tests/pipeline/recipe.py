"""The short run of these tests: a tiny student, a real HTTP teacher on loopback, a recipe of twenty prompts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

from tests.conftest import weather_record, write_jsonl


def answer(body: dict) -> str:
    """What the teacher says: the one tool, with the city that the prompt names."""
    words = str(body["messages"])
    city = re.search(r"like in (\w+)", words)
    tool = body["tools"][0]["function"]["name"] if body.get("tools") else re.search(r"weather_\d+", words).group()
    return f'[{tool}(city="{city.group(1)}")]'


def write_recipe(folder: Path, student: Path, url: str, **training: object) -> Path:
    """Write recipe and data into `folder`; returns the recipe's path."""
    records = [weather_record(index, answer=index % 5 == 0) for index in range(24)]
    train = write_jsonl(folder / "prompts.jsonl", records)
    held_out = write_jsonl(folder / "held_out.jsonl", [weather_record(index, answer=True) for index in range(100, 112)])
    recipe = {
        "name": "short",
        "data": {
            "sources": [
                {"path": str(train), "format": "openai", "role": "train", "category": "weather"},
                {"path": str(held_out), "format": "openai", "role": "evaluate", "category": "weather"},
            ],
            "train": 24,
            "test": 12,
            "minimum": 10,
            "group_by": "tools",
            "near_duplicates": None,
        },
        "teacher": {
            "model": {"engine": "openai", "url": url, "model": "local", "license": "Apache-2.0", "concurrency": 2},
            "max_tokens": 32,
        },
        "student": {"path": str(student), "gguf": False, "export_dtype": "float32"},
        "training": {"epochs": 2, "tokens_per_step": 512, "save_every_steps": 1, "learning_rate": 1e-3, **training},
        "evaluation": {"best": False, "latency_calls": 0, "answer_cap_ratio": 1.0},
    }
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "stillroom", "distill", str(recipe), "--out", str(out), *more]
