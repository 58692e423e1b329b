"""The sides of every comparison: ours, PyTorch DCP in its configurations, and `torch-checkpointing` where it is there.

Each has `save`, which returns what is under way as a `Begun`, and `close`. Checkpoints of all sides lie in folders of
`root`; a side removes the one before last, between saves and outside of what is timed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from stillroom.checkpoint import CheckpointConfig, Checkpointer

DCP_KINDS = {
    "dcp sync": {},
    "dcp thread": {"process": False},
    "dcp thread+cache": {"process": False, "cached": True},
    "dcp process": {"process": True},
    "dcp process+cache": {"process": True, "cached": True, "shared": True},
    "dcp process+cache+async": {"process": True, "cached": True, "shared": True, "staged_behind": True},
}
"""What is set of DCP. `cached`: the plan cache, and one stager kept for all saves; `shared`: it stages to shared
memory; `staged_behind`: on a thread of its own. Without `cached` DCP makes a stager for each save: its default."""

EVERY = 1 << 60


class Begun:
    """A save under way.

    Attributes:
        held_s: how long the call held its caller.
        durable_s: from the call to the end, once that has come.
    """

    def __init__(self, began: float, staged: Callable[[], Any] = lambda: None) -> None:
        self.began, self.held_s = began, time.perf_counter() - began
        self.durable_s: float | None = None
        self._staged, self._ended = staged, threading.Event()

    def staged(self) -> float:
        """Wait until the state may be changed; seconds since the call."""
        self._staged()
        return time.perf_counter() - self.began

    def end(self, *_: Any) -> None:
        self.durable_s = time.perf_counter() - self.began
        self._ended.set()

    def wait(self) -> float:
        """Wait until it is durable; seconds since the call."""
        self._ended.wait()
        assert self.durable_s is not None
        return self.durable_s


class Ours:
    """This engine. `set_up_s` is what its construction took until it was ready for a first save."""

    def __init__(self, root: Path, state: dict[str, Any], **config: Any) -> None:
        began = time.perf_counter()
        self.checkpointer = Checkpointer(root, like=state, config=CheckpointConfig(keep_latest=EVERY, **config))
        self.checkpointer._ready()
        self.set_up_s, self.state, self.step = time.perf_counter() - began, state, 0

    def save(self) -> Begun:
        self.step += 1
        began = time.perf_counter()
        save = self.checkpointer.save(self.step, self.state)
        begun = Begun(began, save.staged)
        save.add_done_callback(begun.end)
        return begun

    def forget(self) -> None:
        """Remove the checkpoint before the newest."""
        for step in self.checkpointer.steps()[:-1]:
            shutil.rmtree(self.checkpointer.path_of(step))

    def close(self) -> None:
        self.checkpointer.close()


class Folders:
    """A side whose caller names a folder for each save."""

    set_up_s = 0.0

    def __init__(self, root: Path, state: dict[str, Any]) -> None:
        self.root, self.state, self.step = root, state, 0

    def next_folder(self) -> Path:
        self.step += 1
        return self.root / f"step-{self.step}"

    def forget(self) -> None:
        shutil.rmtree(self.root / f"step-{self.step - 1}", ignore_errors=True)

    def close(self) -> None:
        pass


class Dcp(Folders):
    """`torch.distributed.checkpoint` as one of `DCP_KINDS`."""

    def __init__(self, root: Path, state: dict[str, Any], kind: str) -> None:
        super().__init__(root, state)
        self.asked = DCP_KINDS[kind]
        self.cached = self.asked.get("cached", False)
        self.stager = None
        if self.cached:
            behind, shared = self.asked.get("staged_behind", False), self.asked.get("shared", False)
            self.stager = DefaultStager(StagingOptions(False, shared, behind, False))

    def save(self) -> Begun:
        path = self.next_folder()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            began = time.perf_counter()
            if not self.asked:
                dcp.save(self.state, checkpoint_id=path)
                begun = Begun(began)
                begun.end()
                return begun
            response = dcp.async_save(
                self.state,
                checkpoint_id=path,
                async_checkpointer_type=AsyncCheckpointerType[("THREAD", "PROCESS")[self.asked["process"]]],
                async_stager=self.stager,
                planner=DefaultSavePlanner(enable_plan_caching=self.cached),
            )
        if isinstance(response, AsyncSaveResponse):
            begun, upload = Begun(began, response.staging_completion.result), response.upload_completion
        else:
            begun, upload = Begun(began), response
        upload.add_done_callback(begun.end)
        return begun

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class Peer(Folders):
    """`torch-checkpointing` from PyPI. It syncs nothing: here what it wrote is synced when it says that it is done.

    On a CPU it stages in its background thread; its `prewarm_staging` is called, and counted as setting up. Its direct
    I/O is off: 0.1.1 hands the kernel unaligned writes, which ext4 refuses.
    """

    def __init__(self, root: Path, state: dict[str, Any]) -> None:
        super().__init__(root, state)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        began = time.perf_counter()
        self.manager = CheckpointManager.Config(
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False)
        ).build()
        self.manager.prewarm_staging({"state": state})
        self.manager._prewarm_staging_future.result()
        self.set_up_s = time.perf_counter() - began

    def save(self) -> Begun:
        path = self.next_folder()
        began = time.perf_counter()
        written = self.manager.save(str(path), {"state": self.state})
        begun = Begun(began, self.manager._staging_future.result)

        def sync(_: Any) -> None:
            for file in path.rglob("*"):
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            begun.end()

        written.add_done_callback(sync)
        return begun

    def close(self) -> None:
        self.manager.close()


def open_side(name: str, root: Path, state: dict[str, Any]) -> Any:
    """A side by name: `ours`, `ours behind` (staged behind the next step), `torch-checkpointing`, or a DCP kind."""
    folder = root / name.replace(" ", "-")
    if name == "ours":
        return Ours(folder, state)
    if name == "ours behind":
        return Ours(folder, state, stage="behind")
    return Peer(folder, state) if name == "torch-checkpointing" else Dcp(folder, state, name)


def peer_version() -> str | None:
    with contextlib.suppress(ImportError):
        from torch_checkpointing import __version__

        return str(__version__)
    return None


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
        "torch": torch.__version__, "torch_checkpointing": peer_version(), "python": platform.python_version(),
        "kernel": platform.release(), "cpus": os.cpu_count(), "load": os.getloadavg()[0], "crc32": crc,
    }  # fmt: skip
