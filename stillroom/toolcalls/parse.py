"""Tool calls out of the text that a model wrote, in every dialect that models write.

    python   [get_weather(city="Paris", days=3)]      also without brackets, or several of them
    json     {"name": "get_weather", "arguments": {"city": "Paris"}}    or a list of such
    hermes   <tool_call>{"name": ..., "arguments": ...}</tool_call>     Hermes, Qwen
    llama    <|python_tag|>{"name": ..., "parameters": ...}             or <function=name>{...}</function>
    auto     whichever of these the text is; a code fence, a `<think>` part and prose around a single
             group of calls are passed over

Promise: on any text, in time linear in its length, the calls or a `ParseError` with its position.
A text that calls nothing raises with kind `no_call`; an explicit empty list `[]` is no calls: ().
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, NoReturn

from stillroom.schema import ToolCall
from stillroom.toolcalls.limits import DEFAULT_LIMITS, Limits
from stillroom.toolcalls.literals import NAME, CallParseError, Scanner

CALL_DIALECTS: Final = ("auto", "python", "json", "hermes", "llama")

_PYTHON_TAG = "<|python_tag|>"
_FUNCTION_TAG = re.compile(r"<function=([^<>\s\ud800-\udfff]{1,256})>")
_FENCE = re.compile(r"```[\w+-]*+[ \t]*+\n?")
_OBJECT = r"\{[ \t\r\n]*+[\"'](?:name|function|type)[\"']"
# Where calls may start inside prose: a list of them anywhere, a bare one or an object only at a line's start. A
# space before the parenthesis makes "Paris (France) is" out of a bare call, so only a list may have one.
_START = re.compile(rf"\[[ \t\r\n]*+(?:{NAME.pattern}[ \t]*+\(|{_OBJECT})|(?m:^)[ \t]*+(?:{NAME.pattern}\(|{_OBJECT})")
_CALL_HERE = re.compile(rf"{NAME.pattern}[ \t]*+\(")
_BARE_CALL = re.compile(rf"{NAME.pattern}\(")
_EMPTY = re.compile(r"\[[ \t\r\n]*+\]")
_NAME_SO_FAR = re.compile(r"[\w.-]*+")
_OBJECT_HERE = re.compile(r"\[?+[ \t\r\n]*+\{")


def parse_calls(text: str, dialect: str = "auto", *, limits: Limits = DEFAULT_LIMITS) -> tuple[ToolCall, ...]:
    """The calls that `text` makes, in the order in which they stand.

    Values are JSON values: tuples become lists, and True, true, None and null are all read.

    Args:
        text: what the model wrote; special tokens that end a turn must be gone already.
        dialect: one of `CALL_DIALECTS`.

    Returns:
        One or more calls, or () for an explicit empty list.

    Raises:
        ParseError: no call (`kind` is `no_call`), not a call, or past a limit; `position` is in `text`.
        ValueError: the dialect is unknown.
    """
    if dialect not in _READERS:
        raise ValueError(f"unknown dialect {dialect!r}; choose one of {', '.join(CALL_DIALECTS)}")
    scanner = Scanner(text, limits)
    scanner.skip_space()
    calls = _READERS[dialect](scanner)
    if scanner.skip_space():
        scanner.fail(f"text after the calls: {scanner.next_words()}")
    return tuple(calls)


def may_begin_calls(text: str) -> bool:
    """Whether `text`, or what it is the beginning of, may have calls before any words: False once words come first.

    A tag, a code fence or an opening bracket may begin calls; `Here is` may not, and `get` still may.
    """
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] in ("", "[", "{", "<", "`"):
        return True
    end = _NAME_SO_FAR.match(text, start).end()  # type: ignore[union-attr]
    return end == len(text) or (end > start and text[end] == "(")


def _auto(scanner: Scanner) -> list[ToolCall]:
    if scanner.text.startswith("<think>", scanner.position):
        end = scanner.text.find("</think>", scanner.position)
        if end < 0:
            _no_call(scanner)
        scanner.position = end + len("</think>")
    char = scanner.skip_space()
    text, start = scanner.text, scanner.position
    # What starts as calls is read as calls: tags and fences inside its strings mean nothing.
    if not _starts_calls(text, start, char):
        if text.find("<tool_call>", start) >= 0:
            return _hermes(scanner)
        if text.find(_PYTHON_TAG, start) >= 0 or _FUNCTION_TAG.search(text, start):
            return _llama(scanner)
        fences = [found for _, found in zip(range(3), _FENCE.finditer(text, start), strict=False)]
        if len(fences) == 2:
            return _fenced(scanner, fences[0].end(), fences[1].start())
        found = _START.search(text, start)
        if found is None:
            _no_call(scanner)
        scanner.position = found.start()
        scanner.skip_space()
    calls = _calls_here(scanner)
    _only_prose_follows(scanner)
    return calls


def _starts_calls(text: str, position: int, char: str) -> bool:
    """Whether the text here must be calls: a name with its parenthesis, an object, or a list of either."""
    if char == "{":
        return True
    if char == "[":
        # "[1] says that ..." is prose; "[]" says in so many words that nothing is called.
        return _START.match(text, position) is not None or _EMPTY.match(text, position) is not None
    return _BARE_CALL.match(text, position) is not None


def _calls_here(scanner: Scanner) -> list[ToolCall]:
    return _json(scanner) if _OBJECT_HERE.match(scanner.text, scanner.position) else _python(scanner)


def _fenced(scanner: Scanner, start: int, end: int) -> list[ToolCall]:
    """The calls inside the text's only code fence; the words around it are passed over."""
    inner = Scanner(scanner.text[:end], scanner.limits, position=start)
    if not inner.skip_space():
        _no_call(scanner)
    calls = _calls_here(inner)
    if inner.skip_space():
        inner.fail(f"text after the calls: {inner.next_words()}")
    scanner.position = len(scanner.text)
    return calls


