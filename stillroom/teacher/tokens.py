"""A server's tokens, named by id, bytes or text, as ids of the student's tokenizer.

Promise: an id is returned only for the token that the server meant; two tokenizers that differ are refused, never
mixed up. Text that does not say which token it is (half a character, a name that two tokens share) gives None.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from stillroom.errors import ConfigError
from stillroom.schema import digest

_LOST = "\ufffd"  # what servers write for the bytes of half a character


class TokenTable:
    """The tokens of a tokenizer by their bytes.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        read = _byte_level if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else _sentencepiece
        added = {index: str(token).encode() for index, token in tokenizer.added_tokens_decoder.items()}
        names = {index: name for name, index in tokenizer.get_vocab().items()}
        self._bytes_of = {index: added.get(index) or read(name) for index, name in names.items()}
        shared = Counter(self._bytes_of.values())
        self._id_of = {said: index for index, said in self._bytes_of.items() if shared[said] == 1}
        self.size = max(names) + 1

    def id_of(self, token: Mapping[str, Any]) -> int | None:
        """The id of a token as servers write one: `{"token", "bytes", "id"}`, the last two often absent.

        Raises:
            ConfigError: the server's id stands for other text here, so its tokenizer is another.
        """
        text, raw, stated = token.get("token"), token.get("bytes"), token.get("id")
        if isinstance(text, str) and (named := re.fullmatch(r"token_id:(\d{1,9})", text)):
            text, stated = "", int(named[1])
        said = bytes(raw) if isinstance(raw, list) else text.encode() if isinstance(text, str) else b""
        if isinstance(stated, int) and not isinstance(stated, bool):
            return self._agreed(stated, said)
        return None if _LOST.encode() in said else self._id_of.get(said)

    def _agreed(self, index: int, said: bytes) -> int:
        """`index`, if it may be what is called `said` there; special tokens have no text on some servers."""
        ours = self._bytes_of.get(index)
        unsaid = not said or _LOST.encode() in said
        if ours is not None and (unsaid or ours.strip() == said.strip()):
            return index
        here = "no token" if ours is None else repr(ours.decode("utf-8", "replace"))
        raise different(f"token {index} is {said.decode('utf-8', 'replace')!r} there and {here} here")


def different(why: str) -> ConfigError:
    """The refusal of a teacher whose tokens are not the student's."""
    return ConfigError(
        f"the teacher's tokenizer is not the student's: {why}.\n"
        "help: distil the teacher's words (sequence KD), or compare across tokenizers with the ULD objective, which "
        "needs the teacher in memory."
    )


def check_same_tokens(student: Any, teacher: Any) -> None:
    """Refuse a teacher whose ids mean other tokens than the student's.

    Args:
        student, teacher: tokenizers.

    Raises:
        ConfigError: names the first id that differs.
    """
    ours, theirs = ({index: token for token, index in one.get_vocab().items()} for one in (student, teacher))
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise different(f"token {index} is {theirs.get(index)!r} there and {ours.get(index)!r} here")


def vocabulary_digest(tokenizer: Any) -> str:
    """Digest of which token has which id: equal where two models mean the same by an id."""
    return digest(dict(sorted(tokenizer.get_vocab().items())))


def _byte_level(name: str) -> bytes:
    """A token of GPT-2's byte alphabet, in which every byte has a printable character."""
    try:
        return bytes(_ALPHABET[character] for character in name)
    except KeyError:
        return name.encode()


def _sentencepiece(name: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("\u2581", " ").encode()


def _alphabet() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
    return dict(zip(characters, printable + others, strict=True))


_ALPHABET = _alphabet()
