"""`open_model`: from a config to something that answers. Each engine is imported only when it is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

from stillroom.config import resolve_path
from stillroom.engines.base import Engine
from stillroom.engines.config import ModelConfig
from stillroom.errors import ModelError

# engine -> module, class, what to install when an import fails
_ENGINES = {
    "transformers": ("stillroom.engines.transformers", "TransformersModel", "train"),
    "llama.cpp": ("stillroom.engines.llamacpp", "LlamaCppModel", "llamacpp"),
    "openai": ("stillroom.engines.openai", "OpenAIModel", None),
    "bedrock": ("stillroom.engines.bedrock", "BedrockModel", "bedrock"),
    "recorded": ("stillroom.engines.recorded", "RecordedModel", None),
}


_REMOTE = ("openai", "bedrock")


def obstacle(config: ModelConfig) -> str:
    """Why a model cannot be opened, as far as that shows without loading or asking it; empty where nothing shows.

    A missing file, key or package shows; that an endpoint is down, or a hub id unknown, does not.
    """
    if config.engine in _REMOTE:
        try:
            open_model(config).close()
        except ModelError as error:
            return str(error)
        return ""
    path = str(config.path)
    is_file = config.engine != "transformers" or path.endswith(".gguf") or Path(path).expanduser().is_absolute()
    return f"there is nothing at {path}" if is_file and not resolve_path(path).exists() else ""


def open_model(config: ModelConfig) -> Engine:
    """A model that answers `generate`; `close()` it, or use it in a `with` block.

    Raises:
        ModelError: the engine is not installed, or the model cannot be opened; says what to do.
    """
    module, name, extra = _ENGINES[config.engine]
    try:
        opener = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("stillroom"):
            raise
        install = f"pip install 'stillroom[{extra}]'" if extra else f"pip install {error.name}"
        raise ModelError(
            f"the engine {config.engine!r} needs the package {error.name!r}, which is not installed.\nhelp: {install}"
        ) from error
    engine: Engine = opener(config)
    return engine