def _only_prose_follows(scanner: Scanner) -> None:
    again = _START.search(scanner.text, scanner.position)
    if again is not None:
        scanner.fail("a second group of calls; which one counts is unclear", "ambiguous", again.start())
    scanner.position = len(scanner.text)


def _no_call(scanner: Scanner) -> NoReturn:
    scanner.fail("the text calls no tool", "no_call")


# -- python ---------------------------------------------------------------------------------------------------


def _python(scanner: Scanner) -> list[ToolCall]:
    calls: list[ToolCall] = []
    if scanner.take("["):
        while not scanner.take("]"):
            calls.append(_python_call(scanner, calls))
            if not scanner.take(","):
                scanner.expect("]", "after a call")
                break
        return calls
    calls.append(_python_call(scanner, calls))
    while True:
        comma = scanner.take(",") or scanner.take(";")
        scanner.skip_space()
        if not _CALL_HERE.match(scanner.text, scanner.position):
            if comma and scanner.position < len(scanner.text):
                scanner.fail(f"expected another call, found {scanner.next_words()}")
            return calls
        calls.append(_python_call(scanner, calls))


def _python_call(scanner: Scanner, calls: list[ToolCall]) -> ToolCall:
    _count(scanner, calls)
    scanner.skip_space()
    start = scanner.position
    name = scanner.name()
    if name is None:
        if start == len(scanner.text) or scanner.text[start] not in "\"'{[(-+.0123456789":
            scanner.fail(f"expected a call such as name(key=value), found {scanner.next_words()}", "no_call")
        scanner.fail("expected a call such as name(key=value), found a value")
    if not scanner.take("("):
        kind = "no_call" if not calls else "syntax"
        scanner.fail(f"expected '(' after {name[:40]!r}, found {scanner.next_words()}", kind)
    arguments: dict[str, Any] = {}
    while not scanner.take(")"):
        _argument(scanner, arguments)
        if not scanner.take(","):
            scanner.expect(")", "after an argument")
            break
    return ToolCall(name, arguments)


def _argument(scanner: Scanner, arguments: dict[str, Any]) -> None:
    """`key=value` or `**{"any key": value}` into `arguments`."""
    if scanner.take("**"):
        scanner.skip_space()
        start = scanner.position
        given = scanner.value()
        if not isinstance(given, dict):
            scanner.fail("'**' needs an object after it", position=start)
    else:
        scanner.skip_space()
        start = scanner.position
        key = scanner.name()
        if key is None or not scanner.take("="):
            scanner.fail("an argument without its name; write name=value", "positional_argument", start)
        given = {key: scanner.value()}
    for key, value in given.items():
        if key in arguments:
            scanner.fail(f"the argument {key[:40]!r} is given twice", "duplicate", start)
        arguments[key] = value


def _count(scanner: Scanner, calls: list[ToolCall]) -> None:
    if len(calls) >= scanner.limits.calls:
        scanner.fail(f"more than {scanner.limits.calls} calls", "too_large")


