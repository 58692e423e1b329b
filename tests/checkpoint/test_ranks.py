"""Promises of the Checkpointer among several ranks, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("function", "world"), [("reshard", 4), ("fsdp", 2), ("failures", 3), ("lost_rank", 2), ("traffic", 2)]
)
def test_ranks(function, world, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.ranks", function, str(world), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
