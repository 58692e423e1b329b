"""Recipes: YAML plus `--set key=value` into frozen pydantic objects.

Promise: an unknown or mistyped key fails, with the nearest valid name; a wrong value fails with its
path and what is allowed. Nothing is guessed, and nothing that a run discovers is written back.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from stillroom.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)


def load_config(schema: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file into `schema`, with `a.b=value` overrides (values are YAML too) applied on top.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit the schema; names the key.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"recipe {path} does not exist.{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path} must be a mapping of settings, but is {type(data).__name__}.")
    for override in overrides:
        _apply(data, override)
    return build_config(schema, data, str(path))


def build_config(schema: type[Config], data: dict[str, Any], where: str) -> Config:
    """Validate plain values against `schema`; `where` names their origin in errors."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(schema, problem, where) for problem in error.errors())) from None


def resolve_path(path: str, relative_to: str | Path = ".") -> Path:
    """A path as a recipe writes it: `package:NAME/file`, `~/file`, absolute, or relative to the working directory.

    `package:` finds a file that an installed package carries, without importing the package.

    Raises:
        ConfigError: the package is not installed.
    """
    if not path.startswith("package:"):
        return Path(relative_to, Path(path).expanduser())
    name, _, inside = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{path!r} needs the package {name!r}, which is not installed.\n"
            f"help: pip install --no-deps {name.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations)), inside)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes KEY=VALUE, such as training.epochs=3, but was given {override!r}.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is not a group of settings.")
    data[leaf] = parsed


def _explain(schema: type[BaseModel], problem: Any, where: str) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, unknown = problem["loc"]
        names = list(_fields_at(schema, parents))
        near = difflib.get_close_matches(str(unknown), names, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(names)}"
        return f"{where}: unknown setting {location!r}; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {location!r} is missing"
    return f"{where}: {location!r}: {problem['msg']} (given: {problem['input']!r:.80})"


def _fields_at(schema: Any, parents: Sequence[Any]) -> dict[str, Any]:
    """Field names of the model that lies at `parents`, looking through optionals, lists and unions."""
    for part in parents:
        field = getattr(schema, "model_fields", {}).get(part)
        schema = _model_in(field.annotation) if field is not None else _model_in(schema)
    return dict(getattr(schema, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner)) is not None), None)
