"""What holds when things break: the promises of `stillroom.checkpoint`, one by one, and stock PyTorch DCP's conduct.

    python -m benchmarks.checkpoint.faults [--docs docs/checkpoint-faults.md]

Ours is what the tests marked with a promise say. DCP is broken in the same ways, by the same preloaded library, in its
best-behaved form: each checkpoint in a directory of its own unless the promise is about replacing one, a reader that
takes the newest directory with a `.metadata`, files synced. A promise is held if after the breaking there is the old
checkpoint or the new one, whole, or an explicit error, and if the next save works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tests.checkpoint.breaking import SURVIVALS, Breaker, Disk, library, put

PROMISES = {
    1: "the writer process is killed: idle, staging, writing, voting",
    2: "the trainer is killed in the middle of a save; no orphan, no leaked memory",
    3: "the coordinator is killed before and after the rename",
    4: "one rank hangs, then goes on",
    5: "full disk, I/O errors, short writes, too few descriptors or too little memory",
    6: "power loss after each file operation",
    7: "a crash while saving a step that exists",
    8: "a flipped bit or truncation, anywhere",
    9: "dtype, shape, nesting, keys, placement or world size change between saves",
    10: "the state is changed before it was staged",
    11: "overlapping saves, a load during a save, exit with a save in flight",
    12: "stale directories, a slow rank, two writers, retention beside a save",
    13: "more than 100 saves: flat memory, shared memory, descriptors",
}


def main(docs: Path | None) -> None:
    ours, dcp = ours_by_test(), dcp_by_breaking()
    rows = [(number, what, *ours[number], *dcp[number]) for number, what in PROMISES.items()]
    for number, what, held, tests, theirs, why in rows:
        print(f"{number:3d} {what}\n      ours: {held} ({len(tests)} tests)   DCP: {theirs} ({why})")
    if docs is not None:
        docs.write_text(page(rows), encoding="utf-8")
    promises = {str(row[0]): {"ours": row[2], "dcp": row[4]} for row in rows}
    print(json.dumps({"promises": promises, "versions": versions()}))


def ours_by_test() -> dict[int, tuple[str, list[str]]]:
    """For each promise whether all of its tests passed, and which those are."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "promises.json"
        command = [sys.executable, "-m", "pytest", "tests/checkpoint", "-q", "-m", "promise and not slow"]
        subprocess.run(command, env=os.environ | {"PROMISES": str(report)}, stdout=sys.stderr, check=False)
        outcomes = json.loads(report.read_text())
    found = {}
    for number in PROMISES:
        tests = outcomes.get(str(number), {})
        passed = {outcome for each in tests.values() for outcome in each} == {"passed"}
        found[number] = ("held" if passed else "broken", sorted(tests))
    return found


