"""How much CPU does writing a gigabyte take?

    python -m benchmarks.checkpoint.writer [--repeats 5] [--mb 256]

Ours: the writer process's CPU time, and the trainer's during the same save. DCP: the process's during `dcp.save`, which
writes in it; its asynchronous forms do the same work elsewhere and more.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoint.sides import Dcp, Ours, environment, large, median, size_of


def main(repeats: int, size_bytes: int) -> None:
    state = large(size_bytes)
    gb = size_of(state) / 1e9
    samples: dict[str, list[float]] = {"ours_writer": [], "ours_trainer": [], "dcp": []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
        ours, dcp = Ours(Path(folder), state), Dcp(Path(folder), state, "sync")
        for _ in range(repeats + 1):
            before, began = _cpu(ours.checkpointer._daemon.pid), time.process_time()
            ours.save()[1]()
            samples["ours_trainer"].append((time.process_time() - began) / gb)
            samples["ours_writer"].append((_cpu(ours.checkpointer._daemon.pid) - before) / gb)
            began = time.process_time()
            dcp.save()
            samples["dcp"].append((time.process_time() - began) / gb)
        ours.close()
    medians = {side: median(values[1:]) for side, values in samples.items()}
    print(f"CPU-seconds per GB: {medians}")
    ratios = {
        "cpu_seconds_per_gb": medians["dcp"] / medians["ours_writer"],
        "with_staging": medians["dcp"] / (medians["ours_writer"] + medians["ours_trainer"]),
    }
    print(json.dumps({"ratios": ratios, "medians": medians, "samples": samples, **environment()}))


def _cpu(pid: int) -> float:
    """CPU time of a process so far, in seconds: user and system, nanosecond counters of the scheduler."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    ended = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = (int(ended[11]) + int(ended[12])) / os.sysconf("SC_CLK_TCK")
    return max(total / 1e9, ticks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mb", type=int, default=256)
    options = parser.parse_args()
    main(options.repeats, options.mb << 20)
