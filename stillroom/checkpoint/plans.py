"""What the ranks agree on before a state is saved, and what serves every save after it while the state looks the same.

A layout is made from what all ranks hold, once. It is found again in the newest checkpoint, whose sidecars and
`.metadata` are the plan that it was saved with: so the first save after a resume needs no gather and no planning. One
that is of another state, of other ranks, or damaged is passed over.
"""

from __future__ import annotations

import json
import queue
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stillroom.checkpoint import layouts, planning
from stillroom.checkpoint.arena import Arena
from stillroom.checkpoint.daemon import Daemon
from stillroom.checkpoint.group import Solo
from stillroom.checkpoint.layouts import CHANGING, SETTLED, Item, Layout, schema_of, sidecar_name
from stillroom.checkpoint.ranges import files_of
from stillroom.checkpoint.reading import METADATA, parse_sidecar
from stillroom.checkpoint.roots import Where
from stillroom.checkpoint.states import Contents, DescribedState
from stillroom.checkpoint.trees import Shape, selector
from stillroom.errors import CheckpointError

WORTH_BYTES = 1 << 20
WORTH_SHARE = 8
"""Tensors found unchanged move to a file of their own when they are this large, and at least an eighth of all."""


class Plan:
    """A layout, and the arenas made for it."""

    def __init__(self, described: DescribedState, layout: Layout) -> None:
        self.layout = layout
        self.arenas: list[Arena] = []
        self.free: queue.SimpleQueue[Arena] = queue.SimpleQueue()
        self._described = described

    def contents_of(self, state: Mapping[Any, Any]) -> Contents | None:
        """What of `state` is copied; None where it needs another plan."""
        return self._described.contents_of(state, self.layout)

    def make_arenas(self, count: int, daemon: Daemon) -> None:
        """Raises CheckpointError, and leaves none, where memory is lacking."""
        try:
            for _ in range(count):
                self.arenas.append(Arena(self.layout))
                self.free.put(self.arenas[-1])
                daemon.share(self.arenas[-1])
        except CheckpointError:
            self.release(daemon)
            raise

    def release(self, daemon: Daemon) -> None:
        """Give the memory back, once nothing is being saved from it."""
        for _ in self.arenas:
            self.free.get()
        while self.arenas:
            arena = self.arenas.pop()
            daemon.forget(arena)
            arena.close()


