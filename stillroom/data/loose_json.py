"""Almost-JSON, as prompts and documentation have it: single quotes, missing quotes, trailing commas.

Used to diagnose only: what it reads is never trained on. It recovers where a person would
(`"description: "text",` is the key description with a text), and gives up where that is not obvious.

Promise: depth and steps are bounded; anything unreadable is None.
"""

from __future__ import annotations

import re
from typing import Any

DEPTH = 32
UNCLOSED = 16
"""Quotes without an end before giving up: each costs a look through the rest of the text."""

_SPACE = re.compile(r"\s*+")
# A closing quote is one that structure follows; others belong to the text ("it's").
_QUOTED = {
    quote: re.compile(rf"{quote}((?:[^{quote}\\]|\\.|{quote}(?!\s*+(?:[,:}}\]]|$)))*+){quote}", re.DOTALL)
    for quote in "\"'"
}
_BARE = re.compile(r"[^,:{}\[\]\n]++")
_NUMBER = re.compile(r"-?\d++(?:\.\d++)?+(?:[eE][+-]?\d++)?+$")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


class _GaveUp(Exception):
    """The text is not even almost JSON."""


def read_loosely(text: str, start: int = 0) -> tuple[Any, int] | None:
    """The object or list at `start` and where it ends; None if there is none."""
    try:
        return _Loose(text).value(start, 0)
    except _GaveUp:
        return None


class _Loose:
    def __init__(self, text: str) -> None:
        self.text = text
        self.unclosed = 0

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        if depth > DEPTH:
            raise _GaveUp
        at = self.space(at)
        first = self.text[at : at + 1]
        if first == "{":
            return self.mapping(at + 1, depth)
        if first == "[":
            return self.items(at + 1, depth)
        return self.scalar(at)

    def mapping(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        while True:
            at = self.space(at)
            first = self.text[at : at + 1]
            if first == "}":
                return found, at + 1
            if first == ",":
                at += 1
                continue
            key, at = self.scalar(at)
            at = self.space(at)
            if self.text[at : at + 1] == ":":
                found[str(key)], at = self.value(at + 1, depth + 1)
            elif isinstance(key, str) and ":" in key:
                # A quote is missing: key and value came as one string.
                name, _, rest = key.partition(":")
                found[name.strip(" \"'")] = rest.strip(" \"'")
            else:
                raise _GaveUp

    def items(self, at: int, depth: int) -> tuple[list[Any], int]:
        found: list[Any] = []
        while True:
            at = self.space(at)
            first = self.text[at : at + 1]
            if first == "]":
                return found, at + 1
            if first == ",":
                at += 1
                continue
            value, at = self.value(at, depth + 1)
            found.append(value)

    def scalar(self, at: int) -> tuple[Any, int]:
        first = self.text[at : at + 1]
        if first and first in _QUOTED:
            if quoted := _QUOTED[first].match(self.text, at):
                return _ESCAPE.sub(_unescaped, quoted.group(1)), quoted.end()
            self.unclosed += 1
            if self.unclosed > UNCLOSED:
                raise _GaveUp
        bare = _BARE.match(self.text, at)
        if bare is None:
            raise _GaveUp
        word = bare.group().strip(" \t\r\"'")
        if _NUMBER.match(word):
            return float(word) if set(word) & set(".eE") else int(word[:300]), bare.end()
        return _WORDS.get(word, word), bare.end()

    def space(self, at: int) -> int:
        match = _SPACE.match(self.text, at)
        assert match is not None  # the pattern matches the empty text
        return match.end()


def _unescaped(escape: re.Match[str]) -> str:
    return {"n": "\n", "t": "\t"}.get(escape.group(1), escape.group(1))
