"""Imports point one way: a module imports only from lower layers, deferred imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "stillroom"
LAYERS = {
    "errors": 0,
    "schema": 1,
    "config": 1,
    "storage": 1,
    "telemetry": 1,
    "artifacts": 2,
    "toolcalls": 2,
    "data": 3,
    "models": 3,
    "checkpoint": 3,
    "engines": 4,
    "testing": 4,
    "teacher": 5,
    "training": 6,
    "evaluation": 6,
    "pipeline": 10,
    "cli": 13,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a module stands"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("stillroom.")}
    return {room for room in found if (PACKAGE / room).exists() or (PACKAGE / f"{room}.py").exists()}


def test_every_room_has_a_layer():
    assert {room_of(path) for path in MODULES} - {"__init__", "__main__"} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for other in imported_rooms(path) - {room}:
        assert LAYERS[other] < LAYERS[room], f"{path}: {room} ({LAYERS[room]}) imports {other} ({LAYERS[other]})"


def test_the_command_line_and_every_config_start_without_torch():
    configs = [f"stillroom.{path.parent.name}.config" for path in PACKAGE.glob("*/config.py")]
    code = f"import sys, stillroom.cli, {', '.join(configs)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "boto3", "xllamacpp"} & set(done.stdout.split())
