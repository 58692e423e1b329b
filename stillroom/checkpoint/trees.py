"""States as trees: nested dictionaries and lists whose leaves are tensors or small values.

Leaves are named as DCP names them: the keys on the way, joined by dots. A list is a branch where it holds tensors
or dictionaries, and a leaf otherwise; a tuple is a leaf. DCP keeps keys as text and forgets empty branches; the
`shape` of a tree, kept beside the checkpoint, has both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from stillroom.errors import CheckpointError

Shape = Any
"""JSON: `{"dict": [[key, shape], ...]}`, `{"list": [shape, ...]}`, or the name of a leaf."""


def leaves(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Every leaf of `state` by its name, in order.

    Raises:
        CheckpointError: two leaves have the same name, or a key is neither text nor an integer.
    """
    found: dict[str, Any] = {}
    for key, value in state.items():
        _collect(value, _text(key, ""), found)
    return found


class Outline:
    """The tree of a state, to see quickly whether another state has the same and to take its leaves."""

    def __init__(self, state: Any) -> None:
        self._keys = list(state) if isinstance(state, Mapping) else None
        entries = state.values() if isinstance(state, Mapping) else state
        self._below = [Outline(entry) if is_branch(entry) else None for entry in entries]

    def leaves_of(self, state: Any) -> list[Any] | None:
        """The leaves in the order of `leaves`; None where the tree is another one."""
        found: list[Any] = []
        return found if self._collect(state, found) else None

    def _collect(self, state: Any, found: list[Any]) -> bool:
        if self._keys is None:
            if not isinstance(state, list) or len(state) != len(self._below):
                return False
            entries: Iterable[Any] = state
        else:
            if not isinstance(state, Mapping) or list(state) != self._keys:
                return False
            entries = state.values()
        for below, entry in zip(self._below, entries, strict=True):
            if below is None:
                found.append(entry)
            elif not below._collect(entry, found):
                return False
        return True


def shape_of(state: Mapping[Any, Any]) -> Shape:
    """The tree without its leaves: what `fill` needs to build it again."""
    return _shape(state, "")


def shape_from_paths(paths: Mapping[str, Iterable[str | int]]) -> Shape:
    """The tree that DCP's own record of paths by leaf describes; integers stand for places in lists."""
    root: dict[Any, Any] = {}
    for name, path in paths.items():
        *way, last = path
        node = root
        for part in way:
            node = node.setdefault(part, {})
        node[last] = name
    return _shape_of_paths(root)


def fill(into: MutableMapping[Any, Any], shape: Shape, place: Callable[[str, Any], Any]) -> None:
    """Put `place(name, present)` at every leaf of `shape`; branches that `into` lacks are made.

    Args:
        place: gets a leaf's name and what is there now (None where nothing is); what it returns is stored.
    """
    for key, below in shape["dict"]:
        key = _key_in(into, key)
        into[key] = _filled(into.get(key), below, place)


def is_branch(node: Any) -> bool:
    """Whether `node` has leaves of its own: a mapping, or a list that holds tensors or mappings somewhere."""
    if isinstance(node, list):
        return any(isinstance(value, Tensor) or is_branch(value) for value in node)
    return isinstance(node, Mapping)


def selector(keys: Collection[str]) -> Callable[[str], bool]:
    """Whether a leaf is one of `keys`, or below one of them."""
    return lambda name: any(name == key or name.startswith(f"{key}.") for key in keys)


def prune(shape: Shape, keep: Callable[[str], bool]) -> Shape:
    """`shape` with only the leaves that are kept; a list stays whole where one of its leaves does."""
    if isinstance(shape, str):
        return shape if keep(shape) else None
    if "list" in shape:
        return shape if any(prune(below, keep) is not None for below in shape["list"]) else None
    entries = [[key, kept] for key, below in shape["dict"] if (kept := prune(below, keep)) is not None]
    return {"dict": entries} if entries or not shape["dict"] else None


def _collect(node: Any, name: str, found: dict[str, Any]) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            _collect(value, f"{name}.{_text(key, name)}", found)
    elif is_branch(node):
        for index, value in enumerate(node):
            _collect(value, f"{name}.{index}", found)
    elif name in found:
        raise CheckpointError(f"two leaves of the state are both called {name!r}.\nhelp: rename one of the keys.")
    else:
        found[name] = node


def _text(key: Any, name: str) -> str:
    if type(key) in (str, int):
        return str(key)
    raise CheckpointError(f"state key {key!r} at {name or 'the top'} is neither text nor an integer.")


def _shape(node: Any, name: str) -> Shape:
    if isinstance(node, Mapping):
        return {"dict": [[key, _shape(value, f"{name}.{key}" if name else str(key))] for key, value in node.items()]}
    if is_branch(node):
        return {"list": [_shape(value, f"{name}.{index}") for index, value in enumerate(node)]}
    return name


def _shape_of_paths(node: Any) -> Shape:
    if isinstance(node, str):
        return node
    if node and all(isinstance(key, int) for key in node):
        return {"list": [_shape_of_paths(node[index]) for index in sorted(node)]}
    return {"dict": [[key, _shape_of_paths(below)] for key, below in node.items()]}


def _key_in(into: Mapping[Any, Any], key: Any) -> Any:
    """DCP keeps an integer key as text: where `into` has the integer, that is meant."""
    return int(key) if isinstance(key, str) and key not in into and key.isdecimal() and int(key) in into else key


def _filled(present: Any, shape: Shape, place: Callable[[str, Any], Any]) -> Any:
    if isinstance(shape, str):
        return place(shape, present)
    if "dict" in shape:
        branch = present if isinstance(present, MutableMapping) else {}
        fill(branch, shape, place)
        return branch
    present = present if isinstance(present, list) else []
    wanted = shape["list"]
    padded = [*present[: len(wanted)], *([None] * (len(wanted) - len(present)))]
    present[:] = [_filled(value, below, place) for value, below in zip(padded, wanted, strict=True)]
    return present


def paths(shape: Shape, way: tuple[str | int, ...] = ()) -> dict[str, tuple[str | int, ...]]:
    """Every leaf's path in DCP's terms: keys as text, places in lists as integers."""
    if isinstance(shape, str):
        return {shape: way}
    found: dict[str, tuple[str | int, ...]] = {}
    for index, entry in enumerate(shape.get("list", ())):
        found |= paths(entry, (*way, index))
    for key, entry in shape.get("dict", ()):
        found |= paths(entry, (*way, str(key)))
    return found


def merged(shapes: Sequence[Shape]) -> Shape:
    """One tree with the leaves of all; where they differ in kind, the first one's."""
    first, *others = shapes
    if isinstance(first, str) or all(other == first for other in others):
        return first
    if "list" in first:
        lists = [shape["list"] for shape in shapes if not isinstance(shape, str) and "list" in shape]
        longest = max(map(len, lists))
        return {"list": [merged([each[index] for each in lists if index < len(each)]) for index in range(longest)]}
    entries: dict[Any, list[Shape]] = {}
    for shape in shapes:
        if not isinstance(shape, str):
            for key, below in shape.get("dict", ()):
                entries.setdefault(key, []).append(below)
    return {"dict": [[key, merged(below)] for key, below in entries.items()]}
