"""Models in GGUF through llama.cpp, inside this process (xllamacpp).

The prompt is rendered by us (templates.py) and sent as text, so that every engine shows a model the
same words; llama.cpp tokenizes, computes and samples. Greedy answers are deterministic with one
request at a time: several at once share batches, whose sums may round differently.
Threads: requests run on worker threads, as many as `concurrency`; `latency_s` is measured there and
does not include waiting for a free one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp

from stillroom.engines.base import Engine
from stillroom.engines.config import ModelConfig
from stillroom.engines.gguf import read_metadata, special_token
from stillroom.engines.prompts import PYTHON_PROMPT, with_python_tools
from stillroom.engines.templates import ChatTemplate
from stillroom.errors import ModelError, ModelRefused
from stillroom.schema import Completion, GenerateParams, Message, ToolSpec, digest

HASH_BYTES = 2**22


class LlamaCppModel(Engine):
    """One GGUF, loaded once.

    Raises:
        ModelError: the file is missing, is no GGUF, has no chat template, or llama.cpp cannot load it.
    """

    def __init__(self, config: ModelConfig) -> None:
        path = Path(config.path or "")
        metadata = read_metadata(path)
        self.template = _chat_template(config, metadata)
        known = "native" if self.template.knows_tools else "python"
        self.tool_format = known if config.tool_format == "auto" else config.tool_format
        if self.tool_format == "native" and not self.template.knows_tools:
            raise ModelError(
                f"the chat template of {path.name} does not mention tools, so `tool_format: native` would hide them.\n"
                "help: use `tool_format: python`, or give a `chat_template` that renders tools."
            )
        self.digest = file_digest(path)
        parts = {
            "weights": self.digest,
            "template": digest(self.template.source),
            "tools": PYTHON_PROMPT if self.tool_format == "python" else "native",
            "context": config.context,
        }
        super().__init__(config, str(metadata.get("general.name") or path.stem), parts)
        self._bos = special_token(metadata, "bos") if _adds_bos(metadata) else ""
        self._server: Any = _start(config, path, self.concurrency)
        self._pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="llama.cpp")

    async def generate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: GenerateParams = GenerateParams()
    ) -> Completion:
        """Answer one conversation; calls stay as text in `content`.

        Raises:
            ModelRefused: the prompt does not fit `context`, or the template rejects the conversation.
            ModelError: llama.cpp failed.
        """
        if self._server is None:
            raise ModelError(f"{self.name} is closed.")
        body = self._body(messages, tools, params)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._complete, body)

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> str:
        """The text that the model is given."""
        if self.tool_format == "python":
            messages, tools = with_python_tools(messages, tools), ()
        return self.template.render(messages, tools).removeprefix(self._bos)  # llama.cpp writes it itself

    def close(self) -> None:
        pool, self._server = getattr(self, "_pool", None), None
        if pool is not None:
            pool.shutdown(wait=True)

    def _body(self, messages: Sequence[Message], tools: Sequence[ToolSpec], params: GenerateParams) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": self.prompt(messages, tools),
            "temperature": params.temperature,
            "seed": params.seed,
            "max_tokens": params.max_tokens,
            "stop": list(params.stop),
            # Tokens kept from the last prompt were computed in other batches and round differently.
            "cache_prompt": False,
        }
        if params.constrain and tools:
            from stillroom.toolcalls import grammar

            body["grammar"] = grammar(tools, "python")
        return body

    def _complete(self, body: dict[str, Any]) -> Completion:
        server = self._server
        if server is None:
            raise ModelError(f"{self.name} was closed while requests were waiting.")
        started = time.perf_counter()
        try:
            answer = server.handle_completions(body)
        except RuntimeError as error:
            raise ModelError(f"llama.cpp failed on {self.name}: {error}.") from error
        latency_s = time.perf_counter() - started
        if "error" in answer:
            raise _refusal(self.name, answer["error"])
        choice, usage = answer["choices"][0], answer["usage"]
        return self._completion(
            Message("assistant", choice["text"]),
            "length" if choice["finish_reason"] == "length" else "stop",
            usage["prompt_tokens"],
            usage["completion_tokens"],
            latency_s,
        )


def _chat_template(config: ModelConfig, metadata: dict[str, Any]) -> ChatTemplate:
    if config.chat_template is not None:
        from stillroom.models import chat_template_text

        source, where = chat_template_text(config.chat_template), "chat template given"
    else:
        source, where = str(metadata.get("tokenizer.chat_template") or ""), f"chat template of {config.path}"
    if not source:
        raise ModelError(f"{config.path} carries no chat template.\nhelp: give one as `chat_template: it.jinja`.")
    return ChatTemplate(source, bos=special_token(metadata, "bos"), eos=special_token(metadata, "eos"), where=where)


def _adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether llama.cpp puts the BOS token before the text by itself, by its own rules where the file does not say."""
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    before = str(metadata.get("tokenizer.ggml.pre", ""))
    return metadata.get("tokenizer.ggml.model") in ("llama", "gemma4") or before.startswith(("llama", "tekken"))


def _start(config: ModelConfig, path: Path, slots: int) -> Any:
    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_parallel = slots
    options.n_ctx = config.context * slots
    options.cpuparams.n_threads = config.threads or len(os.sched_getaffinity(0))
    options.warmup = False
    options.verbosity = 0
    options.cache_ram_mib = 0
    # The library also listens on a loopback port; a key nobody knows keeps other users of the machine out.
    options.api_keys = [secrets.token_hex(16)]
    try:
        return xllamacpp.Server(options)
    except RuntimeError as error:
        raise ModelError(
            f"llama.cpp cannot load {path}: {error}.\nhelp: check that the file is complete and fits into memory."
        ) from error


def _refusal(name: str, error: Any) -> ModelError:
    message = error.get("message", error) if isinstance(error, dict) else error
    if isinstance(error, dict) and error.get("type") == "exceed_context_size_error":
        return ModelRefused(f"{name}: {message}.\nhelp: raise `context` in the model's config, or shorten the prompt.")
    return ModelRefused(f"{name}: llama.cpp refused the request: {message}.")


_digests: dict[tuple[str, int, int], str] = {}
_digests_lock = threading.Lock()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file as 64 hex digits; remembered while size and time of change stay the same."""
    status = os.stat(path)
    known = (str(Path(path).resolve()), status.st_size, status.st_mtime_ns)
    with _digests_lock:
        if known not in _digests:
            total = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(HASH_BYTES):
                    total.update(block)
            _digests[known] = total.hexdigest()
        return _digests[known]
