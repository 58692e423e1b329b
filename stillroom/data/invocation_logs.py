"""Invocation logs as the hosted service delivers them to S3, copied to a folder.

    .../AWSLogs/<account>/BedrockModelInvocationLogs/<region>/YYYY/MM/DD/HH/<time>_<id>.json.gz   records
    .../HH/data/<requestId>_input.json.gz, _output.json.gz                                        large bodies

Each record is one call: Converse in its own form, InvokeModel in the model's (`native_bodies`). The
logged answer is a teacher's. A body that was stored beside the record is looked up inside the folder
that is read, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from stillroom.data import bedrock, native_bodies
from stillroom.data.answers import example_of
from stillroom.data.config import ReadLimits
from stillroom.data.jsontext import decode
from stillroom.data.lines import blocks
from stillroom.data.reasons import Reason, Reject, excerpt
from stillroom.data.shapes import a_list, a_mapping, a_string
from stillroom.data.streams import assembled
from stillroom.schema import Example, Message

OPERATIONS = frozenset({"Converse", "ConverseStream", "InvokeModel", "InvokeModelWithResponseStream"})
TRUNCATED = frozenset({"max_tokens", "length", "LENGTH", "MAX_TOKENS", "model_context_window_exceeded"})
REFUSED = frozenset(
    {"guardrail_intervened", "content_filtered", "CONTENT_FILTERED", "content_filter", "refusal", "error"}
)
BODY_FILE = re.compile(r"_(input|output)\.json(\.gz)?$")
_REGION_PREFIX = re.compile(r"^(global|apac|us-gov|[a-z]{2})\.(?=[a-z0-9-]+\.)")


class Log:
    """One file of a log: where its bodies lie, and whose records are wanted."""

    def __init__(self, file: Path, root: Path, limits: ReadLimits, model: str | None) -> None:
        self.file, self.limits = file, limits
        self.root = root if root.is_dir() else file.parent
        self.model = canonical_model(model) if model is not None else None


def to_example(record: Mapping[str, Any], log: Log, category: str, source: str) -> Example:
    """One logged call: its prompt, its metadata, and the answer as a teacher's target.

    Raises:
        Reject: with the reason and the path of the member at fault.
    """
    if record.get("schemaType", "ModelInvocationLog") != "ModelInvocationLog":
        raise Reject(Reason.NOT_A_LOG_RECORD, f"schemaType is {excerpt(record['schemaType'])!r}")
    missing = [key for key in ("modelId", "input") if key not in record]
    if missing:
        raise Reject(Reason.NOT_A_LOG_RECORD, f"{missing[0]} is missing")
    model = a_string(record, "modelId")
    operation = record.get("operation")
    if not isinstance(operation, str) or operation not in OPERATIONS:
        raise Reject(Reason.UNKNOWN_OPERATION, f"operation is {excerpt(operation)!r}")
    if record.get("errorCode"):
        raise Reject(Reason.CALL_FAILED, f"errorCode is {excerpt(record['errorCode'])!r}")
    if log.model is not None and canonical_model(model) != log.model:
        raise Reject(Reason.NOT_THE_TEACHER, f"modelId is {excerpt(model)!r}, wanted is {log.model!r}")
    given, answered = _body(record, "input", log), _body(record, "output", log)
    call = _converse if operation.startswith("Converse") else native_bodies.read_call
    messages, tools, answer, stop = call(a_mapping(given, "input.inputBodyJson"), assembled(answered))
    stop = stop if isinstance(stop, str) else None
    if stop in TRUNCATED:
        raise Reject(Reason.RESPONSE_TRUNCATED, f"the answer stopped at {stop}")
    if stop in REFUSED:
        raise Reject(Reason.CALL_FAILED, f"the answer stopped at {stop}")
    if not log.limits.multi_turn and sum(message.role == "user" for message in messages) > 1:
        raise Reject(Reason.MULTI_TURN, "has more than one user message; the student takes one")
    metadata = a_mapping(record.get("requestMetadata") or {}, "requestMetadata")
    identity = record.get("requestId") if isinstance(record.get("requestId"), str) else None
    return example_of(
        _with_answer(messages, answer),
        tools,
        category,
        source,
        origin="teacher",
        identity=identity,
        model=model,
        metadata=metadata,
    )


def is_body_file(folder: str, name: str) -> bool:
    """Whether a file is a body that a log stores beside its records, and so no file of records."""
    return Path(folder).name == "data" and BODY_FILE.search(name) is not None


def canonical_model(identity: str) -> str:
    """A model's id however it was named: by id, ARN, or a region's inference profile."""
    return _REGION_PREFIX.sub("", identity.rpartition("/")[2] if identity.startswith("arn:") else identity)


def _converse(request: dict[str, Any], response: dict[str, Any]) -> native_bodies.Call:
    messages = bedrock.system(request.get("system"), strict=False)
    messages += bedrock.conversation(a_list(request, "messages", "input"), strict=False)
    answer, stop = native_bodies.converse_answer(response)
    return list(messages), bedrock.tools(request.get("toolConfig")), answer, stop


def _with_answer(messages: list[Message], answer: Message) -> list[Message]:
    """The conversation with its answer; where the caller began the answer, the two are one."""
    if messages and messages[-1].role == "assistant":
        *messages, begun = messages
        answer = replace(answer, content=begun.content + answer.content)
    return [*messages, answer]


def _body(record: Mapping[str, Any], side: str, log: Log) -> Any:
    part = a_mapping(record.get(side, {}), side)
    if (body := part.get(f"{side}BodyJson")) is not None:
        return body
    path = part.get(f"{side}BodyS3Path")
    if not isinstance(path, str):
        raise Reject(Reason.MISSING_BODY, f"{side} has neither {side}BodyJson nor {side}BodyS3Path")
    return _stored_body(path, log)


def _stored_body(path: str, log: Log) -> Any:
    file = _local_file(path, log)
    taken: list[bytes] = []
    size = 0
    try:
        for block in blocks(file, expansion_ratio=log.limits.expansion_ratio):
            size += len(block)
            if size > log.limits.body_bytes:
                raise Reject(Reason.LINE_TOO_LONG, f"the body has more than {log.limits.body_bytes} bytes")
            taken.append(block)
        return decode(b"".join(taken).strip(), depth=log.limits.depth)
    except Reject as error:
        raise Reject(error.reason, f"body {file.name}: {error.message}") from None


def _local_file(path: str, log: Log) -> Path:
    """The copy of an S3 object inside the folder that is read: beside the record, or by the tail of its key."""
    key = PurePosixPath(path.removeprefix("s3://").partition("/")[2])
    if not path.startswith("s3://") or not key.parts or ".." in key.parts or "\0" in path or key.is_absolute():
        raise Reject(Reason.BODY_OUTSIDE, f"{excerpt(path)!r} is not an object of the log")
    root = log.root.resolve()
    for candidate in _candidates(key, log):
        try:
            # A link is resolved first: it must not lead outside either.
            real = candidate.resolve(strict=True)
        except (OSError, RuntimeError):
            continue
        if not real.is_relative_to(root):
            raise Reject(Reason.BODY_OUTSIDE, f"{excerpt(path)!r} leads to a file outside {log.root}")
        return real
    raise Reject(Reason.BODY_NOT_FOUND, f"{excerpt(path)!r} is not below {log.root}")


def _candidates(key: PurePosixPath, log: Log) -> Iterator[Path]:
    yield log.file.parent / "data" / key.name
    for start in range(len(key.parts)):
        yield log.root.joinpath(*key.parts[start:])
