"""Where the checkpoints of one run lie, and which of them are committed: a directory, or a prefix of an object store.

A directory commits by a rename. An object store has none, so there a commit is one more object, written last:

    s3://bucket/root/
    ├── step-00000400.json           committed: a copy of `checkpoint.json`; its token names the generation
    ├── step-00000400.9f31c2aa-7/    that generation: the same files as in a directory, which copy to one
    └── step-00000500.9f31c2aa-8/    being written, or left by a crash: invisible, since no object names it

Every save of a step has a generation of its own, so one that replaces another never mixes with it. Free of torch:
the writer for object stores uses it too.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from stillroom.checkpoint import writer
from stillroom.checkpoint.writer import RECORD, temporary_name
from stillroom.errors import CheckpointError, StorageError
from stillroom.storage import ObjectPath, ObjectStore, located

STEP_NAME = re.compile(r"step-(\d{8,})")
COMMIT_NAME = re.compile(r"step-(\d{8,})\.json")
ASIDE = ".damaged"

Where = Path | ObjectPath


class Root(Protocol):
    """What a `Checkpointer` needs to know of a place; paths are of the place's own kind."""

    where: Any
    program: Sequence[str]
    """How Python starts the writer that can write there."""

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, in any order; `CheckpointError` where the place cannot be reached."""

    def restore(self) -> None:
        """Put back what a crash may have left moved aside."""

    def unfinished(self, final: Any, token: str, number: int) -> Any:
        """What the checkpoint `final` is called while it is being written."""

    def identity(self, final: Any) -> Any:
        """Differs once the checkpoint has been removed or replaced; where readers see that themselves, it need not."""

    def record(self, final: Any) -> dict[str, Any] | None:
        """What `checkpoint.json` of a committed checkpoint says; None where it cannot be read."""

    def content(self, final: Any) -> tuple[Any, int]:
        """The folder that holds the files of a committed checkpoint, and their bytes; 0 where they are gone."""

    def set_aside(self, final: Any) -> Any:
        """Make it invisible, but keep it; where it is now."""


class Directory:
    """Checkpoints in a local or shared file system."""

    program = (writer.__file__,)

    def __init__(self, where: Path) -> None:
        self.where = where

    def steps(self) -> list[int]:
        if not self.where.is_dir():
            return []
        matches = (STEP_NAME.fullmatch(path.name) for path in self.where.iterdir())
        return [int(match[1]) for match in matches if match]

    def restore(self) -> None:
        writer.restore(str(self.where))

    def unfinished(self, final: Path, token: str, number: int) -> Path:
        return final.with_name(temporary_name(final.name, token, number))

    def identity(self, final: Path) -> int | None:
        try:
            return final.stat().st_ino
        except FileNotFoundError:
            return None

    def record(self, final: Path) -> dict[str, Any] | None:
        try:
            return parse_record((final / RECORD).read_bytes())
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def content(self, final: Path) -> tuple[Path, int]:
        try:
            return final, sum(file.stat().st_size for file in final.iterdir())
        except FileNotFoundError:  # retention on another rank may be ahead
            return final, 0

    def set_aside(self, final: Path) -> Path:
        aside = final.with_name(final.name + ASIDE)
        if aside.exists():
            shutil.rmtree(aside)
        return final.rename(aside)


class Objects:
    """Checkpoints under a prefix of an object store."""

    program = ("-m", "stillroom.checkpoint.remote")

    def __init__(self, where: ObjectPath) -> None:
        self.where = where
        self.store = ObjectStore()

    def steps(self) -> list[int]:
        with explained():
            objects, _ = self.store.children(self.where)
        matches = (COMMIT_NAME.fullmatch(entry.path.name) for entry in objects)
        return [int(match[1]) for match in matches if match]

    def restore(self) -> None:
        """Nothing is ever moved."""

    def unfinished(self, final: ObjectPath, token: str, number: int) -> ObjectPath:
        return final.with_name(f"{final.name}.{token}-{number}")

    def identity(self, final: ObjectPath) -> None:
        """`ObjectFiles` sees it."""

    def record(self, final: ObjectPath) -> dict[str, Any] | None:
        with explained():
            raw = self.store.read(commit_of(final))
        try:
            return None if raw is None else parse_record(raw)
        except (ValueError, KeyError, TypeError):
            return None

    def content(self, final: ObjectPath) -> tuple[ObjectPath, int]:
        folder = generation_of(final, self.record(final))
        with explained():
            return folder, sum(entry.size_bytes for entry in self.store.under(folder))

    def set_aside(self, final: ObjectPath) -> ObjectPath:
        record, aside = self.record(final), commit_of(final.with_name(final.name + ASIDE))
        with explained():
            self.store.copy(commit_of(final), aside)
            self.store.delete([commit_of(final)])
        return generation_of(final, record) if record else aside


def root_of(where: str | Path | ObjectPath) -> Directory | Objects:
    """The kind of place that `where` names.

    Raises:
        CheckpointError: it is of no known kind.
    """
    with explained():
        place = located(where)
    return Objects(place) if isinstance(place, ObjectPath) else Directory(place)


def commit_of(final: ObjectPath) -> ObjectPath:
    """The object that makes the checkpoint `final` a committed one."""
    return final.with_name(f"{final.name}.json")


def generation_of(final: ObjectPath, record: dict[str, Any] | None) -> ObjectPath:
    """The folder that a commit names; `final` itself where there is no commit, such as a copied directory."""
    return final.with_name(record["token"]) if record else final


@contextmanager
def explained() -> Iterator[None]:
    """Whoever uses checkpoints hears of `CheckpointError` only."""
    try:
        yield
    except StorageError as error:
        raise CheckpointError(str(error)) from error


def parse_record(raw: bytes) -> dict[str, Any]:
    """The content of `checkpoint.json`.

    Raises:
        ValueError: it does not match its checksum.
    """
    whole = json.loads(raw)
    record: dict[str, Any] = whole["record"]
    if format_record(record) != raw.decode():
        raise ValueError("checksum")
    return record


def format_record(record: dict[str, Any]) -> str:
    """`record` with its CRC32, as `checkpoint.json` holds it."""
    text = json.dumps(record, sort_keys=True)
    return json.dumps({"record": json.loads(text), "crc32": zlib.crc32(text.encode())}, sort_keys=True) + "\n"
