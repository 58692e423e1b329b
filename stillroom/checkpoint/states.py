"""A state as one rank has it: described once for the layout, then taken save by save.

Most saves find the state as the one before left it, thousands of tensors and all. So the description is kept, and the
next state is only compared with it while its tensors are collected: no name is built, and nothing stays allocated for
each tensor that would make the garbage collector look through the whole heap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillroom.checkpoint import layouts, trees
from stillroom.checkpoint.framing import slot_bytes, value_archive, value_records
from stillroom.checkpoint.layouts import Item, Layout
from stillroom.errors import CheckpointError


class Contents:
    """What is to be copied.

    Attributes:
        parts: for each described item a local tensor, or the archive of its value where this rank writes it.
    """

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts
        self._versions = _versions(parts)

    def changed(self) -> bool:
        """Whether a tensor was written to since."""
        return self._versions != _versions(self.parts)


class DescribedState:
    """What a state looks like to this rank: everything that decides the layout.

    Attributes:
        shape: the tree.

    Raises:
        CheckpointError: a leaf cannot be saved; it is named.
    """

    def __init__(self, state: Mapping[Any, Any]) -> None:
        self.shape = trees.shape_of(state)
        self._outline = trees.Outline(state)
        self._items: list[Item] = []
        # Leaf numbers with what has to be the same next time, by kind of leaf.
        self._plain: list[tuple[int, torch.dtype, torch.Size]] = []
        self._distributed: list[tuple[int, torch.dtype, torch.Size, Any, torch.Size | None]] = []
        self._values: list[int] = []
        self._held: list[int] = []
        for number, (name, leaf) in enumerate(trees.leaves(state).items()):
            if isinstance(leaf, Tensor):
                self._add_tensor(number, name, leaf)
            else:
                self._values.append(number)
                self._held.append(number)
                self._items.append(Item(name, "", (), (), (), slot_bytes(_records(name, leaf))))

    def items(self) -> list[Item]:
        """The layout's terms for every piece that this rank holds, in the order of `Contents.parts`."""
        return self._items

    @torch.no_grad()
    def contents_of(self, state: Mapping[Any, Any], layout: Layout) -> Contents | None:
        """What of `state` goes into `layout`; None where it does not fit: it looks different, or a value has grown.

        Raises:
            CheckpointError: a value cannot be pickled.
        """
        leaves = self._outline.leaves_of(state)
        if leaves is None or not self._take_tensors(leaves):
            return None
        for number in self._values:
            if isinstance(leaves[number], Tensor) or trees.is_branch(leaves[number]):
                return None
        parts = leaves if len(self._held) == len(leaves) else [leaves[number] for number in self._held]
        for place in layout.values:
            try:
                records = _records(place.item.key, parts[place.number])
                parts[place.number] = value_archive(records, place.item.slot)
            except ValueError:
                return None
        return Contents(parts)

    def _add_tensor(self, number: int, name: str, leaf: Tensor) -> None:
        try:
            piece = layouts.local_piece(leaf)
        except CheckpointError as error:
            raise CheckpointError(f"{name!r} cannot be saved: {error}") from None
        if layouts.is_dtensor(leaf):
            local_shape = piece[0].shape if piece else None
            self._distributed.append((number, leaf.dtype, leaf.shape, layouts.placed(leaf), local_shape))
        else:
            self._plain.append((number, leaf.dtype, leaf.shape))
        if piece is not None:
            self._held.append(number)
            dtype = str(leaf.dtype).removeprefix("torch.")
            self._items.append(Item(name, dtype, tuple(leaf.shape), tuple(piece[1][0]), tuple(piece[1][1]), 0))

    def _take_tensors(self, leaves: list[Any]) -> bool:
        """Put local tensors for DTensors; False where a tensor is not what was described."""
        for number, dtype, shape in self._plain:
            leaf = leaves[number]
            if getattr(leaf, "dtype", None) is not dtype or leaf.shape != shape:
                return False
        if any(map(layouts.is_dtensor_class, {type(leaves[number]) for number, *_ in self._plain})):
            return False
        for number, dtype, shape, placed, local_shape in self._distributed:
            leaf = leaves[number]
            if not layouts.is_dtensor(leaf) or (leaf.dtype, leaf.shape, layouts.placed(leaf)) != (dtype, shape, placed):
                return False
            if local_shape is not None:
                leaves[number] = leaf.to_local()
                if leaves[number].shape != local_shape:
                    return False
        return True


def _versions(parts: list[Any]) -> list[int | None]:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # tensors made in inference mode do not count
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _records(name: str, value: Any) -> list[tuple[str, bytes]]:
    try:
        return value_records(value)
    except Exception as error:
        raise CheckpointError(
            f"state at {name} is a {type(value).__name__} that cannot be pickled: {error}\n"
            "help: save tensors and small values; leave out what can be made again."
        ) from error
