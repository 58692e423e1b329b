"""Save and load training state behind the training's back.

    root/
    ├── step-00000400/             committed: the directory was renamed into place, whole and durable
    │   ├── .metadata              where each piece lies; this and the next are what PyTorch DCP reads and writes
    │   ├── __0_0.distcp           what rank 0 wrote: a row of `torch.save` archives
    │   ├── __0_0.checksums        CRC32 of every block of it, and the tree of the state
    │   ├── __0_1.distcp, .checksums   the tensors that have not changed: linked from the checkpoint before, where so
    │   └── checkpoint.json        step, metrics, ranks
    └── .step=d00000500.*.tmp/     being written, or left by a crash: invisible to every reader

On an object store the same files lie under other names, see `roots.py`.

Promise: after a crash at any instruction a reader sees the old set of checkpoints or the new one, never a part,
never a mixture. What is loaded is what was saved, bit for bit, or `CheckpointCorrupt` names the item that is not.
Threads: `save` copies into the arena on the caller's thread (or behind it, on request); one thread waits for the
writer process, which does everything else, and for the other ranks. Every rank calls `save` and `load` alike.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import uuid
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from stillroom.checkpoint import pinned
from stillroom.checkpoint.arena import Arena
from stillroom.checkpoint.config import CheckpointConfig
from stillroom.checkpoint.daemon import Daemon
from stillroom.checkpoint.group import Solo, group_of
from stillroom.checkpoint.loading import Load
from stillroom.checkpoint.plans import Plan, Settled, new_plan
from stillroom.checkpoint.reading import Snapshot
from stillroom.checkpoint.retention import superfluous
from stillroom.checkpoint.roots import Where, format_record, root_of
from stillroom.checkpoint.saves import CheckpointInfo, Save
from stillroom.checkpoint.states import Contents, DescribedState
from stillroom.checkpoint.writer import RECORD
from stillroom.errors import CheckpointCorrupt, CheckpointError
from stillroom.telemetry import note

CHANGED = (
    "the state was changed before it was staged.\n"
    "help: wait for `Save.staged()` before `optimizer.step()`; `Checkpointer.guard(optimizer)` does that."
)


@dataclass
class _Job:
    save: Save
    number: int
    arena: Arena
    contents: Contents | None
    after: Any
    metrics: dict[str, float]
    folder: Any
    failure: str = ""
    committing: bool = False


class Checkpointer:
    """Checkpoints of one run, under `root`.

    Args:
        root: a directory that all ranks see, made when the first checkpoint is saved; or `s3://BUCKET/PREFIX`.
        like: a state of the shape that will be saved; memory for it is made ready in the background, so that the
            first save is as quick as the second.
        config: how checkpoints are written and which stay.
        process_group: the ranks that save together; by default all of them, or this process alone.
        frozen: names of leaves and branches, such as `model.base`, that are not changed but by `load` as long as this
            Checkpointer lives: they are copied and written once, and linked into every checkpoint after that. Without
            it, tensors that stay the same are found by their checksums (`CheckpointConfig.link_unchanged`).

    Raises:
        CheckpointError: `root` is of no known kind, or the object store does not let us in.
    """

    def __init__(
        self,
        root: str | Where,
        *,
        like: Mapping[Any, Any] | None = None,
        config: CheckpointConfig = CheckpointConfig(),
        process_group: Any = None,
        frozen: Collection[str] = (),
    ) -> None:
        self._place, self.config = root_of(root), config
        self.root: Any = self._place.where
        self._group: Solo = group_of(process_group, config.timeout_s)
        self._daemon: Daemon | None = None
        self._plan: Plan | None = None
        self._settled = Settled(frozen if config.link_unchanged else (), config.link_unchanged)
        self._numbers = 0
        self._saves: list[Save] = []
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed, self._process = False, os.getpid()
        self._swept: set[tuple[Any, int | None]] = set()
        self._token, newest = self._group.broadcast("token", self._arrive)
        self._newest = root_of(newest).where if newest else None
        self._preparing: threading.Thread | None = None
        if like is not None:
            self._start()
            described = DescribedState(like)
            self._preparing = threading.Thread(target=self._prepare_early, args=(described, like))
            self._preparing.start()

    def save(self, step: int, state: Mapping[Any, Any], *, metrics: Mapping[str, float] | None = None) -> Save:
        """Save `state` as the checkpoint of `step`, then drop what no policy keeps.

        Returns when the state is copied (or with `stage="behind"`, when the copy has begun); the rest happens in
        the background. It waits for the save before where `buffers` is 1. A failure is noted on stderr and raised
        by `result`, and by `close` if nobody asked.

        Args:
            step: not negative; an existing checkpoint of this step is replaced.
            state: nested dictionaries with string or integer keys, and lists; leaves are tensors, DTensors or
                small values that can be pickled. What several ranks have under one name is saved once: a value
                of the lowest rank that has it.
            metrics: numbers by name, kept with the checkpoint.

        Raises:
            CheckpointError: a leaf cannot be saved, or memory is lacking, on any rank; nothing was begun.
        """
        if self._closed:
            raise CheckpointError("this Checkpointer is closed.\nhelp: open another for the same root.")
        path = self._path(step)
        self._start()
        self._ready()
        save = Save(step)
        number = self._next_number()
        contents = self._contents_of(state, str(number))
        save._mark("planned")
        assert self._plan is not None
        arena = self._plan.free.get()
        save._mark("waited")
        folder = self._place.unfinished(path, self._token, number)
        job = _Job(save, number, arena, contents, pinned.mark(contents.parts), dict(metrics or {}), folder)
        self._saves = [other for other in self._saves if not (other.done() and (other.seen or not other._error))]
        self._saves.append(save)
        self._begin(job)
        save._mark("blocked")
        return save

    def load(
        self,
        into: MutableMapping[Any, Any],
        step: int | None = None,
        *,
        keys: Collection[str] | None = None,
        trust: bool = False,
    ) -> CheckpointInfo | None:
        """Copy a checkpoint into `into`, resharded to what its DTensors hold; None when there is none.

        Tensors are copied into the tensors of `into`, everything else is replaced; what `into` lacks is added,
        what the checkpoint lacks stays as it is and is listed in `absent`. Everything is checked before anything
        is copied. It waits for the saves under way, which could remove what is being read.

        Args:
            into: a state as `save` took it.
            step: which one; None for the newest committed.
            keys: load only these leaves and branches, such as `model` or `model.embed.weight`.
            trust: unpickle values of any class. Without, only what `torch.load(weights_only=True)` admits.

        Raises:
            CheckpointCorrupt: something does not match its checksum, or is missing. Nothing was copied.
            CheckpointError: there is no checkpoint of that step, or a tensor has another shape or dtype, or another
                rank could not load. Nothing was copied.
        """
        self._ready()
        for save in self._saves:
            save._done.wait()
        number = self._next_number()
        chosen = self._group.broadcast(f"{number}/load", lambda: self._choose(step))
        if chosen is None:
            return None
        load = self._load_together(number, lambda: self._read(chosen, into, keys, trust))
        for arena in self._plan.arenas if self._plan else ():
            arena.forget_settled()
        return self._info(chosen, load.absent)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(self._place.steps())

    def committed(self) -> list[CheckpointInfo]:
        """The committed checkpoints, by step."""
        return [self._info(step) for step in self.steps()]

    def path_of(self, step: int | None = None) -> Any:
        """The directory of a committed checkpoint, the newest by default; a `Path` or an `ObjectPath`.

        Raises:
            CheckpointError: there is none.
        """
        chosen = self._choose(step)
        if chosen is None:
            raise CheckpointError(f"there is no checkpoint in {self.root}.")
        return self._place.content(self._path(chosen))[0]

    def verify(self, step: int) -> list[str]:
        """What of a checkpoint does not match its checksums, one line each; empty when all is well."""
        try:
            return Snapshot(self._path(step)).damages()
        except CheckpointCorrupt as error:
            return [str(error).splitlines()[0]]

    def set_aside(self, step: int) -> Any:
        """Rename a damaged checkpoint, so that it is no longer found but can still be looked at; where it is now."""
        return self._place.set_aside(self._path(step))

    def guard(self, optimizer: Any) -> Any:
        """Make `optimizer.step` wait until the newest save is staged; with `stage="behind"` nothing else is needed.

        Returns:
            A handle whose `remove` undoes it.
        """

        def wait(*_: Any) -> None:
            if self._saves:
                self._saves[-1].staged()

        return optimizer.register_step_pre_hook(wait)

    def close(self) -> None:
        """Finish what is under way, end the writer, give the memory back.

        Raises:
            CheckpointError: a save failed and nobody asked for its result.
        """
        if self._closed or os.getpid() != self._process:
            return  # a fork of the trainer has no part in its saves
        self._closed = True
        self._ready()
        atexit.unregister(self.close)
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
        if self._daemon is not None:
            if self._plan is not None:
                self._plan.release(self._daemon)
            self._daemon.close()
        for save in self._saves:
            if save._error is not None and not save.seen:
                raise save._error

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(CheckpointError):
                self.close()

    def _start(self) -> None:
        if self._daemon is not None:
            return
        self._daemon = Daemon(self._place.program, self.config.timeout_s)
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _next_number(self) -> int:
        """What this call is called between the ranks, which count alike."""
        number, self._numbers = self._numbers, self._numbers + 1
        return number

    def _read(self, step: int, into: MutableMapping[Any, Any], keys: Collection[str] | None, trust: bool) -> Load:
        path = self._path(step)
        before = self._place.identity(path)
        try:
            return Load(Snapshot(path), into, keys, trust)
        except CheckpointCorrupt as error:
            if self._place.identity(path) == before:
                raise
            raise CheckpointError(
                f"step {step} in {self.root} was removed or replaced by another process while it was read.\n"
                "help: load again."
            ) from error

    def _load_together(self, number: int, read: Callable[[], Load]) -> Load:
        """Read and check on every rank, and copy only where all could."""
        try:
            load = read()
        except Exception as error:
            with contextlib.suppress(CheckpointError):
                self._group.agree(f"{number}/loaded", failure=str(error))
            raise
        self._group.agree(f"{number}/loaded")
        load.apply()
        return load

    def _prepare_early(self, described: DescribedState, like: Mapping[Any, Any]) -> None:
        # What goes wrong now goes wrong again at the first save, where somebody hears of it.
        with contextlib.suppress(CheckpointError):
            self._prepare(described, like, "like")

    def _ready(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def _contents_of(self, state: Mapping[Any, Any], step: str) -> Contents:
        """What of `state` is copied, with a new plan where any rank's state needs one."""
        contents, described, failure = None, None, ""
        try:
            if self._plan is not None and not self._settled.outdated:
                contents = self._plan.contents_of(state)
            if contents is None:
                described = DescribedState(state)
        except CheckpointError as error:
            failure = str(error)
        try:
            changed = self._group.agree(f"{step}/plan", contents is None, failure)
        except CheckpointError:
            self._swept.clear()  # a rank that is late goes on, and leaves what it wrote
            raise
        if changed:
            return self._prepare(described or DescribedState(state), state, step)
        assert contents is not None
        return contents

    def _prepare(self, described: DescribedState, state: Mapping[Any, Any], step: str) -> Contents:
        assert self._daemon is not None
        older = self._newest if self._plan is None else None
        if self._plan is not None:
            self._plan.release(self._daemon)
            self._plan = None
        self._plan, contents = new_plan(
            described, state, self._settled, older, self._group, self._daemon, self.config.buffers, step
        )
        return contents

    def _begin(self, job: _Job) -> None:
        """Copy the state, unless that happens behind training, and hand the job over."""
        try:
            if self.config.stage == "at once":
                self._stage(job)
        except BaseException:
            job.failure = "staging was interrupted"
            job.save._staged.set()
            raise
        finally:
            self._jobs.put(job)

    def _stage(self, job: _Job) -> None:
        """Copy the state; what goes wrong is for the vote, so that every rank hears of it."""
        contents = job.contents
        assert contents is not None
        try:
            job.arena.stage(contents.parts, self._settled.are_declared, job.after)
            if contents.changed():
                job.failure = CHANGED
        except Exception as error:
            job.failure = f"staging failed: {type(error).__name__}: {error}"
        if self.config.stage == "at once":
            job.contents = None  # nothing may be kept alive for longer than it is needed
        job.save._mark("staged")
        job.save._staged.set()

    def _run(self) -> None:
        """The background thread: one job after another, each to its end."""
        while (job := self._jobs.get()) is not None:
            try:
                info = self._commit(job)
            except Exception as error:
                failed = error if isinstance(error, CheckpointError) else CheckpointError(str(error))
                self._drop(job)
                note(f"step {job.save.step} was not saved: {failed}")
                self._give_back(job)
                job.save._finish(None, failed)
            else:
                self._give_back(job)
                job.save._finish(info)

    def _give_back(self, job: _Job) -> None:
        assert self._plan is not None
        job.contents = None
        self._plan.free.put(job.arena)

    def _drop(self, job: _Job) -> None:
        """Give the folder up; on rank 0, which alone knows that nobody commits it any more, remove it."""
        self._swept.clear()
        folder = str(job.folder) if self._group.rank == 0 else ""
        with contextlib.suppress(CheckpointError):
            assert self._daemon is not None
            self._daemon.ask({"op": "drop", "folder": folder, "committing": job.committing})

    def _sweep(self, parent: Any, keep: str) -> None:
        """On rank 0, once for each writer process: remove what crashes left, the writer's own among them."""
        assert self._daemon is not None
        if self._group.rank == 0 and (parent, self._daemon.pid) not in self._swept:
            with contextlib.suppress(CheckpointError):
                idle_s = 2 * self.config.timeout_s
                self._daemon.ask({"op": "sweep", "root": str(parent), "keep": keep, "idle_s": idle_s})
                self._swept.add((parent, self._daemon.pid))

    def _commit(self, job: _Job) -> CheckpointInfo:
        """Write, vote, commit."""
        assert self._daemon is not None
        final = self._path(job.save.step)
        self._sweep(final.parent, job.folder.name)
        if self.config.stage == "behind":
            self._stage(job)
        failure = job.failure or self._written(job)
        # A tensor's version is raised when an operation ends, so one that overlapped the copy shows only now.
        # Asked in this order: whoever was told that it is staged may have changed it since.
        contents = job.contents
        if contents is not None and contents.changed() and not job.save._released:
            failure = failure or CHANGED
        job.save._mark("written")
        self._group.agree(f"{job.number}/written", failure=failure)
        self._group.broadcast(f"{job.number}/committed", lambda: self._rename(job, final))
        info = self._info(job.save.step)
        self._newest = info.path
        return info

    def _written(self, job: _Job) -> str:
        """Let the writer write; what went wrong, if anything."""
        assert self._daemon is not None
        request = job.arena.write_request(str(job.folder), self._linked_from())
        try:
            reply = self._daemon.ask(request)
        except CheckpointError as error:
            return f"step {job.save.step} could not be written to {job.folder.parent}: {error}"
        self._settled.learn(job.arena.layout, reply["unchanged"], reply["changed"])
        return ""

    def _linked_from(self) -> str:
        return str(self._newest) if self._newest and self.config.link_unchanged else ""

    def _rename(self, job: _Job, final: Any) -> bool:
        """On rank 0, when all ranks have written: the commit, then retention."""
        assert self._daemon is not None
        token, job.committing = job.folder.name, True
        record = {
            "step": job.save.step, "metrics": job.metrics, "world": self._group.world, "token": token, "version": 1,
        }  # fmt: skip
        files = {RECORD: format_record(record)}
        request = job.arena.commit_request(str(job.folder), str(final), token, files, self._linked_from())
        self._daemon.ask(request)
        # It is committed; what cannot be removed now is removed after the next save.
        with contextlib.suppress(CheckpointError, OSError):
            doomed = superfluous({step: self._metrics(step) for step in self.steps()}, self.config)
            if doomed:
                self._daemon.ask({"op": "remove", "paths": [str(self._path(step)) for step in doomed]})
        return True

    def _choose(self, step: int | None) -> int | None:
        steps = self.steps()
        if step is None:
            return steps[-1] if steps else None
        if step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.root}; there are {steps or 'none'}.")
        return step

    def _path(self, step: int) -> Any:
        if step < 0:
            raise CheckpointError(f"a step cannot be negative: {step}")
        return self.root / f"step-{step:08d}"

    def _metrics(self, step: int) -> dict[str, float]:
        record = self._place.record(self._path(step)) or {}
        metrics: dict[str, float] = record.get("metrics", {})
        return metrics

    def _info(self, step: int, absent: tuple[str, ...] = ()) -> CheckpointInfo:
        folder, size_bytes = self._place.content(self._path(step))
        return CheckpointInfo(step, folder, size_bytes, self._metrics(step), absent)

    def _arrive(self) -> tuple[str, str]:
        """On rank 0: what names this Checkpointer's saves, and the newest checkpoint that is there, if any."""
        self._place.restore()
        newest = self._choose(None)
        return uuid.uuid4().hex[:8], "" if newest is None else str(self._place.content(self._path(newest))[0])