def dcp_by_breaking() -> dict[int, tuple[str, str]]:
    """For each promise whether stock DCP held it, and what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        breaker = Breaker(Path(folder) / "control")
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.checkpoint.faults", "--dcp", str(answer)]
        environment = os.environ | breaker.environment | {"OMP_NUM_THREADS": "1", "TMPDIR": folder}
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
        return {int(number): tuple(said) for number, said in json.loads(answer.read_text()).items()}


def page(rows: list[tuple[Any, ...]]) -> str:
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# What holds when things break",
        "",
        "Written by `python -m benchmarks.checkpoint.faults --docs docs/checkpoint-faults.md`; `make faults` prints",
        "it. Ours is what the tests say that are marked with the promise (`tests/checkpoint`); for PyTorch DCP each",
        "row is one breaking of `benchmarks/checkpoint/faults.py`, done to it in the same way, and what was seen.",
        "",
        "Held: afterwards the old checkpoint is there or the new one, whole, or every rank was told of an error, and",
        "the next save works.",
        "",
        f"Versions: {used}.",
        "",
        "| # | what happens | ours | DCP | what was done to DCP, and seen |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {number} | {what} | {held} | {theirs} | {why} |" for number, what, held, _, theirs, why in rows]
    lines += ["", "## Which tests", ""]
    lines += [f"{number}. {', '.join(f'`{test}`' for test in tests)}" for number, _, _, tests, *_ in rows]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {"torch": version("torch"), "python": platform.python_version(), "kernel": platform.release()}


# What follows runs in a process that preloads `breaking.c`.

Verdict = tuple[str, str]


def broken(why: str) -> Verdict:
    return "broken", why


def held(why: str) -> Verdict:
    return "held", why


def break_dcp(answer: Path) -> None:
    """Every breaking of stock DCP, in forks of this process, which has torch imported."""
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.checkpoint._async_process_executor

    torch.set_num_threads(1)
    found: dict[int, Verdict] = {}
    for number, breaking in enumerate(BREAKINGS, start=1):
        root = Path(tempfile.mkdtemp())
        try:
            found[number] = breaking(root)
        except Exception as error:
            traceback.print_exc()
            found[number] = broken(f"the breaking ended in {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        print(number, *found[number], file=sys.stderr, flush=True)
        breaker().disarm()
    answer.write_text(json.dumps(found))


def breaker() -> Breaker:
    return Breaker(Path(os.environ["BREAKING"]))


class Fork:
    """A function in a fork of this process, alone or as one of several ranks over gloo."""

    def __init__(self, call: Callable[[], Any], rank: int = 0, world: int = 1, port: int = 0) -> None:
        self._ours, theirs = connection.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                theirs.send(("started", os.getpid()))
                try:
                    ranks(rank, world, port)
                    theirs.send(("result", call()))
                except BaseException as error:
                    theirs.send(("error", f"{type(error).__name__}: {error}"[:500]))
                leave_in_order()
            os._exit(0)
        theirs.close()
        self._ours.recv()

    def result(self, timeout_s: float = 60.0) -> tuple[str, Any]:
        """`result` and what was returned, `error` and its text, `killed`, or `hangs`."""
        if not self._ours.poll(timeout_s):
            self.kill()
            return "hangs", None
        try:
            kind, value = self._ours.recv()
        except EOFError:
            kind, value = "killed", None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        return kind, value

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def ranks(rank: int, world: int, port: int) -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, world, port == 0, timedelta(seconds=30), wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=5))


def leave_in_order() -> None:
    """What a process does at its end, which a fork that ends by `os._exit` would skip."""
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def state(value: float, count: int = 4, size: int = 30_000) -> dict[str, Any]:
    import torch

    return {f"layer {number}": torch.full((size,), float(value)) for number in range(count)}


def save(path: Path, value: float, **arguments: Any) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state(value), checkpoint_id=path, **arguments)


def loaded(path: Path) -> set[float]:
    """The values that are found: one of a whole checkpoint, several of a mixture.

    Raises:
        Exception: whatever DCP raises.
    """

    def load() -> set[float]:
        import torch.distributed.checkpoint as dcp

        into = state(-1.0)
        dcp.load(into, checkpoint_id=path)
        return {value for tensor in into.values() for value in tensor.unique().tolist()}

    kind, value = Fork(load).result()
    if kind != "result":
        raise RuntimeError(f"{kind}: {value}")
    return set(value)


def newest(root: Path) -> Path | None:
    complete = sorted(path for path in root.glob("step-*") if (path / ".metadata").exists())
    return complete[-1] if complete else None


def daemon_is_killed(root: Path) -> Verdict:
    """1: the process of an asynchronous save dies between two saves."""

    def train() -> list[str]:
        said = []
        for step in range(3):
            try:
                asynchronously(root / f"step-{step}", "PROCESS").result(60)
                said.append("saved")
            except Exception as error:
                said.append(type(error).__name__)
            if step == 0:
                for child in children(os.getpid()):
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.5)
        return said

    said = Fork(train).result(120)
    held_up = said == ("result", ["saved"] * 3)
    return (held if held_up else broken)(f"killed while idle; three saves in a row: {said[1]}")


def asynchronously(path: Path, kind: str, value: float = 1.0, **arguments: Any) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    return dcp.async_save(
        state(value), checkpoint_id=path, async_checkpointer_type=AsyncCheckpointerType[kind], **arguments
    )


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def trainer_is_killed(root: Path) -> Verdict:
    """2: while its process writes."""
    shared = set(os.listdir("/dev/shm"))
    asked, told = connection.Pipe()

    def train() -> None:
        asynchronously(root / "step-1", "PROCESS").result(60)
        breaker().arm("delay", "write", match="step-2/", delay_s=0.2)
        future = asynchronously(root / "step-2", "PROCESS", 2.0)
        told.send(children(os.getpid()))
        future.result(60)

    fork = Fork(train)
    writers = asked.recv() if asked.poll(60) else []
    time.sleep(0.3)
    fork.kill()
    fork.result()
    breaker().disarm()
    for _ in range(100):
        left = [pid for pid in writers if Path(f"/proc/{pid}").exists()]
        if not left:
            break
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    leaked = {name for name in set(os.listdir("/dev/shm")) - shared if name.startswith(("torch", "psm"))}
    whole = loaded(newest(root)) in ({1.0}, {2.0})
    good = whole and not left and not leaked
    return (held if good else broken)(
        f"killed while the process wrote; a whole checkpoint is there: {whole}; orphans after 10 s: {len(left)}, "
        f"names left in /dev/shm: {len(leaked)}"
    )


def coordinator_is_killed(root: Path) -> Verdict:
    """3: at every file operation of a save of a new step."""
    seen = []
    for number in range(0, 60, 3):
        shutil.rmtree(root, ignore_errors=True)
        Fork(lambda: save(root / "step-1", 1.0)).result()
        breaker().arm("kill", match=f"{root}/step-2", after=number, times=1)
        outcome = Fork(lambda: save(root / "step-2", 2.0)).result()[0]
        breaker().disarm()
        seen.append(loaded(newest(root)))
        if outcome != "killed":
            break
    good = all(values in ({1.0}, {2.0}) for values in seen)
    return (held if good else broken)(
        f"killed at every third operation of a new step: {sorted(map(str, seen))[0]} to {seen[-1]}"
    )


def rank_hangs(root: Path) -> Verdict:
    """4: stopped before it saves; the group's timeout is 5 s."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)

    def train(rank: int) -> list[str]:
        said = []
        for step in range(3):
            began = time.monotonic()
            if rank == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            try:
                save(root / f"step-{step}", float(step))
                said.append("saved")
            except Exception as error:
                said.append(f"{type(error).__name__} after {time.monotonic() - began:.0f} s")
                if rank == 0 and step == 1:
                    os.kill(int((root / "1").read_text()), signal.SIGCONT)
        return said

    forks = [Fork(lambda rank=rank: train(rank), rank, 2, store.port) for rank in range(2)]
    (root / "1").write_text(str(forks[1].pid))
    said = [fork.result(60) for fork in forks]
    good = all(kind == "result" and "after" in value[1] and value[2] == "saved" for kind, value in said)
    return (held if good else broken)(
        f"rank 1 stopped before the second of three saves; rank 0: {said[0][1]}, rank 1: {said[1][1]}"
    )


