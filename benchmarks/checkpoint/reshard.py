"""How many bytes are read to load a slice, checked?

    python -m benchmarks.checkpoint.reshard [--mb 64] [--ranks 16]

One tensor saved whole; each of `ranks` loads its rows of it (at least 1 MiB each) into a DTensor's local part. Bytes
are those that the disk delivered (`read_bytes` of /proc/self/io), with the file out of the page cache before each load.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from benchmarks.checkpoint.sides import environment
from stillroom.checkpoint import Checkpointer, Snapshot


def main(size_bytes: int, ranks: int) -> None:
    columns = 1024
    whole = torch.randn(size_bytes // 4 // columns, columns)
    rows = whole.shape[0] // ranks
    needed = rows * columns * 4
    found: dict[str, list[float]] = {"ours": [], "dcp": []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
        path = Path(folder)
        with Checkpointer(path) as checkpointer:
            ours = checkpointer.save(1, {"w": whole}).result().path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock.save({"w": whole}, checkpoint_id=path / "dcp")
        for rank in range(ranks):
            for side, load in (("ours", _ours), ("dcp", _dcp)):
                place = ours if side == "ours" else path / "dcp"
                _forget(place)
                before = _read_bytes()
                part = load(place, rank * rows, rows, columns)
                found[side].append((_read_bytes() - before) / needed)
                assert torch.equal(part, whole[rank * rows : (rank + 1) * rows])
    medians = {side: sorted(values)[len(values) // 2] for side, values in found.items()}
    print(f"bytes read over bytes needed ({needed:,} a rank): {medians}")
    print(json.dumps({
        "ours_bytes_over_needed": medians["ours"], "dcp_bytes_over_needed": medians["dcp"], "samples": found,
        **environment(),
    }))  # fmt: skip


def _ours(path: Path, first: int, rows: int, columns: int) -> torch.Tensor:
    snapshot = Snapshot(path)
    part = snapshot.piece("w", snapshot.tensors["w"].pieces[0], (first, first + rows))
    return part.clone()


def _dcp(path: Path, first: int, rows: int, columns: int) -> torch.Tensor:
    """What `dcp.load` does for a rank that holds these rows: its reader with a plan of that chunk."""
    part = torch.empty(rows, columns)
    reader = stock.FileSystemReader(path)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    chunk = ChunkStorageMetadata(torch.Size([first, 0]), torch.Size([rows, columns]))
    planner = stock.DefaultLoadPlanner()
    planner.set_up_planner({"w": part}, metadata, True)
    planner.resolve_tensor = lambda item: part  # type: ignore[method-assign]
    items = create_read_items_for_chunk_list("w", metadata.state_dict_metadata["w"], [chunk])
    reader.read_data(LoadPlan(items), planner).wait()
    return part


def _forget(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=16)
    options = parser.parse_args()
    main(options.mb << 20, options.ranks)
