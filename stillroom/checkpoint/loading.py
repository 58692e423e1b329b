"""From a snapshot into a state: every rank reads the pieces that overlap what it holds.

First everything that is needed is checked and looked up, then it is copied: damage leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.checkpoint import trees
from stillroom.checkpoint.framing import copyable
from stillroom.checkpoint.layouts import Box, local_piece
from stillroom.checkpoint.reading import READERS, Snapshot, Stored
from stillroom.errors import CheckpointError

Copy = tuple[Tensor, Tensor]
"""Where to, and from where."""


class Read(NamedTuple):
    """Some rows of a stored piece, all of them if None, and where they go.

    Attributes:
        shared: what of the tensor both hold.
        box: what `target` holds of it.
    """

    name: str
    stored: Stored
    rows: tuple[int, int] | None
    shared: Box
    target: Tensor
    box: Box

    def copy(self, snapshot: Snapshot) -> Copy:
        source = snapshot.piece(self.name, self.stored, self.rows)
        begin = _minus(self.shared[0], self.stored.box[0])
        if self.rows:
            begin[0] = 0
        target = _narrow(self.target, _minus(self.shared[0], self.box[0]), self.shared[1])
        return target, _narrow(source, begin, self.shared[1])


class Load:
    """What a load will do, found and checked but not yet done.

    Args:
        keys: names of leaves or branches to load, such as `model` or `model.embed.weight`; None for all.
        trust: see `Snapshot.value`.

    Attributes:
        absent: leaves of the state that were asked for and are not in the checkpoint.

    Raises:
        CheckpointCorrupt: something that is needed is damaged.
        CheckpointError: a tensor has another shape or dtype.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        into: MutableMapping[Any, Any],
        keys: Collection[str] | None = None,
        trust: bool = False,
    ) -> None:
        self._into = into
        wanted = (lambda name: True) if keys is None else trees.selector(keys)
        present = {name: leaf for name, leaf in trees.leaves(into).items() if wanted(name)}
        stored = snapshot.tensors.keys() | snapshot.values.keys()
        self.absent = tuple(name for name in present if name not in stored)
        self._shape = trees.prune(snapshot.shape, lambda name: wanted(name) and name in stored) or {"dict": []}
        self._copies: list[Copy] = []
        self._new: dict[str, Any] = {}
        values = list(filter(wanted, snapshot.values))
        reads: list[Read] = []
        for name in filter(wanted, snapshot.tensors):
            reads += self._reads(snapshot, name, present.get(name))
        ranges = [(name, snapshot.range_of(name, snapshot.values[name])) for name in values]
        snapshot.fetch([*ranges, *((read.name, snapshot.range_of(*read[:3])) for read in reads)])
        for name in values:
            self._new[name] = snapshot.value(name, trust)
        with ThreadPoolExecutor(READERS) as pool:
            self._copies += pool.map(lambda read: read.copy(snapshot), reads)

    @torch.no_grad()
    def apply(self) -> None:
        """Copy everything into the state."""
        for target, source in self._copies:
            copyable(target).copy_(copyable(source))
        trees.fill(self._into, self._shape, lambda name, now: self._new.get(name, now))

    def _reads(self, snapshot: Snapshot, name: str, leaf: Any) -> list[Read]:
        """Reads, each of one stored piece, that together fill the leaf, or a new tensor where there is none."""
        spec = snapshot.tensors[name]
        if isinstance(leaf, Tensor) and torch._debug_has_internal_overlap(leaf) == 1:
            leaf = None  # an expanded tensor cannot be copied into; a new one takes its place
        if isinstance(leaf, Tensor):
            here, there = (tuple(leaf.shape), leaf.dtype), (spec.shape, spec.dtype)
            if here != there:
                raise CheckpointError(
                    f"tensor {name!r} is {here[0]} {here[1]}, in checkpoint {snapshot.path} {there[0]} {there[1]}.\n"
                    "help: it belongs to another model or configuration; use another directory."
                )
            piece = local_piece(leaf)
            if piece is None:
                return []
            target, box = piece
        else:
            target, box = torch.empty(spec.shape, dtype=spec.dtype), ((0,) * len(spec.shape), spec.shape)
            self._new[name] = target
        if isinstance(leaf, Tensor):
            self._new[name] = leaf
        overlaps = [(stored, shared) for stored in spec.pieces if (shared := _overlap(stored.box, box)) is not None]
        covered = sum(torch.Size(sizes).numel() for _, (_, sizes) in overlaps)
        if covered < torch.Size(box[1]).numel():
            raise snapshot.corrupt(f"tensor {name!r} is not wholly stored")

        return [Read(name, stored, _rows(stored, shared), shared, target, box) for stored, shared in overlaps]


def _rows(stored: Stored, shared: Box) -> tuple[int, int] | None:
    """Which rows of a stored piece are wanted, where it has rows and not all are."""
    if not shared[0] or shared[1][0] == stored.box[1][0]:
        return None
    first = shared[0][0] - stored.box[0][0]
    return first, first + shared[1][0]


def _overlap(one: Box, other: Box) -> Box | None:
    """The box in both; None where there is none. Two empty or 0-d tensors overlap wholly."""
    begin = tuple(max(a, b) for a, b in zip(one[0], other[0], strict=True))
    end = tuple(
        min(a + m, b + n) for a, m, b, n in zip(one[0], one[1], other[0], other[1], strict=True)
    )  # fmt: skip
    sizes = tuple(stop - start for start, stop in zip(begin, end, strict=True))
    if any(size < 0 for size in sizes) or (0 in sizes and one != other):
        return None
    return begin, sizes


def _minus(one: tuple[int, ...], other: tuple[int, ...]) -> list[int]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _narrow(tensor: Tensor, begin: list[int], sizes: tuple[int, ...]) -> Tensor:
    for dimension, (start, size) in enumerate(zip(begin, sizes, strict=True)):
        tensor = tensor.narrow(dimension, start, size)
    return tensor
