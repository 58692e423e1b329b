"""A state as one rank has it, in the layout's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stillroom.checkpoint import layouts, trees
from stillroom.checkpoint.framing import slot_bytes, value_archive, value_records
from stillroom.checkpoint.layouts import Item, Layout
from stillroom.errors import CheckpointError


class DescribedState:
    """A state as this rank has it: what decides the layout, and what is to be copied.

    Attributes:
        signature: equal for states that fit one layout, but for the room that values take.
        contents: for each item that is described a local tensor, or a value's archive once it was made.
        shape: the tree.
    """

    def __init__(self, state: Mapping[Any, Any]) -> None:
        self.shape = trees.shape_of(state)
        self.signature: list[Any] = [self.shape]
        self.contents: list[Any] = []
        self._pieces: list[tuple[str, Any, Any]] = []
        self._records: dict[int, list[tuple[str, bytes]]] = {}
        for name, leaf in trees.leaves(state).items():
            if not isinstance(leaf, Tensor):
                self.signature.append(None)
                self._records[len(self.contents)] = _records(name, leaf)
                self._add(name, None, None, None)
                continue
            self.signature.append(_signature(leaf))
            try:
                piece = layouts.local_piece(leaf)
            except CheckpointError as error:
                raise CheckpointError(f"{name!r} cannot be saved: {error}") from None
            if piece is not None:
                self._add(name, leaf, piece[1], piece[0].detach())
        self._versions = [content._version for content in self.contents if isinstance(content, Tensor)]

    def fits(self, signature: Any, layout: Layout) -> bool:
        """Whether a layout that was made before takes this state; its values are made ready if so."""
        if self.signature != signature:
            return False
        try:
            self.archive_values(layout)
        except ValueError:
            return False
        return True

    def archive_values(self, layout: Layout) -> None:
        """Make `contents` hold the archives of those values that this rank writes.

        Raises:
            ValueError: one does not fit its slot.
        """
        for place in layout.places:
            if not place.item.dtype:
                self.contents[place.number] = value_archive(self._records[place.number], place.item.slot)

    def changed(self) -> bool:
        """Whether a tensor was written to since."""
        return self._versions != [content._version for content in self.contents if isinstance(content, Tensor)]

    def items(self) -> list[Item]:
        """The layout's terms for every piece, in the order of `contents`."""
        items = []
        for number, (name, leaf, box) in enumerate(self._pieces):
            if box is None:
                items.append(Item(name, "", (), (), (), slot_bytes(self._records[number])))
            else:
                dtype = str(leaf.dtype).removeprefix("torch.")
                items.append(Item(name, dtype, tuple(leaf.shape), tuple(box[0]), tuple(box[1]), 0))
        return items

    def _add(self, name: str, leaf: Any, box: Any, content: Any) -> None:
        self._pieces.append((name, leaf, box))
        self.contents.append(content)


def _signature(tensor: Any) -> tuple[Any, ...]:
    if hasattr(tensor, "_spec"):
        return (tensor.dtype, tensor.shape, tensor._spec.mesh, tensor._spec.placements)
    return (tensor.dtype, tensor.shape)


def _records(name: str, value: Any) -> list[tuple[str, bytes]]:
    try:
        return value_records(value)
    except Exception as error:
        raise CheckpointError(
            f"state at {name} is a {type(value).__name__} that cannot be pickled: {error}\n"
            "help: save tensors and small values; leave out what can be made again."
        ) from error
