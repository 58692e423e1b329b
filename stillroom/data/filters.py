"""Selecting records by their metadata, as `requestMetadataFilters` of the hosted service does.

A filter has exactly one operator: `equals` or `notEquals` with exactly one key, or `andAll` / `orAll`
with 1 to 16 of these. A record without the key satisfies `notEquals`. Inside a list, a filter that
carries both operators requires both (the service's model is no union there).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_FILTERS = 16
BASE = ("equals", "notEquals")
LISTS = ("andAll", "orAll")


def check_filter(where: Any) -> None:
    """Raises ValueError, with what to write instead, if `where` is not a filter."""
    if not isinstance(where, Mapping):
        raise ValueError(f"a metadata filter is a mapping such as {{equals: {{key: value}}}}, not {where!r:.80}")
    operators = [name for name in where if name in BASE + LISTS]
    unknown = [name for name in where if name not in BASE + LISTS]
    if unknown:
        raise ValueError(f"unknown filter operator {unknown[0]!r:.80}; valid: {', '.join(BASE + LISTS)}")
    if len(operators) != 1:
        given = ", ".join(operators) or "none"
        raise ValueError(f"a metadata filter has exactly one operator, not {given}; join several with andAll or orAll")
    name = operators[0]
    if name in BASE:
        _check_pair(name, where[name])
        return
    inner = where[name]
    if not isinstance(inner, list | tuple) or not 1 <= len(inner) <= MOST_FILTERS:
        raise ValueError(f"{name} takes a list of 1 to {MOST_FILTERS} filters, not {inner!r:.80}")
    for base in inner:
        if not isinstance(base, Mapping) or not base or any(key not in BASE for key in base):
            raise ValueError(f"{name} takes filters with equals or notEquals only, not {base!r:.80}")
        for key, pair in base.items():
            _check_pair(key, pair)


def matches(where: Mapping[str, Any] | None, metadata: Mapping[str, Any]) -> bool:
    """Whether a record with this metadata is selected; `where` has passed `check_filter`."""
    if where is None:
        return True
    if "andAll" in where:
        return all(_base_matches(base, metadata) for base in where["andAll"])
    if "orAll" in where:
        return any(_base_matches(base, metadata) for base in where["orAll"])
    return _base_matches(where, metadata)


def _base_matches(base: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    for operator, pair in base.items():
        ((key, value),) = pair.items()
        if (metadata.get(key) == value) != (operator == "equals"):
            return False
    return True


def _check_pair(name: str, pair: Any) -> None:
    if not isinstance(pair, Mapping) or len(pair) != 1:
        raise ValueError(f"{name} takes exactly one key and its value, not {pair!r:.80}")
    ((key, value),) = pair.items()
    if not isinstance(key, str) or not isinstance(value, str):
        raise ValueError(f"{name}: request metadata is text, but {key!r:.40}: {value!r:.40} is not; quote it")
