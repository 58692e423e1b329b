"""A teacher's answers from its invocation logs: no model, no network, the same answer every time.

Reads a file, or every `.json`, `.jsonl` and either with `.gz` below a folder: one `ModelInvocationLog`
record a line. An answer is found by the prompt's digest (`schema.prompt_digest`): the record states it as
`requestMetadata.promptSha256`, and then need not hold the prompt; or it holds the whole Converse
request, from which the digest is computed.

Promise: equal recordings give equal answers. A record that cannot be used is counted and named once,
and the others go on.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom import telemetry
from stillroom.engines.base import Engine
from stillroom.engines.bedrock_wire import read_request, read_response
from stillroom.engines.config import ModelConfig
from stillroom.engines.names import SafeNames
from stillroom.errors import ModelError, NotRecorded
from stillroom.schema import Completion, GenerateParams, Message, ToolSpec, digest, prompt_digest, to_dict

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
MANIFEST = "recording.json"
MAX_LINE_BYTES = 32 * 2**20
PROMPT_KEY, EXAMPLE_KEY, MODEL_KEY = "promptSha256", "exampleId", "modelSha256"


class RecordedModel(Engine):
    """The answers of one model, as they were logged.

    Attributes:
        skipped: `file:line: reason` of every record that could not be used.

    Raises:
        ModelError: nothing there, no usable record, or answers of several models and none chosen by `model`.
    """

    def __init__(self, config: ModelConfig) -> None:
        path = Path(config.path or "")
        self.skipped: list[str] = []
        self._answers: dict[str, tuple[str, Completion]] = {}
        for where, record in _records(path, self.skipped):
            self._take(where, record, config.model)
        if not self._answers:
            first = f" The first problem: {self.skipped[0]}" if self.skipped else ""
            raise ModelError(f"{path} holds no recorded answer to use.{first}\nhelp: check `path`, and `model`.")
        models = sorted({model for model, _ in self._answers.values()})
        if len(models) > 1:
            raise ModelError(
                f"{path} holds answers of {len(models)} models: {', '.join(models)}.\nhelp: choose one as `model`."
            )
        if self.skipped:
            telemetry.note(f"{path}: {len(self.skipped)} records cannot be used; the first: {self.skipped[0]}")
        content = {key: to_dict(answer) for key, (_, answer) in self._answers.items()}
        super().__init__(config, models[0], {"answers": digest(content)})

    async def generate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: GenerateParams = GenerateParams()
    ) -> Completion:
        """The recorded answer to exactly this prompt; its settings, other than `constrain`, are the recording's.

        Raises:
            NotRecorded: there is none.
        """
        return self.lookup(prompt_digest(messages, tools, constrain=params.constrain), messages)

    def lookup(self, key: str, messages: Sequence[Message] = ()) -> Completion:
        """The answer recorded for a prompt's digest. Raises NotRecorded."""
        if key not in self._answers:
            begin = f" beginning {messages[-1].content[:60]!r}" if messages else ""
            raise NotRecorded(
                f"{self.config.path} has no answer of {self.name} to the prompt {key[:16]}{begin}; "
                f"it has {len(self._answers):,} others.\n"
                "help: messages, tools and `constrain` must be those that were recorded. Record the missing ones with "
                "a live teacher and `engines.write_recording`, or leave these examples out."
            )
        recorded = self._answers[key][1]
        return self._completion(
            recorded.message,
            recorded.finish_reason,
            recorded.input_tokens,
            recorded.output_tokens,
            recorded.latency_s,
        )

    def __len__(self) -> int:
        return len(self._answers)

    def _take(self, where: str, record: Any, wanted: str | None) -> None:
        """Keep one record's answer; the first one for a prompt stays."""
        try:
            if record.get("errorCode"):
                raise ValueError(f"the call failed with {record['errorCode']}")
            if not str(record["operation"]).startswith("Converse"):
                raise ValueError(f"operation {record['operation']!r} is not read here")
            model = str(record["modelId"])
            if wanted is not None and model != wanted:
                return
            key = _prompt_of(record)
            answer = read_response(_body(record["output"]["outputBodyJson"]), SafeNames(()))
            latency_ms = _body(record["output"]["outputBodyJson"]).get("metrics", {}).get("latencyMs")
        except (KeyError, TypeError, ValueError, AttributeError, ModelError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            self.skipped.append(f"{where}: {what}")
            return
        latency_s = latency_ms / 1000 if isinstance(latency_ms, int | float) and latency_ms > 0 else None
        completion = Completion(
            answer.message, model, answer.finish_reason, answer.input_tokens or 0, answer.output_tokens or 0, latency_s
        )
        self._answers.setdefault(key, (model, completion))


def _prompt_of(record: Mapping[str, Any]) -> str:
    stated = (record.get("requestMetadata") or {}).get(PROMPT_KEY)
    if stated is not None:
        return str(stated)
    body = record["input"]["inputBodyJson"]
    messages, tools = read_request(body)
    constrained = bool((body.get("toolConfig") or {}).get("toolChoice"))
    return prompt_digest(messages, tools, constrain=constrained)


def _body(body: Any) -> Any:
    """Streaming operations log the assembled response, or a list that holds it."""
    if isinstance(body, list):
        return next((item for item in body if isinstance(item, Mapping) and "output" in item), None)
    return body


def _records(path: Path, skipped: list[str]) -> Iterator[tuple[str, Any]]:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.name != MANIFEST)
    else:
        raise ModelError(f"there is no recording at {path}.\nhelp: give a file or folder of invocation logs as `path`.")
    for file in files:
        try:
            yield from _file_records(file, skipped)
        except (OSError, EOFError, zlib.error) as error:  # a damaged gzip: what came before it is good
            skipped.append(f"{file}: {error}")


def _file_records(path: Path, skipped: list[str]) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                skipped.append(f"{where}: the line is longer than {MAX_LINE_BYTES:,} bytes; the rest is not read")
                return
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                skipped.append(f"{where}: not JSON: {error}")
