"""Open a causal language model's weights, tokenizer and chat template from where they lie.

A source is a directory in Transformers' layout, a `.gguf` file, or a hub id. Weights are always read
from safetensors or GGUF, never from pickles. Nothing is downloaded unless the source is a hub id.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from stillroom.errors import ModelError
from stillroom.models.prompts import chat_template_text

DTypeName = Literal["float32", "bfloat16", "float16"]


@dataclass
class Loaded:
    """A model ready to compute.

    Attributes:
        model: a Transformers causal language model, in evaluation mode.
        tokenizer: its tokenizer, carrying `chat_template`.
        name: what to call it in reports: the file's or directory's name, or the hub id.
        digest: SHA-256 over its weight files; equal digests mean equal weights.
        chat_template: Jinja text that turns messages and tools into a prompt.
        source: the GGUF file or directory that it was read from.
    """

    model: Any
    tokenizer: Any
    name: str
    digest: str
    chat_template: str
    source: Path


def load(source: str | Path, *, dtype: DTypeName = "float32", chat_template: str | None = None) -> Loaded:
    """Open the model at `source`.

    Args:
        source: a directory, a path ending in `.gguf`, or a hub id such as `org/model`.
        dtype: format of the weights in memory; GGUF blocks are unpacked to it.
        chat_template: name of a template that we ship (`chatml-tools`), path of a `.jinja` file, or its
            text; None keeps the model's own.

    Raises:
        ModelError: nothing there, or it cannot be read as a causal language model.
        ConfigError: there is no such chat template.
    """
    name, path = str(source), Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}.\nhelp: check the path; it is taken from the current directory.")
        name, arguments, weights = path.stem, {"gguf_file": path.name}, [path]
        folder = path.parent
    else:
        folder = path if path.is_dir() else _download(name)
        name, arguments = (path.resolve().name if path.is_dir() else name), {"use_safetensors": True}
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise ModelError(f"no *.safetensors in {folder}.\nhelp: save the model with `save_pretrained(folder)`.")
    model, tokenizer = _read(folder, arguments, dtype, source)
    template = chat_template_text(chat_template) if chat_template else (tokenizer.chat_template or "")
    tokenizer.chat_template = template or None
    origin = path if path.suffix == ".gguf" else folder
    return Loaded(model, tokenizer, name, _digest(weights), template, origin)


def load_tokenizer(source: str | Path, *, chat_template: str | None = None) -> Any:
    """The tokenizer alone, for counting: as `load` would give it, without reading the weights.

    Raises:
        ModelError, ConfigError: as `load`.
    """
    from transformers import AutoTokenizer

    _quiet()
    path = Path(source).expanduser()
    folder, arguments = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source} has no tokenizer that can be read: {error}") from error
    if chat_template:
        tokenizer.chat_template = chat_template_text(chat_template)
    return tokenizer


def _read(folder: Path, arguments: dict[str, Any], dtype: DTypeName, source: str | Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **arguments)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{source} cannot be read as a causal language model: {error}\n"
            "help: give a directory with config.json, tokenizer and *.safetensors, or a .gguf file."
        ) from error
    _unmark_quantised(model)
    model.config.architectures = [type(model).__name__]  # absent after GGUF; some servers refuse a model without it
    return model.eval(), tokenizer


def _unmark_quantised(model: Any) -> None:
    """Say that GGUF weights were unpacked: Transformers refuses to save a model that still says it is quantised."""
    for owner, names in ((model.config, ("quantization_config",)), (model, ("hf_quantizer", "quantization_method"))):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    if hasattr(model, "is_quantized"):
        model.is_quantized = False


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{hub_id!r} is neither a directory here nor a model that the hub gave: {error}\n"
            "help: check the path or the id, and the network if it should be downloaded."
        ) from error


def _digest(files: list[Path]) -> str:
    """SHA-256 of one file as `sha256sum` gives it; of several, over their names and digests."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{value}  {path.name}\n" for value, path in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _quiet() -> None:
    """Transformers draws a bar per file and per tensor on stderr, where our own progress is."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
