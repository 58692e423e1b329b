"""Faults of a record that can be used all the same: tools and answers that do not fit each other or the prompt.

Tools are taken from the record, or from the text of its prompt, where the hosted service's own
documentation puts them. The answer's calls are checked against them, and each text argument against
what the prompt says: a value of which no word occurs anywhere in the prompt can only be invented.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from stillroom.data.loose_json import read_loosely
from stillroom.data.reasons import Reason, excerpt
from stillroom.errors import ParseError
from stillroom.schema import Example, Message, ToolCall, ToolSpec
from stillroom.toolcalls import parse_calls, read_tools, validate_calls

Finding = tuple[Reason, str]
ToolsFound = tuple[tuple[ToolSpec, ...], tuple[Finding, ...]]
MOST_FINDINGS = 8
MOST_STARTS = 8
CACHED_TEXTS = 64
LONG_TEXT_CHARS = 20_000
STEM_CHARS = 4
_START = re.compile(r"\[\s*+\{|\{\s*+[\"']")
_WORD = re.compile(r"\w+")
_CALL = re.compile(r"\s*+(?:\[|\{|<tool_call>|<\|python_tag\|>|```|[A-Za-z_][\w.]*+\()")


def advice(example: Example) -> list[Finding]:
    """What to warn about; at most eight findings, each once."""
    tools, about_tools = (example.tools, _about_tools(example.tools)) if example.tools else _found(example.messages)
    if not tools:
        return []
    findings = list(about_tools)
    if example.targets:
        undeclared = {name for _, name in _undeclared(tools)} if findings else set()
        for target in example.targets:
            findings += _about_answer(target.message, example, tools, undeclared)
    return list(dict.fromkeys(findings))[:MOST_FINDINGS]


def _about_tools(tools: Sequence[ToolSpec]) -> tuple[Finding, ...]:
    return tuple(
        (Reason.UNDECLARED_REQUIRED, f"{excerpt(tool)} requires {excerpt(name)!r} and does not declare it")
        for tool, name in _undeclared(tools)
    )


def _undeclared(tools: Sequence[ToolSpec]) -> Iterator[tuple[str, str]]:
    for tool in tools:
        required, declared = tool.parameters.get("required"), tool.parameters.get("properties")
        if isinstance(required, list):
            for name in required:
                if isinstance(name, str) and not (isinstance(declared, dict) and name in declared):
                    yield tool.name, name


def _about_answer(
    message: Message, example: Example, tools: Sequence[ToolSpec], undeclared: set[str]
) -> Iterator[Finding]:
    calls = message.tool_calls or _calls_in_text(message.content)
    if not calls:
        return
    for problem in validate_calls(calls, tools):
        if not any(f"{name!r}" in problem.message or problem.path.endswith(name) for name in undeclared):
            yield Reason.INVALID_ANSWER, f"{excerpt(problem.path)}: {excerpt(problem.message)}"
    prompt: str | None = None
    for call in calls:
        for path, value in _texts(call.arguments, call.name):
            prompt = _said(example) if prompt is None else prompt
            if not _grounded(value, prompt):
                shown = f"{excerpt(path)} is {excerpt(value)!r}, which the prompt does not name"
                yield Reason.UNGROUNDED_ARGUMENT, shown


def _calls_in_text(text: str) -> tuple[ToolCall, ...]:
    if not _CALL.match(text):
        return ()
    try:
        return parse_calls(text)
    except ParseError:
        return ()


def _said(example: Example) -> str:
    """Everything that the model is shown, in lower case."""
    shown = [message.content for message in example.messages]
    shown += [orjson.dumps((tool.description, tool.parameters)).decode() for tool in example.tools]
    return "\n".join(shown).lower()


def _texts(arguments: Any, path: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    if isinstance(arguments, str):
        yield path, arguments
    elif depth < 4 and isinstance(arguments, Mapping):
        for name, value in arguments.items():
            yield from _texts(value, f"{path}.{name}", depth + 1)
    elif depth < 4 and isinstance(arguments, list | tuple):
        for position, value in enumerate(arguments):
            yield from _texts(value, f"{path}[{position}]", depth + 1)


def _grounded(value: str, prompt: str) -> bool:
    """Whether a word of the value, or its beginning, stands in the prompt; true where there is no word to look for."""
    words = [word for word in _WORD.findall(value.lower()) if len(word) > 2 and not word.isdigit()]
    return not words or any(word[:STEM_CHARS] in prompt for word in words)


def _found(messages: Sequence[Message]) -> ToolsFound:
    """Tools written in a system or user text, and what to warn about them."""
    for message in messages:
        text = message.content
        if "{" in text and message.role in ("system", "user") and (found := _tools_in_text(text))[0]:
            return found
    return (), ()


_cache: OrderedDict[str | bytes, ToolsFound] = OrderedDict()


def _tools_in_text(text: str) -> ToolsFound:
    # System texts repeat through a data set, and reading tools out of them is slow. Long ones go by digest, to
    # bound what is held.
    key = text if len(text) <= LONG_TEXT_CHARS else hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest()
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = _found_tools(text)
        if len(_cache) > CACHED_TEXTS:
            _cache.popitem(last=False)
    return found


def _found_tools(text: str) -> ToolsFound:
    at = 0
    for _ in range(MOST_STARTS):
        start = _START.search(text, at)
        if start is None:
            break
        at = start.end() - 1
        value, end, loosely = _value_at(text, start.start())
        if value is not None and _looks_like_tools(value):
            try:
                tools = read_tools(value)
            except ParseError:
                at = end
                continue
            repaired = [(Reason.NOT_QUITE_JSON, "the tools in the prompt's text could only be read by repairing them")]
            return tools, (*(repaired if loosely else ()), *_about_tools(tools))
    return (), ()


def _value_at(text: str, start: int) -> tuple[Any, int, bool]:
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
        return value, end, False
    except (ValueError, RecursionError):
        found = read_loosely(text, start)
        return (*found, True) if found is not None else (None, start, True)


def _looks_like_tools(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict):
        return False
    if isinstance(first.get("tools"), list):
        return True
    return any(name in first for name in ("parameters", "inputSchema", "toolSpec", "function", "input_schema"))
