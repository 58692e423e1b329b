"""Installing is part of the product: every extra resolves beside the torch that we build on, and the base is small."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = "torch==2.13.0"
BASE_BYTES = 150 * 2**20


def test_torch_is_the_version_that_the_makefile_and_the_constraints_install():
    assert TORCH in (ROOT / "Makefile").read_text()
    assert TORCH in (ROOT / "constraints.txt").read_text().split()


@pytest.mark.slow
@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_every_extra_resolves_beside_torch(extra):
    wanted = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*wanted, TORCH, f"{ROOT}[{extra}]"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = {item["metadata"]["name"].lower(): item["metadata"] for item in json.loads(done.stdout)["install"]}
    assert chosen["torch"]["version"].split("+")[0] == TORCH.split("==")[1]


@pytest.mark.slow
def test_the_base_without_torch_is_small_and_quick_and_starts(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    before, started = size(tmp_path / "venv"), time.monotonic()
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(ROOT)], check=True, stderr=subprocess.DEVNULL)
    seconds, taken = time.monotonic() - started, size(tmp_path / "venv") - before
    print(f"base install: {seconds:.1f} s, {taken / 2**20:.1f} MiB")
    assert taken < BASE_BYTES
    assert not list((tmp_path / "venv").rglob("site-packages/torch"))
    done = subprocess.run([tmp_path / "venv" / "bin" / "stillroom", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout


def size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
