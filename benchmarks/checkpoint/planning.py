"""How much CPU does the coordinator spend on a plan, and on a save whose plan did not change?

    python -m benchmarks.checkpoint.planning [--ranks 8,64,256,1856] [--dcp-up-to 256] [--picture docs/...svg]

Simulated ranks of Llama-3-70B: 723 parameters and two Adam moments, each in rows over all ranks (FSDP), or in rows
over groups of 64 that repeat each other (HSDP). Counted is the coordinator's thread: ours decodes what the ranks sent,
assigns, and makes `.metadata`; with an unchanged plan it compares its own part, votes and waits. DCP with its plan
cache makes the global plan once, and on every save unpickles the ranks' write results, rebuilds `storage_data` and
pickles `.metadata`. Store server time is shown apart. Bytes are what the coordinator is sent for that. Beyond
`--dcp-up-to` DCP's figures continue the line through its last two points, and the point says so.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import socket
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from benchmarks.checkpoint.pictures import Panel, Series, draw
from benchmarks.checkpoint.sides import environment, median
from stillroom.checkpoint import layouts, planning
from stillroom.checkpoint.layouts import Item
from stillroom.checkpoint.states import DescribedState


def shapes() -> dict[str, tuple[int, ...]]:
    """Llama-3-70B's parameters."""
    found: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (128256, 8192)}
    for n in range(80):
        layer = {
            "attention.wq": (8192, 8192), "attention.wk": (1024, 8192), "attention.wv": (1024, 8192),
            "attention.wo": (8192, 8192), "feed_forward.w1": (28672, 8192), "feed_forward.w2": (8192, 28672),
            "feed_forward.w3": (28672, 8192), "attention_norm": (8192,), "ffn_norm": (8192,),
        }  # fmt: skip
        found |= {f"layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"norm.weight": (8192,), "output.weight": (128256, 8192)}


SHARD_GROUP = {"fsdp": 1 << 30, "hsdp": 64}
"""Over how many ranks a tensor is divided at most."""


def items_of(rank: int, world: int, sharding: str) -> list[Item]:
    """What a rank holds: its rows of every parameter and of both moments."""
    shards = min(world, SHARD_GROUP[sharding])
    items = []
    for prefix in ("model.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
        for name, shape in shapes().items():
            rows = -(-shape[0] // shards)
            first = min(rank % shards * rows, shape[0])
            held = min(rows, shape[0] - first)
            if held:
                offsets, sizes = (first, *(0 for _ in shape[1:])), (held, *shape[1:])
                items.append(Item(prefix + name, "float32", shape, offsets, sizes, 0))
    return items


def sent_to_ours(world: int, sharding: str) -> list[bytes]:
    """What each rank sends our coordinator for a first plan."""
    shape = {"dict": [[item.key, item.key] for item in items_of(0, world, sharding)]}
    return [
        zlib.compress(json.dumps(planning.described(items_of(rank, world, sharding), shape)).encode(), 1)
        for rank in range(world)
    ]


def ours_first(sent: list[bytes]) -> tuple[float, int]:
    """CPU-seconds of the coordinator for a first plan, and the bytes of `.metadata`."""
    began = time.thread_time()
    metadata = planning.plan_for_all([json.loads(zlib.decompress(part)) for part in sent])[1]
    return time.thread_time() - began, len(metadata)


def ours_unchanged(world: int, sharding: str) -> tuple[float, float]:
    """CPU-seconds of the coordinator's thread for one save, and of everything else here: the store, and all voters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, 1, True)
    state = {item.key: torch.empty(8) for item in items_of(0, world, sharding)}
    described = DescribedState(state)
    items = described.items()
    [(digest, _, _)], metadata, shape = planning.plan_for_all([planning.described(items, described.shape)])
    layout = layouts.lay_out(0, items, range(len(items)), digest, metadata, shape)
    all_began = time.process_time()
    coordinator = 0.0
    for vote in ("p", "w"):
        for _ in range(1, world):
            store.add(vote, 1)
        began = time.thread_time()
        if vote == "p":
            assert described.contents_of(state, layout) is not None
        store.add(vote, 1)
        store.set(f"{vote}/o", b"1")
        store.get(f"{vote}/o")
        coordinator += time.thread_time() - began
    began = time.thread_time()
    store.set("c", b"true")
    coordinator += time.thread_time() - began
    for _ in range(1, world):
        store.get("c")
    return coordinator, time.process_time() - all_began - coordinator


def sent_to_dcp(world: int, sharding: str) -> list[SavePlan]:
    """What each rank sends DCP's coordinator for a first plan."""
    plans = []
    for rank in range(world):
        writes = []
        for item in items_of(rank, world, sharding):
            chunk = ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes))
            data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(item.shape))
            writes.append(WriteItem(MetadataIndex(item.key, item.offsets), WriteItemType.SHARD, tensor_data=data))
        plans.append(SavePlan(writes, planner_data={}))
    return plans


def dcp_first(plans: list[SavePlan]) -> tuple[float, list[SavePlan], Metadata]:
    """CPU-seconds of DCP's coordinator for a first plan, and what comes of it."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, None, True)
    began = time.thread_time()
    plans, metadata = planner.create_global_plan(plans)
    return time.thread_time() - began, plans, metadata


def written(plans: list[SavePlan]) -> list[bytes]:
    """What each rank sends DCP's coordinator on every save: where its writes went."""
    return [
        pickle.dumps([
            WriteResult(item.index, 8192, _StorageInfo(f"__{rank}_0.distcp", 0, 8192)) for item in plan.items
        ])
        for rank, plan in enumerate(plans)
    ]  # fmt: skip