def disk_is_full(root: Path) -> Verdict:
    """5: in a helper thread of the writer."""
    from torch.distributed.checkpoint import FileSystemWriter

    said = []
    for action in ("ENOSPC", "EIO"):
        for file in ("__0_0", "__0_1"):
            path = root / action / file
            breaker().arm(action, "write", match=f"{path}/{file}.distcp")
            outcome = Fork(lambda: save(None, 1.0, storage_writer=FileSystemWriter(path, thread_count=2))).result()[0]  # noqa: B023
            breaker().disarm()
            if outcome == "result":
                try:
                    fine = loaded(path) == {1.0}
                except RuntimeError:
                    fine = False
                said.append(f"{action} in {file}: reported as success, loads: {fine}")
    return (broken if said else held)("; ".join(said) or "with two writer threads, an error in either is reported")


def power_fails(root: Path) -> Verdict:
    """6: after each operation of a save of a new step, and after it was reported as saved."""
    Fork(lambda: save(root / "step-1", 1.0)).result()
    disk = Disk(root)
    breaker().record(root)
    Fork(lambda: save(root / "step-2", 2.0)).result()
    events = list(breaker().events())
    breaker().record(None)
    wrong: set[str] = set()
    known: dict[int, Any] = {}
    for _ in disk.follow(iter(events)):
        for survival in SURVIVALS:
            files = disk.survivors(survival)
            key = hash(tuple(sorted(files.items())))
            if key not in known:
                known[key] = recovered(files, root.with_name(f"{root.name}-again"))
            if known[key] not in ({1.0}, {2.0}):
                wrong.add(f"{survival}: {known[key]}")
    final = {
        survival: recovered(disk.survivors(survival), root.with_name(f"{root.name}-again")) for survival in SURVIVALS
    }
    lost = [survival for survival, values in final.items() if values != {2.0}]
    size = len(disk.survivors("synced").get("step-2/.metadata", b""))
    return (broken if wrong or lost else held)(
        f"reported as saved, yet lost where a file system keeps no more than what was synced ({', '.join(lost)}): "
        f"`.metadata` has {size} bytes; on the way {len(wrong)} kinds of damage"
        if lost or wrong
        else "old or new after every operation"
    )


