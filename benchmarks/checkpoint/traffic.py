"""How many bytes go between ranks for a save whose plan did not change?

    python -m benchmarks.checkpoint.traffic [--ranks 4] [--tensors 200,2000] [--repeats 5]

A real `torchrun` of gloo ranks, alone in a network namespace (root on Linux), saves DTensors in rows over all ranks;
DCP with processes, plan cache and cached stager. Counted is what the loopback device carried from before a save to
after it on all ranks, less the same time at rest, divided by ranks: with headers as `wire`, and as `payload` without
the headers of each packet, whose size is found by sending known bytes; the JSON's two figures are payload. Ranks wait
for each other through files meanwhile. `store` is what our ranks count themselves: keys and values that they gave to
the store and got from it, without what the store's protocol adds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.checkpoint.sides import environment, median, open_side

DCP = "dcp process+cache"
WARM_UP = 2


def main(ranks: int, tensors: list[int], repeats: int) -> None:
    curve = []
    for count in tensors:
        with tempfile.TemporaryDirectory() as folder:
            launch(ranks, ["--worker", folder, "--tensors", str(count), "--repeats", str(repeats)])
            point = json.loads((Path(folder) / "found.json").read_text())
        curve.append({"tensors": count, "ranks": ranks, **point})
        for side in ("ours", "dcp"):
            print(count, side, {kind: median(of) for kind, of in point[side].items()})
    last = curve[-1]
    print(json.dumps({
        "ours_bytes_per_rank": median(last["ours"]["payload"]),
        "dcp_bytes_per_rank": median(last["dcp"]["payload"]),
        "ours_keys_and_values_per_rank": median(last["ours"]["store"]),
        "curve": curve, **environment(),
    }))  # fmt: skip


def launch(ranks: int, arguments: list[str]) -> None:
    """Run this module's worker on every rank, in a network namespace of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    # A rendezvous that is static has no heartbeat.
    torchrun += ["--rdzv-backend", "static", "--master-addr", "127.0.0.1", "--master-port", "29511"]
    torchrun += ["-m", "benchmarks.checkpoint.traffic", *arguments]
    script = 'ip link set lo up && exec "$@"'
    # The host's name may have no address in the new namespace.
    subprocess.run(
        ["unshare", "--net", "sh", "-c", script, "sh", *torchrun],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"},
        stdout=sys.stderr,
    )


def worker(folder: Path, tensors: int, repeats: int) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    state = {f"layer.{n}.weight": DTensor.from_local(torch.randn(4, 16), mesh, [Shard(0)]) for n in range(tensors)}
    meet = Meeting(folder / "meeting", rank, world)
    header = header_bytes() if rank == 0 else 0
    found = {}
    for name, key in (("ours", "ours"), (DCP, "dcp")):
        side = open_side(name, folder, state)
        samples: dict[str, list[float]] = {"wire": [], "payload": [], "store": []}
        for number in range(WARM_UP + repeats):
            counted = _counted(side)
            meet()
            before = carried()
            meet()
            side.save().wait()
            meet()
            saved = carried()
            told = meet.tell(_counted(side) - counted)
            if number >= WARM_UP:
                time.sleep(saved[0] - before[0])
                meet()
                rested = carried()
                size, packets = (saved[i] - before[i] - (rested[i] - saved[i]) for i in (1, 2))
                samples["wire"].append(size / world)
                samples["payload"].append((size - header * packets) / world)
                samples["store"].append(max(told))
        side.close()
        found[key] = samples if name == "ours" else {kind: samples[kind] for kind in ("wire", "payload")}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found | {"header_bytes": header}))
    meet()
    dist.destroy_process_group()


class Meeting:
    """A place to wait for all ranks that no network has a part in: files."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world, self.number = folder, rank, world, 0
        folder.mkdir(exist_ok=True)

    def __call__(self) -> None:
        self.tell(0.0)

    def tell(self, value: float) -> list[float]:
        """What each rank says here."""
        self.number += 1
        own = self.folder / f"{self.number}-{self.rank}"
        own.with_suffix(".new").write_text(str(value))
        own.with_suffix(".new").rename(own)
        everybody = [self.folder / f"{self.number}-{rank}" for rank in range(self.world)]
        while not all(file.exists() for file in everybody):
            time.sleep(0.002)
        return [float(file.read_text()) for file in everybody]


def carried() -> tuple[float, int, int]:
    """The time; bytes and packets that the loopback device has carried."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    fields = line.split(":")[1].split()
    return time.monotonic(), int(fields[0]), int(fields[1])


def header_bytes(messages: int = 50, tries: int = 5) -> int:
    """Bytes of headers for each packet, by sending single bytes to oneself: the least found, as others send too."""
    found = []
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        accepted, _ = server.accept()
        for _ in range(tries):
            before = carried()
            for _ in range(messages):
                client.send(b"x")
                accepted.recv(1)
            time.sleep(0.1)
            after = carried()
            found.append((after[1] - before[1] - messages) / (after[2] - before[2]))
        accepted.close()
    return round(min(found))


def _counted(side: Any) -> float:
    group = getattr(getattr(side, "checkpointer", None), "_group", None)
    return float(group.bytes_sent + group.bytes_received) if group is not None else 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tensors", default="200,2000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, int(options.tensors), options.repeats)
    else:
        main(options.ranks, [int(count) for count in options.tensors.split(",")], options.repeats)
