"""Power that fails: the writer's file operations are written down, and what was not synced is dropped."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch

from stillroom.checkpoint import CheckpointConfig, Checkpointer
from tests.checkpoint.breaking import SURVIVALS, Disk, assert_tidy, put

ALL = CheckpointConfig(keep_latest=99)
ONE = CheckpointConfig(keep_latest=1)


def state(step: int) -> dict:
    return {"w": torch.full((30_000,), float(step)), "small": [torch.full((3,), float(step))], "v": step}


def assert_whole(loaded: dict) -> None:
    assert loaded["w"].unique().tolist() == loaded["small"][0].unique().tolist() == [loaded["v"]]


@pytest.mark.promise(6, 7)
@pytest.mark.parametrize(
    ("old", "new", "config", "exchange"),
    [
        ([100], 200, ALL, True),
        ([100], 100, ALL, True),
        ([100], 100, ALL, False),
        ([100], 200, ONE, True),
        ([], 100, ALL, True),
        pytest.param([100, 200, 300], 400, ONE, True, marks=pytest.mark.slow),
    ],
    ids=["another step", "a step that exists", "no exchange of names", "retention", "the first step", "more retention"],
)
def test_power_that_fails_after_any_operation_leaves_the_old_or_the_new(tmp_path, breaker, old, new, config, exchange):
    """And whatever was reported as committed is there."""
    top, root = tmp_path / "top", tmp_path / "top" / "runs" / "checkpoints"
    top.mkdir()
    for step in old:
        with Checkpointer(root, config=ALL) as checkpointer:
            checkpointer.save(step, state(1)).result()
    disk = Disk(top)
    breaker.record(top)
    if not exchange:
        breaker.arm("EINVAL", "exchange", match=str(root))
    with Checkpointer(root, config=config) as checkpointer:
        checkpointer.save(new, state(2)).result()
    seen = [value for files in after_power_failures(disk, breaker) for value in outcome(files, tmp_path / "again")]
    assert set(seen) == {1 if old else None, 2}
    assert outcome(disk.survivors("synced"), tmp_path / "again")[0] == 2


@pytest.mark.promise(1, 6)
def test_what_a_second_writer_finished_is_durable(tmp_path, breaker):
    """The first is killed before each of its syncs; then the machine loses power."""
    for number in range(12):
        root = tmp_path / str(number)
        root.mkdir()
        with Checkpointer(root, config=ALL) as checkpointer:
            checkpointer.save(100, state(1)).result()
            disk = Disk(root)
            breaker.record(root)
            breaker.arm("kill", "sync", match=f"{root}", after=number, times=1)
            checkpointer.save(100, state(2)).result()
        killed = breaker.hits
        for _ in disk.follow(breaker.events()):
            pass
        breaker.record(None)
        put(disk.survivors("synced"), tmp_path / "again")
        with Checkpointer(tmp_path / "again") as checkpointer:
            checkpointer.load(into := {})
            assert_whole(into)
            assert into["v"] == 2
        shutil.rmtree(tmp_path / "again")
    assert not killed


def after_power_failures(disk, breaker):
    """What may be left, for every moment and every way to survive it; each once."""
    known = set()
    for number, _ in enumerate(itertools.chain(["nothing"], disk.follow(breaker.events()))):
        for survival in SURVIVALS:
            files = disk.survivors(survival, seed=number)
            key = hash(tuple(sorted(files.items())))
            if key not in known:
                known.add(key)
                yield files
    assert number > 15


def outcome(files, where):
    """The value that a trainer finds; at times it saves, too."""
    put(files, where)
    with Checkpointer(where / "runs" / "checkpoints", config=ALL) as checkpointer:
        loaded: dict = {}
        for step in checkpointer.steps():
            checkpointer.load(loaded, step=step)
            assert_whole(loaded)
        if len(files) % 7 == 0:
            checkpointer.save(500, {"next": 1}).result()
            assert checkpointer.verify(500) == []
            assert_tidy(checkpointer.root)
    shutil.rmtree(where)
    return [loaded.get("v")]
