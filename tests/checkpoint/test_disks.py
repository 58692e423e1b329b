"""Disks that fill up, fail or write less than they were asked to, and limits of the system."""

from __future__ import annotations

import os
import resource
import signal
import subprocess

import pytest
import torch

from stillroom.checkpoint import CheckpointConfig, Checkpointer
from stillroom.errors import CheckpointError
from tests.checkpoint.breaking import FOREVER, assert_tidy
from tests.checkpoint.states import assert_same
from tests.checkpoint.trainers import content

pytestmark = pytest.mark.promise(5)


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_is_an_error_and_the_next_save_works(small_disk):
    with Checkpointer(small_disk) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(500_000)}).result()
        for step in range(2, 5):
            with pytest.raises(CheckpointError, match=r"No space left.*\n.*free disk space"):
                checkpointer.save(step, {"w": torch.ones(1_500_000)}).result()
            assert checkpointer.steps() == [1]
            assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
        checkpointer.save(9, {"w": torch.zeros(500_000)}).result()
        assert checkpointer.verify(9) == []


@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_0.checksums", ".metadata", "checkpoint.json"])
@pytest.mark.parametrize("operation", ["open", "write", "sync"])
@pytest.mark.parametrize("action", ["EIO", "ENOSPC"])
def test_an_error_in_any_file_is_reported_and_the_next_save_works(tmp_path, breaker, name, operation, action):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, content(1)).result()
        breaker.arm(action, operation, match=f"tmp/{name}")
        with pytest.raises(CheckpointError, match=r"Input/output error|No space left"):
            checkpointer.save(2, {**content(2), "new": 1}).result()  # else `.metadata` would be linked
        assert breaker.hits
        breaker.disarm()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        checkpointer.save(3, content(3)).result()
        assert checkpointer.verify(3) == []


@pytest.mark.promise(7)
@pytest.mark.parametrize("step", [100, 200], ids=["a step that exists", "another step"])
@pytest.mark.parametrize("times", [1, FOREVER], ids=["once", "from then on"])
def test_an_error_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, breaker, times, step):
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_latest=1)) as checkpointer:
        for number in range(60):
            checkpointer.save(100, content(1)).result()
            breaker.arm("EIO", match=f"{tmp_path}/", after=number, times=times)
            try:
                checkpointer.save(step, content(2)).result()
                failed = False
            except CheckpointError as error:
                failed = "Input/output error" in str(error)
                assert failed
            hits = breaker.hits
            breaker.disarm()
            into: dict = {}
            checkpointer.load(into)
            assert_same(into, content(into["step"]))
            assert failed or into["step"] == 2
            checkpointer.save(300, content(3)).result()
            assert checkpointer.steps() == [300]
            assert checkpointer.verify(300) == []
            assert_tidy(tmp_path)
            checkpointer._daemon.ask({"op": "remove", "paths": [str(checkpointer.path_of(300))]})
            if not hits:
                break
    assert not hits
    assert number > 12


@pytest.mark.parametrize("direct", ["0", "1"], ids=["through the cache", "direct"])
def test_short_writes_are_carried_on(tmp_path, breaker, monkeypatch, direct):
    monkeypatch.setenv("STILLROOM_DIRECT_IO", direct)
    with Checkpointer(tmp_path) as checkpointer:
        breaker.arm("shorten", "write", match=f"{tmp_path}/")
        checkpointer.save(1, content(1)).result()
        assert breaker.hits > 10
        into: dict = {}
        checkpointer.load(into)
        assert_same(into, content(1))


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [(resource.RLIMIT_FSIZE, 1_000_000, "File too large"), (resource.RLIMIT_NOFILE, 4, "Too many open files")],
    ids=["file size", "descriptors"],
)
def test_a_limit_in_the_writer_is_an_error_and_the_next_save_works(tmp_path, limit, value, reason):
    """The limit on file size makes a short write, then an error, in the writer's own thread."""
    state = {"w": torch.ones(500_000)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state).result()
        pid = checkpointer._daemon.pid
        before = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (value, before[1]))
        with pytest.raises(CheckpointError, match=reason):
            checkpointer.save(2, state).result()
        if limit == resource.RLIMIT_NOFILE:
            with pytest.raises(CheckpointError, match=reason):  # not even the memory of another layout arrives
                checkpointer.save(2, {"other": torch.ones(10)}).result()
        resource.prlimit(pid, limit, before)
        assert checkpointer.steps() == [1]
        checkpointer.save(3, state).result()
        assert checkpointer.verify(3) == []


@pytest.mark.parametrize("limit", [resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE], ids=["descriptors", "file size"])
def test_a_limit_in_the_trainer_is_an_error_and_the_next_save_works(tmp_path, limit):
    """Memory for staging cannot be had: no descriptor for it, or no more than the limit on file size."""
    with Checkpointer(tmp_path, config=CheckpointConfig(timeout_s=20)) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(10)}).result()
        before = resource.getrlimit(limit)
        value = min(map(int, os.listdir("/proc/self/fd"))) if limit == resource.RLIMIT_NOFILE else 1_000_000
        resource.setrlimit(limit, (value, before[1]))
        try:
            with pytest.raises(CheckpointError, match=r"shared memory"):
                checkpointer.save(2, {"w": torch.ones(500_000)})
        finally:
            resource.setrlimit(limit, before)
        checkpointer.save(3, {"w": torch.ones(500_000)}).result()
        assert checkpointer.steps() == [1, 3]


def test_too_little_memory_for_the_arena_is_an_error(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(10)}).result()
        huge = torch.empty(1).expand(2**46)  # more bytes than any machine has, of one element
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, before[1]))  # should it ever try, it must not get far
        try:
            with pytest.raises(CheckpointError, match=r"shared memory.*available"):
                checkpointer.save(2, {"w": huge})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        checkpointer.save(3, {"w": torch.ones(10)}).result()
        assert checkpointer.steps() == [1, 3]


@pytest.mark.promise(4)
@pytest.mark.parametrize("when", ["writing", "committing", "removing", "between layouts"])
def test_a_writer_that_hangs_is_an_error_and_the_next_save_works(tmp_path, breaker, when):
    """Stopped, as a process is that waits for a dead file server."""
    with Checkpointer(tmp_path, config=CheckpointConfig(timeout_s=3.0, keep_latest=1)) as checkpointer:
        checkpointer.save(1, {"a": 1}).result()
        state: dict = {"a": 2}
        if when == "between layouts":
            os.kill(checkpointer._daemon.pid, signal.SIGSTOP)
            state = {"a": torch.ones(3)}
        else:
            operation, match = {
                "writing": ("write", ".distcp"),
                "committing": ("rename", ".tmp"),
                "removing": ("rename", "/step-00000001"),
            }[when]
            breaker.arm("stop", operation, match=match, times=1)
        if when in ("removing", "between layouts"):
            checkpointer.save(2, state).result()  # late, as a new writer had to be started first or afterwards
        else:
            with pytest.raises(CheckpointError, match="did not finish"):
                checkpointer.save(2, state).result()
        checkpointer.save(3, {"a": 3}).result()
        assert checkpointer.steps() == [3]


def test_a_file_system_without_direct_writing_is_written_through_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLROOM_DIRECT_IO", "0")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": torch.randn(100_000)}).result()
        assert checkpointer.verify(1) == []
