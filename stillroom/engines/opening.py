"""`open_model`: from a config to something that answers. Each engine is imported only when it is asked for."""

from __future__ import annotations

import importlib
import re
from typing import Any

from stillroom.config import resolve_path
from stillroom.engines.base import Engine
from stillroom.engines.config import ModelConfig
from stillroom.errors import ConfigError, ModelError

# engine -> module, class, what to install when an import fails
_ENGINES = {
    "transformers": ("stillroom.engines.transformers", "TransformersModel", "train"),
    "llama.cpp": ("stillroom.engines.llamacpp", "LlamaCppModel", "llamacpp"),
    "openai": ("stillroom.engines.openai", "OpenAIModel", None),
    "bedrock": ("stillroom.engines.bedrock", "BedrockModel", "bedrock"),
    "recorded": ("stillroom.engines.recorded", "RecordedModel", None),
}
_REMOTE = ("openai", "bedrock")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def obstacle(config: ModelConfig) -> str:
    """Why a model cannot be opened, and what to do, as far as that shows without loading or asking it; else "".

    A missing file, key or package shows; that an endpoint is down, or a hub id unknown, does not.
    """
    try:
        opener = _opener(config)
        if config.engine in _REMOTE:
            opener(config).close()
        else:
            _find(config)
    except (ModelError, ConfigError) as error:
        return str(error)
    return ""


def open_model(config: ModelConfig) -> Engine:
    """A model that answers `generate`; `close()` it, or use it in a `with` block.

    Raises:
        ModelError: the engine is not installed, or the model cannot be opened; says what to do.
    """
    engine: Engine = _opener(config)(config)
    return engine


def _opener(config: ModelConfig) -> Any:
    """The class of the engine. Raises ModelError where a package that it needs is not installed."""
    module, name, extra = _ENGINES[config.engine]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("stillroom"):
            raise
        install = f"pip install 'stillroom[{extra}]'" if extra else f"pip install {error.name}"
        raise ModelError(
            f"the engine {config.engine!r} needs the package {error.name!r}, which is not installed.\nhelp: {install}"
        ) from error


def _find(config: ModelConfig) -> None:
    """Return where a local model's path leads somewhere, or may be a hub id."""
    path = str(config.path)
    if resolve_path(path).exists():
        return
    if config.engine == "transformers" and not path.endswith(".gguf") and _HUB_ID.fullmatch(path):
        return
    raise ModelError(
        f"there is nothing at {path}.\n"
        "help: check `path`; where it is relative, it is taken from the current directory."
    )
