"""Records in, from every format, as a stream: `read` yields examples, rejections and warnings in file order.

Promise: memory is bounded by the longest line allowed, whatever the files hold; a bad record or file
costs itself only; nothing but a `StillroomError` is raised, and that only for the caller's mistakes.
Repeats are not looked for here (that needs memory): `check` and `prepare` do.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stillroom.data import bedrock, bfcl, invocation_logs, openai_chat
from stillroom.data.advice import advice
from stillroom.data.config import ReadLimits
from stillroom.data.contents import refuse_other_than_text
from stillroom.data.filters import check_filter, matches
from stillroom.data.jsontext import decode
from stillroom.data.lines import TooLong, blocks, lines, open_regular
from stillroom.data.loose_json import DEPTH, read_loosely
from stillroom.data.reasons import DataWarning, Reason, Reject, Rejection, excerpt
from stillroom.data.shapes import type_name
from stillroom.errors import ConfigError, DataError
from stillroom.schema import Example

KIB = 1024
LINE_BYTES = {"bedrock": 180 * KIB, "openai": 1024 * KIB, "invocation_logs": 1024 * KIB, "bfcl": 1024 * KIB}
EXTENSIONS = {
    "bedrock": (".jsonl", ".jsonl.gz"),
    "openai": (".jsonl", ".jsonl.gz"),
    "invocation_logs": (".json.gz", ".json", ".jsonl", ".jsonl.gz"),
    "bfcl": (".json", ".jsonl", ".json.gz", ".jsonl.gz"),
}
SKIPPED_FOLDERS = frozenset({"possible_answer"})
"""BFCL's answers are read beside their questions."""

SKIPPED_FILES = frozenset({"amazon-bedrock-logs-permission-check"})
WHOLE_FILE = frozenset({Reason.NOT_JSON_LINES, Reason.WRONG_EXTENSION, Reason.TOO_MUCH_DATA})
CUTS = frozenset({Reason.TRUNCATED_GZIP, Reason.CORRUPT_GZIP, Reason.GZIP_BOMB, Reason.TOO_MUCH_DATA})
"""Rejections of a file that name the last line before them."""

ANY_EXTENSION = tuple(sorted({ending for endings in EXTENSIONS.values() for ending in endings}))

Finding = Example | Rejection | DataWarning
ToExample = Callable[[dict[str, Any], str], Example]


def read(
    path: str | Path,
    format: str = "auto",
    *,
    where: Mapping[str, Any] | None = None,
    limits: ReadLimits | None = None,
    category: str | None = None,
    answers: str | Path | None = None,
    model: str | None = None,
) -> Iterator[Finding]:
    """Every record of a file or folder; an example is followed by the warnings about it.

    Args:
        path: a file, or a folder that is searched for files of the format (hidden ones left out).
        format: auto, bedrock, openai, invocation_logs or bfcl; auto looks at the first record of each file.
        where: metadata filter; records that do not match are rejected as `filtered_out`.
        category: what examples are grouped by; None: what the format says.
        answers: BFCL answers file, where it is not `possible_answer/` beside the questions.
        model: invocation logs: the model whose records are wanted.

    Raises:
        DataError: `path` or `answers` does not exist. ConfigError: `where` is not a filter, or `format` is unknown.
    """
    path, limits = Path(path), limits or ReadLimits()
    if format != "auto" and format not in LINE_BYTES:
        raise ConfigError(f"unknown format {format!r}; valid: auto, {', '.join(LINE_BYTES)}")
    if where is not None:
        try:
            check_filter(where)
        except ValueError as error:
            raise ConfigError(f"data filter: {error}") from None
    if not os.path.lexists(path):
        raise DataError(f"{path} does not exist.\nhelp: give a file or folder of records.")
    if answers is not None and not Path(answers).is_file():
        raise DataError(
            f"the answers file {answers} does not exist.\nhelp: leave `answers` out to use possible_answer/."
        )
    return _read_all(_Reading(path, format, where, limits, category, answers, model))