def dcp_every_save(results: list[bytes], metadata: Metadata) -> tuple[float, int]:
    """CPU-seconds of DCP's coordinator for a save whose plan is cached, and the bytes of `.metadata`."""
    began = time.thread_time()
    storage: dict[Any, Any] = {}
    for part in results:
        storage.update({result.index: result.storage_data for result in pickle.loads(part)})
    metadata.storage_data = storage
    buffer = io.BytesIO()
    pickle.dump(metadata, buffer)
    return time.thread_time() - began, buffer.tell()


def unchanged(ranks: list[int], sharding: str, repeats: int) -> dict[int, dict[str, list[float]]]:
    """Our saves with an unchanged plan, the numbers of ranks in turns: before others fill the heap and the caches."""
    times: dict[int, dict[str, list[float]]] = {world: {"ours_unchanged_s": [], "ours_store_s": []} for world in ranks}
    for _ in range(repeats):
        for world, of in times.items():
            for part, took in zip(of, ours_unchanged(world, sharding), strict=True):
                of[part].append(took)
    return times


def measure(world: int, sharding: str, repeats: int, with_dcp: bool, times: dict[str, list[float]]) -> dict[str, Any]:
    """One point of the curve: medians, and the samples of what takes time; sides alternate.

    Without DCP our first plan is made once.
    """
    times = times | {"ours_first_s": []}
    sent, theirs = sent_to_ours(world, sharding), sent_to_dcp(world, sharding) if with_dcp else []
    results: list[bytes] = []
    sizes = {"ours_first_bytes": sum(map(len, sent))}
    if with_dcp:
        times |= {"dcp_first_s": [], "dcp_every_save_s": []}
    for number in range(repeats):
        if with_dcp or number == 0:
            took, sizes["ours_metadata_bytes"] = ours_first(sent)
            times["ours_first_s"].append(took)
        if with_dcp:
            took, plans, metadata = dcp_first(theirs)
            times["dcp_first_s"].append(took)
            results = results or written(plans)
            took, sizes["dcp_metadata_bytes"] = dcp_every_save(results, metadata)
            times["dcp_every_save_s"].append(took)
            sizes["dcp_every_save_bytes"] = sum(map(len, results))
    medians = {part: median(values) for part, values in times.items()}
    return {"sharding": sharding, "ranks": world, **medians, **sizes, "samples": times}


DCP_PARTS = ("dcp_first_s", "dcp_every_save_s", "dcp_every_save_bytes", "dcp_metadata_bytes")


def extrapolate(curve: list[dict[str, Any]]) -> None:
    """Continue DCP's figures in a straight line over ranks."""
    known = [point for point in curve if "dcp_first_s" in point]
    if len(known) < 2:
        return
    before, last = known[-2:]
    for point in curve:
        if "dcp_first_s" not in point:
            share = (point["ranks"] - last["ranks"]) / (last["ranks"] - before["ranks"])
            point |= {part: last[part] + share * (last[part] - before[part]) for part in DCP_PARTS}
            point["dcp_extrapolated"] = True


def picture(path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    lines = {
        "ours, unchanged plan": "ours_unchanged_s", "DCP, unchanged plan": "dcp_every_save_s",
        "ours, first plan": "ours_first_s", "DCP, first plan": "dcp_first_s",
    }  # fmt: skip
    titles = {"fsdp": "FSDP", "hsdp": "HSDP, shard groups of 64"}
    draw(path, [
        Panel(f"Coordinator, Llama-3-70B, {titles[sharding]}", "ranks", "CPU-seconds", [
            Series(name, [(point["ranks"], point[part]) for point in curve if part in point])
            for name, part in lines.items()
        ], log=True)
        for sharding, curve in curves.items()
    ])  # fmt: skip


def main(ranks: list[int], shardings: list[str], dcp_up_to: int, repeats: int, path: Path | None) -> None:
    curves: dict[str, list[dict[str, Any]]] = {}
    for sharding in shardings:
        curve = curves[sharding] = []
        quick = unchanged(ranks, sharding, 3 * repeats)
        for world in ranks:
            curve.append(measure(world, sharding, repeats, world <= dcp_up_to, quick[world]))
            shown = {key: value for key, value in curve[-1].items() if key != "samples"}
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in shown.items()})
        extrapolate(curve)
    if path:
        picture(path, curves)
    curve = curves[shardings[0]]
    compared = max(
        (point for point in curve if "dcp_first_s" in point and "dcp_extrapolated" not in point),
        key=lambda point: point["ranks"],
    )
    at, last, first = compared["ranks"], curve[-1], curve[0]
    flat = last["ours_unchanged_s"] / first["ours_unchanged_s"]
    print(json.dumps({
        "ratios": {
            f"unchanged_{at}": compared["dcp_every_save_s"] / compared["ours_unchanged_s"],
            f"first_{at}": compared["dcp_first_s"] / compared["ours_first_s"],
        },
        "ours": {f"unchanged_{last['ranks']}_over_{first['ranks']}": flat},
        "curve": [point for of in curves.values() for point in of], **environment(),
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="8,64,256,1856")
    parser.add_argument("--shardings", default="fsdp,hsdp")
    parser.add_argument("--dcp-up-to", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    ranks = [int(rank) for rank in options.ranks.split(",")]
    main(ranks, options.shardings.split(","), options.dcp_up_to, options.repeats, options.picture)
