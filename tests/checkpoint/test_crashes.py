"""Things that break for real: killed processes, power that fails, disks that fill up, limits, a writer that hangs."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stillroom.checkpoint import CheckpointConfig, Checkpointer, layouts, planning, writer
from stillroom.checkpoint.arena import Arena
from stillroom.checkpoint.reading import RECORD, format_record
from stillroom.checkpoint.states import DescribedState
from stillroom.errors import CheckpointError

TRAINER = """
import os, sys, time
import torch
from stillroom.checkpoint import CheckpointConfig, Checkpointer

def train(root):
    state = {"w": torch.zeros(500_000), "many": [torch.zeros(10) for _ in range(20)], "step": 0}
    with Checkpointer(root, like=state, config=CheckpointConfig(keep_latest=3)) as checkpointer:
        info = checkpointer.load(into=state)
        step = info.step if info else 0
        assert not info or (state["w"] == step).all() and all((t == step).all() for t in state["many"])
        print("writer", checkpointer._daemon.pid, flush=True)
        save = None
        while True:
            step += 1
            state["w"].fill_(step)
            for tensor in state["many"]:
                tensor.fill_(step)
            if save is not None:
                print("committed", save.result().step, flush=True)
            save = checkpointer.save(step, {**state, "step": step})

for line in sys.stdin:  # torch is imported once, each run is a fork
    task, root = line.split()
    child = os.fork()
    if child == 0:
        if task == "leave":
            Checkpointer(root).save(7, {"w": torch.ones(2_000_000)})
            sys.exit()
        train(root)
    print("trainer", child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_nothing_committed_is_lost_or_wrong(tmp_path, kills):
    """Promises 1 to 3, and 200 saves with random kills: of the trainer, of its writer, of both at once."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    draw, committed, root = random.Random(kills), 0, tmp_path / "root"
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", TRAINER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    ) as runs:  # fmt: skip
        exit_with_a_save_in_flight(runs, tmp_path / "left")
        for number in range(kills):
            runs.stdin.write(f"train {root}\n")
            runs.stdin.flush()
            found, began = {}, None
            patience = draw.uniform(0.0, 0.15)
            for line in runs.stdout:
                kind, *rest = line.split()
                if kind in ("trainer", "writer"):
                    found[kind] = int(rest[0])
                    began = time.monotonic()
                if kind == "committed":
                    committed = max(committed, int(rest[0]))
                if kind == "ended":
                    break
                if began and len(found) == 2 and time.monotonic() - began > patience:
                    for kind in (["trainer"], ["writer"], ["writer", "trainer"])[number % 3]:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(found[kind], signal.SIGKILL)
                    began = None
                    if number % 3 == 1:  # training went on with a new writer; now it ends
                        time.sleep(0.2)
                        os.kill(found["trainer"], signal.SIGKILL)
            wait_until_gone(found["writer"])
            with Checkpointer(root) as reader:
                assert reader.steps()[-1] >= committed
                for step in reader.steps():
                    into: dict = {}
                    reader.load(into, step=step)
                    assert into["step"] == step
                    assert into["w"].unique().tolist() == [step]
                    assert all(tensor.unique().tolist() == [step] for tensor in into["many"])
        runs.stdin.close()
    assert committed > kills // 2


def exit_with_a_save_in_flight(runs, root):
    """Promise 11: it is finished."""
    runs.stdin.write(f"leave {root}\n")
    runs.stdin.flush()
    assert [runs.stdout.readline().split()[0] for _ in range(2)] == ["trainer", "ended"]
    with Checkpointer(root) as checkpointer:
        assert checkpointer.steps() == [7]
        assert checkpointer.verify(7) == []


def wait_until_gone(pid: int) -> None:
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.01)
    raise AssertionError("the writer outlived its trainer")


def staged(state, step, root, name):
    """An arena with `state` in it, and the two requests that write and commit it."""
    described = DescribedState(state)
    items = described.items()
    [(digest, _, _)], metadata, shape = planning.plan_for_all([planning.described(items, described.shape)])
    layout = layouts.lay_out(0, items, range(len(items)), digest, metadata, shape)
    arena = Arena(layout)
    arena.stage(described.contents_of(state, layout).parts)
    folder, final = root / f".step-{step:08d}.{name}.tmp", root / f"step-{step:08d}"
    files = {
        RECORD: format_record({"step": step, "metrics": {}, "world": 1, "token": folder.name, "version": 1})
    }  # fmt: skip
    requests = [arena.write_request(str(folder)), arena.commit_request(str(folder), str(final), folder.name, files)]
    return arena, requests


def perform(arena, requests):
    made = writer.Writer()
    made.arena(os.dup(arena.descriptor), arena.id, arena.size_bytes)
    for request in requests:
        request = dict(request)
        getattr(made, request.pop("op"))(None, **request)


CALLS = ("open", "pwrite", "write", "fsync", "ftruncate", "rename", "makedirs", "unlink", "rmdir")


@pytest.mark.parametrize("new_step", [200, 100], ids=["another step", "a step that exists"])
def test_a_crash_at_any_system_call_leaves_the_old_or_the_new_checkpoint(tmp_path, new_step):
    """Promises 1 and 7."""
    outcomes = []
    for calls in range(100):
        root = tmp_path / str(calls)
        root.mkdir()
        perform(*staged({"w": torch.full((3000,), 1.0), "v": 1}, 100, root, "old"))
        arena, requests = staged({"w": torch.full((3000,), 2.0), "v": 2}, new_step, root, "new")
        child = os.fork()
        if child == 0:
            die_after(calls)
            perform(arena, requests)
            os._exit(0)
        died = os.waitpid(child, 0)[1] != 0
        with Checkpointer(root) as checkpointer:
            into: dict = {}
            checkpointer.load(into)
            assert into["w"].unique().tolist() == [into["v"]]
            outcomes.append(into["v"])
            perform(arena, requests)  # a new writer does it again
            checkpointer.load(into)
            assert into["v"] == 2
            assert checkpointer.verify(new_step) == []
            checkpointer.save(300, into).result()
            assert not list(root.glob(".*"))
        arena.close()
        if not died:
            break
    assert not died
    assert outcomes == sorted(outcomes)  # old up to the rename, new from there on
    assert set(outcomes) == {1, 2}
    assert len(outcomes) > 15


def die_after(calls: int) -> None:
    left = [calls]

    def dying(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)  # at once, as a kill is: no handler, no flush
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    writer._exchange = dying(writer._exchange)


class Disk:
    """What of a directory tree survives a power failure: what was synced, and nothing else.

    Watches the writer's system calls. `survivors` yields the two extremes that a file system may leave after any of
    them: names as of the last sync of their folder, or every rename done at once; contents always as of their sync.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.durable: dict[int, dict[str, int]] = {}
        self.states: list[list[dict[str, bytes]]] = []
        self.inodes: dict[int, str] = {}

    def now(self) -> dict[int, dict[str, int]]:
        folders = [self.root, *(path for path in self.root.rglob("*") if path.is_dir())]
        return {
            folder.stat().st_ino: {entry.name: entry.stat().st_ino for entry in folder.iterdir()} for folder in folders
        }

    def synced(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        inode = os.fstat(descriptor).st_ino
        if path.is_dir():
            self.durable[inode] = self.now()[inode]
        else:
            self.contents[inode] = path.read_bytes()

    def record(self) -> None:
        eager = self.now()
        self.states.append([self.tree(names) for names in (self.durable, eager)])

    def tree(self, names: dict[int, dict[str, int]]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}

        def walk(folder: int, way: str) -> None:
            for name, inode in names.get(folder, {}).items():
                if inode in self.durable or inode in names:
                    walk(inode, f"{way}{name}/")
                else:
                    found[f"{way}{name}"] = self.contents.get(inode, b"")

        walk(self.root.stat().st_ino, "")
        return found


@pytest.mark.parametrize("new_step", [200, 100], ids=["another step", "a step that exists"])
def test_power_that_fails_at_any_system_call_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch, new_step):
    """Promise 6: whatever was not synced is gone."""
    root = tmp_path / "root"
    root.mkdir()
    disk = Disk(root)

    def watched(function, is_sync=False):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if is_sync:
                disk.synced(args[0])
            disk.record()
            return result

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, watched(getattr(os, name), name == "fsync"))
    monkeypatch.setattr(writer, "_exchange", watched(writer._exchange))
    perform(*staged({"w": torch.full((3000,), 1.0), "v": 1}, 100, root, "old"))
    before = len(disk.states)
    perform(*staged({"w": torch.full((3000,), 2.0), "v": 2}, new_step, root, "new"))
    monkeypatch.undo()

    seen = set()
    for number, survivors in enumerate(disk.states[before - 1 :]):
        for kind, files in enumerate(survivors):
            again = tmp_path / f"{number}-{kind}"
            again.mkdir()
            for name, content in files.items():
                (again / name).parent.mkdir(parents=True, exist_ok=True)
                (again / name).write_bytes(content)
            with Checkpointer(again) as checkpointer:
                into: dict = {}
                assert checkpointer.load(into) is not None
                assert into["w"].unique().tolist() == [into["v"]]
                seen.add(into["v"])
            shutil.rmtree(again)
    assert seen == {1, 2}
    assert into["v"] == 2


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
    """Promise 5."""
    with Checkpointer(small_disk) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(500_000)}).result()
        for step in range(2, 5):
            with pytest.raises(CheckpointError, match=r"No space left.*\n.*free disk space"):
                checkpointer.save(step, {"w": torch.ones(1_500_000)}).result()
            assert checkpointer.steps() == [1]
            assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
        checkpointer.save(9, {"w": torch.zeros(500_000)}).result()
        assert checkpointer.verify(9) == []


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [(resource.RLIMIT_FSIZE, 1_000_000, "File too large"), (resource.RLIMIT_NOFILE, 4, "Too many open files")],
    ids=["file size", "descriptors"],
)
def test_a_limit_in_the_writer_is_an_error_and_the_next_save_works(tmp_path, limit, value, reason):
    """Promise 5: the limit on file size makes a short write, then an error, in the writer's own thread."""
    state = {"w": torch.ones(500_000)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state).result()
        pid = checkpointer._daemon.pid
        before = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (value, before[1]))
        with pytest.raises(CheckpointError, match=reason):
            checkpointer.save(2, state).result()
        resource.prlimit(pid, limit, before)
        assert checkpointer.steps() == [1]
        checkpointer.save(3, state).result()
        assert checkpointer.verify(3) == []


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


def test_a_writer_that_hangs_is_an_error_and_the_next_save_works(tmp_path):
    """Promise 4."""
    with Checkpointer(tmp_path, config=CheckpointConfig(timeout_s=0.5)) as checkpointer:
        checkpointer.save(1, {"a": 1}).result()
        os.kill(checkpointer._daemon.pid, signal.SIGSTOP)
        with pytest.raises(CheckpointError, match="did not finish"):
            checkpointer.save(2, {"a": 2}).result()
        checkpointer.save(3, {"a": 3}).result()
        assert checkpointer.steps() == [1, 3]


def test_a_file_system_without_direct_writing_is_written_through_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLROOM_DIRECT_IO", "0")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": torch.randn(100_000)}).result()
        assert checkpointer.verify(1) == []


def test_two_writers_of_one_directory_do_not_disturb_each_other(tmp_path):
    """Promise 12: each sweeps what crashes left, not what the other is writing."""
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
