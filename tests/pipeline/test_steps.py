"""A step's key covers the code that its result depends on."""

from __future__ import annotations

import ast
from pathlib import Path

from stillroom import evaluation
from stillroom.pipeline.steps import MEASURING

ROOM = Path(evaluation.__file__).parent


def imported(module: str) -> set[str]:
    """Modules of `stillroom.evaluation` that a module of it imports, at its top or in a function."""
    tree = ast.parse((ROOM / f"{module}.py").read_text(encoding="utf-8"))
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.rpartition(".")[2] for name in names if name.startswith("stillroom.evaluation.")}


def test_whatever_a_measuring_module_imports_is_measuring_too():
    assert set().union(*map(imported, MEASURING)) <= set(MEASURING)
