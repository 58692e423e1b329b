"""Putting a conversation together: what of it is the prompt, what is the answer, and what scoring accepts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from stillroom.data.reasons import Reason, Reject
from stillroom.errors import DataError, ParseError
from stillroom.schema import Example, Message, Origin, Target, ToolSpec
from stillroom.toolcalls import expected_from, may_begin_calls, parse_calls

ID_BYTES = 16


def example_of(
    messages: Sequence[Message],
    tools: tuple[ToolSpec, ...],
    category: str,
    source: str,
    *,
    origin: Origin,
    identity: str | None = None,
    model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Example:
    """An example of a conversation; an assistant's message at the end is taken off as the answer.

    A golden answer is also what scoring accepts (`expected`): its calls, or its text. Where tools are offered, a text
    that is nothing but calls stands for them. An example without an id of its own is named by the digest of its prompt.

    Raises:
        Reject: nothing but answers is there.
    """
    prompt, answer = tuple(messages), None
    if prompt and prompt[-1].role == "assistant":
        prompt, answer = prompt[:-1], prompt[-1]
    for message in prompt:
        if message.role == "user":
            break
    else:
        raise Reject(Reason.NO_PROMPT, "has no message of the role user to answer")
    identity = identity or PromptId(_digest(prompt, tools).hex())
    if answer is not None and origin == "golden" and tools:
        answer = _with_calls(answer)
    targets = (Target(answer, origin, model),) if answer is not None else ()
    expected = _expected(answer, tools) if answer is not None and origin == "golden" else None
    return Example(identity, prompt, tools, targets, expected, category, None, source, (), metadata or {})


class PromptId(str):
    """The id of an example that had none: the digest of its prompt, in hex."""

    __slots__ = ()


def prompt_key(example: Example) -> bytes:
    """16 bytes that tell prompts apart: equal messages and tools give equal keys."""
    # Digests are half of the cost of checking a record, so one that was made already is used again.
    if isinstance(example.id, PromptId):
        return bytes.fromhex(example.id)
    return _digest(example.messages, example.tools)


def _digest(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> bytes:
    parts: list[Any] = []
    for message in messages:
        if message.tool_calls:
            parts.append([(call.name, call.arguments) for call in message.tool_calls])
        parts += (message.role, message.content)
    if tools:
        parts.append([(tool.name, tool.description, tool.parameters) for tool in tools])
    return hashlib.blake2b(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), digest_size=ID_BYTES).digest()


def _with_calls(answer: Message) -> Message:
    """An answer with its calls in `tool_calls`, where its text begins with them and can be read as nothing else."""
    if answer.tool_calls or not may_begin_calls(answer.content):
        return answer
    try:
        calls = parse_calls(answer.content)
    except ParseError:
        return answer
    return Message(answer.role, "", calls) if calls else answer


def _expected(answer: Message, tools: Sequence[ToolSpec]) -> Any:
    """What scoring accepts, given an answer known to be right: its calls, or its text.

    None where it calls a tool that was not offered: such a record can be learnt from, and not be scored.
    """
    if not answer.tool_calls:
        return answer.content
    try:
        return expected_from(answer.tool_calls, tools)
    except DataError:
        return None
