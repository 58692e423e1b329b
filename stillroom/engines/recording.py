"""Answers written down as invocation logs, so that a run can be repeated without its teacher.

    answers.jsonl (or answers.json.gz)   one ModelInvocationLog record an answer, by example id
    recording.json                       who answered: model, digest, licence, prompt format, counts

Promise: the same entries give the same bytes. `read` is `ModelConfig(engine="recorded", path=folder)`.
Prompts are referred to by example id and digest, and copied only on request: their licence may differ.
"""

from __future__ import annotations

import gzip
import io
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom import storage
from stillroom.engines.asking import Request
from stillroom.engines.bedrock_wire import write_request, write_response
from stillroom.engines.names import PlainNames
from stillroom.engines.recorded import EXAMPLE_KEY, MANIFEST, MODEL_KEY, PROMPT_KEY
from stillroom.schema import Completion, canonical_json, prompt_digest

ACCOUNT, REGION = "000000000000", "us-east-1"  # a log record has both; nothing here happened at AWS


@dataclass(frozen=True, slots=True)
class Entry:
    """One answered request and the id of the example that it belongs to."""

    example_id: str
    request: Request
    completion: Completion


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Who answered.

    Attributes:
        model_id: `provider.model` in lower-case letters, digits and hyphens, as logs name models.
        digest: SHA-256 of the weights, where they are known.
        license: of the model. terms: what they say about its answers. source: where it comes from.
        recorded_at: ISO 8601 in UTC, such as `2026-05-04T12:00:00Z`; given, so that files can be reproduced.
        details: anything else worth knowing: engine, prompt format, settings.
    """

    model_id: str
    recorded_at: str
    digest: str = ""
    license: str = ""
    terms: str = ""
    source: str = ""
    details: Mapping[str, Any] | None = None


def write_recording(
    folder: str | Path, entries: Iterable[Entry], info: ModelInfo, *, prompts: bool = False, compress: bool = False
) -> Path:
    """Write the folder whole or not at all, and return it.

    Args:
        folder: replaced if it exists.
        entries: in any order; records are sorted by example id and prompt digest.
        info: who answered.
        prompts: copy the prompts too, so that the log is training data by itself.
        compress: gzip, as the service delivers logs; plain lines show their changes under version control.
    """
    keyed = sorted(((_key(entry), entry) for entry in entries), key=lambda pair: (pair[1].example_id, pair[0]))
    records = [_record(key, entry, info, prompts) for key, entry in keyed]
    data = b"".join(_line(record) for record in records)
    name = "answers.json.gz" if compress else "answers.jsonl"
    with storage.atomic_directory(folder) as fresh:
        (fresh / name).write_bytes(_gzipped(data) if compress else data)
        manifest = json.dumps(_manifest(records, info), indent=2, ensure_ascii=False) + "\n"
        (fresh / MANIFEST).write_text(manifest, encoding="utf-8")
    return Path(folder)


def _key(entry: Entry) -> str:
    request = entry.request
    return prompt_digest(request.messages, request.tools, constrain=request.params.constrain)


def _record(key: str, entry: Entry, info: ModelInfo, prompts: bool) -> dict[str, Any]:
    request, answer = entry.request, entry.completion
    given: dict[str, Any] = {"inputContentType": "application/json", "inputTokenCount": answer.input_tokens}
    if prompts:
        given["inputBodyJson"] = write_request(
            request.messages, request.tools, request.params, PlainNames(request.tools)
        )
    said = write_response(
        answer.message, answer.finish_reason, answer.input_tokens, answer.output_tokens, answer.latency_s
    )
    return {
        "schemaType": "ModelInvocationLog",
        "schemaVersion": "1.0",
        "timestamp": info.recorded_at,
        "accountId": ACCOUNT,
        "region": REGION,
        "requestId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{info.model_id} {key}")),
        "operation": "Converse",
        "modelId": info.model_id,
        "requestMetadata": {
            EXAMPLE_KEY: entry.example_id,
            PROMPT_KEY: key,
            **({MODEL_KEY: info.digest} if info.digest else {}),
        },
        "input": given,
        "output": {
            "outputContentType": "application/json",
            "outputBodyJson": said,
            "outputTokenCount": answer.output_tokens,
        },
    }


def _line(record: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair can only be written escaped
        return (json.dumps(record) + "\n").encode()


def _manifest(records: list[dict[str, Any]], info: ModelInfo) -> dict[str, Any]:
    return {
        "model": info.model_id,
        "modelSha256": info.digest,
        "license": info.license,
        "terms": info.terms,
        "source": info.source,
        "recordedAt": info.recorded_at,
        "records": len(records),
        "inputTokens": sum(record["input"]["inputTokenCount"] for record in records),
        "outputTokens": sum(record["output"]["outputTokenCount"] for record in records),
        "details": json.loads(canonical_json(dict(info.details or {}))),
    }


def _gzipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    # No name and no time in the header: the same answers are the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(data)
    return buffer.getvalue()
