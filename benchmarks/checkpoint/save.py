"""How long does a save hold up its caller, how long until it is durable, and what memory does it take?

    python -m benchmarks.checkpoint.save [--repeats 5] [--small 3000] [--large-mb 512] [--sides ours,"dcp sync",...]

Two states: many small tensors of 8 KiB, and eight large ones. Every side has a process of its own with the state in it;
all are open at once and save in turns, after every tensor was changed as a training step would. `staged` is from the
call until the state may be changed again, `durable` until the checkpoint is whole and synced. Floors, in the same
turns: a warm memcpy of the state, and a raw write with fsync of as many bytes past the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint.apart import Apart
from benchmarks.checkpoint.sides import DCP_KINDS, environment, median, one_rank, open_side, peer_version

BEST = "dcp process+cache"
SYNCHRONOUS = ("dcp thread+cache", "dcp process+cache")
"""DCP's ways to stage on the caller's thread into memory that it keeps: its fastest."""

ASYNCHRONOUS = "dcp process+cache+async"


def small(count: int) -> dict[str, Any]:
    return {f"layer.{n}.weight": torch.randn(2048) for n in range(count)}


def large(size_bytes: int, count: int = 8) -> dict[str, Any]:
    return {f"layer.{n}.weight": torch.randn(size_bytes // 4 // count) for n in range(count)}


class Saver:
    """One side with a state of its own."""

    def __init__(self, name: str, root: Path, make_state: Callable[[int], dict[str, Any]], size: int) -> None:
        torch.manual_seed(0)
        self.name, self.root, self.state = name, root, make_state(size)
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(one_rank())
        self.side: Any = None

    def open(self) -> float:
        """Seconds that setting up took."""
        self.side = open_side(self.name, self.root, self.state)
        return float(self.side.set_up_s)

    def prepare(self) -> None:
        """Change every tensor, so that none can be skipped; drop what an earlier save left."""
        torch._foreach_add_(list(self.state.values()), 1.0)
        self.side.forget()

    def save(self) -> tuple[float, float]:
        """Seconds until staged, and until durable."""
        begun = self.side.save()
        return begun.staged(), begun.wait()

    def close(self) -> None:
        self.side.close()
        self.stack.close()


class Floor:
    """What the machine needs for the same bytes."""

    def __init__(self, root: Path, make_state: Callable[[int], dict[str, Any]], size: int) -> None:
        self.root, self.tensors = root, list(make_state(size).values())
        self.copies = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.size_bytes = sum(tensor.nbytes for tensor in self.tensors)
        self.piece = mmap.mmap(-1, 16 << 20)
        self.piece.write(os.urandom(4096) * 4096)

    def save(self) -> tuple[float, float]:
        """Seconds of a memcpy, and of a write with fsync."""
        # The first copy after other processes' turns took 25 to 165 ms for the same 512 MB: it is not warm.
        torch._foreach_copy_(self.copies, self.tensors)
        return _seconds(lambda: torch._foreach_copy_(self.copies, self.tensors)), self._write_s()

    def _write_s(self) -> float:
        path = self.root / "raw"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)

        def write() -> None:
            for at in range(0, self.size_bytes, len(self.piece)):
                os.pwrite(descriptor, memoryview(self.piece)[: min(len(self.piece), self.size_bytes - at)], at)
            os.fsync(descriptor)

        took = _seconds(write)
        os.close(descriptor)
        os.unlink(path)
        return took


def measure(root: Path, make: Callable[[int], dict[str, Any]], size: int, names: list[str], repeats: int) -> Any:
    """For each side its samples in seconds, the first save first, and its memory in bytes beyond the state's."""
    floor, savers = Apart(Floor, root, make, size), {name: Apart(Saver, name, root, make, size) for name in names}
    samples: dict[str, dict[str, list[float]]] = {"floor": {"memcpy": [], "write": []}}
    memory: dict[str, dict[str, float]] = {}
    try:
        before = {name: saver.memory_bytes() for name, saver in savers.items()}
        for name, saver in savers.items():
            samples[name] = {"set_up": [saver.call("open")], "staged": [], "durable": []}
        for turn in range(repeats + 1):
            print(f"{make.__name__}: save {turn + 1} of {repeats + 1}", file=sys.stderr)
            for name, saver in savers.items():
                saver.call("prepare")
                _append(samples[name], ("staged", "durable"), saver.call("save"))
            _append(samples["floor"], ("memcpy", "write"), floor.call("save"))
        for name, saver in savers.items():
            saver.call("prepare")
            idle = saver.memory_bytes()
            memory[name] = {"idle": idle - before[name], "saving": saver.memory_during("save") - before[name]}
            saver.call("close")
    finally:
        for apart in (floor, *savers.values()):
            apart.close()
    return {"samples": samples, "memory_bytes": memory}


