"""The arena: one piece of shared memory that is the image of the file to be written.

Heads and tails of all items are put there once, when the layout is known; staging copies the payloads between
them. The writer maps the same memory, fills in CRC32s, and hands it to the disk as it is: no second copy, and one
file descriptor whatever the number of tensors.

    image | running CRC32 of every block | the writer's table | first part of the sidecar | .metadata

The memory has no name in any file system: it is gone when the last process that maps it is, however that ends.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.checkpoint.framing import copyable, tensor_frame
from stillroom.checkpoint.layouts import Layout, file_name, sidecar_name
from stillroom.checkpoint.writer import PAGE_BYTES
from stillroom.errors import CheckpointError

_IDS = itertools.count()


class Arena:
    """Shared memory for one layout, its pages present and mapped.

    Raises:
        CheckpointError: there is not enough memory.
    """

    def __init__(self, layout: Layout) -> None:
        self.id = next(_IDS)
        self.layout = layout
        table = b"".join(_row(place) for place in layout.places)
        image_bytes = _round_up(layout.file_bytes)
        self._crcs = (image_bytes, layout.blocks)
        self._table = (_round_up(image_bytes + 4 * layout.blocks, 8), len(layout.places))
        self._head = (self._table[0] + len(table), len(layout.sidecar_head))
        self._metadata = (sum(self._head), len(layout.metadata))
        self.size_bytes = _round_up(max(1, sum(self._metadata)))
        # Asked first: a machine that runs out while the pages are being reserved ends processes instead.
        if self.size_bytes > (available := available_bytes()):
            raise _too_little(self.size_bytes, f"{available:,} are available")
        self.descriptor = os.memfd_create("stillroom-checkpoint", os.MFD_CLOEXEC)
        try:
            # Reserved now: a page that cannot be had later would end the process with SIGBUS.
            os.posix_fallocate(self.descriptor, 0, self.size_bytes)
            self._map = mmap.mmap(self.descriptor, self.size_bytes)
        except OSError as error:
            os.close(self.descriptor)
            raise _too_little(self.size_bytes, str(error.strerror)) from error
        with contextlib.suppress(OSError, AttributeError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._memory.zero_()
        for blob, (begin, length) in (
            (table, (self._table[0], len(table))),
            (layout.sidecar_head, self._head),
            (layout.metadata, self._metadata),
        ):
            self._map[begin : begin + length] = blob
        self._targets = [self._target(place) for place in layout.places]
        self._tensors = [target for target in self._targets if target is not None]

    @torch.no_grad()
    def stage(self, contents: Sequence[Any]) -> None:
        """Copy in what is saved.

        Args:
            contents: for each item that the rank described its local tensor, or the archive of its value.
        """
        sources = []
        for place, target in zip(self.layout.places, self._targets, strict=True):
            if target is None:
                self._map[place.offset : place.offset + place.size_bytes] = contents[place.number]
            else:
                sources.append(copyable(contents[place.number]))
        if sources:
            torch._foreach_copy_(self._tensors, sources)

    def write_request(self, folder: str) -> dict[str, Any]:
        """The writer's request to write this arena into `folder`."""
        rank = self.layout.rank
        return {
            "op": "write", "arena": self.id, "folder": folder, "file": file_name(rank), "sidecar": sidecar_name(rank),
            "file_bytes": self.layout.file_bytes, "table": self._table, "crcs": self._crcs, "head": self._head,
        }  # fmt: skip

    def commit_request(self, folder: str, final: str, token: str, files: dict[str, str]) -> dict[str, Any]:
        """The writer's request to commit `folder`, with `.metadata` from this arena."""
        return {
            "op": "commit", "folder": folder, "final": final, "token": token, "files": files, "arena": self.id,
            "metadata": self._metadata,
        }  # fmt: skip

    def close(self) -> None:
        """Give the memory back, once nothing refers to it."""
        self._targets, self._tensors = [], []
        del self._memory
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.descriptor)

    def _target(self, place: Any) -> Tensor | None:
        """Where a tensor goes, with its frame put around it; None for a value."""
        if not place.item.dtype:
            return None
        dtype = getattr(torch, place.item.dtype)
        frame = tensor_frame(dtype, place.item.sizes)
        begin, end = place.payload_at, place.payload_at + place.payload_bytes
        self._map[place.offset : begin] = frame.head
        self._map[end : end + len(frame.tail)] = frame.tail
        return copyable(self._memory[begin:end].view(dtype).view(place.item.sizes))


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


def _row(place: Any) -> bytes:
    crc_at = (0, 0)
    if place.item.dtype:
        tail_at = place.payload_at + place.payload_bytes
        frame = tensor_frame(getattr(torch, place.item.dtype), place.item.sizes)
        crc_at = (tail_at + frame.crc_at[0], tail_at + frame.crc_at[1])
    return struct.pack("<4q", place.payload_at, place.payload_bytes, *crc_at)


def _round_up(size: int, multiple: int = PAGE_BYTES) -> int:
    return -(-size // multiple) * multiple
