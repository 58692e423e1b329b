"""What ranks tell each other for a save: a few bytes each, over a key-value store.

One atomic add per rank counts a round; who completes it publishes the outcome, and everybody waits for that key. A
rank that fails says so in the same add and leaves its reason under a key of its own, so nobody reads a vote per rank.
"""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from stillroom.errors import CheckpointError

FAILED = 1 << 40
CHANGED = 1 << 20


class Solo:
    """One process: everything is agreed at once."""

    rank, world = 0, 1

    def agree(self, step: str, changed: bool = False, failure: str = "") -> bool:
        """Whether any rank says that something changed.

        Raises:
            CheckpointError: a rank failed, or did not answer in time.
        """
        if failure:
            raise CheckpointError(failure)
        return changed

    def gather(self, step: str, what: Any) -> list[Any] | None:
        """On rank 0 what every rank sent, by rank; None elsewhere."""
        return [what]

    def scatter(self, step: str, what: Sequence[Any] | None) -> Any:
        """This rank's part of what rank 0 has for each."""
        assert what is not None
        return what[0]

    def broadcast(self, step: str, what: Callable[[], Any]) -> Any:
        """What rank 0 computes; its failure is everybody's.

        Raises:
            CheckpointError: it failed on rank 0, or took too long.
        """
        return what()


class StoreGroup(Solo):
    """The ranks of a process group, over its store.

    Args:
        timeout_s: how long a rank waits for the others.
    """

    def __init__(self, group: Any, timeout_s: float) -> None:
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._timeout_s = timeout_s
        self._store = _connection()
        self.bytes_sent = self.bytes_received = 0
        # All groups share the store, so the ranks name the group; its members count alike how many were made of it.
        ranks = zlib.crc32(str(dist.get_process_group_ranks(group or dist.group.WORLD)).encode())
        self._prefix = f"stillroom/{ranks:08x}"
        before = self._add(f"{self._prefix}/{self.rank}", 1)
        self._prefix = str(self.broadcast(f"begin/{before}", lambda: uuid.uuid4().hex[:8]))

    def agree(self, step: str, changed: bool = False, failure: str = "") -> bool:
        key = f"{self._prefix}/{step}"
        if failure:
            self._set(f"{key}/failure/{self.rank}", failure.encode())
        total = self._add(key, 1 + CHANGED * changed + FAILED * bool(failure))
        if total % CHANGED == self.world:
            self._set(f"{key}/o", str(total).encode())
        total = int(self._get(f"{key}/o"))
        if total >= FAILED:
            raise CheckpointError(failure or self._reasons(key))
        return total >= CHANGED

    def gather(self, step: str, what: Any) -> list[Any] | None:
        key = f"{self._prefix}/{step}"
        if self.rank:
            self._set(f"{key}/{self.rank}", zlib.compress(json.dumps(what).encode(), 1))
            return None
        others = []
        for rank in range(1, self.world):
            others.append(json.loads(zlib.decompress(self._get(f"{key}/{rank}"))))
            self._store.delete_key(f"{key}/{rank}")
        return [what, *others]

    def scatter(self, step: str, what: Sequence[Any] | None) -> Any:
        key = f"{self._prefix}/{step}"
        if self.rank == 0:
            assert what is not None
            for rank in range(1, self.world):
                self._set(f"{key}/{rank}", zlib.compress(json.dumps(what[rank]).encode(), 1))
            return what[0]
        part = json.loads(zlib.decompress(self._get(f"{key}/{self.rank}")))
        self._store.delete_key(f"{key}/{self.rank}")
        return part

    def broadcast(self, step: str, what: Callable[[], Any]) -> Any:
        key = f"{self._prefix}/{step}"
        if self.rank == 0:
            try:
                result = what()
            except Exception as error:
                self._set(key, json.dumps({"failure": str(error)}).encode())
                raise
            self._set(key, json.dumps({"result": result}).encode())
            return result
        reply = json.loads(self._get(key))
        if "failure" in reply:
            raise CheckpointError(reply["failure"])
        return reply["result"]

    def _reasons(self, key: str) -> str:
        for rank in range(self.world):
            name = f"{key}/failure/{rank}"
            if self._store.check([name]):
                return f"rank {rank} failed: {self._get(name).decode()}"
        return "another rank failed"

    def _set(self, key: str, value: bytes) -> None:
        self.bytes_sent += len(key) + len(value)
        self._try(lambda: self._store.set(key, value))

    def _add(self, key: str, amount: int) -> int:
        self.bytes_sent += len(key) + 8
        self.bytes_received += 8
        return int(self._try(lambda: self._store.add(key, amount)))

    def _get(self, key: str) -> bytes:
        self.bytes_sent += len(key)
        self._store.set_timeout(timedelta(seconds=self._timeout_s))
        value: bytes = self._try(lambda: self._store.get(key))
        self.bytes_received += len(value)
        return value

    def _try(self, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        try:
            return call()
        except (RuntimeError, dist.DistError) as error:
            waited, reason = time.monotonic() - began, str(error).splitlines()[0]
            raise CheckpointError(
                f"rank {self.rank} lost the other ranks while saving, after {waited:.0f} s: {reason}\n"
                "help: a rank may have died or hang; the checkpoints before are intact."
            ) from error


_CONNECTIONS: list[tuple[Any, Any]] = []


def _connection() -> Any:
    """A connection of our own to the job's store: a wait in the background must not hold up what training asks it.

    One for the process: torch 2.13 takes five seconds to connect when the server is busy accepting another.
    """
    store: Any = dist.distributed_c10d._get_process_group_store(dist.distributed_c10d._get_default_group())
    if not _CONNECTIONS or _CONNECTIONS[0][0] is not store:
        _CONNECTIONS[:] = [(store, store.clone())]
    return _CONNECTIONS[0][1]


def group_of(process_group: Any, timeout_s: float) -> Solo:
    """The ranks to save with: those of the process group, or this process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return Solo()
    return StoreGroup(process_group, timeout_s)
