"""Is it the right call? Matching as syntax trees, as the Gorilla paper and BFCL define it.

A ground truth is a list of `{function: {parameter: [acceptable values]}}`; an acceptable "" says that the
parameter may be left out. The category says how calls and ground truth are put together:

    simple, multiple              one call, of the expected function: the ground truth holds one
    parallel, parallel_multiple   as many calls as the ground truth holds, in any order
    irrelevance                   no call at all; text that cannot be parsed calls nothing
    relevance                     at least one call, whichever

Values: types are exact (True is no integer), but an integer serves where a number is declared. Text is compared
without case, spaces and ``,./-_*^``, and with ' as "; so are the items of a list and the values of an object, one
level down and no deeper. Where the ground truth's type differs from the declared one, it is a variable's
name or a placeholder, and is compared exactly.

Promise: agrees with `bfcl_eval`'s ast_checker wherever that is well defined; benchmarks/matcher_vs_bfcl.py measures
it, tests/toolcalls/bfcl_defects.json holds the rest. Calls are never changed, and no call makes this raise.
Source: Patil et al. 2023, arXiv:2305.15334, section 3.3; bfcl-eval 2026.3.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stillroom.errors import DataError
from stillroom.schema import ToolCall, ToolSpec

FAILURE_KINDS: Final = (
    "unparseable",
    "no_call",
    "called_when_irrelevant",
    "wrong_count",
    "wrong_function",
    "missing_parameter",
    "unexpected_parameter",
    "wrong_type",
    "wrong_value",
)
_DECLARED: Final[dict[str, type]] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}
_IGNORED = str.maketrans("'", '"', " ,./-_*^")


@dataclass(frozen=True, slots=True)
class Match:
    """Whether the calls are right, and if not, why.

    Attributes:
        ok: they are right.
        kind: "" when right, else one of `FAILURE_KINDS`.
        detail: what was wanted and what was given, in a line.
        path: where: `calls[0].city`, or "" for the calls as a whole.
    """

    ok: bool
    kind: str = ""
    detail: str = ""
    path: str = ""


RIGHT: Final = Match(True)


def match(
    calls: Sequence[ToolCall] | None,
    expected: Sequence[Mapping[str, Mapping[str, Any]]] | None,
    tools: Sequence[ToolSpec],
    category: str,
    *,
    underscore_names: bool = False,
) -> Match:
    """Compare the calls of one answer with the ground truth.

    Args:
        calls: as `parse_calls` gave them; None: the answer could not be parsed.
        expected: the ground truth; not looked at for (ir)relevance.
        tools: what the model could call; their declared types decide how values are compared.
        category: any of BFCL's names for single-turn categories, `live_simple` for instance.
        underscore_names: the model was shown names with "_" for ".", since its interface takes no dots.

    Raises:
        DataError: the ground truth does not fit the tools or has another form.
    """
    if "relevance" in category:
        return _relevance(calls, wanted="irrelevance" not in category)
    wanted = read_truth(expected)
    if calls is None:
        return Match(False, "unparseable", f"wanted {_names(wanted)}, but the answer could not be parsed as calls")
    if not calls and wanted:
        return Match(False, "no_call", f"wanted {_names(wanted)}, but nothing was called")
    if calls and not wanted:
        return _relevance(calls, wanted=False)
    if len(calls) != len(wanted):
        names = ", ".join(call.name for call in calls)
        return Match(False, "wrong_count", f"wanted {_names(wanted)}, got {len(calls)} calls: {names}")
    # One call alone is the case without any order to choose; every category but (ir)relevance comes down to this.
    return _match_any_order(calls, wanted, tools, underscore_names)


def _relevance(calls: Sequence[ToolCall] | None, wanted: bool) -> Match:
    if wanted and not calls:
        return Match(False, "unparseable" if calls is None else "no_call", "wanted a call, but nothing was called")
    if not wanted and calls:
        return Match(False, "called_when_irrelevant", f"wanted no call, got {', '.join(call.name for call in calls)}")
    return RIGHT


def read_truth(expected: Sequence[Mapping[str, Mapping[str, Any]]] | None) -> list[tuple[str, Mapping[str, Any]]]:
    """The ground truth as (function, {parameter: acceptable values}) pairs."""
    if not isinstance(expected, Sequence) or isinstance(expected, str):
        raise DataError("the ground truth must be a list of {function: {parameter: [acceptable values]}}.")
    pairs: list[tuple[str, Mapping[str, Any]]] = []
    for index, item in enumerate(expected):
        pair = next(iter(item.items())) if isinstance(item, Mapping) and len(item) == 1 else (None, None)
        name, answer = pair
        if name is None or not isinstance(answer, Mapping) or not all(isinstance(v, list) for v in answer.values()):
            raise DataError(f"ground truth [{index}] must be {{function: {{parameter: [acceptable values]}}}}.")
        pairs.append((name, answer))
    return pairs


def _names(wanted: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(name for name, _ in wanted) or "no call"


def _match_any_order(
    calls: Sequence[ToolCall],
    wanted: Sequence[tuple[str, Mapping[str, Any]]],
    tools: Sequence[ToolSpec],
    underscore_names: bool,
) -> Match:
    """Each expected call takes the first call left that fits. The detail tells of the nearest one where none does."""
    left = list(range(len(calls)))
    for name, answer in wanted:
        failures: list[Match] = []
        for index in left:
            result = _match_call(calls[index], name, answer, tools, underscore_names, f"calls[{index}]")
            if result.ok:
                left.remove(index)
                break
            failures.append(result)
        else:
            return max(failures, key=lambda failure: FAILURE_KINDS.index(failure.kind))
    return RIGHT


# -- one call -------------------------------------------------------------------------------------------------


def _match_call(
    call: ToolCall, name: str, answer: Mapping[str, Any], tools: Sequence[ToolSpec], underscore_names: bool, path: str
) -> Match:
    schema = find_tool(name, tools).parameters
    shown = name.replace(".", "_") if underscore_names else name
    if call.name != shown:
        return Match(False, "wrong_function", f"wanted {shown}, got {call.name}", path)
    declared = schema.get("properties") or {}
    for parameter in [*required_of(schema), *answer]:
        may_be_left_out = parameter in answer and "" in answer[parameter] and parameter not in required_of(schema)
        if parameter not in call.arguments and not may_be_left_out:
            value = f"={_show_wanted(answer[parameter])}" if parameter in answer else ""
            return Match(False, "missing_parameter", f"wanted {parameter}{value}, got none", f"{path}.{parameter}")
    for parameter, value in call.arguments.items():
        where = f"{path}.{parameter}"
        if parameter not in declared or parameter not in answer:
            why = "the tool has no such parameter" if parameter not in declared else "it should be left out"
            return Match(False, "unexpected_parameter", f"got {parameter}={_show(value)}; {why}", where)
        kind = _compare(value, answer[parameter], declared[parameter])
        if kind:
            return Match(False, kind, f"wanted {_show_wanted(answer[parameter])}, got {_show(value)}", where)
    return RIGHT


def find_tool(name: str, tools: Sequence[ToolSpec]) -> ToolSpec:
    """The tool of that name, which its specification may spell with "_" for ".".

    Raises:
        DataError: there is none.
    """
    for spelling in (name, name.replace(".", "_")):
        for tool in tools:
            if tool.name == spelling:
                return tool
    raise DataError(f"the ground truth calls {name!r}, which is not among the tools.")


def required_of(schema: Mapping[str, Any]) -> Sequence[str]:
    required = schema.get("required")
    return required if isinstance(required, list) else ()


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list nested as deep
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _show_wanted(acceptable: Sequence[Any]) -> str:
    values = [value for value in acceptable if value != ""]
    if not values:
        return "it left out"
    return _show(values[0]) if len(values) == 1 else f"one of {_show(values)}"


# -- one value ------------------------------------------------------------------------------------------------


def _compare(value: Any, acceptable: Sequence[Any], schema: Any) -> str:
    """What is wrong with the value: a failure kind, or "" when it is acceptable."""
    declared = _type_of(schema, acceptable)
    if declared is float and type(value) is int:
        value = _as_float(value)  # 5 serves for 5.0, but inside lists and objects BFCL wants what the truth has
    given = next((type(each) for each in acceptable if each != ""), None)
    if type(value) is declared:
        item_type = _item_type(schema) if declared is list else None
        if item_type is not None and not _items_fit(value, acceptable, item_type):
            # A list that mixes 1 and 2.5 does not fit itself; what is given exactly is right nevertheless.
            given_exactly = item_type is not dict and any(_identical(value, each) for each in acceptable)
            return "" if given_exactly else "wrong_type"
        exact = given is not None and given is not declared
    elif given is not None and type(value) is given:
        item_type, exact = None, True
    else:
        return "wrong_type"
    return "" if _equal(value, acceptable, declared, item_type, exact) else "wrong_value"


def _equal(value: Any, acceptable: Sequence[Any], declared: type, item_type: type | None, exact: bool) -> bool:
    if exact or declared not in (str, list, dict):
        return value in acceptable
    if declared is str:
        return _standard(value) in [_standard(each) for each in acceptable if isinstance(each, str)]
    if declared is dict:
        return any(_equal_object(value, each) for each in acceptable if isinstance(each, Mapping))
    # A parameter that may be left out may be an empty list as well: in BFCL "" has no items either.
    lists = [[] if each == "" else each for each in acceptable if isinstance(each, list) or each == ""]
    if item_type is dict:
        return any(_equal_objects(value, each) for each in lists)
    return [_standard(item) for item in value] in [[_standard(item) for item in each] for each in lists]


def _equal_objects(values: Sequence[Any], acceptable: Sequence[Any]) -> bool:
    return len(values) == len(acceptable) and all(
        isinstance(value, Mapping) and isinstance(each, Mapping) and _equal_object(value, each)
        for value, each in zip(values, acceptable, strict=True)
    )


def _equal_object(value: Mapping[str, Any], acceptable: Mapping[str, Any]) -> bool:
    """Whether each key holds one of its acceptable values, and none is missing that may not be."""
    for key, item in value.items():
        if key not in acceptable or _standard(item) not in [_standard(each) for each in _list(acceptable[key])]:
            return False
    return all(key in value or "" in _list(each) for key, each in acceptable.items())


def _list(acceptable: Any) -> list[Any]:
    """Acceptable values; one that stands without its list accepts itself."""
    return acceptable if isinstance(acceptable, list) else [acceptable]


def _identical(value: Any, other: Any) -> bool:
    """Equal in every type too, at any depth."""
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_identical, value, other))
    return type(value) is type(other) and bool(value == other)


def _standard(value: Any) -> Any:
    return value.translate(_IGNORED).lower() if isinstance(value, str) else value


def _as_float(value: int) -> int | float:
    try:
        return float(value)
    except OverflowError:
        return value


def _type_of(schema: Any, acceptable: Sequence[Any]) -> type:
    """The Python type that a parameter declares; text where it declares none, as BFCL's `any` has it."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if isinstance(kind, list):
        kinds = [_DECLARED[each] for each in kind if each in _DECLARED]
        given = next((type(each) for each in acceptable if each != ""), None)
        return given if given in kinds else next(iter(kinds), str)
    return _DECLARED.get(kind, str) if isinstance(kind, str) else str


def _item_type(schema: Mapping[str, Any]) -> type | None:
    """The declared type of a list's items, or None where nothing is declared (BFCL always declares it)."""
    items = schema.get("items")
    return _type_of(items, ()) if isinstance(items, Mapping) and "type" in items else None


def _items_fit(value: Any, acceptable: Sequence[Any], item_type: type) -> bool:
    """Whether every item has the declared type, or that of the items of one acceptable list."""
    for each in acceptable:
        if not isinstance(each, list):
            return True
        given = next((type(item) for item in each if item != ""), None)
        if all(type(item) is item_type or (given is not None and type(item) is given) for item in value):
            return True
    return False
