"""Which number format a model computes in on this machine, decided from the hardware and recorded.

bf16 pays only where the processor multiplies it natively. Measured on a CPU with AVX-512 but without its
BF16 instructions: 50 GFLOP/s in bf16 against 150 to 240 in fp32, so "auto" must not mean bf16 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

CPU_BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Linux's names (x86 twice, then Arm) for instructions that multiply bf16."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The format of matrix products; weights, sums and losses stay fp32 in every case.

    Attributes:
        name: `fp32` or `bf16`.
        native: whether this device multiplies the format in hardware.
        reason: why this one was picked, for the record.
    """

    name: Literal["fp32", "bf16"]
    native: bool
    reason: str


def pick_precision(asked: Literal["auto", "fp32", "bf16"] = "auto", device: str = "cpu") -> Precision:
    """The precision to compute in: what was asked, or for "auto" bf16 exactly where `device` has it in hardware."""
    fast, why = _native_bf16(device)
    if asked == "fp32":
        return Precision("fp32", True, "asked for")
    if asked == "bf16":
        return Precision("bf16", fast, f"asked for; {why}")
    return Precision("bf16" if fast else "fp32", True, why)


def _native_bf16(device: str) -> tuple[bool, str]:
    if device.startswith("cuda"):
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return fast, f"the GPU {'multiplies' if fast else 'does not multiply'} bf16"
    found = sorted(_cpu_flags() & CPU_BF16_FLAGS)
    return bool(found), f"the CPU has {', '.join(found)}" if found else "the CPU has no bf16 instructions"


def _cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo lists; nothing where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