class _Reading:
    """What `read` was asked for, and how many bytes it has taken so far."""

    def __init__(
        self,
        path: Path,
        format: str,
        where: Mapping[str, Any] | None,
        limits: ReadLimits,
        category: str | None,
        answers: str | Path | None,
        model: str | None,
    ) -> None:
        self.path, self.format, self.where, self.limits = path, format, where, limits
        self.category, self.model = category, model
        self.answers = Path(answers) if answers is not None else None
        self.bytes_taken = 0

    def line_bytes(self, format: str) -> int:
        return self.limits.line_bytes or LINE_BYTES.get(format, max(LINE_BYTES.values()))

    def take(self, size: int) -> None:
        self.bytes_taken += size
        if self.bytes_taken > self.limits.total_bytes:
            message = f"the data set has more than {self.limits.total_bytes} bytes; the rest is not read"
            raise Reject(Reason.TOO_MUCH_DATA, message)


def _read_all(reading: _Reading) -> Iterator[Finding]:
    for file in _files(reading.path):
        if isinstance(file, Rejection):
            yield file
            continue
        yield from _read_file(file, reading)
        if reading.bytes_taken > reading.limits.total_bytes:
            return


def _files(path: Path) -> Iterator[Path | Rejection]:
    """Files in name order. Linked folders are not entered: they could lead outside, or in circles."""
    if not path.is_dir():
        yield path
        return
    found = False
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.startswith(".") or name in SKIPPED_FILES or invocation_logs.is_body_file(folder, name):
                continue
            found = True
            yield Path(folder, name)
    if not found:
        yield Rejection(str(path), 0, Reason.EMPTY_FILE, "the folder holds no files")


def _read_file(file: Path, reading: _Reading) -> Iterator[Finding]:
    records = _Records(file, reading)
    number = 0
    try:
        _check_extension(file, records.format, reading.limits)
        for number, line in lines(file, line_bytes=records.line_bytes, expansion_ratio=reading.limits.expansion_ratio):
            reading.take(len(line))
            try:
                example = records.example(number, line)
            except Reject as error:
                if error.reason in WHOLE_FILE:
                    raise
                yield error.at(records.name, number)
                if error.reason is Reason.INVALID_JSON and isinstance(line, bytes):
                    yield from _despite(line, records.name, number)
                continue
            yield example
            for reason, message in advice(example):
                yield DataWarning(records.name, number, reason, message)
        if number == 0:
            raise Reject(Reason.EMPTY_FILE, "holds no record")
    except Reject as error:
        yield error.at(records.name, number if error.reason in CUTS else 0)
        if error.reason is Reason.NOT_JSON_LINES:
            yield from _despite(_beginning(file), records.name, 0)


class _Records:
    """The records of one file: their format, known from the first on, and how each is made an example."""

    def __init__(self, file: Path, reading: _Reading) -> None:
        self.file, self.reading, self.format = file, reading, reading.format
        # A name of bytes that are not UTF-8 could not be written to any report.
        self.name = str(file).encode("utf-8", "replace").decode()
        self.line_bytes = reading.line_bytes(self.format)
        self._parse: ToExample | None = None
        self._first = True

    def example(self, number: int, line: bytes | TooLong) -> Example:
        """Raises Reject: the line, the record, or the whole file cannot be used."""
        first, self._first = self._first, False
        if isinstance(line, TooLong):
            raise Reject(Reason.LINE_TOO_LONG, f"has {line.size} bytes; {self.line_bytes} are allowed")
        depth = self.reading.limits.depth
        record = _first_record(line, depth) if first else decode(line, depth=depth)
        if type(record) is not dict:
            raise Reject(Reason.NOT_AN_OBJECT, f"is {type_name(record)}")
        if self._parse is None:
            self._settle(record)
            assert self._parse is not None
        if len(line) > self.line_bytes:
            message = f"has {len(line)} bytes; {self.format} allows {self.line_bytes}"
            raise Reject(Reason.LINE_TOO_LONG, message)
        example = self._parse(record, f"{self.name}:{number}")
        if self.reading.where is not None and not matches(self.reading.where, example.metadata):
            raise Reject(Reason.FILTERED_OUT, "does not match the metadata filter")
        return example

    def _settle(self, record: Mapping[str, Any]) -> None:
        """Fix the format by the first record that can be decoded."""
        self.format = _detected(record) if self.format == "auto" else self.format
        _check_extension(self.file, self.format, self.reading.limits)
        self.line_bytes = self.reading.line_bytes(self.format)
        self._parse = _parser(self.format, self.file, self.reading)


