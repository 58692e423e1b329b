"""Copies into the arena; from a GPU, into memory that its driver knows and on a stream beside training's.

Source: CUDA Runtime API, `cudaHostRegister`; PyTorch's notes on pinned memory and non-blocking copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stillroom.telemetry import note

_PINNED: dict[int, bool] = {}
"""By address, whether the driver took the memory."""


@contextlib.contextmanager
def copying(memory: Tensor, parts: list[Any], after: Any) -> Iterator[bool]:
    """Copy `parts` into `memory` within; at the end all copies are done. Yields whether they are only queued.

    Args:
        after: what `mark` returned when the state was as it should be saved.
    """
    device = _device(parts)
    if device is None:
        yield False
        return
    _pin(memory)
    stream: Any = torch.cuda.Stream(device)
    stream.wait_event(after or mark(parts))
    with torch.cuda.stream(stream):
        yield True
    stream.synchronize()


def mark(parts: list[Any]) -> Any:
    """The moment on the GPU up to which what was asked of it so far is done; None for a state on the CPU."""
    device = _device(parts)
    return None if device is None else torch.cuda.current_stream(device).record_event()


def release(memory: Tensor) -> None:
    """Let the driver forget the memory, which is about to go."""
    if _PINNED.pop(memory.data_ptr(), False):
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _pin(memory: Tensor) -> None:
    if memory.data_ptr() in _PINNED:
        return
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if code:
        note(f"memory for staging could not be pinned (CUDA error {code}); copies from the GPU will be slower.")
    _PINNED[memory.data_ptr()] = not code


def _device(parts: list[Any]) -> torch.device | None:
    if not torch.cuda.is_initialized():
        return None
    return next((part.device for part in parts if isinstance(part, Tensor) and part.is_cuda), None)
