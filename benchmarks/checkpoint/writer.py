"""How much CPU does writing a gigabyte take?

    python -m benchmarks.checkpoint.writer [--repeats 5] [--mb 512]

Eight large tensors, all changed before each save, the sides in turns, each in a process of its own. Counted is the CPU
time of the process that writes (our writer; DCP's daemon), and of the one that trains, which stages and hands over.
`dcp sync` has one process for both. The ratio is of the writing processes, `with_staging` of both together.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from benchmarks.checkpoint.apart import Apart
from benchmarks.checkpoint.save import BEST, Saver, large
from benchmarks.checkpoint.sides import environment, median

SIDES = ("ours", BEST, "dcp sync")


def main(repeats: int, size_bytes: int) -> None:
    samples: dict[str, dict[str, list[float]]] = {name: {"writer": [], "trainer": []} for name in SIDES}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
        savers = {name: Apart(Saver, name, Path(folder), large, size_bytes) for name in SIDES}
        for saver in savers.values():
            saver.call("open")
        for _ in range(repeats + 1):
            for name, saver in savers.items():
                saver.call("prepare")
                before = saver.cpu_s()
                saver.call("save")
                after = saver.cpu_s()
                for part, where in (("writer", "others"), ("trainer", "own")):
                    samples[name][part].append((after[where] - before[where]) / (size_bytes / 1e9))
        for saver in savers.values():
            saver.call("close")
            saver.close()
    medians = {name: {part: median(values[1:]) for part, values in of.items()} for name, of in samples.items()}
    for name, of in medians.items():
        print(f"{name:18} CPU-seconds per GB: {of['writer']:.3f} in the writer, {of['trainer']:.3f} in the trainer")
    both = {name: median([w + t for w, t in zip(of["writer"][1:], of["trainer"][1:], strict=True)])
            for name, of in samples.items()}  # fmt: skip
    ratios = {
        "cpu_seconds_per_gb": medians[BEST]["writer"] / medians["ours"]["writer"],
        "with_staging": both[BEST] / both["ours"],
        "with_staging_vs_sync": both["dcp sync"] / both["ours"],
    }
    print(json.dumps({"ratios": ratios, "medians": medians, "samples": samples, **environment()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mb", type=int, default=512)
    options = parser.parse_args()
    main(options.repeats, options.mb << 20)