class Settled:
    """Which tensors go to the file that is linked from checkpoint to checkpoint while it stays the same.

    Either the caller says which, or they are found: what had the same checksums in two saves. A tensor that changes
    afterwards is written with all others, is taken out, and does not come back.

    Args:
        declared: names of leaves or branches that never change; nothing else is looked for then.
        find: whether to look.
    """

    def __init__(self, declared: Collection[str] = (), find: bool = True) -> None:
        self.are_declared = bool(declared)
        self.outdated = False
        self._find = find and not declared
        self._is_declared = selector(declared)
        self._names: set[str] = set()
        self._restless: set[str] = set()

    def parted(self, items: Sequence[Item]) -> list[Item]:
        """The items, each with the part that it goes to."""
        self.outdated = False
        return [
            item._replace(part=SETTLED if item.dtype and self._is_settled(item.key) else CHANGING) for item in items
        ]

    def adopt(self, layout: Layout) -> None:
        """Go on from what a layout has it that is settled."""
        self._names = {place.item.key for part in layout.parts[SETTLED:] for place in part.places}

    def learn(self, layout: Layout, unchanged: Sequence[int], changed: Sequence[int]) -> None:
        """Take in what the writer found.

        Args:
            unchanged: rows of the first file that are as they were.
            changed: rows of the second file that are not.
        """
        if not self._find:
            return
        first, *others = layout.parts
        lost = {others[0].places[row].item.key for row in changed} if others else set()
        found = [place for place in map(first.places.__getitem__, unchanged) if place.item.key not in self._restless]
        size = sum(place.payload_bytes for place in found)
        won = (
            {place.item.key for place in found} if size >= max(WORTH_BYTES, first.file_bytes // WORTH_SHARE) else set()
        )
        self._restless |= lost
        self._names = (self._names | won) - lost
        self.outdated |= bool(lost or won)

    def _is_settled(self, key: str) -> bool:
        return key in self._names or self._is_declared(key)


def new_plan(
    described: DescribedState,
    state: Mapping[Any, Any],
    settled: Settled,
    older: Where | None,
    group: Solo,
    daemon: Daemon,
    buffers: int,
    step: str,
) -> tuple[Plan, Contents]:
    """Agree on a layout with the other ranks and make its arenas; the plan, and what of `state` is copied.

    Args:
        older: a checkpoint that may have been saved with the same plan; the same on all ranks.
        step: names this round between the ranks.

    Raises:
        CheckpointError: the ranks' states do not go together, or memory is lacking, on any rank.
    """
    layout = None
    if older is not None:
        layout = _recalled(older, described, state, group)
        if group.agree(f"{step}/recalled", changed=layout is None):
            layout = None
    if layout is None:
        layout = _agreed(described, settled, group, step)
    else:
        settled.adopt(layout)
    plan, failure = Plan(described, layout), ""
    try:
        contents = plan.contents_of(state)
        if contents is None:
            raise CheckpointError("the state was changed while it was being saved.")
        plan.make_arenas(buffers, daemon)
    except CheckpointError as error:
        failure = str(error)
    try:
        group.agree(f"{step}/arena", failure=failure)
    except CheckpointError:
        plan.release(daemon)
        raise
    assert contents is not None
    return plan, contents


def _agreed(described: DescribedState, settled: Settled, group: Solo, step: str) -> Layout:
    """A layout for what all ranks hold now."""
    items, shape = settled.parted(described.items()), described.shape
    schema = schema_of(items, shape, group.rank, group.world)
    everybody = group.gather(f"{step}/items", planning.described(items, shape))
    parts, metadata = None, b""
    if everybody is not None:
        parts, metadata, shape = planning.plan_for_all(everybody)
    digest, chosen, failure = group.scatter(f"{step}/layout", parts)
    if failure:
        raise CheckpointError(failure)
    mine = range(len(items)) if chosen is None else chosen
    return layouts.lay_out(group.rank, items, mine, digest, metadata, shape, schema)


def _recalled(older: Where, described: DescribedState, state: Mapping[Any, Any], group: Solo) -> Layout | None:
    """The layout that an older checkpoint was saved with; None where it is not one for this state and these ranks."""
    try:
        layout = _layout_of(older, described.items(), described.shape, group.rank, group.world)
    except (OSError, ValueError, KeyError, TypeError, IndexError, CheckpointError):
        return None  # a part of it is missing or damaged, or out of reach
    if layout is None or described.contents_of(state, layout) is None:
        return None
    return layout


def _layout_of(older: Where, items: Sequence[Item], shape: Shape, rank: int, world: int) -> Layout | None:
    files = files_of(older)
    headers = [parse_sidecar(files.read(sidecar_name(rank)))[0]]
    first, schema = headers[0], schema_of(items, shape, rank, world)
    if first["schema"] != schema:
        return None
    if first["parts"] > 1:
        headers.append(parse_sidecar(files.read(sidecar_name(rank, SETTLED)))[0])
    metadata = files.read(METADATA) if rank == 0 else b""
    if rank == 0 and zlib.crc32(metadata) != first["metadata_crc32"]:
        return None
    stored = {entry[0]: (entry[4], part) for part, header in enumerate(headers) for entry in header["items"]}
    chosen = [number for number, item in enumerate(items) if item.key in stored]
    placed = list(items)
    for number in chosen:
        size, part = stored[items[number].key]
        placed[number] = items[number]._replace(slot=0 if items[number].dtype else size, part=part)
    layout = layouts.lay_out(rank, placed, chosen, first["plan"], metadata, first["shape"], schema)
    same = [json.loads(part.head[4:]) for part in layout.parts] == headers
    return layout if same else None
