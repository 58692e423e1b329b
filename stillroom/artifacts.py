"""Immutable results of steps, addressed by everything that made them, with their lineage.

    artifacts/<step>-<key>/       committed by one rename; never changed after
        artifact.json             step, key, parents, resolved config, code digest, a digest per file
    work/<step>-<key>/            a step's own unfinished state; survives a kill, goes when the step commits

The key is a digest of the step's name, its inputs' content digests, its resolved config and the source
code of the rooms that it runs, so a cached step is never stale, and changing one setting redoes exactly
what depends on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import ArtifactError
from stillroom.schema import digest
from stillroom.storage import atomic_directory

RECORD = "artifact.json"
_KEY_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Artifact:
    """One committed result.

    Attributes:
        step: name of the step that made it.
        key: digest of what it was made from. digest: digest of what it contains.
        path: its directory.
        parents: input name -> key of the artifact, or digest of the file, that went in.
        config: the step's resolved config.
        seconds: wall time of the making, over all resumed attempts that are known.
        created: UTC, ISO 8601.
        reused: it stood already when it was asked for.
    """

    step: str
    key: str
    digest: str
    path: Path
    parents: Mapping[str, str]
    config: Mapping[str, Any]
    seconds: float
    created: str
    reused: bool = False


class Store:
    """The artifacts of one run directory; one process at a time works in it (see `lock`)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def step(
        self,
        name: str,
        *,
        inputs: Mapping[str, Artifact | str],
        config: Mapping[str, Any],
        rooms: Sequence[str],
        build: Callable[[Path, Path], None],
    ) -> Artifact:
        """The artifact of this step: found, or built by `build(folder, work)` and committed.

        Args:
            inputs: artifacts, or digests of outside files, by role.
            config: the settings that the result depends on, as JSON values.
            rooms: packages or modules of `stillroom` whose code the result depends on.
            build: fills `folder`; may keep unfinished state in `work`, which survives a kill.
        """
        digests = {role: value.digest if isinstance(value, Artifact) else value for role, value in inputs.items()}
        key = digest({"step": name, "inputs": digests, "config": config, "code": code_digest(*rooms)})[:_KEY_DIGITS]
        path = self.root / "artifacts" / f"{name}-{key}"
        work = self.root / "work" / f"{name}-{key}"
        if path.is_dir():
            shutil.rmtree(work, ignore_errors=True)
            return read_artifact(path, reused=True)
        work.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with atomic_directory(path) as folder:
            build(folder, work)
            record = {
                "step": name,
                "key": key,
                "parents": {r: v.key if isinstance(v, Artifact) else v for r, v in inputs.items()},
                "config": config,
                "code": code_digest(*rooms),
                "files": _file_digests(folder),
                "seconds": round(time.monotonic() - started, 3),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
        shutil.rmtree(work, ignore_errors=True)
        return read_artifact(path)

    def by_key(self, key: str) -> Artifact | None:
        """The artifact with that key, or None."""
        found = next((self.root / "artifacts").glob(f"*-{key}"), None)
        return read_artifact(found) if found is not None else None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of this run directory.

        Raises:
            ArtifactError: another process works here.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArtifactError(
                    f"another process is working in {self.root}.\nhelp: wait for it, or choose another --out."
                ) from None
            # Half-written directories of a killed process: nobody else can be writing them now.
            for stale in self.root.glob("artifacts/.*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
            yield


def read_artifact(path: str | Path, *, reused: bool = False) -> Artifact:
    """Open a committed artifact.

    Raises:
        ArtifactError: there is none, or its record cannot be read.
    """
    path = Path(path)
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        return Artifact(
            step=record["step"],
            key=record["key"],
            digest=digest(record["files"]),
            path=path,
            parents=record["parents"],
            config=record["config"],
            seconds=record["seconds"],
            created=record["created"],
            reused=reused,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not a readable artifact: {error!r}.\nhelp: delete it and run again.") from None


def verify_artifact(path: str | Path) -> None:
    """Compare every file with the digest written at its making.

    Raises:
        ArtifactError: names the first file that is missing, added or changed.
    """
    path = Path(path)
    written = json.loads((path / RECORD).read_text(encoding="utf-8"))["files"]
    found = _file_digests(path)
    for name in sorted(written.keys() | found.keys()):
        if written.get(name) != found.get(name):
            what = "is missing" if name not in found else "was added" if name not in written else "was changed"
            raise ArtifactError(f"{path}: {name} {what} since it was made.\nhelp: delete the folder and run again.")


def lineage(path: str | Path) -> dict[str, Any]:
    """What made a thing: its artifact's record with every ancestor's, as a tree.

    Args:
        path: an artifact's directory, or anything inside one (links are followed).

    Raises:
        ArtifactError: the path lies in no artifact.
    """
    path = Path(path).resolve()
    home = next((p for p in (path, *path.parents) if (p / RECORD).is_file()), None)
    if home is None:
        what = "lies in no artifact" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {what}.\nhelp: name a path inside a run's artifacts/, or its student/.")
    store = Store(home.parent.parent)
    return _tree(store, read_artifact(home))


def _tree(store: Store, artifact: Artifact) -> dict[str, Any]:
    parents: dict[str, Any] = {}
    for role, key in artifact.parents.items():
        parent = store.by_key(key) if len(key) == _KEY_DIGITS else None
        parents[role] = _tree(store, parent) if parent else key
    return {
        "step": artifact.step,
        "key": artifact.key,
        "path": str(artifact.path),
        "created": artifact.created,
        "seconds": artifact.seconds,
        "config": dict(artifact.config),
        "parents": parents,
    }


@functools.cache
def code_digest(*rooms: str) -> str:
    """Digest of the source of `stillroom.<room>` for each room, templates included."""
    package = Path(__file__).parent
    hasher = hashlib.sha256()
    for room in sorted(rooms):
        found = package / room
        files = sorted(p for p in found.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        for file in files or [found.with_suffix(".py")]:
            hasher.update(f"{file.relative_to(package)}\0".encode())
            hasher.update(file.read_bytes())
    return hasher.hexdigest()[:_KEY_DIGITS]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, or of a directory's names and contents, as hex."""
    path = Path(path)
    if path.is_dir():
        return digest(_file_digests(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_digests(folder: Path) -> dict[str, str]:
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if name != RECORD:
                found[str(file.relative_to(folder))] = file_digest(file)
    return dict(sorted(found.items()))
