"""Answers that were paid for, kept so that none is asked for twice.

    answers.jsonl   one line per answer: {"key", "sum", "account", "prompt", "model", "completion"}
                    and per lost spending:  {"key": null, "sum", "account", "tokens", "usd"}

Promise: when `put` returns, the answer survives a crash or power loss. A line torn by a crash is
skipped and written over by nobody; everything else stays readable. Several processes may write
at once: each line is appended under a file lock, and `get` sees what others stored meanwhile.
`sum` is the SHA-256 of the line's other members; a line that does not match counts as absent.
Out of scope: expiry. Answers are facts about a model's identity; delete the folder to forget them.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom.schema import (
    Completion,
    GenerateParams,
    Message,
    ToolSpec,
    completion_from_dict,
    digest,
    prompt_digest,
    to_dict,
)
from stillroom.storage import sync_directory

FILE = "answers.jsonl"
READ_BYTES = 4 * 2**20


def answer_key(identity: str, messages: Sequence[Message], tools: Sequence[ToolSpec], params: GenerateParams) -> str:
    """What identifies an answer: who is asked (`Engine.identity`), what, and with which settings; 64 hex digits."""
    settings = {name: getattr(params, name) for name in GenerateParams.__slots__}
    question = {"prompt": prompt_digest(messages, tools), "params": {**settings, "stop": [*params.stop]}}
    return digest({"model": identity, **question})


class AnswerCache:
    """A folder of answers by key. Cheap to open: one read of the file, no answer kept in memory.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        created = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if created:
            sync_directory(self.path.parent)
        self._where: dict[str, tuple[int, int]] = {}
        self._spent: dict[str, tuple[int, float]] = {}
        self._read_to = 0
        self._mutex = threading.Lock()
        self.damaged = 0
        with self._mutex:
            self._refresh()

    def get(self, key: str) -> Completion | None:
        """The answer stored under `key`, by this process or another; None when there is none."""
        with self._mutex:
            if key not in self._where:
                self._refresh()
            place = self._where.get(key)
            if place is None:
                return None
            record = _verified(os.pread(self._descriptor, place[1], place[0]))
            if record is None:  # damaged after it was indexed
                del self._where[key]
                return None
            return completion_from_dict(record["completion"])

    def put(self, key: str, completion: Completion, *, prompt: str = "", account: str = "") -> None:
        """Store an answer durably. A second answer under the same key changes nothing but the spending."""
        self._append({"key": key, "account": account, "prompt": prompt, "completion": to_dict(completion)})

    def book(self, account: str, tokens: int, usd: float) -> None:
        """Record spending that brought no answer worth keeping."""
        self._append({"key": None, "account": account, "tokens": tokens, "usd": usd})

    def spent(self, account: str) -> tuple[int, float]:
        """Tokens and US dollars booked to `account` so far, by every process."""
        with self._mutex:
            self._refresh()
            return self._spent.get(account, (0, 0.0))

    def __len__(self) -> int:
        with self._mutex:
            self._refresh()
            return len(self._where)

    def close(self) -> None:
        """Close the file; calling it twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps({**record, "sum": digest(record)}, ensure_ascii=True).encode() + b"\n"
        with self._mutex:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                end = os.fstat(self._descriptor).st_size
                if end and os.pread(self._descriptor, 1, end - 1) != b"\n":
                    line = b"\n" + line  # a writer was killed in the middle of a line: end it
                view = memoryview(line)
                while view:
                    view = view[os.write(self._descriptor, view) :]
                os.fsync(self._descriptor)
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._refresh()

    def _refresh(self) -> None:
        """Index the complete lines that were added since last time."""
        size, window = os.fstat(self._descriptor).st_size, READ_BYTES
        while self._read_to < size:
            block = os.pread(self._descriptor, min(window, size - self._read_to), self._read_to)
            end = block.rfind(b"\n") + 1
            if not end and len(block) == window:
                window *= 2  # one line longer than the window
                continue
            if not end:
                return  # a line still being written, or torn: the next writer ends it
            for line in block[:end].splitlines(keepends=True):
                self._index(line)
                self._read_to += len(line)

    def _index(self, line: bytes) -> None:
        if not line.strip():
            return
        record = _verified(line)
        if record is None:
            self.damaged += 1
            return
        if record["key"] is None:
            tokens, usd = record["tokens"], record["usd"]
        else:
            self._where.setdefault(record["key"], (self._read_to, len(line)))
            answer = record["completion"]
            tokens, usd = answer["input_tokens"] + answer["output_tokens"], answer["cost_usd"]
        before = self._spent.get(record["account"], (0, 0.0))
        self._spent[record["account"]] = (before[0] + tokens, before[1] + usd)


def _verified(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        total = record.pop("sum")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) and digest(record) == total else None
