"""The writer for object stores: parts go up from the arena's memory, and one more object commits.

    python -P -m stillroom.checkpoint.remote SOCKET      started by `daemon.py`, as `writer.py` is for a disk

What lies where is told in `roots.py`. Nothing goes that a commit may name: what a rank has written whole is for rank 0
to commit or to drop, and once a commit was asked for only a sweep, much later, judges what became of it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from stillroom.checkpoint import writer
from stillroom.checkpoint.roots import ASIDE, Objects, commit_of, generation_of
from stillroom.checkpoint.writer import RECORD, Writer
from stillroom.errors import CheckpointError, StillroomError, StorageError
from stillroom.storage import ObjectPath, ObjectStore, Upload, located

FAREWELL_S = 10.0
"""How long a writer whose trainer is gone may take to clear up."""

GENERATION = re.compile(r"(.+)\.[0-9a-f]{8}-\d+")


class RemoteWriter(Writer):
    """The requests of `Writer`, with URLs for paths."""

    def __init__(self) -> None:
        super().__init__()
        self._store = ObjectStore()
        self._upload: Upload | None = None
        self._writing = False
        self._unvoted: list[ObjectPath] = []

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
        """Make the generation `folder` the checkpoint `final`, then drop the one that was it before."""
        self.doing = folder
        with self._ending:
            self._writing, self._unvoted = False, []  # from here on nothing is taken back
        place, generation = _path(final), _path(folder)
        root = Objects(place.parent)
        before = root.record(place)
        if before and before["token"] == token:
            return {}  # an earlier try, cut short after its last request, did it
        self._write_last(folder, files, self._arenas[arena], metadata, sidecar, head, previous)
        self._check_whole(generation, json.loads(files[RECORD])["record"]["world"])
        self._store.put(commit_of(place), files[RECORD].encode())
        if before:
            with suppress(StorageError):  # a sweep will
                self._delete(generation_of(place, before))
        return {}

    def remove(self, _: None, paths: list[str]) -> None:
        """Drop whole checkpoints: invisible at once, then gone."""
        for path in map(_path, paths):
            record = Objects(path.parent).record(path)
            self._store.delete([commit_of(path)])
            if record:
                self._delete(generation_of(path, record))

    def sweep(self, _: None, root: str, keep: str, idle_s: float) -> None:
        """Remove generations that no commit names, but `keep`, and multipart uploads, once they are `idle_s` old."""
        place = _path(root)
        objects, folders = self._store.children(place)
        commits = {entry.path for entry in objects}
        for folder in folders:
            if folder.name != keep and self._is_loose(folder, commits):
                entries = self._store.under(folder)
                if all(entry.age_s > idle_s for entry in entries):
                    self._store.delete(entry.path for entry in entries)
        for upload in self._store.unfinished(place):
            generation = upload.path.parent
            if upload.age_s > idle_s and generation.parent == place and GENERATION.fullmatch(generation.name):
                self._store.abort(upload.path, upload.upload_id)

    def drop(self, _: None, folder: str, committing: bool) -> None:
        """Give up a save: what this rank has not voted for goes, and the `folder` unless its commit may yet arrive."""
        self._store.delete(self._unvoted)
        self._writing, self._unvoted = False, []
        if folder and not committing:
            self._delete(_path(folder))

    def abandon(self) -> None:
        """Remove what was begun and nobody will commit, soon or not at all, and end: a sweep does the rest."""
        last = threading.Timer(FAREWELL_S, os._exit, (0,))
        last.daemon = True
        last.start()
        with self._ending:
            with suppress(StillroomError):
                if self._upload is not None:
                    self._upload.abort()
                self._store.delete(self._unvoted)
            os._exit(0)

    def explain(self, error: Exception) -> str:
        return str(error) if isinstance(error, StillroomError) else super().explain(error)

    @contextmanager
    def _file(self, path: str, memory: memoryview, size_bytes: int) -> Iterator[Upload]:
        target = _path(path)
        with self._store.upload(target, memory, size_bytes) as self._upload:
            yield self._upload
        self._upload = None
        self._remember(target)

    def _small_file(self, path: str, content: Any) -> None:
        with self._store.upload(_path(path), memoryview(content), len(content)):
            pass
        self._remember(_path(path))

    def _read(self, path: str, limit: int = -1) -> bytes:
        content = self._store.read(_path(path)) or b""
        return content if limit < 0 else content[:limit]

    def _linked(self, source: str, folder: str, names: Sequence[str]) -> bool:
        try:
            for name in names:
                self._store.copy(_path(source) / name, _path(folder) / name)
                self._remember(_path(folder) / name)
        except StorageError:  # it is gone, or the store does not copy
            return False
        return True

    def _enter(self, folder: str) -> None:
        self._writing, self._unvoted = True, []

    def _written(self, folder: str, commits: bool) -> None:
        if not commits:
            self._writing, self._unvoted = False, []  # the others may commit it from now on

    def _remember(self, path: ObjectPath) -> None:
        if self._writing:
            self._unvoted.append(path)

    def _check_whole(self, generation: ObjectPath, world: int) -> None:
        """Every rank's last object is there: no sweep of somebody else took this for a leftover."""
        found = {entry.path.name for entry in self._store.under(generation)}
        if not found.issuperset(f"__{rank}_0.checksums" for rank in range(world)):
            raise CheckpointError(
                f"objects of {generation} were removed before it was committed.\n"
                "help: let only one run save there, or raise `timeout_s` of the other's CheckpointConfig."
            )

    def _is_loose(self, folder: ObjectPath, commits: set[ObjectPath]) -> bool:
        """Whether it is a generation that no commit names, neither one that counts nor one set aside."""
        match = GENERATION.fullmatch(folder.name)
        if not match:
            return False
        for final in (folder.with_name(match[1]), folder.with_name(match[1] + ASIDE)):
            if commit_of(final) in commits:
                record = Objects(final.parent).record(final)
                if record is None or record["token"] == folder.name:
                    return False  # a commit that cannot be read might name it
        return True

    def _delete(self, folder: ObjectPath) -> None:
        self._store.delete(entry.path for entry in self._store.under(folder))
        for upload in self._store.unfinished(folder):
            self._store.abort(upload.path, upload.upload_id)


def _path(url: str) -> ObjectPath:
    path = located(url)
    assert isinstance(path, ObjectPath)
    return path


if __name__ == "__main__":
    writer.main(int(sys.argv[1]), RemoteWriter())
