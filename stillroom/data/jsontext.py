"""One JSON record from bytes, strictly: duplicate keys, deep nesting, NaN and broken text are refused.

orjson does the work. It keeps the last of duplicate keys without a word, so the number of quotes
before and after parsing decides whether the slow, exact check is needed.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import orjson

from stillroom.data.reasons import Reason, Reject, excerpt

_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode(line: bytes, *, depth: int) -> Any:
    """The value that `line` holds.

    Raises:
        Reject: with the reason and, where there is one, the byte or character where it went wrong.
    """
    if line.count(b"{") + line.count(b"[") > depth and _is_deeper(line, depth):
        raise Reject(Reason.TOO_DEEP, f"is nested more than {depth} levels deep")
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _diagnose(line, error)
    if _may_repeat_keys(line, value):
        json.loads(line, object_pairs_hook=_unique)
    return value


def _may_repeat_keys(line: bytes, value: Any) -> bool:
    """False only if no object in `line` has a key twice.

    Written out again, the value has as many quotes as the line if no key was dropped, for every string
    keeps its own; only a quote written as an escape sequence counts on one side alone.
    """
    return line.count(b'"') != orjson.dumps(value).count(b'"') or b"\\u0022" in line


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for position, key in enumerate(keys) if key in keys[:position])
        raise Reject(Reason.DUPLICATE_KEYS, f"the key {excerpt(repeated)!r} stands twice in one object")
    return seen


def _is_deeper(line: bytes, depth: int) -> bool:
    level = 0
    for match in _STRUCTURE.finditer(line):
        first = line[match.start()]
        if first in b"[{":
            level += 1
            if level > depth:
                return True
        elif first in b"]}":
            level -= 1
    return False


def _diagnose(line: bytes, error: orjson.JSONDecodeError) -> NoReturn:
    """Tell apart the reasons for which orjson refuses; the standard library accepts more than it."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as broken:
        message = f"byte {line[broken.start]:#04x} at position {broken.start} is not UTF-8"
        raise Reject(Reason.INVALID_UTF8, message) from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except json.JSONDecodeError as reason:
        around = excerpt(text[max(0, reason.pos - 20) : reason.pos + 20])
        raise Reject(Reason.INVALID_JSON, f"{reason.msg} at character {reason.pos}: {around!r}") from None
    except (ValueError, RecursionError):
        raise Reject(Reason.INVALID_JSON, f"cannot be read: {error}") from None
    if _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise Reject(Reason.LONE_SURROGATE, f"half a character stands alone: {error.msg} at character {error.pos}")
    raise Reject(Reason.INVALID_JSON, f"cannot be read: {error}")


def _refuse_constant(name: str) -> NoReturn:
    raise Reject(Reason.NOT_A_NUMBER, f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise Reject(Reason.NOT_A_NUMBER, f"the number {excerpt(text)} is too large")
    return value
