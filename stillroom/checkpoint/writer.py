"""The writer: a program of its own that makes a staged checkpoint durable.

    python -P writer.py SOCKET      started by `daemon.py` with one end of a socket pair

It shares the arena's memory with the trainer and holds no lock of it. Requests and replies are lines of JSON, one
reply for each request; an arena's file descriptor comes with the request that names it.

    arena    {"id", "bytes"}                                     map the memory that came along
    write    {"arena", "folder", "parts", ...}                   CRC32s, one rank's files and sidecars, synced
    commit   {"folder", "final", "files", "token", ...}          the last small files, then the rename
    remove   {"paths"}, sweep {"root", "keep"}                   what retention dropped; what crashes left

The end of the connection, or another parent, means that the trainer is gone: the writer removes what it had begun, and
leaves. All ranks write into one folder, so what is complete is removed by rank 0 alone, which also commits.
Nothing here may import torch, which would cost seconds and memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import queue
import re
import select
import shutil
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from stillroom.checkpoint.disk import SIDECAR_MAGIC, NewFile, Part, linked, read, sync_folder, write_small

LEFTOVER = re.compile(r"\.(?P<final>.+)\.[0-9a-f]{8}-\d+\.tmp(?P<aside>\.old)?|\.step-\d{8,}\.old")
"""Folders being written, or moved aside, or dropped."""

WATCH_S = 2.0
"""How often a writer that hears nothing looks for its trainer."""

RECORD = "checkpoint.json"
RENAME_EXCHANGE = 2
AT_FDCWD = -100


def main(descriptor: int, writer: Writer) -> None:
    """Serve requests until the connection ends."""
    connection = socket.socket(fileno=descriptor)
    requests: queue.SimpleQueue[tuple[dict[str, Any], int | None]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, requests, writer), daemon=True).start()
    while True:
        request, arena = requests.get()
        began, cpu = time.monotonic(), time.process_time()
        try:
            reply = getattr(writer, request.pop("op"))(arena, **request) or {}
        except OSError as error:
            reply = {"error": f"{error.strerror}: {error.filename or writer.doing}", "errno": error.errno}
        except Exception as error:
            reply = {"error": writer.explain(error)}
        reply |= {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
        connection.sendall(json.dumps(reply).encode() + b"\n")


def _listen(connection: socket.socket, requests: Any, writer: Writer) -> None:
    buffer, descriptors, trainer = b"", [], os.getppid()
    while True:
        # The trainer's forks hold its end of the connection open after its death, so its death is looked for too.
        while not select.select([connection], [], [], WATCH_S)[0]:
            if os.getppid() != trainer:
                writer.abandon()
        try:
            data, received, _, _ = socket.recv_fds(connection, 1 << 16, 4)
        except OSError:
            data, received = b"", []
        descriptors += received
        if not data:
            writer.abandon()
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            # A descriptor that this process may not open any more does not arrive.
            came = request["op"] == "arena" and descriptors
            requests.put((request, descriptors.pop(0) if came else None))


class Writer:
    """The requests, each a method that returns what its reply says."""

    def __init__(self) -> None:
        self.doing = ""
        self._arenas: dict[int, mmap.mmap] = {}
        self._folder = ""
        self._lock: int | None = None
        self._removals: dict[str, threading.Thread] = {}
        self._ending = threading.Lock()

    def arena(self, descriptor: int | None, id: int, bytes: int) -> None:
        """Map an arena; its `id` replaces one of that name."""
        if descriptor is None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "shared memory for staging")
        try:
            if bytes:
                self._arenas[id] = mmap.mmap(descriptor, bytes)
            else:
                self._arenas.pop(id, None)
        finally:
            os.close(descriptor)

    def write(
        self, _: None, arena: int, folder: str, parts: list[dict[str, Any]], previous: str, commits: bool
    ) -> dict[str, Any]:
        """Write one rank's files and their sidecars into `folder`, durably.

        Args:
            parts: the files, see `Part`.
            previous: an older checkpoint. A file after the first is linked from there where its content is the same.
            commits: whether this is the writer that will be asked to commit the folder, or to drop it.

        Returns:
            `unchanged`: rows of the first file whose CRC32s are those of this arena's last write; `changed`: rows of
            the second that are not as in `previous`.
        """
        self._enter(folder)
        memory = memoryview(self._arenas[arena])
        first, *others = [Part(memory, folder=folder, **part) for part in parts]
        unchanged = self._write_first(first, bool(previous))
        changed: list[int] = []
        for part in others:
            changed += self._write_unless_linked(part, previous)
        self._written(folder, commits)
        return {"unchanged": unchanged, "changed": changed}

    def _write_first(self, part: Part, compare: bool) -> list[int]:
        before = part.running.tolist() if compare else []
        self.doing = part.path
        if not part.file_bytes:
            self._small_file(part.sidecar_path, part.sidecar_content())
            return []
        with self._file(part.path, part.image, part.file_bytes) as out:
            for ready in part.checksummed():
                out.write_until(ready)
            out.write_until(part.file_bytes, last=True)
            self._small_file(part.sidecar_path, part.sidecar_content())  # while the last pieces are on their way
            return part.rows_with(before, same=True)

    def _write_unless_linked(self, part: Part, previous: str) -> list[int]:
        for _ in part.checksummed():
            pass
        before = self._read(os.path.join(previous, part.sidecar)) if previous else b""
        names = (part.file, part.sidecar)
        if before == part.sidecar_content() and self._linked(previous, part.folder, names):
            return []
        self.doing = part.path
        with self._file(part.path, part.image, part.file_bytes) as out:
            out.write_until(part.file_bytes, last=True)
            self._small_file(part.sidecar_path, part.sidecar_content())
        return part.rows_with(part.running_in(before), same=False)

    def commit(
        self,
        _: None,
        folder: str,
        final: str,
        token: str,
        files: dict[str, str],
        arena: int,
        metadata: tuple[int, int],
        sidecar: str,
        head: tuple[int, int],
        previous: str,
    ) -> dict[str, Any]:
        """Make `folder` the checkpoint `final`, replacing one that is there, in one step.

        Args:
            head: first part of rank 0's `sidecar`. Where that of `previous` is the same, so is its `.metadata`.
        """
        if not _committed(final, token):
            self._write_last(folder, files, self._arenas[arena], metadata, sidecar, head, previous)
            sync_folder(folder)
            self.doing = final
            with self._ending:  # from here on nothing is abandoned
                self._folder = ""
                if os.path.exists(final):
                    _exchange(folder, final)
                else:
                    os.rename(folder, final)
        sync_folder(os.path.dirname(final))  # an earlier try may have ended just before it
        for left in (folder, f"{folder}.old"):  # what was there before
            self._remove(left)
        self._leave()
        return {}

    def _write_last(
        self,
        folder: str,
        files: dict[str, str],
        arena: mmap.mmap,
        metadata: tuple[int, int],
        sidecar: str,
        head: tuple[int, int],
        previous: str,
    ) -> None:
        """What only the coordinator adds; `.metadata` is that of `previous` where the `sidecar` there begins alike."""
        for name, text in files.items():
            self._small_file(os.path.join(folder, name), text.encode())
        memory = memoryview(arena)
        begins = b"".join((SIDECAR_MAGIC, memory[head[0] : sum(head)]))
        same = bool(previous) and self._read(os.path.join(previous, sidecar), len(begins)) == begins
        if not same or not self._linked(previous, folder, [".metadata"]):
            self._small_file(os.path.join(folder, ".metadata"), memory[metadata[0] : sum(metadata)])

    def remove(self, _: None, paths: list[str]) -> None:
        """Drop whole checkpoints: invisible at once, then gone."""
        for path in paths:
            doomed = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.old")
            shutil.rmtree(doomed, ignore_errors=True)  # left where an earlier try was cut short
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, doomed)
                # The content must not go before the name has.
                sync_folder(os.path.dirname(path))
                self._remove(doomed)

    def sweep(self, _: None, root: str, keep: str, idle_s: float) -> None:
        """Remove what crashed saves left under `root`, but `keep`; a save under way holds a lock on its folder.

        Args:
            idle_s: no save goes on for so long without a sign of life, for where there are no locks.
        """
        restore(root)
        with contextlib.suppress(FileNotFoundError):
            for entry in list(os.scandir(root)):
                if LEFTOVER.fullmatch(entry.name) and entry.name != keep:
                    _remove_if_free(entry.path)

    def drop(self, _: None, folder: str, committing: bool) -> None:
        """Give up a save, and remove its folder where one is named.

        Args:
            committing: whether its commit was begun; a rename has failed or not, a request may yet arrive.
        """
        self._leave()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)

    def abandon(self) -> None:
        """Remove what was begun, which nobody will commit, and end; never while it is being committed."""
        with self._ending:
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._finish_removals()
            os._exit(0)

    def explain(self, error: Exception) -> str:
        """What to tell the trainer about an error that is none of the operating system's."""
        return f"{type(error).__name__}: {error}"

    def _file(self, path: str, memory: memoryview, size_bytes: int) -> Any:
        """A context in which `write_until` takes more of the memory as it becomes final."""
        return NewFile(path, memory, size_bytes)

    def _small_file(self, path: str, content: Any) -> None:
        write_small(path, content)

    def _read(self, path: str, limit: int = -1) -> bytes:
        return read(path, limit)

    def _linked(self, source: str, folder: str, names: Sequence[str]) -> bool:
        return linked(source, folder, names)

    def _written(self, folder: str, commits: bool) -> None:
        """This rank's files are there."""
        sync_folder(folder)
        if not commits:
            self._folder = ""  # the others may commit it from now on

    def _remove(self, folder: str) -> None:
        """Freeing gigabytes takes a while, which nobody needs to wait for."""
        self._removals[folder] = threading.Thread(target=shutil.rmtree, args=(folder, True))
        self._removals[folder].start()

    def _finish_removals(self) -> None:
        for folder, thread in list(self._removals.items()):
            thread.join()
            if os.path.exists(folder):  # it met an error; once more, and again next time
                shutil.rmtree(folder, ignore_errors=True)
            else:
                del self._removals[folder]

    def _enter(self, folder: str) -> None:
        self._leave()
        self._finish_removals()  # their room may be needed
        while True:
            self._leave()
            self._folder = folder
            _make_folders(folder)
            with contextlib.suppress(FileNotFoundError):  # another job's sweep was quicker
                self._lock = os.open(folder, os.O_RDONLY)
                with contextlib.suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(self._lock, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(self._lock), os.stat(folder)):
                    return

    def _leave(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._folder, self._lock = "", None


def _make_folders(path: str) -> None:
    """Make a folder and those above it, each with a name that lasts."""
    try:
        os.mkdir(path)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_folders(os.path.dirname(path))
        _make_folders(path)
        return
    sync_folder(os.path.dirname(path))


def temporary_name(final: str, token: str, number: int) -> str:
    """What the folder `final` is called while it is written; hyphens go, so that no pattern finds `step-5` in it."""
    return f".{final.replace('=', '=e').replace('-', '=d')}.{token}-{number}.tmp"


def restore(root: str) -> None:
    """Put back what a crash left moved aside for a checkpoint that then was not moved in (see `_exchange`)."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(root):
            match = LEFTOVER.fullmatch(name)
            if match and match["aside"]:
                final = os.path.join(root, match["final"].replace("=d", "-").replace("=e", "="))
                if not os.path.exists(final):
                    os.rename(os.path.join(root, name), final)


def _committed(final: str, token: str) -> bool:
    """Whether an earlier try, cut short after its rename, did it already."""
    try:
        with open(os.path.join(final, RECORD), encoding="utf-8") as file:
            return bool(json.load(file)["record"]["token"] == token)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _exchange(new: str, old: str) -> None:
    """Swap two folders in one step; where the file system cannot, the old one is moved aside first."""
    library = ctypes.CDLL(None, use_errno=True)
    paths = (AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old))
    if hasattr(library, "renameat2") and library.renameat2(*paths, RENAME_EXCHANGE) == 0:
        return
    aside = f"{new}.old"
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise


def _remove_if_free(path: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]), Writer())
