"""Weights, tokenizer and chat template: load them, turn conversations into token ids, export a student.

loaded = load("model.gguf", chat_template="chatml-tools")
ids = encode_prompt(loaded, messages, tools)
student = prune(loaded, PruneConfig(layers=6), sequences)
export(student, "student/")         # Transformers, vLLM, llama.cpp and Ollama read it as it is
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.models.config import PruneConfig as PruneConfig
    from stillroom.models.exporting import export as export
    from stillroom.models.exporting import weights_bytes as weights_bytes
    from stillroom.models.loading import Loaded as Loaded
    from stillroom.models.loading import load as load
    from stillroom.models.loading import load_tokenizer as load_tokenizer
    from stillroom.models.precision import Precision as Precision
    from stillroom.models.precision import pick_precision as pick_precision
    from stillroom.models.prompts import chat_template_text as chat_template_text
    from stillroom.models.prompts import encode_prompt as encode_prompt
    from stillroom.models.prompts import encode_target as encode_target
    from stillroom.models.prompts import target_text as target_text
    from stillroom.models.pruning import prune as prune
    from stillroom.models.pruning import restrict as restrict
    from stillroom.models.spectrum_view import write_spectrum as write_spectrum
    from stillroom.models.vocabulary import token_map as token_map

_HOMES = {
    "Loaded": "loading",
    "Precision": "precision",
    "PruneConfig": "config",
    "chat_template_text": "prompts",
    "encode_prompt": "prompts",
    "encode_target": "prompts",
    "export": "exporting",
    "load": "loading",
    "load_tokenizer": "loading",
    "pick_precision": "precision",
    "prune": "pruning",
    "restrict": "pruning",
    "target_text": "prompts",
    "token_map": "vocabulary",
    "weights_bytes": "exporting",
    "write_spectrum": "spectrum_view",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