# -- json and the dialects around it --------------------------------------------------------------------------


def _json(scanner: Scanner) -> list[ToolCall]:
    """One object, a list of them, or several one after the other."""
    inner = _as_json(scanner)
    calls: list[ToolCall] = []
    char = inner.skip_space()
    if char not in ("{", "["):
        inner.fail(f"expected a call as a JSON object, found {inner.next_words()}", "no_call")
    while char in ("{", "["):
        start = inner.position
        value = inner.value()
        for item in value if isinstance(value, list) else [value]:
            _json_call(inner, item, start, calls)
        scanner.position = inner.position
        if not inner.take(","):
            inner.take(";")
        char = inner.skip_space()
    return calls


def _as_json(scanner: Scanner) -> Scanner:
    return Scanner(scanner.text, scanner.limits, position=scanner.position, json_escapes=True)


def _json_call(scanner: Scanner, item: Any, start: int, calls: list[ToolCall]) -> None:
    """Append what one object says: a call in any of the wire forms, or a message that carries several."""
    _count(scanner, calls)
    if isinstance(item, dict) and isinstance(item.get("tool_calls"), list):
        for inner in item["tool_calls"]:
            if isinstance(inner, dict) and "tool_calls" in inner:
                _not_a_call(scanner, start)
            _json_call(scanner, inner, start, calls)
        return
    for wrapper in ("function", "toolUse"):
        if isinstance(item, dict) and isinstance(item.get(wrapper), dict):
            item = item[wrapper]
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
        _not_a_call(scanner, start)
    key = next((key for key in ("arguments", "parameters", "input") if key in item), None)
    arguments = item[key] if key else {}
    if isinstance(arguments, str):
        arguments = _encoded(scanner, arguments, start)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        scanner.fail(f"the arguments of {item['name'][:40]!r} are no object", position=start)
    calls.append(ToolCall(item["name"], arguments))


def _not_a_call(scanner: Scanner, start: int) -> NoReturn:
    scanner.fail('not a call: expected an object with "name" and "arguments"', position=start)


def _encoded(scanner: Scanner, text: str, start: int) -> Any:
    """Arguments that OpenAI's wire carries as JSON text inside a string."""
    inner = Scanner(text, scanner.limits, json_escapes=True)
    try:
        value = inner.value() if inner.skip_space() else {}
        if inner.skip_space():
            inner.fail(f"text after the arguments: {inner.next_words()}")
    except CallParseError as error:
        raise CallParseError(f"in the arguments' text: {error}", start, error.kind) from None
    return value


def _hermes(scanner: Scanner) -> list[ToolCall]:
    calls: list[ToolCall] = []
    open_tag, close_tag = "<tool_call>", "</tool_call>"
    at = scanner.text.find(open_tag, scanner.position)
    if at < 0:
        _no_call(scanner)
    while at >= 0:
        scanner.position = at + len(open_tag)
        inner = _as_json(scanner)
        inner.skip_space()
        start = inner.position
        _json_call(inner, inner.value(), start, calls)
        # The closing tag may be what generation stopped at.
        if not inner.take(close_tag) and inner.skip_space():
            inner.fail(f"expected {close_tag!r} after a call, found {inner.next_words()}")
        scanner.position = inner.position
        at = scanner.text.find(open_tag, scanner.position)
    scanner.position = len(scanner.text)
    return calls


def _llama(scanner: Scanner) -> list[ToolCall]:
    at = scanner.text.find(_PYTHON_TAG, scanner.position)
    if at >= 0:
        scanner.position = at + len(_PYTHON_TAG)
        return _calls_here(scanner)
    if _FUNCTION_TAG.search(scanner.text, scanner.position) is None:
        return _calls_here(scanner)
    calls: list[ToolCall] = []
    while (found := _FUNCTION_TAG.search(scanner.text, scanner.position)) is not None:
        _count(scanner, calls)
        scanner.position = found.end()
        inner = _as_json(scanner)
        arguments = inner.value()
        if not isinstance(arguments, dict):
            scanner.fail(f"the arguments of {found.group(1)[:40]!r} are no object")
        inner.take("</function>")
        calls.append(ToolCall(found.group(1), arguments))
        scanner.position = inner.position
    scanner.position = len(scanner.text)
    return calls


_READERS: Final[dict[str, Callable[[Scanner], list[ToolCall]]]] = {
    "auto": _auto,
    "python": _python,
    "json": _json,
    "hermes": _hermes,
    "llama": _llama,
}
