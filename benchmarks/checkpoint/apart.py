"""A process for each side, so that one side's threads, memory and warm pages are not another's.

The sides of a benchmark live beside each other and act in turns: a call to one returns before the next is made, and who
is not called sleeps. What a side took is read from outside: CPU time and memory of its process and all descendants.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Apart:
    """An object that lives in a process of its own.

    Args:
        make: what makes it, there; importable by name.
    """

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *args: Any) -> Any:
        """What the object's method returns.

        Raises:
            RuntimeError: it raised there; with its traceback.
        """
        self._pipe.send((method, args))
        return self._receive()

    def cpu_s(self) -> dict[str, float]:
        """CPU-seconds so far of the process itself and of its descendants, without the CPU of threads elsewhere."""
        own, *others = _tree(self._process.pid)
        return {"own": _cpu_s(own), "others": sum(map(_cpu_s, others))}

    def memory_bytes(self) -> int:
        """Memory of the process and its descendants; what they share counts once (sum of PSS)."""
        return sum(map(_pss_bytes, _tree(self._process.pid)))

    def memory_during(self, method: str, *args: Any, every_s: float = 0.01) -> int:
        """The highest memory while a method runs."""
        seen, ended = [self.memory_bytes()], threading.Event()

        def watch() -> None:
            while not ended.wait(every_s):
                seen.append(self.memory_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.call(method, *args)
        finally:
            ended.set()
            watcher.join()
        return max(seen)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        result, failure = self._pipe.recv()
        if failure:
            raise RuntimeError(failure)
        return result


def _serve(pipe: Any, make: Callable[..., Any], args: Any) -> None:
    made: list[Any] = []
    _answer(pipe, lambda: made.append(make(*args)))
    while made and (request := pipe.recv()) is not None:
        method, arguments = request
        _answer(pipe, lambda: getattr(made[0], method)(*arguments))  # noqa: B023


def _answer(pipe: Any, call: Callable[[], Any]) -> None:
    try:
        pipe.send((call(), ""))
    except Exception:
        pipe.send((None, traceback.format_exc()))


def _tree(pid: int | None) -> list[int]:
    """The process and its descendants that are alive."""
    found = [int(pid or 0)]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _cpu_s(pid: int) -> float:
    """By the process's own clock (`clock_getcpuclockid`), which counts threads that ended, in nanoseconds."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def _pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
