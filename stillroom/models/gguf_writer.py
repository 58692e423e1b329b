"""Write a model as one GGUF file for llama.cpp and Ollama, through the official `gguf` library.

Where the model was read from a GGUF, that file's tokenizer is copied key by key; otherwise it is described
from tokenizer.json, which works for the byte-level vocabularies whose splitting llama.cpp has by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from stillroom.errors import ModelError
from stillroom.models import gguf_layout
from stillroom.models.gguf_file import ARRAY, GgufFile, read_gguf

GgufType = Literal["F32", "F16", "BF16", "Q8_0"]


def write_gguf(loaded: Any, path: str | Path, kind: GgufType = "Q8_0") -> None:
    """Write `loaded` (a `Loaded`) to `path`; vectors stay fp32, matrices become `kind`.

    Raises:
        ModelError: the architecture, its rope scaling or its tokenizer has no place in `gguf_layout`.
    """
    from gguf import GGUFWriter

    config = loaded.model.config
    names = _names(loaded.model)
    writer = GGUFWriter(str(path), gguf_layout.ARCHITECTURES[config.model_type])
    try:
        _add_settings(writer, loaded, kind)
        _add_tokenizer(writer, loaded)
        for name, theirs in names.items():
            _add_tensor(writer, theirs, _values(loaded.model.get_parameter(name), name, config), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def can_write(loaded: Any) -> str | None:
    """Why a model cannot be written as GGUF; None if it can."""
    config = loaded.model.config
    if config.model_type not in gguf_layout.ARCHITECTURES:
        return f"models of type {config.model_type!r} are not; {', '.join(gguf_layout.ARCHITECTURES)} are"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        return f"its rope scaling ({config.rope_parameters['rope_type']}) is not"
    unknown = [name for name, _ in loaded.model.named_parameters() if gguf_layout.gguf_name(name) is None]
    if unknown:
        return f"its parameter {unknown[0]} is not"
    if _source_file(loaded) is None and gguf_layout.pre_tokenizer_id(loaded.tokenizer.backend_tokenizer) is None:
        return f"its tokenizer's splitting is not; {', '.join(gguf_layout.PRE_TOKENIZERS)} are"
    return None


def _names(model: Any) -> dict[str, str]:
    names = {name: gguf_layout.gguf_name(name) for name, _ in model.named_parameters()}
    unknown = [name for name, theirs in names.items() if theirs is None]
    if model.config.model_type not in gguf_layout.ARCHITECTURES or unknown:
        raise ModelError(f"a {model.config.model_type} model with parameter {unknown[:1]} has no GGUF layout here.")
    return {name: theirs for name, theirs in names.items() if theirs is not None}


def _values(parameter: torch.Tensor, name: str, config: Any) -> np.ndarray[Any, Any]:
    values = parameter.detach().float().cpu().numpy()
    heads = gguf_layout.permuted_heads(name, config)
    return np.ascontiguousarray(gguf_layout.permute(values, heads)) if heads else values


def _add_tensor(writer: Any, name: str, values: np.ndarray[Any, Any], kind: GgufType) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize

    wanted = GGMLQuantizationType[kind]
    block, _ = GGML_QUANT_SIZES[wanted]
    if values.ndim < 2:
        wanted = GGMLQuantizationType.F32
    elif values.shape[-1] % block:
        wanted = GGMLQuantizationType.F16  # rows that blocks do not divide
    writer.add_tensor(name, quantize(values, wanted), raw_dtype=wanted)


def _add_settings(writer: Any, loaded: Any, kind: GgufType) -> None:
    from gguf import LlamaFileType

    config = loaded.model.config
    file_type = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}[kind]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(loaded.name)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, loaded: Any) -> None:
    source = _source_file(loaded)
    if source is not None:
        _copy_tokenizer(writer, source)
    else:
        _describe_tokenizer(writer, loaded.tokenizer, loaded.model.config.vocab_size)
    if loaded.chat_template:
        writer.add_chat_template(loaded.chat_template)


def _source_file(loaded: Any) -> GgufFile | None:
    return read_gguf(loaded.source) if loaded.source and Path(loaded.source).is_file() else None


def _copy_tokenizer(writer: Any, source: GgufFile) -> None:
    from gguf import GGUFValueType

    for key, value in source.metadata.items():
        if key.startswith("tokenizer.ggml."):
            kind, items = source.types[key]
            sub_type = GGUFValueType(items) if kind == ARRAY else None
            writer.add_key_value(key, value, GGUFValueType(kind), sub_type)


def _describe_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    pre = gguf_layout.pre_tokenizer_id(tokenizer.backend_tokenizer)
    if pre is None:
        raise ModelError(
            f"the tokenizer's splitting has no name in llama.cpp; {', '.join(gguf_layout.PRE_TOKENIZERS)} have."
        )
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [gguf_layout.UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, gguf_layout.NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index] = added.content
        kinds[index] = gguf_layout.CONTROL if added.special else gguf_layout.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_add_bos_token(False)
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
