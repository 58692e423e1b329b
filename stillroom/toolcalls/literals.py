"""The scanner under every parser here: values written as JSON or as Python literals, with positions.

Promise: nothing is evaluated; each character is looked at a bounded number of times; depth, count and
size are bounded before they cost anything; every refusal is a `CallParseError` with its position.

Read: strings in either quote, tripled too; integers and floats; True, False, None and true, false,
null; lists; tuples (as lists); objects with string keys. Refused, since guessing would be worse: bare
names, expressions, sets, NaN and infinities, repeated keys, raw line breaks and lone surrogates in strings.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from stillroom.errors import ParseError
from stillroom.toolcalls.limits import Limits

SPACE = re.compile(r"[ \t\r\n]*+")
# A tool's name may hold dots (Python, BFCL) and hyphens (OpenAI, Bedrock); a parameter's may be `Content-Type`.
NAME = re.compile(r"(?=\d*+[^\W\d])\w[\w-]*+(?:\.\w[\w-]*+)*+")
NUMBER = re.compile(r"-?+(?:\d++(?:_\d++)*+(?:\.\d*+)?+|\.\d++)(?:[eE][+-]?+\d++)?+", re.ASCII)
_PLAIN = {quote: re.compile(rf"[^{quote}\\\n\r\ud800-\udfff]*+") for quote in "\"'"}
_PLAIN_TRIPLE = {quote: re.compile(rf"[^{quote}\\\ud800-\udfff]*+") for quote in "\"'"}
_HEX = {"x": re.compile(r"[0-9a-fA-F]{2}"), "u": re.compile(r"[0-9a-fA-F]{4}"), "U": re.compile(r"[0-9a-fA-F]{8}")}
_OCTAL = re.compile(r"[0-7]{1,3}")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", '"': '"', "'": "'"}
_PYTHON_ESCAPES = {**_ESCAPES, "a": "\a", "v": "\v", "\n": ""}
_JSON_ESCAPES = {**_ESCAPES, "/": "/"}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class CallParseError(ParseError):
    """A `ParseError` that says which kind it is.

    Attributes:
        kind: `no_call` (the text holds none), `positional_argument`, `bare_name` (a variable or an expression
            where a value should be), `duplicate`, `too_large`, `ambiguous` or `syntax`.
    """

    def __init__(self, message: str, position: int = 0, kind: str = "syntax") -> None:
        super().__init__(message, position)
        self.kind = kind


class Scanner:
    """A cursor over `text` that reads one value at a time.

    Args:
        json_escapes: `\\/` is a slash and unknown escapes are refused, as in JSON; otherwise as in Python,
            where an unknown escape stands for itself, backslash included.
    """

    def __init__(self, text: str, limits: Limits, *, position: int = 0, json_escapes: bool = False) -> None:
        if len(text) > limits.text_chars:
            raise CallParseError(
                f"the text has {len(text):,} characters; at most {limits.text_chars:,} are read",
                limits.text_chars,
                "too_large",
            )
        self.text, self.limits, self.position = text, limits, position
        self.escapes = _JSON_ESCAPES if json_escapes else _PYTHON_ESCAPES
        self.json_escapes = json_escapes
        self.values = 0

    # -- the cursor ---------------------------------------------------------------------------------------

    def fail(self, message: str, kind: str = "syntax", position: int | None = None) -> NoReturn:
        """Raise at the cursor, or at `position`."""
        raise CallParseError(message, self.position if position is None else position, kind)

    def skip_space(self) -> str:
        """Move past white space; the next character, or "" at the end."""
        found = SPACE.match(self.text, self.position)
        assert found is not None  # the pattern matches the empty text
        self.position = found.end()
        return self.text[self.position : self.position + 1]

    def take(self, wanted: str) -> bool:
        """Move past white space and `wanted`, if it is next."""
        self.skip_space()
        if not self.text.startswith(wanted, self.position):
            return False
        self.position += len(wanted)
        return True

    def expect(self, wanted: str, where: str) -> None:
        if not self.take(wanted):
            self.fail(f"expected {wanted!r} {where}, found {self.next_words()}")

    def next_words(self) -> str:
        """What is at the cursor, for a message."""
        rest = self.text[self.position : self.position + 20]
        return repr(rest) if rest else "the end of the text"

    def name(self) -> str | None:
        """A name at the cursor, or None where there is none."""
        self.skip_space()
        found = NAME.match(self.text, self.position)
        if found is None:
            return None
        self.position = found.end()
        return found.group()

    # -- values -------------------------------------------------------------------------------------------

    def value(self, depth: int = 0) -> Any:
        """The JSON value at the cursor.

        Raises:
            CallParseError: it is none, or passes a limit.
        """
        self.values += 1
        if self.values > self.limits.values:
            self.fail(f"more than {self.limits.values:,} values", "too_large")
        if depth > self.limits.depth:
            self.fail(f"nested more than {self.limits.depth} deep", "too_large")
        char = self.skip_space()
        if char in ('"', "'"):
            return self._string(char)
        if char == "[":
            return self._items("]", depth)[0]
        if char == "(":
            items, comma = self._items(")", depth)
            return items if comma or not items else items[0]
        if char == "{":
            return self._object(depth)
        if char and char in "-+.0123456789":
            return self._number()
        return self._word(char)

    def _word(self, char: str) -> Any:
        start = self.position
        word = self.name()
        if word in _WORDS:
            return _WORDS[word]
        self.position = start
        if word is not None:
            self.fail(f"{word[:40]!r} is a bare name, not a value; put text in quotes", "bare_name")
        self.fail(f"expected a value, found {self.next_words()}")

    def _number(self) -> int | float:
        start = self.position
        self.position += self.text[start] == "+"
        found = NUMBER.match(self.text, self.position)
        if found is None:
            self.fail("not a number", position=start)
        digits = found.group()
        if len(digits) > self.limits.number_chars:
            self.fail(f"a number of {len(digits):,} characters; at most {self.limits.number_chars} fit", "too_large")
        self.position = found.end()
        body = digits.removeprefix("-").replace("_", "")
        if NAME.match(self.text, self.position):
            self.fail("not a number", position=start)
        if body.isdigit():
            if body[0] == "0" and body.strip("0"):
                self.fail("a number may not start with 0", position=start)
            return int(digits)
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            self.fail("a number too large for a float", position=start)
        return number

    def _items(self, close: str, depth: int) -> tuple[list[Any], bool]:
        """Values up to `close`, and whether a comma stood among them (which makes a tuple of one)."""
        self.position += 1
        items: list[Any] = []
        comma = False
        while not self.take(close):
            if items and not comma:
                self.fail(f"expected ',' or {close!r} in a list, found {self.next_words()}")
            items.append(self.value(depth + 1))
            comma = self.take(",")
        return items, comma or len(items) > 1

    def _object(self, depth: int) -> dict[str, Any]:
        self.position += 1
        out: dict[str, Any] = {}
        comma = True
        while not self.take("}"):
            if not comma:
                self.fail(f"expected ',' or '}}' in an object, found {self.next_words()}")
            quote = self.skip_space()
            if quote not in ('"', "'"):
                self.fail(f"expected a key in quotes, found {self.next_words()}")
            start = self.position
            key = self._string(quote)
            if key in out:
                self.fail(f"the key {key[:40]!r} stands twice in an object", "duplicate", start)
            self.expect(":", "after a key")
            out[key] = self.value(depth + 1)
            comma = self.take(",")
        return out

    # -- strings ------------------------------------------------------------------------------------------

    def _string(self, quote: str) -> str:
        start = self.position
        closing = quote * 3 if self.text.startswith(quote * 3, start) else quote
        plain = (_PLAIN if closing == quote else _PLAIN_TRIPLE)[quote]
        self.position += len(closing)
        parts: list[str] = []
        while True:
            found = plain.match(self.text, self.position)
            assert found is not None  # the pattern matches the empty text
            parts.append(found.group())
            self.position = found.end()
            if self.text.startswith(closing, self.position):
                self.position += len(closing)
                return "".join(parts)
            parts.append(self._special(start))

    def _special(self, start: int) -> str:
        """One character that stops a plain run: an escape, a lone quote in a tripled string, or an error."""
        char = self.text[self.position : self.position + 1]
        if char == "\\":
            return self._escape()
        if char in ('"', "'"):
            self.position += 1
            return char
        if not char:
            self.fail("a string that is never closed", position=start)
        if char in "\n\r":
            self.fail("a raw line break inside a string; write \\n")
        self.fail("half a surrogate pair, which is not text")

    def _escape(self) -> str:
        char = self.text[self.position + 1 : self.position + 2]
        if char in self.escapes and char:
            self.position += 2
            return self.escapes[char]
        if char in _HEX and (char == "u" or not self.json_escapes):
            return self._code_point(char)
        octal = None if self.json_escapes else _OCTAL.match(self.text, self.position + 1)
        if octal is not None:
            self.position = octal.end()
            return chr(int(octal.group(), 8))
        if self.json_escapes or char in ("", "N", "\r"):
            self.fail(f"unknown escape {self.text[self.position : self.position + 2]!r} in a string")
        self.position += 1
        return "\\"

    def _code_point(self, letter: str) -> str:
        code = self._hex(letter)
        if 0xD800 <= code < 0xDC00 and self.text.startswith("\\u", self.position):
            # JSON writes what lies beyond 0xFFFF as two escapes; models do so in Python text too.
            start, low = self.position, self._hex("u")
            if not 0xDC00 <= low < 0xE000:
                self.fail("half a surrogate pair, which is not text", position=start)
            return chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00))
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            self.fail(f"\\{letter} with {code:x}, which is not a character")
        return chr(code)

    def _hex(self, letter: str) -> int:
        found = _HEX[letter].match(self.text, self.position + 2)
        if found is None:
            self.fail(f"\\{letter} needs hexadecimal digits after it")
        self.position = found.end()
        return int(found.group(), 16)
