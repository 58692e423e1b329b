"""Numbers and text as people read them, for the report and the model card.

`visible` makes a model's text safe to look at: characters that would hide or reorder what surrounds them are
written as escapes, and what is too long is cut with a note. Escaping for HTML is the template's, always.
"""

from __future__ import annotations

import re
from typing import Any

from stillroom.evaluation.statistics import GapClosed

# C0 and C1 controls but tab and newline, zero-width and bidirectional controls, byte order mark, lone surrogates.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def clean(value: Any) -> Any:
    """A JSON value whose strings can be stored as UTF-8: lone surrogates become escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {clean(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value


def visible(text: str, limit: int) -> tuple[str, str]:
    """The text with hidden characters escaped, cut at `limit` characters; and a note where it was cut."""
    shown = _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text[:limit].replace("\r\n", "\n"))
    left = len(text) - limit
    return shown, f"{left:,} more characters; the whole answer stands in report.json" if left > 0 else ""


def share(value: float) -> str:
    """0.357 as `0.36`; two digits are more than a few hundred items support."""
    return f"{value:.2f}"


def percent(value: float) -> str:
    """0.714 as `71%`."""
    return f"{100 * value:.0f}%"


def p_value(value: float) -> str:
    """A p-value, never shown as zero."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def seconds(value: float | None) -> str:
    """A duration: `38 ms`, `1.24 s`, `12 min 5 s`, `3 h 2 min`."""
    if value is None:
        return "–"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(value: float | None) -> str:
    """Bytes: `269 MB`, decimal as on a disk's label."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def count(value: float | None) -> str:
    """A count with separators; millions and billions short: `135M`, `1.2B`."""
    if value is None:
        return "–"
    if value >= 1e9:
        return f"{value / 1e9:.3g}B"
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value:,.0f}"


def price(value: float | None) -> str:
    """US dollars."""
    return "–" if value is None else f"${value:,.2f}" if value >= 0.01 or value == 0 else f"${value:.4f}"


def fraction(value: float) -> str:
    """A ratio below one, as people say it: `a quarter`, `1/12`."""
    named = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 10: "a tenth"}
    if value >= 0.75:
        return f"{100 * value:.0f}%"
    below = round(1 / value)
    return named.get(below, f"1/{below}")


def gap_interval(gap: GapClosed, confidence: float = 0.95) -> str:
    """The interval of a share of the gap, in words."""
    level = percent(confidence)
    if gap.low is not None and gap.high is not None:
        return f"{level} interval {percent(gap.low)} to {percent(gap.high)}"
    if gap.low is not None:
        return f"{level} interval from {percent(gap.low)}, not bounded above"
    if gap.high is not None:
        return f"{level} interval up to {percent(gap.high)}, not bounded below"
    return f"no {level} interval: {gap.reason}"


def failure(kind: str) -> str:
    """A failure kind as words: `wrong_value` as `wrong value`."""
    return kind.replace("_", " ").replace(":", ": ")
