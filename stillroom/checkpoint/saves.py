"""What the caller of a save holds: the save under way, and what is known of it once it is committed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stillroom.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint.

    Attributes:
        path: a `Path`, or an `ObjectPath` on an object store.
        size_bytes: of all its files.
        metrics: as they were given to `save`.
        absent: after a load, leaves of the state that the checkpoint does not have; they stayed as they were.
    """

    step: int
    path: Any
    size_bytes: int
    metrics: Mapping[str, float]
    absent: tuple[str, ...] = ()


class Save:
    """A save under way: what `Checkpointer.save` returns.

    Attributes:
        seconds: how long its parts took so far: `blocked`, `staged`, `written`, `committed`.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()
        self._staged, self._done = threading.Event(), threading.Event()
        self._info: CheckpointInfo | None = None
        self._error: BaseException | None = None
        self.seen = self._released = False
        self._callbacks: list[Callable[[Save], Any]] = []
        self._lock = threading.Lock()

    def staged(self, timeout_s: float | None = None) -> None:
        """Wait until the state may be changed again."""
        if not self._staged.wait(timeout_s):
            raise CheckpointError(f"step {self.step} was not staged within {timeout_s} s.")
        self._released = True

    def done(self) -> bool:
        """Whether it is committed, or has failed."""
        return self._done.is_set()

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Wait until the checkpoint is committed on all ranks.

        Raises:
            CheckpointError: it could not be; nothing was committed, and the checkpoints before are intact.
        """
        if not self._done.wait(timeout_s):
            raise CheckpointError(f"step {self.step} was not committed within {timeout_s} s.")
        self.seen = True
        if self._error is not None:
            raise self._error
        assert self._info is not None
        return self._info

    def add_done_callback(self, call: Callable[[Save], Any]) -> None:
        """Call `call(self)` when it is committed or has failed, on a thread of the Checkpointer; at once if it has."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(call)
                return
        call(self)

    def _mark(self, part: str) -> None:
        self.seconds[part] = time.monotonic() - self._began

    def _finish(self, info: CheckpointInfo | None, error: BaseException | None = None) -> None:
        self._info, self._error = info, error
        self._mark("committed")
        self._staged.set()
        with self._lock:
            self._done.set()
        for call in self._callbacks:
            call(self)