def main(repeats: int, count: int, large_bytes: int, names: list[str], states: list[str]) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
        for make, size in ((small, count), (large, large_bytes)):
            if make.__name__ not in states:
                continue
            root = Path(folder) / make.__name__
            root.mkdir()
            found[make.__name__] = measure(root, make, size, names, repeats)
    print(table(found))
    print(json.dumps(summary(found) | found | environment()))


def table(found: dict[str, Any]) -> str:
    """Medians without the first save, milliseconds and MB."""
    lines = [
        "| state | side | set-up | first: staged | durable | later: staged | durable | idle | saving |",
        "|---" * 9 + "|",
    ]
    for state, results in found.items():
        for side, of in results["samples"].items():
            if side == "floor":
                cells = ["", "", "", *(f"{1e3 * median(of[part][1:]):.1f} ms" for part in ("memcpy", "write")), "", ""]
            else:
                memory = results["memory_bytes"][side]
                cells = [f"{of['set_up'][0]:.2f} s", *(f"{1e3 * of[part][0]:.0f} ms" for part in ("staged", "durable"))]
                cells += [f"{1e3 * median(of[part][1:]):.1f} ms" for part in ("staged", "durable")]
                cells += [f"{memory[when] / 1e6:.0f} MB" for when in ("idle", "saving")]
            lines.append(f"| {state} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Ratios of medians without the first save; the named DCP configuration's over ours, None where it did not run."""

    def of(state: str, side: str, part: str) -> float | None:
        samples = found[state]["samples"].get(side) if state in found else None
        return median(samples[part][1:]) if samples else None

    def ratio(state: str, part: str, *sides: str) -> float | None:
        theirs = [value for side in sides if (value := of(state, side, part)) is not None]
        ours = of(state, "ours", part)
        return min(theirs) / ours if theirs and ours else None

    ours = {}
    if "large" in found:
        durable, floor = found["large"]["samples"]["ours"]["durable"], found["large"]["samples"]["floor"]
        ours = {
            "first_over_second": durable[0] / durable[1],
            "first_over_median": durable[0] / median(durable[1:]),
            "staged_over_memcpy": median(found["large"]["samples"]["ours"]["staged"][1:]) / median(floor["memcpy"][1:]),
            "background_over_raw_write": median(durable[1:]) / median(floor["write"][1:]),
        }
    return {
        "ratios": {
            "staged_small_vs_sync": ratio("small", "staged", *SYNCHRONOUS),
            "staged_small_vs_async": ratio("small", "staged", ASYNCHRONOUS),
            "staged_large_vs_sync": ratio("large", "staged", *SYNCHRONOUS),
            "background_small": ratio("small", "durable", BEST),
            "background_large": ratio("large", "durable", BEST),
            "background_small_vs_any": ratio("small", "durable", *DCP_KINDS),
            "background_large_vs_any": ratio("large", "durable", *DCP_KINDS),
        },
        "ours": ours,
        "configurations": {
            "staged_small_vs_sync": SYNCHRONOUS, "staged_small_vs_async": ASYNCHRONOUS, "background": BEST,
        },
    }  # fmt: skip


def _append(lists: dict[str, list[float]], parts: tuple[str, ...], values: tuple[float, ...]) -> None:
    for part, value in zip(parts, values, strict=True):
        lists[part].append(value)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    every = ["ours", *DCP_KINDS, *(["torch-checkpointing"] if peer_version() else [])]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", type=int, default=3000)
    parser.add_argument("--large-mb", type=int, default=512)
    parser.add_argument("--sides", default=",".join(every))
    parser.add_argument("--states", default="small,large")
    options = parser.parse_args()
    sides, states = options.sides.split(","), options.states.split(",")
    main(options.repeats, options.small, options.large_mb << 20, sides, states)
