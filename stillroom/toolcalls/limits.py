"""How much of a text or a specification is read before it is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one parse may take; past any of them it raises, so time and memory stay linear in `text_chars`."""

    text_chars: int = 1_000_000
    """Characters of text."""

    depth: int = 64
    """Lists, objects and parentheses inside one another."""

    calls: int = 128
    """Calls in one answer."""

    values: int = 100_000
    """Values in one text, however they are nested."""

    number_chars: int = 400
    """Characters of one number; converting longer ones takes more than linear time."""

    tools: int = 1_000
    """Tools in one specification."""


DEFAULT_LIMITS = Limits()
