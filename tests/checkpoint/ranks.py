"""Runs functions of this folder on several ranks: `python -m tests.checkpoint.ranks ROOT WORLD MODULE FUNCTION...`.

torch is imported once and the ranks are forked from there, for each `WORLD MODULE FUNCTION,FUNCTION...` anew; they meet
over gloo and a store that belongs to none of them, as under torchrun. `ROOT/FUNCTION.RANK.passed` says which function
passed on which rank, `.failed` why it did not.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stillroom.checkpoint import CheckpointConfig, Checkpointer
from stillroom.checkpoint.reading import Snapshot
from stillroom.errors import CheckpointCorrupt, CheckpointError
from stillroom.storage import ObjectPath, ObjectStore
from tests.checkpoint.states import STOCK_DTYPES, any_tensor, assert_same, bits

QUICK = CheckpointConfig(timeout_s=20.0)
HASTY = CheckpointConfig(timeout_s=2.0)


def wholes(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "even": torch.randn(8, 6, generator=generator),
        "uneven": torch.randn(5, 3, generator=generator),
        "one row": torch.randn(1, 4, generator=generator).bfloat16(),
        "long": torch.randn(1000, 70, generator=generator),
        "columns": torch.randn(4, 9, generator=generator),
        "scalar": torch.randn((), generator=generator),
    }


def sharded(seed: int, mesh: DeviceMesh) -> dict:
    """A state as FSDP2 has it on a 1-D mesh and HSDP on a 2-D one: sharded over the last dimension of the mesh."""
    replicated = [Replicate()] * (mesh.ndim - 1)

    def place(name: str, whole: torch.Tensor) -> DTensor:
        placement = Replicate() if name == "scalar" else Shard(int(name == "columns"))
        return distribute_tensor(whole, mesh, [*replicated, placement], src_data_rank=None)

    return {
        "model": {name: place(name, whole) for name, whole in wholes(seed).items()},
        "plain": torch.arange(10) + seed,
        "run": {"step": seed, "rates": [0.1, 0.2]},
    }


def emptied(state: dict) -> dict:
    return {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()},
        "plain": torch.zeros_like(state["plain"]),
        "run": {"step": -1, "rates": []},
    }


def assert_whole(state: dict, seed: int) -> None:
    for name, whole in wholes(seed).items():
        assert bits(state["model"][name].full_tensor()) == bits(whole), name
    assert_same(state["plain"], torch.arange(10) + seed)
    assert_same(state["run"], {"step": seed, "rates": [0.1, 0.2]})


def meshes(world: int) -> list[DeviceMesh]:
    """1, 2, 3 and 4 ranks in a row, and 2 x 2; every rank takes part in making them."""
    found = [DeviceMesh("cpu", list(range(size))) for size in range(1, world + 1)]
    return [*found, DeviceMesh("cpu", [[0, 1], [2, 3]])] if world >= 4 else found


def group_of(mesh: DeviceMesh):
    return mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD


def object_store(root: Path, rank: int, world: int) -> None:
    """Saved by all ranks as objects, resharded to all and to one; a rank that cannot write is named to every rank."""
    url = os.environ["CHECKPOINTS"]
    one, both = meshes(world)
    with Checkpointer(url, like=sharded(1, both), config=QUICK) as checkpointer:
        for step in (1, 2, 2):
            checkpointer.save(step, sharded(step, both)).result()
        assert checkpointer.steps() == [1, 2]
        checkpointer.load(into := emptied(sharded(0, both)))
        assert_whole(into, 2)
        dist.barrier()
    if one.get_coordinate() is not None:
        with Checkpointer(url, config=QUICK, process_group=one.get_group()) as checkpointer:
            checkpointer.load(into := emptied(sharded(0, one)))
            assert checkpointer.verify(2) == []
        assert_whole(into, 2)
    dist.barrier()
    with Checkpointer(url, config=QUICK) as checkpointer:
        right = checkpointer.root
        checkpointer.root = ObjectPath("no-such-bucket", "run") if rank == 1 else right
        assert "no bucket 'no-such-bucket'" in failed(checkpointer.save(3, sharded(3, both)).result)
        checkpointer.root = right
        dist.barrier()
        store = ObjectStore()
        assert {folder.name[:13] for folder in store.children(right)[1]} == {"step-00000001", "step-00000002"}
        checkpointer.save(3, sharded(3, both)).result()
        assert checkpointer.steps() == [2, 3]


def reshard(root: Path, rank: int, world: int) -> None:
    """Every world size to every other, ours and stock DCP reading what ours wrote and ours what DCP wrote."""
    made = meshes(world)
    for number, mesh in enumerate(made):
        if mesh.get_coordinate() is not None:
            state = sharded(number, mesh)
            with Checkpointer(root / f"ours-{number}", config=QUICK, process_group=group_of(mesh)) as checkpointer:
                for step in (1, 2):
                    checkpointer.save(step, state).result()
            stock.save(state, checkpoint_id=root / f"stock-{number}" / "step-00000002", process_group=group_of(mesh))
        dist.barrier()
    for mesh in made:
        dist.barrier()
        if mesh.get_coordinate() is None:
            continue
        for number in range(len(made)):
            for kind in ("ours", "stock"):
                into = emptied(sharded(0, mesh))
                with Checkpointer(
                    root / f"{kind}-{number}", config=QUICK, process_group=group_of(mesh)
                ) as checkpointer:
                    assert checkpointer.load(into).step == 2
                assert_whole(into, number)
                assert checkpointer.verify(2) == []
            into = emptied(sharded(0, mesh))
            stock.load(into, checkpoint_id=root / f"ours-{number}" / "step-00000002", process_group=group_of(mesh))
            assert_whole(into, number)


def any_wholes(draw: random.Random) -> dict[str, torch.Tensor]:
    """Tensors of any dtype that stock DCP knows, of any bits, and shapes that do not divide by the ranks."""

    def shape() -> tuple[int, ...]:
        return tuple(draw.randrange(draw.random() > 0.1, 8) for _ in range(draw.randrange(4)))

    return {
        str(number): any_tensor(draw.choice(STOCK_DTYPES), shape(), draw.randrange(1000))
        for number in range(draw.randrange(1, 6))
    }


def placed(wholes: dict[str, torch.Tensor], mesh: DeviceMesh, draw: random.Random) -> dict[str, torch.Tensor]:
    """Each whole or as a DTensor, sharded or replicated along each dimension of the mesh."""
    found: dict[str, torch.Tensor] = {}
    for name, whole in wholes.items():
        placements = [
            Shard(draw.randrange(whole.ndim)) if whole.ndim and draw.random() < 0.7 else Replicate()
            for _ in range(mesh.ndim)
        ]
        if draw.random() < 0.2:
            found[name] = whole.clone()
            continue
        sizes, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
        local = whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
        found[name] = DTensor.from_local(
            local.contiguous(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return found


def reshard_any(root: Path, rank: int, world: int) -> None:
    """What `reshard` shows for one state, for a family of them, with other placements at each load."""
    made = meshes(world)
    for seed in range(int(os.environ.get("STILLROOM_STATES", "3"))):
        wholes = any_wholes(random.Random(seed))
        for number, mesh in enumerate(made):
            if mesh.get_coordinate() is not None:
                state = {**placed(wholes, mesh, random.Random(seed + number)), "seed": seed}
                with Checkpointer(root / f"ours-{number}", config=QUICK, process_group=group_of(mesh)) as checkpointer:
                    checkpointer.save(seed, state).result()
                path = root / f"stock-{number}" / f"step-{seed:08d}"
                stock.save(state, checkpoint_id=path, process_group=group_of(mesh))
            dist.barrier()
        for number in range(len(made)):
            for other, mesh in enumerate(made):
                if mesh.get_coordinate() is not None:
                    read_any(root, number, mesh, wholes, seed, random.Random(seed + 100 * number + other))
                dist.barrier()


def read_any(
    root: Path, number: int, mesh: DeviceMesh, wholes: dict[str, torch.Tensor], seed: int, draw: random.Random
) -> None:
    """Ours by stock DCP, and both by ours, into one choice of placements."""
    wanted = placed(wholes, mesh, draw)

    def empty() -> dict:
        return {**{name: torch.zeros_like(tensor) for name, tensor in wanted.items()}, "seed": -1}

    def check(into: dict, who: str) -> None:
        assert into["seed"] == seed
        for name, tensor in wanted.items():
            here, there = (each.to_local() if isinstance(each, DTensor) else each for each in (into[name], tensor))
            assert bits(here) == bits(there), f"{who}, state {seed}, from mesh {number} to {mesh}, tensor {name}"

    into = empty()
    path = root / f"ours-{number}" / f"step-{seed:08d}"
    stock.load(into, checkpoint_id=path, process_group=group_of(mesh))
    check(into, "stock reads ours")
    for kind in ("ours", "stock"):
        into = empty()
        with Checkpointer(root / f"{kind}-{number}", config=QUICK, process_group=group_of(mesh)) as checkpointer:
            checkpointer.load(into, step=seed)
        check(into, f"ours reads {kind}")


def fsdp(root: Path, rank: int, world: int) -> None:
    """A model under FSDP2 and its optimizer: saved, trained on, loaded, and trained on again to the same bits."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh = DeviceMesh("cpu", list(range(world)))
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(steps: int) -> list[bytes]:
        for step in range(steps):
            torch.manual_seed(10 * step + rank)
            model(torch.randn(4, 7)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [bits(parameter.to_local()) for parameter in model.parameters()]

    def state() -> dict:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    train(2)
    with Checkpointer(root, like=state(), config=QUICK) as checkpointer:
        checkpointer.save(2, state()).staged()
        wanted = train(2)
        loaded = state()
        checkpointer._saves[-1].result()
        checkpointer.load(loaded)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        assert train(2) == wanted


def tensor_parallel(root: Path, rank: int, world: int) -> None:
    """FSDP2 over tensor parallelism, both sharding the same dimension: loaded into other meshes, also by stock DCP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 16)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parallelize_module(model, mesh["tp"], ColwiseParallel())
    fully_shard(model, mesh=mesh["fsdp"])
    with Checkpointer(root, config=QUICK) as checkpointer:
        path = checkpointer.save(1, {"model": model.state_dict()}).result().path
        flat = DeviceMesh("cpu", list(range(world)))
        for load in (checkpointer.load, lambda state: stock.load(state, checkpoint_id=path)):
            into = {"model": {name: distribute_tensor(torch.zeros_like(whole), flat, [Shard(0)])
                              for name, whole in wanted.items()}}  # fmt: skip
            load(into)
            for name, whole in wanted.items():
                assert bits(into["model"][name].full_tensor()) == bits(whole), name
        again = model.state_dict()
        for parameter in again.values():
            parameter.zero_()
        checkpointer.load({"model": again})
        for name, whole in wanted.items():
            assert bits(again[name].full_tensor()) == bits(whole), name


def refused(root: Path, rank: int, world: int) -> None:
    """What has no single box on each rank is refused by name, and what was before is saved on."""
    from torch.distributed._shard.sharded_tensor import zeros
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    spec = ChunkShardingSpec(dim=0, placements=[f"rank:{number}/cpu" for number in range(world)])
    mesh = DeviceMesh("cpu", list(range(world)))
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    wrong = DTensor.from_local(torch.ones(3 + rank), mesh, [Shard(0)], shape=torch.Size([8]), stride=(1,))
    with Checkpointer(root, config=QUICK) as checkpointer:
        assert "'t' cannot be saved: it is a ShardedTensor" in failed(
            lambda: checkpointer.save(1, {"t": zeros(spec, 8)})
        )
        assert "'p' cannot be saved: a DTensor is partial" in failed(lambda: checkpointer.save(1, {"p": partial}))
        assert "'w' cannot be saved: a DTensor holds" in failed(lambda: checkpointer.save(1, {"w": wrong}))
        checkpointer.save(1, {"fine": torch.ones(3)}).result()


def linked(root: Path, rank: int, world: int) -> None:
    """Each rank links what stays the same on it: here all ranks but the last one have such a tensor."""
    mesh = DeviceMesh("cpu", list(range(world)))
    own = torch.zeros(300_000)
    for resume in range(2):
        with Checkpointer(root, config=QUICK.model_copy(update={"keep_latest": 100})) as checkpointer:
            for step in range(1 + 6 * resume, 7 + 6 * resume):
                if rank == world - 1:
                    own.fill_(step)
                state = sharded(step, mesh) | {f"own {rank}": own}
                checkpointer.save(step, state).result()
            for step in (1, 6 * resume + 1, 6 * resume + 6):
                into = emptied(sharded(0, mesh)) | {f"own {rank}": torch.ones(300_000)}
                checkpointer.load(into, step=step)
                assert_whole(into, step)
                assert into[f"own {rank}"].unique().tolist() == [step if rank == world - 1 else 0]
            files = [checkpointer.path_of(step) / f"__{rank}_1.distcp" for step in checkpointer.steps()]
            inodes = {file.stat().st_ino for file in files if file.exists()}
            assert len(inodes) == (rank != world - 1)
            assert checkpointer.verify(6 * resume + 6) == []


def failures(root: Path, rank: int, world: int) -> None:
    """One rank fails, or changes its state: every rank hears of it, nothing is committed, the next save works."""
    mesh = DeviceMesh("cpu", list(range(world)))
    with Checkpointer(root, config=QUICK) as checkpointer:
        checkpointer.save(1, sharded(1, mesh)).result()
        state = sharded(2, mesh)
        if rank == 1:
            state["run"]["bad"] = (value for value in ())
        assert "run.bad" in failed(lambda: checkpointer.save(2, state))
        if rank == 1:
            broken = root / "a file"
            broken.write_text("")
            checkpointer.root = broken
        save = checkpointer.save(3, sharded(3, mesh))
        assert "could not be written" in failed(save.result)
        checkpointer.root = root
        different = torch.ones(3 + rank)
        assert "on one rank" in failed(lambda: checkpointer.save(4, {"same name": different}))
        own = {f"rank {rank}": different, "shared": torch.ones(2)} | ({"extra": 1} if rank == 1 else {})
        checkpointer.save(5, own).result()
        assert checkpointer.steps() == [1, 5]
        into: dict = {}
        checkpointer.load(into)
        assert len(into) == world + 2
        if rank == 1:
            os.kill(checkpointer._daemon.pid, signal.SIGKILL)
        checkpointer.save(6, own).result()
        dist.barrier()
        if rank == 0:
            snapshot = Snapshot(root / "step-00000006")
            piece = snapshot.tensors["rank 1"].pieces[0]
            data = bytearray((snapshot.path / piece.file).read_bytes())
            data[piece.offset + piece.size_bytes // 2] ^= 1
            (snapshot.path / piece.file).write_bytes(data)
        dist.barrier()
        into = {f"rank {rank}": torch.zeros(3 + rank)}
        reason = failed(lambda: checkpointer.load(into, keys=[f"rank {rank}"]))
        assert ("damaged" in reason) if rank == 1 else reason
        assert_same(into, {f"rank {rank}": torch.zeros(3 + rank)})
    assert not list(root.glob(".step*"))


def lost_rank(root: Path, rank: int, world: int) -> None:
    """The last rank is killed, or hangs, in the middle: the others hear of it within the timeout."""
    with Checkpointer(root, config=HASTY) as checkpointer:
        state = {"w": torch.ones(1000), f"own {rank}": torch.ones(10) * rank}
        checkpointer.save(1, state).result()
        if rank == world - 1:
            checkpointer._daemon.ask = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # it votes no more
        began = time.monotonic()
        assert failed(lambda: checkpointer.save(2, state).result())
        assert time.monotonic() - began < 5 * HASTY.timeout_s
        assert checkpointer.steps() == [1]


def traffic(root: Path, rank: int, world: int) -> None:
    """With an unchanged plan a save takes at most 256 bytes a rank, whatever the number of tensors."""
    state = {f"layer {number}": torch.ones(3) * rank for number in range(200)} | {"step": 0}
    with Checkpointer(root, config=QUICK) as checkpointer:
        checkpointer.save(1, state).result()
        for step in range(2, 5):
            before = checkpointer._group.bytes_sent + checkpointer._group.bytes_received
            checkpointer.save(step, state | {"step": step}).result()
            used = checkpointer._group.bytes_sent + checkpointer._group.bytes_received - before
            assert used <= 256, f"{used} bytes"
    with Checkpointer(root, config=QUICK) as checkpointer:  # a resume: the plan is found again
        before = checkpointer._group.bytes_sent + checkpointer._group.bytes_received
        checkpointer.save(5, state | {"step": 5}).result()
        used = checkpointer._group.bytes_sent + checkpointer._group.bytes_received - before
        assert used <= 512, f"{used} bytes"


def failed(call) -> str:
    try:
        call()
    except CheckpointCorrupt as error:
        return str(error)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it did not fail")


def _rank(module: str, functions: list[str], rank: int, world: int, root: Path, port: int) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, world, False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        for function in functions:
            (root / function).mkdir(exist_ok=True)
            dist.barrier()
            name = f"{function}.{rank}"
            try:
                getattr(importlib.import_module(f"tests.checkpoint.{module}"), function)(root / function, rank, world)
            except BaseException:
                (root / f"{name}.failed").write_text(traceback.format_exc())
                break  # the others are no longer where this rank is
            (root / f"{name}.passed").touch()
    finally:
        os._exit(0)


def main(root: Path, launches: list[str]) -> None:
    for world, module, functions in zip(launches[::3], launches[1::3], launches[2::3], strict=True):
        store = dist.TCPStore("127.0.0.1", 0, int(world), True, wait_for_workers=False)
        children = []
        for rank in range(int(world)):
            child = os.fork()
            if child == 0:
                _rank(module, functions.split(","), rank, int(world), root, store.port)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
