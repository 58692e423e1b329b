"""Processes that are killed: trainers, their writers, both, at any moment and at any operation on a file."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from stillroom.checkpoint import CheckpointConfig, Checkpointer
from stillroom.checkpoint.reading import Snapshot
from tests.checkpoint.breaking import SURVIVALS, Disk, assert_tidy, put
from tests.checkpoint.states import assert_same
from tests.checkpoint.trainers import content, kill_later


def found(root: Path) -> list[int]:
    """The values of all committed checkpoints, each compared with what was saved."""
    values = []
    with Checkpointer(root) as checkpointer:
        for step in checkpointer.steps():
            into: dict = {}
            checkpointer.load(into, step=step)
            assert_same(into, content(into["step"]))
            values.append(into["step"])
    return values


def wait_until_gone(*processes: int) -> None:
    for process in processes:
        wait_until(lambda: not alive(process))  # noqa: B023


def wait_until_no_writer(breaker) -> None:
    """Neither those that were told of nor those that took their place."""
    wait_until(lambda: not any("writer.py" in command(process) for process in preloading(breaker)))


def wait_until(true) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("a process outlived its trainer")


def alive(process: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def preloading(breaker) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if breaker.environment["BREAKING"].encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


VICTIMS = ("trainer", "writer", "trainer and writer", "machine")


@pytest.mark.promise(1, 2, 3, 6)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("ranks", "kills"),
    [
        (1, 8),
        *(pytest.param(*counts, marks=pytest.mark.slow) for counts in ((2, 4), (1, 200), (2, 200))),
    ],
)
def test_killed_at_any_moment_nothing_committed_is_lost_or_wrong(tmp_path, breaker, task, ranks, kills):
    """Each time a trainer, a writer, both or the machine, which loses what was not synced."""
    root, draw, compared = tmp_path / "root", random.Random(kills + ranks), 0
    root.mkdir()
    for number in range(kills):
        victim = VICTIMS[number % len(VICTIMS)]
        if victim == "machine":
            disk = Disk(root)
            breaker.record(root)
        wait_until_gone(*one_run(task, root, ranks, victim, draw))
        wait_until_no_writer(breaker)
        if victim == "machine":
            for _ in disk.follow(breaker.events()):
                pass
            survivors = disk.survivors(draw.choice(SURVIVALS), seed=number)
            shutil.rmtree(root)
            put(survivors, root)
            breaker.record(None)
        values = found(root)
        compared += len(values)
        assert not task.committed or values[-1] >= task.committed
    assert task.committed >= kills // 2
    print(f"{ranks} ranks, {kills} kills: {task.committed} steps committed, {compared} checkpoints compared")


def one_run(task, root, ranks, victim, draw):
    """Training until somebody is killed; all processes that there were."""
    processes: dict[str, list[int]] = {"rank": [], "writer": []}
    killer, patience = None, draw.randrange(3 * ranks)
    for word, number in task.start("train", root, ranks):
        if word in processes:
            processes[word].append(number)
        elif word == "committed":
            patience -= 1
        if killer is None and patience <= 0 and [len(each) for each in processes.values()] == [ranks, ranks]:
            which = draw.randrange(ranks)
            chosen = {
                "trainer": [processes["rank"][which]],
                "writer": [processes["writer"][which]],
                "trainer and writer": [processes["rank"][which], processes["writer"][which]],
            }.get(victim, [*processes["rank"], *processes["writer"]])
            killer = kill_later(draw.uniform(0.0, 0.05), chosen)
            if victim == "writer":  # training goes on with a new one; then it ends
                killer.join()
                killer = kill_later(0.3, processes["rank"])
    killer.join()
    return [*processes["rank"], *processes["writer"]]


OPERATIONS = 40
"""More than a save has."""


@pytest.mark.promise(1, 7)
@pytest.mark.parametrize("new_step", [200, 100], ids=["another step", "a step that exists"])
def test_a_writer_killed_at_any_operation_is_replaced_and_the_save_succeeds(tmp_path, breaker, new_step):
    kept = CheckpointConfig(keep_latest=1)
    with Checkpointer(tmp_path, config=kept) as checkpointer:
        for number in range(OPERATIONS):
            checkpointer.save(100, content(1)).result()
            breaker.arm("kill", match=f"{tmp_path}/", after=number, times=1)
            checkpointer.save(new_step, content(2)).result()
            killed = breaker.hits
            breaker.disarm()
            into: dict = {}
            checkpointer.load(into)
            assert_same(into, content(2))
            # It may have been killed after the commit, behind the save: what it left is for the next writer.
            checkpointer.save(new_step, content(2)).result()
            assert_tidy(tmp_path)
            if not killed:
                break
            shutil.rmtree(tmp_path / f"step-{new_step:08d}")
    assert not killed
    assert number > 12


@pytest.mark.promise(1, 2, 3, 7)
@pytest.mark.parametrize("action", ["kill both", "kill parent"], ids=["trainer and writer", "trainer"])
@pytest.mark.parametrize("new_step", [200, 100], ids=["another step", "a step that exists"])
@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_operation_the_old_or_the_new_checkpoint_is_there(
    tmp_path, breaker, task, action, new_step, stride
):
    """The coordinator before and after the rename is one of these; the next save works."""
    outcomes = []
    for number in range(0, OPERATIONS, stride):
        root = tmp_path / str(number)
        for _ in task.start("save", root, 100, 1):
            pass
        breaker.arm(action, match=f"{root}/", after=number, times=1, delay_s=0.02)
        processes = [told for word, told in task.start("save", root, new_step, 2) if word in ("rank", "writer")]
        wait_until_gone(*processes)
        killed = breaker.hits
        breaker.disarm()
        outcomes.append(found(root)[-1])
        if not killed:
            break
        for _ in task.start("save", root, 300, 3):
            pass
        assert found(root)[-1] == 3
        assert_tidy(root)
        shutil.rmtree(root)
    assert not killed
    assert outcomes == sorted(outcomes)  # old up to the rename, new from there on
    assert set(outcomes) == {1, 2}


@pytest.mark.promise(3)
@pytest.mark.parametrize("new_step", [200, 100], ids=["another step", "a step that exists"])
def test_a_coordinator_that_dies_during_the_rename_does_not_lose_what_is_renamed(tmp_path, breaker, task, new_step):
    """Its writer cleans up after it, slowly here, while it commits."""
    for _ in task.start("save", tmp_path, 100, 1):
        pass
    breaker.arm("kill parent", "rename", "exchange", "remove", match=f"{tmp_path}/", times=1, delay_s=0.1)
    processes = [told for word, told in task.start("save", tmp_path, new_step, 2) if word in ("rank", "writer")]
    wait_until_gone(*processes)
    assert breaker.hits == 1
    breaker.disarm()
    assert found(tmp_path)[-1] in (1, 2)


@pytest.mark.promise(2)
def test_nothing_outlives_a_killed_trainer(tmp_path, breaker, task):
    """Neither its writer nor the memory that they share, which has no name and ends with them; not even while a
    process lives that was forked from the trainer, as data loading does, and so holds its end of the connection."""
    children = []
    for word, number in task.start("fork", tmp_path):
        children.append((word, number))
        if word == "writer":
            mapped = {"memfd:stillroom-checkpoint" in text for text in maps(number)}
            assert True in mapped
            kill_later(0, [process for kind, process in children if kind == "rank"])
    known = dict(children)
    wait_until_no_writer(breaker)
    wait_until_gone(known["writer"])
    os.kill(known["child"], signal.SIGKILL)
    wait_until_gone(known["child"])
    assert found(tmp_path) == [1]
    assert_tidy(tmp_path)


def maps(process: int) -> list[str]:
    return Path(f"/proc/{process}/maps").read_text().splitlines()


@pytest.mark.promise(11)
def test_a_save_in_flight_is_finished_at_exit(tmp_path, task):
    assert [word for word, _ in task.start("leave", tmp_path)] == ["rank", "ended"]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [7]
        assert checkpointer.verify(7) == []


@pytest.mark.promise(11)
def test_a_process_forked_from_a_trainer_cannot_end_the_trainers_saves(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(10)}).result()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                checkpointer.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        checkpointer.save(2, {"w": torch.ones(10)}).result()
        assert Snapshot(checkpointer.path_of(2)).damages() == []


@pytest.mark.promise(12)
def test_two_writers_of_one_directory_do_not_disturb_each_other(tmp_path):
    """Each sweeps what crashes left, not what the other is writing."""
    config = CheckpointConfig(keep_latest=100)
    with Checkpointer(tmp_path, config=config) as one, Checkpointer(tmp_path, config=config) as other:
        saves = []
        for step in range(0, 20, 2):
            saves.append(one.save(step, {"w": torch.full((200_000,), float(step))}))
            saves.append(other.save(step + 1, {"w": torch.full((200_000,), float(step + 1))}))
        for save in saves:
            save.result()
        assert one.steps() == list(range(20))
        assert [one.verify(step) for step in one.steps()] == [[]] * 20
