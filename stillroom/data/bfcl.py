"""Questions and answers of the Berkeley Function Calling Leaderboard, version 2 to 4, single turn.

Questions are JSON lines `{"id", "question": [[messages]], "function": [tools]}`; the right answers
stand in `possible_answer/` beside them, `{"id", "ground_truth": [{name: {parameter: [values]}}]}`.
Both files are read in step, so memory stays flat while they keep the same order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stillroom.data.config import ReadLimits
from stillroom.data.jsontext import decode
from stillroom.data.lines import TooLong, lines
from stillroom.data.reasons import Reason, Reject, excerpt
from stillroom.data.shapes import a_list, a_mapping, a_string, parsed_tools
from stillroom.schema import Example, Message, Target
from stillroom.toolcalls import golden_call

ANSWERS_AHEAD = 100_000
ROLES = {"system", "user", "assistant"}


class Answers:
    """The answers file, read as far as it was asked for."""

    def __init__(self, path: Path | None, limits: ReadLimits, line_bytes: int) -> None:
        self.path, self._limits = path, limits
        self._waiting: dict[str, Any] = {}
        self._rows = self._read(path, line_bytes) if path is not None else iter(())

    def get(self, identity: str) -> Any:
        """The answer to the question of that id, or None."""
        if identity in self._waiting:
            return self._waiting.pop(identity)
        for found, answer in self._rows:
            if found == identity:
                return answer
            if len(self._waiting) >= ANSWERS_AHEAD:
                raise Reject(Reason.NO_ANSWER, f"the answers in {self.path} are in another order than the questions")
            self._waiting[found] = answer
        return None

    def _read(self, path: Path, line_bytes: int) -> Iterator[tuple[str, Any]]:
        for number, line in lines(path, line_bytes=line_bytes, expansion_ratio=self._limits.expansion_ratio):
            try:
                if isinstance(line, TooLong):
                    raise Reject(Reason.LINE_TOO_LONG, f"has {line.size} bytes")
                row = decode(line, depth=self._limits.depth)
                yield a_string(row, "id"), a_list(row, "ground_truth")
            except Reject as error:
                # The question of this answer is then rejected as unanswered; the others go on.
                yield f"\0{number}", error


def default_answers(path: Path) -> Path | None:
    """The answers file of a questions file, where there is one."""
    beside = path.parent / "possible_answer" / path.name
    return beside if beside.is_file() else None


def default_category(path: Path) -> str:
    """`BFCL_v4_live_simple.json` -> `live_simple`."""
    return re.sub(r"^BFCL_v\d+_", "", path.name).partition(".")[0]


def to_example(row: Mapping[str, Any], answers: Answers, category: str, source: str) -> Example:
    """One question with its answer.

    Raises:
        Reject: the question is not a single-turn one, or its answer is missing.
    """
    identity = a_string(row, "id")
    turns = a_list(row, "question")
    if len(turns) != 1:
        raise Reject(Reason.MULTI_TURN, f"question has {len(turns)} turns; the single-turn categories are read")
    messages = tuple(_message(message, f"question[0][{i}]") for i, message in enumerate(_items(turns[0])))
    if not any(message.role == "user" for message in messages):
        raise Reject(Reason.NO_MESSAGES, "question has no message of the role user")
    if messages[-1].role == "assistant":
        raise Reject(Reason.NO_PROMPT, "question ends with an answer")
    tools = parsed_tools(a_list(row, "function"), "function")
    expected = answers.get(identity)
    targets: tuple[Target, ...] = ()
    if expected is None and "irrelevance" in category:
        expected = []
    elif expected is None and answers.path is not None:
        raise Reject(Reason.NO_ANSWER, f"no answer with the id {excerpt(identity)} in {answers.path}")
    elif expected is not None:
        targets = (Target(Message("assistant", "", _golden(expected, tools)), "golden"),)
    return Example(identity, messages, tools, targets, expected, category, source=source)


def _items(turn: Any) -> list[Any]:
    if not isinstance(turn, list) or not turn:
        raise Reject(Reason.NO_MESSAGES, "question[0] must be a list of messages")
    return turn


def _message(value: Any, where: str) -> Message:
    message = a_mapping(value, where)
    role, content = a_string(message, "role", where), a_string(message, "content", where)
    if role not in ROLES:
        raise Reject(Reason.BAD_ROLE, f"{where}.role is {excerpt(role)!r}")
    if not content.strip():
        raise Reject(Reason.BLANK_TEXT, f"{where}.content is blank")
    return Message(role, content)  # type: ignore[arg-type]


def _golden(expected: Any, tools: Any) -> Any:
    from stillroom.errors import StillroomError

    try:
        return golden_call(expected, tools)
    except StillroomError as error:
        raise Reject(Reason.BAD_ANSWER, f"the answer is not usable: {excerpt(str(error))}") from None
