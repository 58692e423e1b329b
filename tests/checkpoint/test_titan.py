"""A loop that saves as TorchTitan does, whose import of DCP is swapped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OURS, STOCK = "stillroom.checkpoint.dcp", "torch.distributed.checkpoint"
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("module", "mode"),
    [
        (OURS, "async_with_pinned_mem"),
        pytest.param(OURS, "async", marks=slow),
        pytest.param(OURS, "disabled", marks=slow),
        pytest.param(STOCK, "async", marks=slow),
    ],
)
def test_a_loop_like_torchtitans_resumes_to_the_same_bits(tmp_path, module, mode):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(Path(__file__).with_name("titan.py")), module, str(tmp_path), mode,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same bits" in done.stdout
