"""How long does a save hold up its caller, and how long until it is durable?

    python -m benchmarks.checkpoint.save [--repeats 5] [--small 3000] [--large-mb 512] [--configs sync,thread,...]

Floors, measured in the same rounds: a warm memcpy of the state, and a raw write with fsync of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint.sides import Dcp, Ours, environment, large, median, one_rank, size_of, small

CONFIGS = "sync,thread,process,process+cache"


def measure(root: Path, state: dict[str, Any], configs: list[str], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Staged and durable seconds of every side, a list each, the first save first; sides alternate."""
    sides = [Ours(root, state), *(Dcp(root, state, kind) for kind in configs)]
    samples: dict[str, dict[str, list[float]]] = {
        side.name: {"staged": [], "done": [], "set_up": [side.set_up_s]} for side in sides
    }
    samples["floor"] = {"memcpy": [], "write": []}
    copies = [torch.empty_like(tensor) for tensor in state.values()]
    torch._foreach_copy_(copies, list(state.values()))
    for _ in range(repeats + 1):
        for side in sides:
            staged, wait = side.save()
            samples[side.name]["staged"].append(staged)
            samples[side.name]["done"].append(wait())
        samples["floor"]["memcpy"].append(_seconds(lambda: torch._foreach_copy_(copies, list(state.values()))))
        samples["floor"]["write"].append(_raw_write(root, size_of(state)))
    for side in sides:
        side.close()
    return samples


def main(repeats: int, count: int, large_bytes: int, configs: list[str]) -> None:
    found = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder, one_rank():
        for name, state in (("small", small(count)), ("large", large(large_bytes))):
            found[name] = measure(Path(folder) / name, state, configs, repeats)
            for side, values in found[name].items():
                shown = {part: f"{median(numbers[1:] or numbers) * 1e3:.1f} ms" for part, numbers in values.items()}
                print(f"{name:6} {side:18} {shown}")
    print(json.dumps(summary(found, configs) | {"samples": found, **environment()}))


def summary(found: dict[str, Any], configs: list[str]) -> dict[str, Any]:
    """Ratios of medians without the first save; DCP's named configuration over ours."""

    def of(state: str, side: str, part: str) -> float:
        return median(found[state][side][part][1:])

    best = configs[-1]
    ratios = {
        "staged_small_vs_sync": of("small", "dcp sync", "staged") / of("small", "ours", "staged")
        if "sync" in configs
        else None,
        "staged_small_vs_async": of("small", f"dcp {best}", "staged") / of("small", "ours", "staged"),
        "background_small": of("small", f"dcp {best}", "done") / of("small", "ours", "done"),
        "background_large": of("large", f"dcp {best}", "done") / of("large", "ours", "done"),
    }
    ours = {
        "first_over_second": found["large"]["ours"]["done"][0] / found["large"]["ours"]["done"][1],
        "staged_over_memcpy": of("large", "ours", "staged") / median(found["large"]["floor"]["memcpy"][1:]),
        "background_over_raw_write": of("large", "ours", "done") / median(found["large"]["floor"]["write"][1:]),
    }
    return {"ratios": ratios, "ours": ours, "dcp_best": best}


def _raw_write(root: Path, size_bytes: int) -> float:
    """Seconds to write and sync as many bytes past the page cache, from memory that is ready."""
    import mmap

    piece = mmap.mmap(-1, 16 << 20)
    piece.write(os.urandom(4096) * 4096)
    descriptor = os.open(root / "raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)

    def write() -> None:
        for at in range(0, size_bytes, len(piece)):
            os.pwrite(descriptor, piece, at)
        os.fsync(descriptor)

    took = _seconds(write)
    os.close(descriptor)
    os.unlink(root / "raw")
    return took


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", type=int, default=3000)
    parser.add_argument("--large-mb", type=int, default=512)
    parser.add_argument("--configs", default=CONFIGS)
    options = parser.parse_args()
    main(options.repeats, options.small, options.large_mb << 20, options.configs.split(","))
