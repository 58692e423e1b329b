"""Trainers to be broken: `python -m tests.checkpoint.trainers` reads tasks, one a line, and forks a trainer for each.

    train ROOT RANKS        saves without end
    save ROOT STEP VALUE    one save
    leave ROOT              exits with a save in flight
    fork ROOT               saves, forks as data loading does, and waits

torch is imported once. What happens is told on stdout, a word and a number a line: `rank`, `writer` and `child` with
their processes, `committed` with a step, and `ended` when the ranks have.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.filesystem  # what the first save would import, in every fork again
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from stillroom.checkpoint import CheckpointConfig, Checkpointer

CONFIG = CheckpointConfig(keep_latest=3, timeout_s=30.0)


def content(step: int) -> dict[str, Any]:
    """The state of a step, of whole tensors."""
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.randn(100_000, 3, generator=generator),
        "many": [torch.randn(11, generator=generator) for _ in range(20)],
        "frozen": torch.arange(400_000),  # linked from step to step
        "step": step,
    }


def train(root: str, ranks: int) -> None:
    mesh = DeviceMesh("cpu", list(range(ranks))) if ranks > 1 else None

    def state(step: int) -> dict[str, Any]:
        whole = content(step)
        if mesh is not None:
            whole["w"] = distribute_tensor(whole["w"], mesh, [Shard(0)], src_data_rank=None)
        return whole

    into = state(0)
    with Checkpointer(root, like=into, config=CONFIG) as checkpointer:
        tell("writer", checkpointer._daemon.pid)
        info = checkpointer.load(into=into)
        step, save = info.step if info else 0, None
        while True:
            step += 1
            if save is not None:
                tell("committed", save.result().step)
            save = checkpointer.save(step, state(step))


def save(root: str, step: int, value: int) -> None:
    with Checkpointer(root, config=CONFIG) as checkpointer:
        tell("writer", (checkpointer._start(), checkpointer._daemon.pid)[1])
        checkpointer.save(step, content(value)).result()
    tell("committed", step)


def leave(root: str) -> None:
    Checkpointer(root).save(7, {"w": torch.ones(2_000_000)})
    sys.exit()


def fork(root: str) -> None:
    with Checkpointer(root, config=CONFIG) as checkpointer:
        checkpointer.save(1, content(1)).result()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        tell("child", child)
        tell("writer", checkpointer._daemon.pid)
        time.sleep(60)


def tell(word: str, number: int | None) -> None:
    os.write(1, f"{word} {number}\n".encode())


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        task, *arguments = line.split()
        numbers = [int(argument) if argument.isdigit() else argument for argument in arguments]
        ranks = int(numbers[1]) if task == "train" else 1
        # As under torchrun, the store belongs to none of the ranks.
        host = dist.TCPStore("127.0.0.1", 0, ranks, True, wait_for_workers=False) if ranks > 1 else None
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    if host is not None:
                        store = dist.TCPStore("127.0.0.1", host.port, ranks, False, timedelta(seconds=60))
                        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
                    globals()[task](*numbers)
                if task == "leave":
                    sys.exit()
                os._exit(1)
            children.append(child)
            tell("rank", child)
        os.wait()  # as under torchrun, they end together
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for _ in children[1:]:
            os.wait()
        tell("ended", 0)


class Trainers:
    """The program above, from the outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.committed = 0
        """The newest step of the present root that a trainer reported as committed."""
        self._root: Any = None

    def start(self, *task: Any) -> Iterator[tuple[str, int]]:
        """Begin a task; yields what is told of it until it has ended."""
        assert self._process.stdin
        assert self._process.stdout
        self.committed = 0 if self._root != task[1] else self.committed
        self._root = task[1]
        self._process.stdin.write(" ".join(map(str, task)) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            word, number = line.split()
            if word == "committed":
                self.committed = max(self.committed, int(number))
            yield word, int(number)
            if word == "ended":
                return


@contextmanager
def trainers(**environment: str) -> Iterator[Trainers]:
    """Trainers to give tasks to."""
    found = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.trainers"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=found,
    ) as process:  # fmt: skip
        yield Trainers(process)
        process.stdin.close()


def kill_later(delay_s: float, processes: list[int]) -> threading.Thread:
    """SIGKILL to some processes, after a while."""

    def kill() -> None:
        time.sleep(delay_s)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


if __name__ == "__main__":
    main()
