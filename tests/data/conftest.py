"""Fixtures that write small data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.data.records import answer_to

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file: bytes as they are, records as JSON lines."""

    def write(name: str, content: bytes | Iterable[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = b"".join(json.dumps(record).encode() + b"\n" for record in content)
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def write_bfcl(write: Write) -> Write:
    """Write BFCL questions with their answers beside them."""

    def write_bfcl(name: str, questions: list[dict[str, Any]]) -> Path:
        write(f"possible_answer/{name}", [answer_to(question) for question in questions])
        return write(name, questions)

    return write_bfcl
