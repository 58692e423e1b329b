"""How Llama-like models are laid out in GGUF, and the same in Transformers: names, settings, tokenizers.

One table serves reading and writing. Models of other architectures, with rope scaling or with a
SentencePiece vocabulary are not described here: Transformers reads them, and they are not exported to GGUF.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from stillroom.errors import ModelError
from stillroom.models.gguf_file import GgufFile

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Transformers' model types and what GGUF calls them."""

TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]},
    "qwen2": _split(_QWEN2),
    "llama-bpe": _split(_LLAMA3),
}
"""What llama.cpp's pre-tokenizer ids mean, in the form of a tokenizer.json (llama-vocab.cpp, `load`)."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of token, as ggml numbers them."""


def gguf_name(name: str) -> str | None:
    """GGUF's name of a Transformers parameter; None where there is none."""
    if name in TOP:
        return TOP[name]
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 5:
        return None
    stem = LAYER.get(".".join(parts[3:-1]))
    return f"blk.{parts[2]}.{stem}.{parts[-1]}" if stem else None


def permute(rows: np.ndarray[Any, Any], heads: int, *, undo: bool = False) -> np.ndarray[Any, Any]:
    """Rows of a Llama query or key projection from halves (Transformers) to pairs (GGUF), or back."""
    inner = (2, -1) if not undo else (-1, 2)
    return rows.reshape(heads, *inner, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def permuted_heads(name: str, config: Any) -> int | None:
    """By how many heads a parameter is permuted in GGUF: only Llama's queries and keys are."""
    if ARCHITECTURES[config.model_type] != "llama":
        return None
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])


def model_config(file: GgufFile) -> Any:
    """The Transformers config of a GGUF that this table describes wholly; None for any other.

    Dimensions come from the metadata; whether embeddings are tied, from whether there is an output tensor.
    """
    from transformers import AutoConfig

    data, arch = file.metadata, file.metadata.get("general.architecture")

    def get(key: str, default: Any = None) -> Any:
        return data.get(f"{arch}.{key}", default)

    plain = (
        not any(".rope.scaling." in key or "expert" in key for key in data) and "rope_freqs.weight" not in file.tensors
    )
    if arch not in ARCHITECTURES.values() or not plain or get("attention.sliding_window"):
        return None
    missing = [
        key for key in ("embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon") if not get(key)
    ]
    if missing:
        raise ModelError(f"{file.path} lacks {arch}.{missing[0]}.\nhelp: it is damaged or unfinished; fetch it again.")
    heads = get("attention.head_count")
    config = AutoConfig.for_model(
        arch,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length") or get("rope.dimension_count") or get("embedding_length") // heads,
        max_position_embeddings=get("context_length"),
        rms_norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": _shortest(get("rope.freq_base", 10000.0))},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=data.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=data.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=data.get("tokenizer.ggml.padding_token_id"),
    )
    if arch == "llama" and any(name.endswith("attn_q.bias") for name in file.tensors):
        config.attention_bias = True
    return config


def tokenizer(file: GgufFile) -> Any:
    """The tokenizer of a GGUF with a byte-level BPE vocabulary whose splitting we know; None for any other."""
    data = file.metadata
    pre = {"default": "gpt-2"}.get(data.get("tokenizer.ggml.pre", "default"), data.get("tokenizer.ggml.pre"))
    if (
        data.get("tokenizer.ggml.model") != "gpt2"
        or pre not in PRE_TOKENIZERS
        or data.get("tokenizer.ggml.add_bos_token")
    ):
        return None
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
    text: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "decoder": _GPT2,
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in data.get("tokenizer.ggml.merges", ())],
            "ignore_merges": pre == "llama-bpe",
        },
    }
    backend = Tokenizer.from_str(json.dumps(text))
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [tokens[index] for index, found in enumerate(kinds) if found == kind]
        added = [AddedToken(token, normalized=False, special=special) for token in chosen]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: data.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=data.get("tokenizer.chat_template"),
        **{f"{name}_token": tokens[index] for name, index in ids.items() if index is not None},
    )


def pre_tokenizer_id(backend: Any) -> str | None:
    """llama.cpp's id of a tokenizer's way of splitting, compared as a whole; None where it has no name there."""
    found = json.loads(backend.to_str())
    if found["model"]["type"] != "BPE" or not found["model"]["merges"]:
        return None
    return next((name for name, wanted in PRE_TOKENIZERS.items() if _same(found["pre_tokenizer"], wanted)), None)


def _same(found: Any, wanted: Any) -> bool:
    """Equal but for `trim_offsets`, which changes offsets, not tokens."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = (found.keys() | wanted.keys()) - {"trim_offsets"}
        return all(_same(found.get(key), wanted.get(key)) for key in keys)
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(_same, found, wanted))
    return bool(found == wanted)


def _shortest(value: float) -> float:
    """The shortest decimal that a float32 reads back as: 1e-05, where 9.999999747378752e-06 was stored."""
    return float(str(np.float32(value)))
