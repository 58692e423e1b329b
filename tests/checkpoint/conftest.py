"""What several tests of the checkpoints break things with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.checkpoint.breaking import Breaker, library
from tests.checkpoint.trainers import trainers


@pytest.fixture(scope="session")
def breaker_of_trainers(tmp_path_factory):
    if library() is None:
        pytest.skip("a C compiler is not installed")
    return Breaker(tmp_path_factory.mktemp("breaker") / "control")


@pytest.fixture
def breaker(breaker_of_trainers, monkeypatch):
    """Breaks the file operations of the processes that the test starts from now on, and of `task`."""
    for name, value in breaker_of_trainers.environment.items():
        monkeypatch.setenv(name, value)
    yield breaker_of_trainers
    breaker_of_trainers.record(None)


@pytest.fixture(scope="session")
def task(breaker_of_trainers):
    """Trainers in other processes; torch takes long to import, so all tests have the same."""
    with trainers(**breaker_of_trainers.environment) as found:
        yield found


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Note for `make faults` what became of the tests of each promise, where it asks for that."""
    report = (yield).get_result()
    path = os.environ.get("PROMISES")
    if path is None or not (report.when == "call" or report.outcome != "passed"):
        return
    noted = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    for number in {number for mark in item.iter_markers("promise") for number in mark.args}:
        test = f"{item.path.name}::{item.originalname}"
        noted.setdefault(str(number), {}).setdefault(test, []).append(report.outcome)
    Path(path).write_text(json.dumps(noted))
