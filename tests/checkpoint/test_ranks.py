"""Promises of the Checkpointer among several ranks, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.checkpoint import Checkpointer
from tests.checkpoint.breaking import assert_tidy

FUNCTIONS = [
    "reshard",
    "reshard_any",
    "fsdp",
    "tensor_parallel",
    "refused",
    "linked",
    "failures",
    "traffic",
    "lost_rank",
]
"""Of `ranks.py`, on four ranks; the last one loses a rank."""

FAULTS = ["rank_hangs", "late_rank", "broken_disk_of_one"]
"""Of `rank_faults.py`, on two ranks."""

DEATHS = {"coordinator_dies_at_the_rename": [1, 2], "voter_dies": [2]}
MORE_DEATHS = {"coordinator_dies_before_the_rename": [1], "coordinator_dies_after_the_rename": [1, 2]}
"""Of `rank_faults.py`, on two ranks of which one is killed; the steps that are there afterwards."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory, breaker_of_trainers):
    launches = ["4", "ranks", ",".join(FUNCTIONS), "2", "rank_faults", ",".join(FAULTS)]
    return launched(tmp_path_factory, breaker_of_trainers, launches + each_alone(DEATHS))


@pytest.fixture(scope="module")
def ran_more(tmp_path_factory, breaker_of_trainers):
    return launched(tmp_path_factory, breaker_of_trainers, each_alone(MORE_DEATHS))


def each_alone(functions) -> list[str]:
    return [word for function in functions for word in ("2", "rank_faults", function)]


def launched(tmp_path_factory, breaker, launches, **environment: str) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    found = os.environ | breaker.environment | environment
    found |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.ranks", str(root), *launches]
    subprocess.run(command, env=found, capture_output=True, timeout=2900, check=True)
    return root


def passed(ran: Path, function: str) -> int:
    failures = [path.read_text() for path in sorted(ran.glob(f"{function}.*.failed"))]
    assert not failures, "\n".join(failures)
    return len(list(ran.glob(f"{function}.*.passed")))


@pytest.mark.promise(3, 4, 5, 9)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_rank_passes(ran, function):
    assert passed(ran, function) == 4 - (function == "lost_rank")


@pytest.mark.promise(1, 4, 5, 12)
@pytest.mark.parametrize("function", FAULTS)
def test_every_rank_hears_of_what_breaks_on_one_and_the_next_save_works(ran, function):
    assert passed(ran, function) == 2


@pytest.mark.promise(2, 3)
@pytest.mark.parametrize("function", DEATHS)
def test_a_rank_that_dies_leaves_the_old_or_the_new_checkpoint_and_the_others_hear_of_it(ran, function):
    check_after_death(ran, function, DEATHS[function])


@pytest.mark.slow
@pytest.mark.promise(2, 3)
@pytest.mark.parametrize("function", MORE_DEATHS)
def test_a_coordinator_that_dies_leaves_the_old_or_the_new_checkpoint(ran_more, function):
    check_after_death(ran_more, function, MORE_DEATHS[function])


def check_after_death(ran: Path, function: str, steps: list[int]) -> None:
    assert passed(ran, function) == 1
    with Checkpointer(ran / function) as checkpointer:
        assert checkpointer.steps() == steps
        for step in steps:
            into: dict = {}
            checkpointer.load(into, step=step)
            assert {into["step"]} | {float(into[f"own {rank}"].unique()) for rank in range(2)} == {step}
        checkpointer.save(3, into).result()
        assert_tidy(checkpointer.root)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_states_are_resharded_between_one_two_three_and_four_ranks(tmp_path_factory, breaker_of_trainers):
    launches = ["4", "ranks", "reshard_any"]
    assert passed(launched(tmp_path_factory, breaker_of_trainers, launches, STILLROOM_STATES="40"), "reshard_any") == 4
