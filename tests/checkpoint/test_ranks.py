"""Promises of the Checkpointer among several ranks, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORLD = 4
FUNCTIONS = ["reshard", "fsdp", "tensor_parallel", "refused", "failures", "traffic", "lost_rank"]
"""Of `ranks.py`; the last one loses a rank."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.ranks", str(WORLD), str(root), *FUNCTIONS]
    subprocess.run(command, env=environment, capture_output=True, timeout=200, check=True)
    return root


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_rank_passes(ran, function):
    failures = [path.read_text() for path in sorted(ran.glob(f"{function}.*.failed"))]
    assert not failures, "\n".join(failures)
    ranks = WORLD - (function == "lost_rank")
    assert len(list(ran.glob(f"{function}.*.passed"))) == ranks
