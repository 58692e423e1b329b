"""Runs functions of this module on several ranks: `python -m tests.checkpoint.ranks WORLD ROOT FUNCTION...`.

torch is imported once and the ranks are forked from there; they meet over gloo. `ROOT/FUNCTION.RANK.passed` says which
function passed on which rank, `.failed` why it did not.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from stillroom.checkpoint import CheckpointConfig, Checkpointer
from stillroom.checkpoint.reading import Snapshot
from stillroom.errors import CheckpointCorrupt, CheckpointError
from tests.checkpoint.states import assert_same, bits

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


def _rank(functions: list[str], rank: int, world: int, root: Path, port: int) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        for function in functions:
            (root / function).mkdir(exist_ok=True)
            dist.barrier()
            name = f"{function}.{rank}"
            try:
                globals()[function](root / function, rank, world)
            except BaseException:
                (root / f"{name}.failed").write_text(traceback.format_exc())
                break  # the others are no longer where this rank is
            (root / f"{name}.passed").touch()
        if rank == 0:
            time.sleep(1)  # the store is here, and the others may still ask it
    finally:
        os._exit(0)


def main(world: int, root: Path, functions: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _rank(functions, rank, world, root, port)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
