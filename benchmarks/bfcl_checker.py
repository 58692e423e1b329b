"""BFCL's own checker, imported from the installed `bfcl-eval` wheel without its API clients.

Importing `ast_checker` pulls in every model handler of BFCL, and with them the clients of a dozen providers. None
of them is used for checking, so modules that only they need are given an empty stand-in for the import.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

_NOT_NEEDED = (
    # Handlers and with them every API client; parsers of Java and JavaScript (tree_sitter); multi-turn and agentic
    # checkers; and eval_config, which makes folders inside the installed package.
    "bfcl_eval.constants.model_config",
    "bfcl_eval.constants.eval_config",
    "bfcl_eval.eval_checker.agentic_eval.agentic_checker",
    "bfcl_eval.eval_checker.ast_eval.type_convertor.java_type_converter",
    "bfcl_eval.eval_checker.ast_eval.type_convertor.js_type_converter",
    "bfcl_eval.eval_checker.eval_runner_helper",
    "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker",
    "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils",
    "bfcl_eval.model_handler.base_handler",
    "bfcl_eval.model_handler.utils",
    "dotenv",
    "filelock",
    "tqdm",
)
# Names under which BFCL looks up whether a model takes dots in function names.
_MODELS = {"dots": SimpleNamespace(underscore_to_dot=False), "underscores": SimpleNamespace(underscore_to_dot=True)}

Call = tuple[str, dict[str, Any]]


class _StandIn(ModuleType):
    """A module that has any name one imports from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@dataclass(frozen=True)
class Theirs:
    """BFCL's verdicts: True, False, or the name of the exception that it raised."""

    ast_checker: Any
    relevance: Any
    language: Any

    def check(
        self, tools: Any, calls: Sequence[Call], expected: Any, category: str, *, underscore_names: bool = False
    ) -> bool | str:
        model = "underscores" if underscore_names else "dots"
        answer = [{name: arguments} for name, arguments in calls]
        try:
            return bool(self.ast_checker(tools, answer, expected, self.language, category, model)["valid"])
        except Exception as error:
            return type(error).__name__

    def check_relevance(self, calls: Sequence[Call] | None, category: str) -> bool:
        """`calls` None: the answer could not be decoded."""
        entry = self.relevance(_Decoded(calls), "0", "", {}, "dots", category)
        return bool(entry["valid"])


class _Decoded:
    """What BFCL asks for the decoded answer."""

    def __init__(self, calls: Sequence[Call] | None) -> None:
        self.calls = calls

    def decode_ast(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
        if self.calls is None:
            raise ValueError("not a call")
        return [{name: arguments} for name, arguments in self.calls]


def load_theirs() -> Theirs:
    """Import the checker. Raises ModuleNotFoundError where `bfcl-eval` is not installed."""
    stand_ins = {name: _StandIn(name) for name in _NOT_NEEDED}
    stand_ins["bfcl_eval.constants.model_config"].__dict__["MODEL_CONFIG_MAPPING"] = _MODELS
    saved = {name: sys.modules[name] for name in _NOT_NEEDED if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        runner = importlib.import_module("bfcl_eval.eval_checker.eval_runner")
        enums = importlib.import_module("bfcl_eval.constants.enums")
    finally:
        for name in _NOT_NEEDED:
            del sys.modules[name]
        sys.modules.update(saved)
    return Theirs(runner.ast_checker, runner._evaluate_single_relevance_entry, enums.Language.PYTHON)


def data_folder() -> Path:
    """Where the installed wheel keeps questions and ground truths. Found without importing the package."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("bfcl-eval is not installed; help: pip install --no-deps bfcl-eval==2026.3.23")
    return Path(next(iter(spec.submodule_search_locations)), "data")


def entries(category: str) -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """(id, tools as BFCL writes them, ground truth) of a category; the ground truth of (ir)relevance is empty."""
    folder, name = data_folder(), f"BFCL_v4_{category}.json"
    truths: dict[str, Any] = {}
    if (folder / "possible_answer" / name).exists():
        truths = {item["id"]: item["ground_truth"] for item in _lines(folder / "possible_answer" / name)}
    for item in _lines(folder / name):
        yield item["id"], item["function"], truths.get(item["id"], [])


def python_calls(text: str) -> list[Call]:
    """Calls of literals as Python itself reads them, tuples kept; an independent reference for small texts."""
    body = ast.parse(text, mode="eval").body
    assert isinstance(body, ast.List)
    calls = [node for node in body.elts if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}) for call in calls]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)
