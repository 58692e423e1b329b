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
from stillroom.toolcalls import match, parse_calls, validate_calls

UNPARSEABLE = "unparseable"
"""Failure kind: the text holds no call that could be read."""


class FunctionCalling:
    """BFCL's semantics: function, required parameters, types and values; see `toolcalls.match`."""

    def check(self, examples: Sequence[Example]) -> None:
        """Every example must say what is expected."""
        missing = [example for example in examples if not isinstance(example.expected, list | tuple)]
        if missing:
            first = missing[0]
            raise DataError(
                f"{len(missing)} of {len(examples)} held-out examples have no expected calls; the first is "
                f"{first.id!r} ({first.source or 'unknown source'}).\n"
                "help: hold out golden records only, or give BFCL's possible answers beside the questions."
            )

    def score(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per answer, in order."""
        return [_verdict(example, completion) for example, completion in zip(examples, completions, strict=True)]

    def extra(self, items: Sequence[ItemResult]) -> dict[str, Any]:
        """How many answers held a readable call."""
        return {"readable": sum(item.kind not in (UNPARSEABLE, CUT_OFF) for item in items)}


def _verdict(example: Example, completion: Completion) -> Verdict:
    wants_none = example.category.endswith("irrelevance") or not example.expected
    try:
        calls = read_calls(completion)
    except ParseError as error:
        if wants_none and completion.finish_reason != "length":
            return Verdict(True, 1.0, valid=True)
        kind = CUT_OFF if completion.finish_reason == "length" else UNPARSEABLE
        return Verdict(False, 0.0, kind, str(error), valid=False)
    valid = not validate_calls(calls, example.tools)
    found = match(calls, example.expected, example.tools, example.category)
    plain = tuple(to_dict(call) for call in calls)
    if found.ok:
        return Verdict(True, 1.0, valid=valid, calls=plain)
    return Verdict(False, 0.0, found.kind, found.detail, str(found.path), valid=valid, calls=plain)


def read_calls(completion: Completion) -> tuple[ToolCall, ...]:
    """The calls of an answer: the engine's own, or those written in its text, in whatever dialect.

    Raises:
        ParseError: there is no call to read.
    """
    return completion.message.tool_calls or parse_calls(completion.message.content)