def _despite(text: bytes, file: str, number: int) -> Iterator[DataWarning]:
    """Faults beyond the form of a record that is not JSON: the service's documentation shows one with three."""
    if b"bedrock-conver" not in text:
        return
    record = read_loosely(text.decode("utf-8", "replace").strip().removeprefix("["))
    if record is None or not isinstance(record[0], dict):
        return
    with contextlib.suppress(Reject):
        # Through JSON once more: only then are its values what every reader expects.
        mended = decode(json.dumps({**record[0], "schemaVersion": bedrock.SCHEMA_VERSION}).encode(), depth=DEPTH)
        for reason, message in advice(bedrock.to_example(mended, ReadLimits(), "", "")):
            yield DataWarning(file, number, reason, message)


def _beginning(file: Path) -> bytes:
    with open_regular(file) as opened:
        return opened.read(LINE_BYTES["bedrock"])


def _first_record(line: bytes, depth: int) -> Any:
    """The value of a file's first line, where it shows if the file is no JSON lines at all."""
    try:
        value = decode(line, depth=depth)
    except Reject as error:
        if error.reason is Reason.INVALID_JSON and line.rstrip(b" \t,") in (b"[", b"{", b"[{"):
            raise Reject(Reason.NOT_JSON_LINES, "is one JSON document over several lines") from None
        raise
    if isinstance(value, list) and value and isinstance(value[0], dict):
        raise Reject(Reason.NOT_JSON_LINES, "is one JSON list; records must stand on lines of their own")
    return value


def _detected(record: Mapping[str, Any]) -> str:
    """The format of a record by the members that only it has."""
    if "schemaVersion" in record and "messages" in record:
        return "bedrock"
    if record.get("schemaType") == "ModelInvocationLog" or {"modelId", "input", "output"} <= record.keys():
        return "invocation_logs"
    if isinstance(record.get("question"), list) and "id" in record:
        return "bfcl"
    if isinstance(messages := record.get("messages"), list):
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        blocks = first.get("content")
        # Only OpenAI's content blocks have to say their type.
        if isinstance(blocks, list) and blocks and isinstance(blocks[0], dict) and "type" not in blocks[0]:
            return "bedrock"
        return "bedrock" if "system" in record else "openai"
    if "schemaVersion" in record:
        return "bedrock"
    raise Reject(Reason.UNKNOWN_FORMAT, f"no known format has the members {excerpt(', '.join(record) or '(none)')}")


def _parser(format: str, file: Path, reading: _Reading) -> ToExample:
    limits, category = reading.limits, reading.category
    if format == "bedrock":
        return lambda record, source: bedrock.to_example(record, limits, category or "", source)
    if format == "openai":
        return lambda record, source: openai_chat.to_example(record, limits, category or "", source)
    if format == "invocation_logs":
        log = invocation_logs.Log(file, reading.path, limits, reading.model)
        return lambda record, source: invocation_logs.to_example(record, log, category or "", source)
    answers = bfcl.Answers(reading.answers or bfcl.default_answers(file), limits, reading.line_bytes("bfcl"))
    group = category or bfcl.default_category(file)
    return lambda record, source: bfcl.to_example(record, answers, group, source)


def _check_extension(file: Path, format: str, limits: ReadLimits) -> None:
    allowed = EXTENSIONS.get(format, ANY_EXTENSION)
    if not file.name.lower().endswith(allowed):
        # Renaming, which this reason advises, would help no archive and no picture.
        refuse_other_than_text(next(blocks(file, expansion_ratio=limits.expansion_ratio), b""))
        raise Reject(Reason.WRONG_EXTENSION, f"{format} files end in {' or '.join(allowed)}")