def recovered(files: dict[str, bytes], where: Path) -> Any:
    put(files, where)
    try:
        path = newest(where)
        return loaded(path) if path else "no checkpoint"
    except RuntimeError as error:
        return str(error)[:80]
    finally:
        shutil.rmtree(where)


def crash_while_replacing(root: Path) -> Verdict:
    """7: killed at every operation of a save over one that exists."""
    seen: dict[str, int] = {}
    for number in range(60):
        shutil.rmtree(root, ignore_errors=True)
        Fork(lambda: save(root / "step-1", 1.0)).result()
        breaker().arm("kill", match=f"{root}/step-1", after=number, times=1)
        outcome = Fork(lambda: save(root / "step-1", 2.0)).result()[0]
        breaker().disarm()
        try:
            values = loaded(root / "step-1")
            kind = {(1.0,): "old", (2.0,): "new"}.get(
                tuple(sorted(values)), f"a mixture {sorted(values)} without an error"
            )
        except RuntimeError:
            kind = "neither can be loaded"
        seen[kind] = seen.get(kind, 0) + 1
        if outcome != "killed":
            break
    good = set(seen) <= {"old", "new"}
    return (held if good else broken)(f"killed at each operation: {seen}")


def bit_is_flipped(root: Path) -> Verdict:
    """8: in the payload of a tensor, in `.metadata`, and truncation."""
    found = []
    for name, damage in (("__0_0.distcp", "flip"), ("__0_0.distcp", "cut"), (".metadata", "flip")):
        shutil.rmtree(root, ignore_errors=True)
        Fork(lambda: save(root / "step-1", 1.0)).result()
        path = root / "step-1" / name
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) // 3] ^= 1
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
        try:
            found.append(f"{name} {damage}: loads {sorted(loaded(root / 'step-1'))[:2]} without an error")
        except RuntimeError:
            continue
    return (broken if found else held)("; ".join(found) or "all three are errors")


