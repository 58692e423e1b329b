"""The arena: one piece of shared memory that is the image of the files to be written.

Heads and tails of all items are put there once, when the layout is known; staging copies the payloads between
them. The writer maps the same memory, fills in CRC32s, and hands it to the disk as it is: no second copy, and one
file descriptor whatever the number of tensors. (A writer that followed the copy at a distance made a save durable no
sooner on two cores, and the copy 1.8 times as long: both want the memory.)

    image of each file | running CRC32 of every block | the writer's table | first part of each sidecar | .metadata

The memory has no name in any file system: it is gone when the last process that maps it is, however that ends.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.checkpoint import pinned
from stillroom.checkpoint.disk import PAGE_BYTES
from stillroom.checkpoint.framing import copyable, tensor_frame
from stillroom.checkpoint.layouts import SETTLED, Layout, Part, Place
from stillroom.errors import CheckpointError

_IDS = itertools.count()


@dataclass
class _Image:
    """Where the items of a file go: numbers of tensors and their places, numbers of values and their offsets."""

    numbers: list[int] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    values: list[tuple[int, int]] = field(default_factory=list)


class Arena:
    """Shared memory for one layout, its pages present and mapped.

    Raises:
        CheckpointError: there is not enough memory.
    """

    def __init__(self, layout: Layout) -> None:
        self.id = next(_IDS)
        self.layout = layout
        self._begins: list[int] = []
        end = 0
        for part in layout.parts:
            self._begins.append(end)
            end += _round_up(part.file_bytes)
        blobs = [b"".join(_row(place) for place in part.places) for part in layout.parts]
        blobs += [*(part.head for part in layout.parts), layout.metadata]
        self._crcs, end = _spans(end, [4 * part.blocks for part in layout.parts])
        spans, end = _spans(end, [len(blob) for blob in blobs])
        count = len(layout.parts)
        self._tables, self._heads, self._metadata = spans[:count], spans[count:-1], spans[-1]
        self.size_bytes = _round_up(max(1, end))
        self._memory = self._reserve()
        for blob, (begin, length) in zip(blobs, spans, strict=True):
            self._map[begin : begin + length] = blob
        self._images = [self._image(part, begin) for part, begin in zip(layout.parts, self._begins, strict=True)]
        self._settled_is_here = False

    @torch.no_grad()
    def stage(self, parts: list[Any], settled_is_known: bool = False, after: Any = None) -> None:
        """Copy in what is saved.

        Args:
            parts: see `Contents`.
            settled_is_known: what is settled is as it was when it was copied into this arena; it is not copied again.
            after: an event of a GPU to wait for first, see `pinned.mark`.
        """
        with pinned.copying(self._memory, parts, after) as queued:
            for number, image in enumerate(self._images):
                if number == SETTLED and settled_is_known and self._settled_is_here:
                    continue
                for value, offset in image.values:
                    self._map[offset : offset + len(parts[value])] = parts[value]
                if image.targets:
                    sources = [copyable(parts[tensor]) for tensor in image.numbers]
                    torch._foreach_copy_(image.targets, sources, non_blocking=queued)
        self._settled_is_here = True

    def forget_settled(self) -> None:
        """What is settled may have changed after all: copy it again."""
        self._settled_is_here = False

    def write_request(self, folder: str, previous: str = "") -> dict[str, Any]:
        """The writer's request to write this arena into `folder`.

        Args:
            previous: an older checkpoint, whose files are linked where they are the same.
        """
        spans = zip(self.layout.parts, self._begins, self._tables, self._crcs, self._heads, strict=True)
        parts = [
            {
                "file": part.file, "sidecar": part.sidecar, "begin": begin, "file_bytes": part.file_bytes,
                "table": table, "crcs": crcs, "head": head,
            }
            for part, begin, table, crcs, head in spans
        ]  # fmt: skip
        return {
            "op": "write", "arena": self.id, "folder": folder, "parts": parts, "previous": previous,
            "commits": self.layout.rank == 0,
        }  # fmt: skip

    def commit_request(
        self, folder: str, final: str, token: str, files: dict[str, str], previous: str = ""
    ) -> dict[str, Any]:
        """The writer's request to commit `folder`, with `.metadata` from this arena."""
        return {
            "op": "commit", "folder": folder, "final": final, "token": token, "files": files, "arena": self.id,
            "metadata": self._metadata, "sidecar": self.layout.parts[0].sidecar, "head": self._heads[0],
            "previous": previous,
        }  # fmt: skip

    def close(self) -> None:
        """Give the memory back, once nothing refers to it."""
        self._images = []
        pinned.release(self._memory)
        del self._memory
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.descriptor)

    def _reserve(self) -> Tensor:
        self.descriptor = -1
        try:
            # Asked first: a machine that runs out while the pages are being reserved ends processes instead.
            if self.size_bytes > (available := available_bytes()):
                raise _too_little(self.size_bytes, f"{available:,} are available")
            self.descriptor = os.memfd_create("stillroom-checkpoint", os.MFD_CLOEXEC)
            # Reserved now: a page that cannot be had later would end the process with SIGBUS.
            os.posix_fallocate(self.descriptor, 0, self.size_bytes)
            self._map = mmap.mmap(self.descriptor, self.size_bytes)
        except OSError as error:
            if self.descriptor >= 0:
                os.close(self.descriptor)
            raise _too_little(self.size_bytes, str(error.strerror)) from error
        return torch.frombuffer(self._map, dtype=torch.uint8).zero_()

    def _image(self, part: Part, begin: int) -> _Image:
        """Puts the frames of tensors around their places, too."""
        image = _Image()
        for place in part.places:
            if place.item.dtype:
                image.numbers.append(place.number)
                image.targets.append(self._target(place, begin))
            else:
                image.values.append((place.number, begin + place.offset))
        return image

    def _target(self, place: Place, begin: int) -> Tensor:
        """Where a tensor goes, with its frame put around it."""
        dtype = getattr(torch, place.item.dtype)
        frame = tensor_frame(dtype, place.item.sizes)
        first, end = begin + place.payload_at, begin + place.payload_at + place.payload_bytes
        self._map[begin + place.offset : first] = frame.head
        self._map[end : end + len(frame.tail)] = frame.tail
        return copyable(self._memory[first:end].view(dtype).view(place.item.sizes))


def available_bytes() -> int:
    """Memory that can be had without swapping, within the container's limit where there is one (cgroup 2)."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        available = min(available, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return available


def _too_little(size_bytes: int, why: str) -> CheckpointError:
    return CheckpointError(
        f"{size_bytes:,} bytes of shared memory for staging could not be had: {why}.\n"
        "help: one copy of what this rank saves is needed; free memory, or save over more ranks."
    )


def _row(place: Place) -> bytes:
    crc_at = (0, 0)
    if place.item.dtype:
        tail_at = place.payload_at + place.payload_bytes
        frame = tensor_frame(getattr(torch, place.item.dtype), place.item.sizes)
        crc_at = (tail_at + frame.crc_at[0], tail_at + frame.crc_at[1])
    return struct.pack("<4q", place.payload_at, place.payload_bytes, *crc_at)


def _spans(end: int, lengths: list[int]) -> tuple[list[tuple[int, int]], int]:
    """Where pieces of these lengths lie from `end` on, each at a multiple of 8; and the new end."""
    found = []
    for length in lengths:
        found.append((_round_up(end, 8), length))
        end = sum(found[-1])
    return found, end


def _round_up(size: int, multiple: int = PAGE_BYTES) -> int:
    return -(-size // multiple) * multiple
