"""Open a causal language model's weights, tokenizer and chat template from where they lie.

A source is a directory in Transformers' layout, a `.gguf` file, or a hub id. Weights are always read
from safetensors or GGUF, never from pickles. Nothing is downloaded unless the source is a hub id.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from stillroom.errors import ModelError
from stillroom.models import gguf_layout
from stillroom.models.gguf_file import GgufFile, read_gguf
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
        source: the GGUF file or directory that it was read from; None if its vocabulary was made here.
    """

    model: Any
    tokenizer: Any
    name: str
    digest: str
    chat_template: str
    source: Path | None


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
    place, name = _locate(source)
    weights = weight_files(place)
    file = read_gguf(place) if place.is_file() else None
    tokenizer = _read_tokenizer(place, file, chat_template)
    return Loaded(
        _read_model(place, file, dtype), tokenizer, name, weights_digest(weights), tokenizer.chat_template or "", place
    )


def load_tokenizer(source: str | Path, *, chat_template: str | None = None) -> Any:
    """The tokenizer alone, for counting: as `load` would give it, without reading the weights.

    Raises:
        ModelError, ConfigError: as `load`.
    """
    place, _ = _locate(source)
    return _read_tokenizer(place, read_gguf(place) if place.is_file() else None, chat_template)


def weight_files(source: str | Path) -> list[Path]:
    """The files that hold a model's weights: one GGUF, or the safetensors of a directory.

    Raises:
        ModelError: there are none.
    """
    place, _ = _locate(source)
    weights = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"no *.safetensors in {place}.\nhelp: save the model with `save_pretrained(folder)`.")
    return weights


def _locate(source: str | Path) -> tuple[Path, str]:
    """The GGUF file or directory meant, and its name."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}.\nhelp: check the path; it is taken from the current directory.")
        return path, path.stem
    return (path, path.resolve().name) if path.is_dir() else (_download(str(source)), str(source))


def _read_tokenizer(place: Path, file: GgufFile | None, chat_template: str | None) -> Any:
    from transformers import AutoTokenizer

    with _reading(place):
        tokenizer = gguf_layout.tokenizer(file) if file else None
        if tokenizer is None:
            named = {"gguf_file": place.name} if file else {}
            tokenizer = AutoTokenizer.from_pretrained(place.parent if file else place, **named)
    if chat_template:
        tokenizer.chat_template = chat_template_text(chat_template)
    return tokenizer


def _read_model(place: Path, file: GgufFile | None, dtype: DTypeName) -> Any:
    from transformers import AutoModelForCausalLM

    with _reading(place):
        model = _read_gguf_model(file, getattr(torch, dtype)) if file else None
        if model is None:
            named: dict[str, Any] = {"gguf_file": place.name} if file else {"use_safetensors": True}
            folder = place.parent if file else place
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **named)
    _unmark_quantised(model)
    model.config.architectures = [type(model).__name__]  # absent after GGUF; some servers refuse a model without it
    return model.eval()


def _read_gguf_model(file: GgufFile, dtype: torch.dtype) -> Any:
    """The model of a GGUF that `gguf_layout` describes wholly; None for any other."""
    from transformers import AutoModelForCausalLM

    config = gguf_layout.model_config(file)
    if config is None:
        return None
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    names = {name: gguf_layout.gguf_name(name) for name, _ in shapes.named_parameters()}
    if set(names.values()) != set(file.tensors):
        return None
    state = {}
    for name, theirs in names.items():
        values, heads = file.tensor(str(theirs)), gguf_layout.permuted_heads(name, config)
        values = np.ascontiguousarray(gguf_layout.permute(values, heads, undo=True)) if heads else values
        state[name] = torch.from_numpy(values).to(dtype)
    return type(shapes).from_pretrained(None, config=config, state_dict=state, dtype=dtype)


@contextlib.contextmanager
def _reading(place: Path) -> Iterator[None]:
    _quiet()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{place} cannot be read as a causal language model: {error}\n"
            "help: give a directory with config.json, tokenizer and *.safetensors, or a .gguf file."
        ) from error


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{hub_id!r} is neither a directory here nor a model that the hub gave: {error}\n"
            "help: check the path or the id, and the network if it should be downloaded."
        ) from error


def weights_digest(files: list[Path]) -> str:
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