def dtype_changes(root: Path) -> Verdict:
    """9: with cached plans, as its fast asynchronous mode has them."""

    def train() -> list[str]:
        import torch
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        found = []
        for step, dtype in enumerate((torch.float32, torch.float32, torch.float64)):
            path = root / f"step-{step}"
            dcp.save(
                {"w": torch.ones(100, dtype=dtype)},
                checkpoint_id=path,
                planner=DefaultSavePlanner(enable_plan_caching=True),
            )
            with (path / ".metadata").open("rb") as file:
                found.append(str(pickle.load(file).state_dict_metadata["w"].properties.dtype))
        return found

    kind, said = Fork(train).result()
    good = kind == "result" and said[-1] == "torch.float64"
    return (held if good else broken)(
        f"float32, float32, then float64 saved with plan caching; the metadata says {said}"
    )


def state_changes(root: Path) -> Verdict:
    """10: right after `async_save` returned."""

    def train() -> None:
        import torch.distributed.checkpoint as dcp

        content = state(1.0)
        future = dcp.async_save(content, checkpoint_id=root / "step-1")
        for tensor in content.values():
            tensor.fill_(9.0)
        future.result()

    Fork(train).result()
    values = loaded(root / "step-1")
    return (held if values == {1.0} else broken)(f"changed as soon as `async_save` returned; loaded: {sorted(values)}")


def saves_overlap(root: Path) -> Verdict:
    """11: two at once, and exit with one in flight."""

    def train() -> None:
        futures = [asynchronously(root / f"step-{step}", "THREAD", float(step)) for step in (1, 2)]
        for future in futures:
            future.result()

    kind, why = Fork(train).result()
    both = kind == "result" and [loaded(root / f"step-{step}") for step in (1, 2)] == [{1.0}, {2.0}]
    program = (
        "import torch.distributed as d, sys, pathlib; from benchmarks.checkpoint.faults import *; ranks(0, 1, 0); "
        "asynchronously(pathlib.Path(sys.argv[1]) / 'step-0', 'PROCESS').result(); "
        "asynchronously(pathlib.Path(sys.argv[1]) / 'step-9', 'PROCESS')"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(root)], capture_output=True, timeout=120, check=False
    )
    finished = (root / "step-9" / ".metadata").exists()
    return (held if both and finished else broken)(
        f"two saves by threads at once: {'both whole' if both else why}; "
        f"a save by a process, in flight at exit, is finished: {finished}"
    )


def directory_is_stale(root: Path) -> Verdict:
    """12: what a killed save left, and a slow rank."""
    breaker().arm("kill", "write", match=".metadata.tmp")
    Fork(lambda: save(root / "step-1", 1.0)).result()
    breaker().disarm()
    left = sorted(path.name for path in (root / "step-1").iterdir())
    Fork(lambda: save(root / "step-2", 2.0)).result()
    swept = not (root / "step-1").exists()
    Fork(lambda: save(root / "step-1", 3.0)).result()
    right = loaded(root / "step-1") == {3.0}
    return (held if right else broken)(
        f"a killed save left {left}, never removed: {not swept}; saved again it is right: {right}"
    )


def hundred_saves(root: Path) -> Verdict:
    """13: by a thread."""

    def train() -> list[tuple[int, int, int]]:
        seen = []
        for _ in range(110):
            asynchronously(root / "step-1", "THREAD").result()
            seen.append(
                (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(os.listdir("/dev/shm")))
            )
        return seen

    kind, seen = Fork(train).result(200)
    good = kind == "result" and max(seen[10:]) <= tuple(number + 1 for number in seen[9])
    return (held if good else broken)(
        f"descriptors and threads after 10 and after 110 saves: {seen[9][:2]}, {seen[-1][:2]}"
    )


BREAKINGS: list[Callable[[Path], Verdict]] = [
    daemon_is_killed, trainer_is_killed, coordinator_is_killed, rank_hangs, disk_is_full, power_fails,
    crash_while_replacing, bit_is_flipped, dtype_changes, state_changes, saves_overlap, directory_is_stale,
    hundred_saves,
]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, help="write the table to this page, too")
    parser.add_argument("--dcp", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dcp:
        break_dcp(options.dcp)
    elif library() is None:
        sys.exit("a C compiler is needed.\nhelp: install gcc.")
    else:
        main(options.docs)
