"""What goes wrong on one rank of several: functions for `ranks.py`, whose processes preload `breaking.c`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from stillroom.checkpoint import CheckpointConfig, Checkpointer
from stillroom.checkpoint.reading import Snapshot
from tests.checkpoint.breaking import Breaker, assert_tidy
from tests.checkpoint.ranks import failed
from tests.checkpoint.states import assert_same

HASTY = CheckpointConfig(timeout_s=4.0, keep_latest=1)


def state(rank: int, value: int) -> dict:
    return {f"own {rank}": torch.full((70_000,), float(value)), "shared": torch.full((3,), float(value)), "step": value}


def breaker() -> Breaker:
    return Breaker(Path(os.environ["BREAKING"]))


def told(call) -> str:
    """The error that comes within a bounded time."""
    began = time.monotonic()
    reason = failed(call)
    assert time.monotonic() - began < 5 * HASTY.timeout_s
    return reason


def next_save_works(checkpointer: Checkpointer, rank: int, world: int, step: int) -> None:
    dist.barrier()
    checkpointer.save(step, state(rank, step)).result()
    assert checkpointer.steps() == [step]
    into: dict = {}
    checkpointer.load(into)
    for other in range(world):
        assert_same(into[f"own {other}"], state(other, step)[f"own {other}"])
    dist.barrier()
    assert_tidy(checkpointer.root)


def rank_hangs(root: Path, rank: int, world: int) -> None:
    """Each in turn, the coordinator too, is stopped before it saves, and goes on when the others have given up."""
    with Checkpointer(root, config=HASTY) as checkpointer:
        checkpointer.save(1, state(rank, 1)).result()
        for hanging in range(world):
            (root / f"{rank}").write_text(str(os.getpid()))
            dist.barrier()
            if rank == hanging:
                os.kill(os.getpid(), signal.SIGSTOP)
            told(lambda: checkpointer.save(100, state(rank, 100)).result())
            if rank == (hanging + 1) % world:
                os.kill(int((root / f"{hanging}").read_text()), signal.SIGCONT)
            next_save_works(checkpointer, rank, world, 2 + hanging)


def late_rank(root: Path, rank: int, world: int) -> None:
    """A slow one is waited for, within the timeout."""
    with Checkpointer(root, config=HASTY) as checkpointer:
        for step in (1, 2, 3):
            if rank == step % world:
                time.sleep(0.5)
            checkpointer.save(step, state(rank, step)).result()
        next_save_works(checkpointer, rank, world, 4)


def broken_disk_of_one(root: Path, rank: int, world: int) -> None:
    """A full disk, an error, a hanging disk and a killed writer on the last rank; then at the coordinator's commit."""
    last = f"__{world - 1}_0.distcp"
    with Checkpointer(root, config=HASTY) as checkpointer:
        step = 1
        checkpointer.save(step, state(rank, step)).result()
        for action, operation, match in (
            ("ENOSPC", "write", last), ("EIO", "sync", last), ("stop", "write", last), ("EIO", "write", ".metadata"),
            ("EIO", "rename", f"{root}/"), ("stop", "rename", f"{root}/"),
        ):  # fmt: skip
            dist.barrier()
            if rank == 0:
                breaker().arm(action, operation, match=match, times=1)
            dist.barrier()
            changed = {**state(rank, 100), "new": 1}  # else `.metadata` would be linked
            told(lambda: checkpointer.save(100, changed).result())  # noqa: B023
            dist.barrier()
            assert checkpointer.steps()[-1] == step
            assert breaker().hits == 1
            dist.barrier()
            breaker().disarm()
            step += 1
            next_save_works(checkpointer, rank, world, step)
        for operation, match in (("write", last), ("sync", last), ("write", ".metadata"), ("rename", f"{root}/")):
            dist.barrier()
            if rank == 0:
                breaker().arm("kill", operation, match=match, times=1)
            dist.barrier()
            step += 1
            checkpointer.save(step, {**state(rank, step), "new": 1}).result()
            assert breaker().hits == 1
            dist.barrier()
            breaker().disarm()
            step += 1
            next_save_works(checkpointer, rank, world, step)


def coordinator_dies_before_the_rename(root: Path, rank: int, world: int) -> None:
    coordinator_dies(root, rank, "kill both", "write", "tmp/.metadata")


def coordinator_dies_at_the_rename(root: Path, rank: int, world: int) -> None:
    """Its writer lives a moment longer, and commits."""
    coordinator_dies(root, rank, "kill parent", "rename", f"{root}/")


def coordinator_dies_after_the_rename(root: Path, rank: int, world: int) -> None:
    """When it removes what is superfluous."""
    coordinator_dies(root, rank, "kill both", "rename", f"{root}/step-00000001")


def coordinator_dies(root: Path, rank: int, action: str, operation: str, match: str) -> None:
    with Checkpointer(root, config=HASTY) as checkpointer:
        checkpointer.save(1, state(rank, 1)).result()
        dist.barrier()
        if rank == 0:
            breaker().arm(action, operation, match=match, times=1, delay_s=0.2)
        dist.barrier()
        told(lambda: checkpointer.save(2, state(rank, 2)).result())


def voter_dies(root: Path, rank: int, world: int) -> None:
    """The last rank, between its vote and the coordinator's rename: what it wrote stays."""
    with Checkpointer(root, config=HASTY) as checkpointer:
        checkpointer.save(1, state(rank, 1)).result()
        dist.barrier()
        if rank == 0:
            breaker().arm("delay", "rename", "remove", match=f"{root}/", delay_s=0.3)
        dist.barrier()
        save = checkpointer.save(2, state(rank, 2))
        if rank == world - 1:
            while "written" not in save.seconds:
                time.sleep(0.001)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        save.result()
        breaker().disarm()
        assert checkpointer.verify(2) == []
        assert Snapshot(checkpointer.path_of(2)).tensors.keys() >= {f"own {other}" for other in range(world)}
