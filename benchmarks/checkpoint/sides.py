"""The two sides of every comparison: states to save, ours, and DCP in its configurations."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from stillroom.checkpoint import CheckpointConfig, Checkpointer


def small(count: int = 3000, size_bytes: int = 8192) -> dict[str, Any]:
    return {f"layer.{n}.weight": torch.randn(size_bytes // 4) for n in range(count)}


def large(size_bytes: int = 512 << 20, count: int = 8) -> dict[str, Any]:
    return {f"layer.{n}.weight": torch.randn(size_bytes // 4 // count) for n in range(count)}


def size_of(state: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


class Ours:
    """Save, timed: `staged` is how long the caller is held, `done` until it is durable, both in seconds."""

    name = "ours"

    def __init__(self, root: Path, state: dict[str, Any], **config: Any) -> None:
        began = time.perf_counter()
        # The states here never change, and linking them would be no save at all.
        settings = CheckpointConfig(keep_latest=1, link_unchanged=False, **config)
        self.checkpointer = Checkpointer(root / "ours", like=state, config=settings)
        self.checkpointer._ready()
        self.set_up_s, self.state, self.step = time.perf_counter() - began, state, 0

    def save(self) -> tuple[float, Callable[[], float]]:
        self.step += 1
        began = time.perf_counter()
        save = self.checkpointer.save(self.step, self.state)
        staged = time.perf_counter() - began

        def wait() -> float:
            save.result()
            return save.seconds["committed"]

        return staged, wait

    def close(self) -> None:
        self.checkpointer.close()


class Dcp:
    """`torch.distributed.checkpoint` as one of `sync`, `thread`, `process`, `process+cache` (plan cache and cached
    shared-memory stager: its best)."""

    def __init__(self, root: Path, state: dict[str, Any], kind: str) -> None:
        self.name, self.kind, self.root, self.state, self.step = f"dcp {kind}", kind, root / kind, state, 0
        self.set_up_s = 0.0
        self.stager = (
            DefaultStager(StagingOptions(False, True, False, False)) if kind == "process+cache" else None
        )  # fmt: skip

    def save(self) -> tuple[float, Callable[[], float]]:
        self.step += 1
        path = self.root / f"step-{self.step}"
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.kind == "sync":
                dcp.save(self.state, checkpoint_id=path)
                took = time.perf_counter() - began
                shutil.rmtree(path)
                return took, lambda: took
            process = self.kind != "thread"
            response = dcp.async_save(
                self.state,
                checkpoint_id=path,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD,
                async_stager=self.stager,
                planner=DefaultSavePlanner(enable_plan_caching=self.kind == "process+cache"),
            )
        upload: Future[Any] = response
        if self.stager is not None:
            response.staging_completion.result()
            upload = response.upload_completion
        staged = time.perf_counter() - began

        def wait() -> float:
            upload.result()
            took = time.perf_counter() - began
            shutil.rmtree(path)
            return took

        return staged, wait

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


@contextmanager
def one_rank() -> Iterator[None]:
    """A gloo group of one: DCP's asynchronous saving needs one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def median(values: list[float]) -> float:
    return statistics.median(values)


def environment() -> dict[str, Any]:
    try:
        import isal

        crc = f"isal {isal.__version__}"
    except ImportError:
        crc = "zlib"
    return {
        "torch": torch.__version__, "python": platform.python_version(), "kernel": platform.release(),
        "cpus": os.cpu_count(), "load": os.getloadavg()[0], "crc32": crc,
    }  # fmt: skip
