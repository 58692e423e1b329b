"""A training loop that calls checkpoints as TorchTitan does: `torchrun ... titan.py MODULE ROOT MODE`.

MODULE is imported as `dcp`, and nothing else differs: `torch.distributed.checkpoint` or `stillroom.checkpoint.dcp`.
MODE is TorchTitan's `async_mode`. The model is under FSDP2; what is saved is its flat state and, as `Stateful`
objects, optimizer, schedule, data and step; the newest two are kept by a thread that purges. After every few steps the
run begins again from the newest checkpoint and has to come to the same bits.

Source: pytorch/torchtitan, torchtitan/components/checkpointer/dcp.py at b5bcd76 (August 2026), for which calls are
made, with which arguments, and what is done with what comes back.
"""

from __future__ import annotations

import importlib
import os
import queue
import re
import shutil
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.fsdp import fully_shard

dcp = importlib.import_module(sys.argv[1])


class Optimizer:
    """`Stateful`: keyed by names, as TorchTitan flattens it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.inner = model, torch.optim.AdamW(model.parameters(), lr=0.05)

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.inner)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.inner, state)


class Progress:
    """`Stateful`: the data's position and the step, of every rank, and the same on all."""

    def __init__(self) -> None:
        self.step, self.seen = 0, torch.tensor(0)

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step), "seen": self.seen, f"rank_{dist.get_rank()}": {"rng": self.step * 7}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seen = int(state["step"]), state["seen"]
        assert state[f"rank_{dist.get_rank()}"] == {"rng": self.step * 7}


class Checkpoints:
    """The calls, in TorchTitan's order."""

    def __init__(self, folder: str, mode: str, states: dict[str, Any]) -> None:
        self.folder, self.mode, self.states = folder, mode, states
        self.group = dist.new_group(backend="gloo") if mode != "disabled" else None
        self.stager = object() if mode == "async_with_pinned_mem" else None  # its own needs an accelerator
        self.staging: Future | None = None
        self.saving: Future | None = None
        self.purges: queue.Queue[str | None] = queue.Queue()
        self.purging = threading.Thread(target=self.purge, daemon=True)
        self.purging.start()

    def flat(self) -> dict[str, Any]:
        return {key: value for key, value in self.states.items() if key != "model"} | self.states["model"].state_dict()

    @torch.no_grad()
    def save(self, step: int) -> None:
        if self.saving is not None:
            self.saving.result()
            self.saving = None
        path = os.path.join(self.folder, f"step-{step}")
        if self.mode == "async":
            self.saving = dcp.async_save(self.flat(), storage_writer=None, checkpoint_id=path, process_group=self.group)
            assert isinstance(self.saving, Future)
        elif self.mode == "async_with_pinned_mem":
            response = dcp.async_save(
                self.flat(),
                storage_writer=None,
                checkpoint_id=path,
                process_group=self.group,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
            assert isinstance(response, AsyncSaveResponse)
            self.staging, self.saving = response.staging_completion, response.upload_completion
        else:
            dcp.save(self.flat(), storage_writer=None, checkpoint_id=path)
        if dist.get_rank() == 0 and os.path.isdir(self.folder):
            steps = sorted(
                (int(match[1]), name) for name in os.listdir(self.folder) if (match := re.search(r"step-(\d+)", name))
            )
            for _, name in steps[:-2]:
                self.purges.put(os.path.join(self.folder, name))

    def wait_for_staging(self) -> None:
        if self.staging is not None:
            self.staging.result()
            self.staging = None

    @torch.no_grad()
    def load(self) -> int:
        steps = [
            int(match[1])
            for name in os.listdir(self.folder)
            if (match := re.search(r"step-(\d+)", name))
            and os.path.isfile(os.path.join(self.folder, name, ".metadata"))
        ]
        state = self.flat()
        dcp.load(state, checkpoint_id=os.path.join(self.folder, f"step-{max(steps)}"))
        self.states["model"].load_state_dict(state, strict=False)
        return max(steps)

    def purge(self) -> None:
        while (path := self.purges.get()) is not None:
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        if self.saving is not None:
            self.saving.result()
        self.purges.put(None)
        self.purging.join()


def fresh() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = Optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.inner, 2, 0.9)
    return {"model": model, "optimizer": optimizer, "lr_scheduler": schedule, "train_state": Progress()}


def train(states: dict[str, Any], checkpoints: Checkpoints | None, until: int) -> list[float]:
    """The losses of every step."""
    losses, progress = [], states["train_state"]
    while progress.step < until:
        progress.step += 1
        torch.manual_seed(100 * progress.step + dist.get_rank())
        loss = states["model"](torch.randn(4, 6)).square().mean()
        loss.backward()
        if checkpoints is not None:
            checkpoints.wait_for_staging()
        states["optimizer"].inner.step()
        states["optimizer"].inner.zero_grad()
        states["lr_scheduler"].step()
        progress.seen += 4
        losses.append(loss.item())
        if checkpoints is not None:
            checkpoints.save(progress.step)
    return losses


def main(root: str, mode: str) -> None:
    dist.init_process_group("gloo")
    wanted = train(fresh(), None, 9)
    losses: list[float] = []
    for until in (3, 6, 9):
        states = fresh()
        checkpoints = Checkpoints(root, mode, states)
        if until > 3:
            assert checkpoints.load() == until - 3
        losses += train(states, checkpoints, until)
        checkpoints.close()
        dist.barrier()
    assert losses == wanted, (losses, wanted)
    if dist.get_rank() == 0:
        left = sorted(path.name for path in Path(root).iterdir() if not path.name.startswith("."))
        # The purge looks just after a save began: whether it sees that save decides if one more folder stays.
        assert left in (["step-8", "step-9"], ["step-7", "step-8", "step-9"]), left
        print("the same bits")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[3])
