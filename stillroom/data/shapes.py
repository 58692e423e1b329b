"""Taking values out of untrusted records: the right type, or a reason that names the path."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from stillroom.data.reasons import Reason, Reject, excerpt
from stillroom.errors import StillroomError
from stillroom.schema import ToolSpec
from stillroom.toolcalls import read_tools

CACHED_TOOLS = 64
_NAMES = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}


def a_mapping(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is an object."""
    if not isinstance(value, dict):
        raise Reject(Reason.WRONG_TYPE, f"{where} must be an object, not {type_name(value)}")
    return value


def a_string(record: Any, key: str, where: str = "") -> str:
    """`record[key]`, if it is a string."""
    value = _member(record, key, where)
    if not isinstance(value, str):
        raise Reject(Reason.WRONG_TYPE, f"{_path(where, key)} must be a string, not {type_name(value)}")
    return value


def a_list(record: Any, key: str, where: str = "") -> list[Any]:
    """`record[key]`, if it is a list."""
    value = _member(record, key, where)
    if not isinstance(value, list):
        raise Reject(Reason.WRONG_TYPE, f"{_path(where, key)} must be a list, not {type_name(value)}")
    return value


def no_others(record: Mapping[str, Any], allowed: frozenset[str], where: str = "") -> None:
    """Refuse members that the format does not have."""
    if not record.keys() <= allowed:
        unknown = next(key for key in record if key not in allowed)
        names = ", ".join(sorted(allowed))
        message = f"{_path(where, excerpt(unknown))} is not part of the format; allowed: {names}"
        raise Reject(Reason.UNKNOWN_FIELD, message)


def parsed_tools(value: Any, where: str) -> tuple[ToolSpec, ...]:
    """Tools of any dialect; `value` is fresh from `decode`."""
    # The same tools stand in record after record, and reading them costs more than all the rest.
    key = hashlib.blake2b(orjson.dumps(value), digest_size=16).digest()
    tools = _cache.get(key)
    if tools is None:
        try:
            tools = read_tools(value)
        except StillroomError as error:
            raise Reject(Reason.BAD_TOOLS, f"{where}: {excerpt(str(error))}") from None
        _cache[key] = tools
        if len(_cache) > CACHED_TOOLS:
            _cache.popitem(last=False)
    return tools


_cache: OrderedDict[bytes, tuple[ToolSpec, ...]] = OrderedDict()


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    return _NAMES.get(type(value), "a number")


def _member(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict):
        raise Reject(Reason.WRONG_TYPE, f"{where or 'the record'} must be an object, not {type_name(record)}")
    if key not in record:
        raise Reject(Reason.MISSING_FIELD, f"{_path(where, key)} is missing")
    return record[key]


def _path(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


__all__: Sequence[str] = ("a_list", "a_mapping", "a_string", "no_others", "parsed_tools", "type_name")
