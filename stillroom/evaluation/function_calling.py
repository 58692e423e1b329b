"""Scoring of tool calls: read the answer, match it against what is expected, and say whether it is valid at all.

Right and valid are different things: a valid answer fits the schemas of the tools that were offered; a right one
is also what was asked for. A model that is constrained to the schema is always valid and may never be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillroom.errors import DataError, ParseError
from stillroom.evaluation.results import ItemResult
from stillroom.evaluation.scoring import CUT_OFF, Verdict
from stillroom.schema import Completion, Example, ToolCall, to_dict
from stillroom.toolcalls import CallParseError, golden_call, match, may_begin_calls, parse_calls, validate_calls

NO_CALL = "no_call"
"""Failure kind: the answer is prose where a call was wanted."""

UNPARSEABLE = "unparseable"
"""Failure kind: the answer starts to call something, but cannot be read."""


class FunctionCalling:
    """BFCL's semantics: function, required parameters, types and values; see `toolcalls.match`.

    Args:
        calls_first: words before a call make the answer wrong, as in BFCL's own scoring.
    """

    def __init__(self, calls_first: bool = False) -> None:
        self._calls_first = calls_first

    def check(self, examples: Sequence[Example]) -> None:
        """Every example must say what is expected, in terms of its own tools."""
        for example in examples:
            if "relevance" in example.category:
                continue  # whether anything is called is all that counts
            try:
                golden_call(example.expected, example.tools)
            except DataError as error:
                where = f"{example.id!r} ({example.source or 'unknown source'})"
                raise DataError(
                    f"held-out example {where} cannot be scored: {error}\n"
                    "help: hold out golden records only, or give BFCL's possible answers beside the questions."
                ) from None

    def score(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per answer, in order."""
        pairs = zip(examples, completions, strict=True)
        return [_verdict(example, completion, self._calls_first) for example, completion in pairs]

    def extra(self, items: Sequence[ItemResult]) -> dict[str, Any]:
        """How many answers held a readable call."""
        return {"readable": sum(item.kind not in (NO_CALL, UNPARSEABLE, CUT_OFF) for item in items)}


def _verdict(example: Example, completion: Completion, calls_first: bool) -> Verdict:
    try:
        calls: tuple[ToolCall, ...] | None = read_calls(completion, calls_first)
        unread = ""
    except ParseError as error:
        calls, unread = None, str(error)
        kind = NO_CALL if getattr(error, "kind", "") == NO_CALL else UNPARSEABLE
        if completion.finish_reason == "length" and kind == UNPARSEABLE:
            kind = CUT_OFF  # it might have become a call
    found = match(calls, example.expected, example.tools, example.category)
    if calls is None:
        # As BFCL has it: what cannot be read calls nothing, which is right where nothing was to be called.
        return Verdict(True, 1.0, valid=True) if found.ok else Verdict(False, 0.0, kind, unread, valid=False)
    valid = not validate_calls(calls, example.tools)
    plain = tuple(to_dict(call) for call in calls)
    if found.ok:
        return Verdict(True, 1.0, valid=valid, calls=plain)
    return Verdict(False, 0.0, found.kind, found.detail, found.path, valid=valid, calls=plain)


def read_calls(completion: Completion, calls_first: bool = False) -> tuple[ToolCall, ...]:
    """The calls of an answer: the engine's own, or those written in its text, in whatever dialect.

    Raises:
        ParseError: there is no call to read, or with `calls_first` not where the answer begins.
    """
    if completion.message.tool_calls:
        return completion.message.tool_calls
    if calls_first and not may_begin_calls(completion.message.content):
        raise CallParseError("the answer begins with words, so no call in it counts", 0, NO_CALL)
    return parse_calls(completion.message.content)
