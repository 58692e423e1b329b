"""How much CPU does the coordinator spend on a plan, and on a save whose plan did not change?

    python -m benchmarks.checkpoint.planning [--ranks 8,64,256,1856] [--dcp-up-to 64] [--first-up-to 256]

Simulated ranks of Llama-3-70B under FSDP: 723 parameters and two Adam moments, each in rows over all ranks. Counted is
the coordinator's thread: ours decodes what the ranks sent, assigns, and makes `.metadata`; with an unchanged plan it
compares its own part, votes and waits. DCP with its plan cache makes the global plan once, and on every save unpickles
the ranks' write results, rebuilds `storage_data` and pickles `.metadata`. Store server time is shown apart.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import socket
import time
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

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


def items_of(rank: int, world: int) -> list[Item]:
    """What a rank holds: its rows of every parameter and of both moments."""
    items = []
    for prefix in ("model.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
        for name, shape in shapes().items():
            rows = -(-shape[0] // world)
            first = min(rank * rows, shape[0])
            held = min(rows, shape[0] - first)
            if held:
                offsets, sizes = (first, *(0 for _ in shape[1:])), (held, *shape[1:])
                items.append(Item(prefix + name, "float32", shape, offsets, sizes, 0))
    return items


def ours_first(world: int) -> tuple[float, int]:
    """CPU-seconds of the coordinator for a first plan, and the bytes of `.metadata`."""
    held = [items_of(rank, world) for rank in range(world)]
    shape = {"dict": [[item.key, item.key] for item in held[0]]}
    sent = [zlib.compress(json.dumps(planning.described(items, shape)).encode(), 1) for items in held]
    del held
    began = time.thread_time()
    received = [json.loads(zlib.decompress(part)) for part in sent]
    metadata = planning.plan_for_all(received)[1]
    return time.thread_time() - began, len(metadata)


def ours_unchanged(world: int) -> tuple[float, float]:
    """CPU-seconds of the coordinator's thread for one save, and of everything else here: the store, and all voters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, 1, True)
    state = {item.key: torch.empty(8) for item in items_of(0, world)}
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


def dcp(world: int) -> tuple[float, float, int]:
    """CPU-seconds of DCP's coordinator for a first plan, and for every save with a cached one; bytes of `.metadata`."""
    plans, results = [], []
    for rank in range(world):
        writes, done = [], []
        for item in items_of(rank, world):
            index = MetadataIndex(item.key, item.offsets)
            chunk = ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes))
            data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(item.shape))
            writes.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            done.append(WriteResult(index, 8192, _StorageInfo(f"__{rank}_0.distcp", 0, 8192)))
        plans.append(SavePlan(writes, planner_data={}))
        results.append(pickle.dumps(done))
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, None, True)
    began = time.thread_time()
    _, metadata = planner.create_global_plan(plans)
    first = time.thread_time() - began
    began = time.thread_time()
    storage: dict[Any, Any] = {}
    for part in results:
        storage.update({result.index: result.storage_data for result in pickle.loads(part)})
    metadata.storage_data = storage
    buffer = io.BytesIO()
    pickle.dump(metadata, buffer)
    return first, time.thread_time() - began, buffer.tell()


def main(ranks: list[int], dcp_up_to: int, first_up_to: int, repeats: int) -> None:
    curve = []
    for world in ranks:
        unchanged = [ours_unchanged(world) for _ in range(repeats)]
        point: dict[str, Any] = {
            "ranks": world,
            "ours_unchanged_s": median([own for own, _ in unchanged]),
            "ours_store_s": median([rest for _, rest in unchanged]),
        }
        if world <= first_up_to:
            point["ours_first_s"], point["ours_metadata_bytes"] = ours_first(world)
        if world <= dcp_up_to:
            point["dcp_first_s"], point["dcp_every_save_s"], point["dcp_metadata_bytes"] = dcp(world)
        print({key: round(value, 4) for key, value in point.items()}, flush=True)
        curve.append(point)
    compared = [point for point in curve if "dcp_first_s" in point and "ours_first_s" in point][-1]
    at = compared["ranks"]
    ratios = {
        f"unchanged_{at}": compared["dcp_every_save_s"] / compared["ours_unchanged_s"],
        f"first_{at}": compared["dcp_first_s"] / compared["ours_first_s"],
    }
    flat = {f"unchanged_{curve[-1]['ranks']}_over_{curve[0]['ranks']}": curve[-1]["ours_unchanged_s"] / curve[0]["ours_unchanged_s"]}  # noqa: E501  # fmt: skip
    print(json.dumps({"ratios": ratios, "ours": flat, "curve": curve, **environment()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="8,64,256,1856")
    parser.add_argument("--dcp-up-to", type=int, default=256)
    parser.add_argument("--first-up-to", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    main([int(rank) for rank in options.ranks.split(",")], options.dcp_up_to, options.first_up_to, options.repeats)
