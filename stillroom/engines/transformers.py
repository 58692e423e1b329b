"""Models in Hugging Face Transformers' layout (or GGUF), computed in this process, many answers at once.

Concurrent `generate` calls are gathered into batches by one worker thread, so callers keep to the
narrow `ChatModel` and evaluation is still fast: give `ask` as many requests at once as there are.
`latency_s` is measured when a request had the model to itself, and None in a batch.
"""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from stillroom.engines.base import Engine
from stillroom.engines.config import ModelConfig
from stillroom.engines.decoding import write_answers
from stillroom.engines.jobs import Job
from stillroom.engines.prompts import PYTHON_PROMPT, with_python_tools
from stillroom.errors import ConfigError, ModelError, ModelRefused
from stillroom.models import Loaded, encode_prompt, load, pick_precision
from stillroom.schema import Completion, GenerateParams, Message, ToolSpec, digest
from stillroom.toolcalls import may_begin_calls

ALONE_S = 0.002  # how long the first request waits for a second one
BEGINNING = 24  # tokens in which an answer shows whether it begins with words
GATHER_S = 0.05  # where there are several: how long for another, whose prompt is being made meanwhile


@dataclass
class _Item:
    job: Job
    stops: tuple[str, ...]
    future: Future[Completion]


class TransformersModel(Engine):
    """One causal language model with its tokenizer.

    Args:
        config: where it lies, and how it is computed.
        loaded: an open model (a student in training, for instance) to use in place of `config.path`.

    Raises:
        ModelError: it cannot be opened. ConfigError: there is no such chat template, or no template at all.
    """

    def __init__(self, config: ModelConfig, loaded: Loaded | None = None) -> None:
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if loaded is None:
            loaded = load(str(config.path), dtype=_dtype(config.dtype, device), chat_template=config.chat_template)
            loaded.model.to(device)
        self.loaded = loaded
        if not loaded.chat_template:
            raise ConfigError(f"{loaded.name} has no chat template.\nhelp: set `chat_template: chatml-tools`.")
        knows_tools = "tools" in loaded.chat_template
        known = "native" if knows_tools else "python"
        self.tool_format = known if config.tool_format == "auto" else config.tool_format
        if self.tool_format == "native" and not knows_tools:
            raise ConfigError(
                f"the chat template of {loaded.name} does not show tools.\n"
                "help: use `tool_format: python`, or `chat_template: chatml-tools`."
            )
        parts = {
            "weights": loaded.digest,
            "template": digest(loaded.chat_template),
            "tools": PYTHON_PROMPT if self.tool_format == "python" else "native",
            "dtype": str(loaded.model.dtype),
        }
        super().__init__(config, loaded.name, parts)
        self.digest = loaded.digest
        self._end_ids = end_ids(loaded)
        self._grammars: Any = None
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    async def generate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: GenerateParams = GenerateParams()
    ) -> Completion:
        """Answer one conversation; calls stay as text in `content`.

        Raises:
            ModelRefused: the prompt and its answer do not fit the model, or the chat template rejects it.
            ModelError: computing failed (out of memory, for instance).
        """
        job = self._job(messages, tools, params)
        future: Future[Completion] = Future()
        with self._lock:
            if self._closed:
                raise ModelError(f"{self.name} is closed.")
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=f"{self.name} worker", daemon=True)
                self._worker.start()
                atexit.register(self.close)  # a thread that still computes when the interpreter ends aborts the process
            self._queue.put(_Item(job, params.stop, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        with self._lock:
            worker, self._worker, self._closed = self._worker, None, True
        if worker is not None:
            atexit.unregister(self.close)
            self._queue.put(None)
            worker.join()

    def _job(self, messages: Sequence[Message], tools: Sequence[ToolSpec], params: GenerateParams) -> Job:
        shown = (messages, tools) if self.tool_format == "native" else (with_python_tools(messages, tools), ())
        prompt = encode_prompt(self.loaded, *shown)
        limit = getattr(self.loaded.model.config, "max_position_embeddings", None)
        if limit is not None and len(prompt) + params.max_tokens > limit:
            raise ModelRefused(
                f"{self.name} takes {limit:,} tokens; the prompt has {len(prompt):,} and the answer may have "
                f"{params.max_tokens:,}.\nhelp: shorten the prompt, or lower max_tokens."
            )
        matcher = self._grammar(tools) if params.constrain and tools else None
        stop = self._stopper(params) if params.stop or params.calls_first else None
        return Job(prompt, params.max_tokens, params.temperature, params.seed, matcher, stop)

    def _grammar(self, tools: Sequence[ToolSpec]) -> Any:
        from stillroom.engines.constrain import CallGrammars

        if self._grammars is None:
            width = self.loaded.model.get_output_embeddings().weight.shape[0]
            self._grammars = CallGrammars(self.loaded.tokenizer, width, sorted(self._end_ids))
        return self._grammars.matcher(tools)

    def _stopper(self, params: GenerateParams) -> Callable[[list[int]], bool]:
        """Says whether an answer is over: at a stop string, or where words come first and only calls are of use."""

        def stopped(written: list[int]) -> bool:
            if params.calls_first and len(written) <= BEGINNING and not may_begin_calls(self._text(written)):
                return True
            return bool(params.stop) and any(stop in self._text(written) for stop in params.stop)

        return stopped

    def _text(self, written: Sequence[int]) -> str:
        return str(self.loaded.tokenizer.decode(list(written), skip_special_tokens=True))

    def _work(self) -> None:
        """The worker thread: gather what there is, write it, until told to stop."""
        while (item := self._queue.get()) is not None:
            items, wait_s = [item], ALONE_S
            while True:
                try:
                    further = self._queue.get(timeout=wait_s)
                except queue.Empty:
                    break
                if further is None:
                    self._queue.put(None)  # stop after these
                    break
                items.append(further)
                wait_s = GATHER_S
            self._write(items, alone=len(items) == 1)

    def _write(self, items: list[_Item], *, alone: bool) -> None:
        items = [item for item in items if item.future.set_running_or_notify_cancel()]
        if not items:
            return
        by_job = {id(item.job): item for item in items}
        started = time.perf_counter()

        def finished(job: Job) -> None:
            latency_s = time.perf_counter() - started if alone else None
            item = by_job[id(job)]
            item.future.set_result(self._answer(job, item.stops, latency_s))

        try:
            write_answers(
                self.loaded.model,
                [item.job for item in items],
                self._end_ids,
                finished,
                max_batch=self.config.max_batch,
                batch_tokens=self.config.batch_tokens,
            )
        except Exception as error:
            for item in items:
                if not item.future.done():
                    item.future.set_exception(
                        error if isinstance(error, ModelError) else ModelError(f"{self.name} failed: {error}")
                    )

    def _answer(self, job: Job, stops: tuple[str, ...], latency_s: float | None) -> Completion:
        ended = job.written[-1] in self._end_ids
        text = self._text(job.written[:-1] if ended else job.written)
        text = text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
        return self._completion(
            Message("assistant", text), job.finish or "stop", len(job.prompt), len(job.written), latency_s
        )


def _dtype(wanted: str, device: str) -> Literal["float32", "bfloat16", "float16"]:
    if wanted == "auto":
        return "bfloat16" if pick_precision("auto", device).name == "bf16" else "float32"
    return cast(Literal["float32", "bfloat16", "float16"], wanted)


def end_ids(loaded: Loaded) -> frozenset[int]:
    """Tokens that end an answer: what the template ends a turn with, and what the model's own settings name."""
    from stillroom.models.prompts import end_of_turn_id

    stated = loaded.model.generation_config.eos_token_id if loaded.model.generation_config is not None else None
    listed = stated if isinstance(stated, list) else [stated]
    return frozenset({end_of_turn_id(loaded.tokenizer), *(token for token in listed if token is not None)})
