"""Write a student so that others read it as it is.

student/
├── config.json, generation_config.json, model.safetensors   Transformers, vLLM
├── tokenizer.json, tokenizer_config.json, chat_template.jinja
├── student.Q8_0.gguf                                        llama.cpp, Ollama
└── Modelfile                                                `ollama create NAME -f Modelfile`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from stillroom.models.gguf_writer import GgufType, can_write, write_gguf
from stillroom.models.prompts import end_of_turn_id
from stillroom.storage import write_atomic
from stillroom.telemetry import note


def export(
    loaded: Any,
    folder: str | Path,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    gguf: bool = True,
    gguf_type: GgufType = "Q8_0",
) -> None:
    """Write `loaded` (a `Loaded` with plain weights; adapters must be merged) into `folder`.

    Args:
        dtype: format of the weights in model.safetensors.
        gguf: write a GGUF and a Modelfile too; where the model has no GGUF layout here, a note says why not.
        gguf_type: format of the GGUF's matrices. Q8_0 is made from the fp32 weights, not from `dtype`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    loaded.tokenizer.chat_template = loaded.chat_template or None
    loaded.model.generation_config.eos_token_id = end_of_turn_id(loaded.tokenizer)
    _save_model(loaded.model, folder, getattr(torch, dtype))
    _save_tokenizer(loaded, folder)
    if not gguf:
        return
    reason = can_write(loaded)
    if reason:
        note(f"no GGUF is written for {loaded.name}: only what llama.cpp's layout is known for can be, and {reason}.")
        return
    name = f"student.{gguf_type}.gguf"
    write_gguf(loaded, folder / name, gguf_type)
    write_atomic(folder / "Modelfile", _modelfile(loaded, name))


def weights_bytes(folder: str | Path) -> int:
    """Size of the weights that a directory, or one GGUF file, holds."""
    path = Path(folder)
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _save_model(model: Any, folder: Path, dtype: torch.dtype) -> None:
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model.save_pretrained(folder, state_dict=state)
    for weights in folder.glob("*.safetensors"):
        # Written for their owner's eyes only, which a server that runs as another user cannot open.
        weights.chmod((folder / "config.json").stat().st_mode)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
    config.pop("_model_name_or_path", None)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "default":
        config["rope_theta"] = rope["rope_theta"]  # where Transformers 4, and servers built on it, look for it
        config["torch_dtype"] = config["dtype"]
    write_atomic(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_tokenizer(loaded: Any, folder: Path) -> None:
    loaded.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that Transformers 4 knows it by
    for local in ("is_local", "local_files_only", "name_or_path"):
        config.pop(local, None)
    end = end_of_turn_id(loaded.tokenizer)
    config["eos_token"] = loaded.tokenizer.convert_ids_to_tokens(end)
    config["model_max_length"] = int(getattr(loaded.model.config, "max_position_embeddings", 0)) or None
    write_atomic(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _modelfile(loaded: Any, gguf_name: str) -> str:
    """Ollama has its own template language, which cannot render tools as the student learnt to read them."""
    end = loaded.tokenizer.convert_ids_to_tokens(end_of_turn_id(loaded.tokenizer))
    lines = [f"FROM ./{gguf_name}", "PARAMETER temperature 0", f'PARAMETER stop "{end}"']
    if "<|im_start|>" in loaded.chat_template:
        turns = (
            "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
        )
        lines[1:1] = [
            "# Ollama does not use the file's own template. Put the tools into the system message, rendered as",
            "# chat_template.jinja does; llama-server --jinja, vLLM and Transformers do that by themselves.",
            f'TEMPLATE """{turns}"""',
        ]
    return "\n".join(lines) + "\n"
