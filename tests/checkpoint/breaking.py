"""Breaks file operations of real processes, and says what a power failure would leave of what they did.

`Breaker` compiles `breaking.c` and tells the processes that preload it what to do, while they run. `Disk` replays what
they wrote down: which bytes and names were synced at any moment, and so what a machine finds when it starts again.
"""

from __future__ import annotations

import atexit
import errno
import mmap
import os
import random
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

OPERATIONS = ("open", "write", "sync", "rename", "remove", "mkdir", "truncate", "memory", "exchange", "link")
ACTIONS = {
    "kill": -1, "kill parent": -2, "shorten": -3, "stop": -4, "delay": -5, "kill after": -6, "kill both": -7,
    "EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EINVAL": errno.EINVAL, "ENOMEM": errno.ENOMEM, "EMFILE": errno.EMFILE,
}  # fmt: skip
CONTROL = struct.Struct("<4i2I256s256s")
HITS_AT = 12
EVENT = struct.Struct("<3I2q")
FOREVER = 1 << 30


@lru_cache(maxsize=1)
def library() -> Path | None:
    """`breaking.c`, compiled once for this process; None where no C compiler is."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    folder = tempfile.mkdtemp(prefix="breaking-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = Path(folder) / "breaking.so"
    source = Path(__file__).with_name("breaking.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


class Breaker:
    """What happens to the file operations of every process started with `environment`.

    Attributes:
        environment: for `subprocess`, or for `os.environ` while a process starts others.
    """

    def __init__(self, path: Path) -> None:
        """Uses the control file at `path`, which is made where it is missing."""
        if not path.exists():
            path.write_bytes(bytes(CONTROL.size))
        with path.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), CONTROL.size)
        self._recorded = b""
        self.log = path.with_name(f"{path.name}.log")
        self._path = path

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(library()), "BREAKING": str(self._path)}

    def arm(
        self, action: str, *operations: str, match: str, after: int = 0, times: int = FOREVER, delay_s: float = 0.0
    ) -> None:
        """From now on the operations on paths that contain `match` meet `action`, but the first `after`."""
        mask = sum(1 << OPERATIONS.index(operation) for operation in operations or OPERATIONS)
        self._set(ACTIONS[action], after, times, mask, round(1000 * delay_s), os.fsencode(match))

    def disarm(self) -> None:
        self._set(0, 0, 0, 0, 0, b"")

    @property
    def hits(self) -> int:
        """How often the action happened since it was armed."""
        return int(struct.unpack_from("<i", self._control, HITS_AT)[0])

    def record(self, root: Path | None) -> None:
        """Write down operations on paths under `root` from now on; None ends it."""
        self.log.write_bytes(b"")
        self._recorded = os.fsencode(root) if root else b""
        self.disarm()

    def events(self) -> Iterator[tuple[str, str, str, int, bytes]]:
        """What was written down: operation, path, other path, number, data."""
        raw, at = self.log.read_bytes(), 0
        while at < len(raw):
            operation, path, other, number, length = EVENT.unpack_from(raw, at)
            parts = []
            at += EVENT.size
            for size in (path, other, length):
                parts.append(raw[at : at + size])
                at += size
            yield OPERATIONS[operation], os.fsdecode(parts[0]), os.fsdecode(parts[1]), number, parts[2]

    def _set(self, action: int, after: int, times: int, mask: int, delay_ms: int, match: bytes) -> None:
        CONTROL.pack_into(self._control, 0, 0, after, times, 0, mask, delay_ms, match, self._recorded)
        struct.pack_into("<i", self._control, 0, action)


class File:
    """A file's content: as it is, and what is sure to be there after a power failure."""

    def __init__(self, content: bytes = b"") -> None:
        self.now, self.synced = bytearray(content), bytes(content)
        self.pending: list[tuple[int, bytes | None]] = []

    def write(self, offset: int, data: bytes) -> None:
        _overwrite(self.now, offset, data)
        self.pending.append((offset, data))

    def truncate(self, length: int) -> None:
        _cut(self.now, length)
        self.pending.append((length, None))

    def sync(self) -> None:
        self.synced, self.pending = bytes(self.now), []

    def some(self, draw: random.Random) -> bytes:
        """Of what was not synced, some."""
        content = bytearray(self.synced)
        for offset, data in self.pending:
            if draw.random() < 0.5:
                if data is None:
                    _cut(content, offset)
                else:
                    _overwrite(content, offset, data)
        return bytes(content)


class Folder(dict[str, "File | Folder"]):
    """Names, as they are; `synced` are those that are sure to be there."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: dict[str, File | Folder] = {}

    def sync(self) -> None:
        self.synced = dict(self)


SURVIVALS = ("synced", "names", "removals", "some")


class Disk:
    """A directory tree through a series of events, and what power failure would leave of it after any of them.

    File systems differ in what else than the synced they keep, so there are several survivals:
    `synced`, nothing else; `names`, every change of a name at once but of contents only what was synced; `removals`,
    every removal at once but no other name; `some`, names at once and any of the unsynced writes.
    """

    def __init__(self, root: Path) -> None:
        """Starts from what is under `root` now, all of it durable."""
        self.root = root
        self.tree = _scan(root)

    def follow(self, events: Iterator[tuple[str, str, str, int, bytes]]) -> Iterator[str]:
        """Apply events one by one; yields what was done, after each."""
        for operation, path, other, number, data in events:
            if path.endswith(" (deleted)"):
                continue  # it has no name any more
            getattr(self, f"_{operation}")(path, other, number, data)
            yield f"{operation} {os.path.relpath(path, self.root)}"

    def survivors(self, survival: str, seed: int = 0) -> dict[str, bytes]:
        """The files that survive, by path."""
        return dict(_survivors(self.tree, survival, "", random.Random(seed)))

    def _open(self, path: str, other: str, truncated: int, data: bytes) -> None:
        folder, name = self._find(path)
        file = folder.setdefault(name, File())
        if truncated and isinstance(file, File) and file.now:
            file.truncate(0)

    def _write(self, path: str, other: str, offset: int, data: bytes) -> None:
        self._at(path).write(offset, data)

    def _truncate(self, path: str, other: str, length: int, data: bytes) -> None:
        self._at(path).truncate(length)

    def _sync(self, path: str, other: str, number: int, data: bytes) -> None:
        self._at(path).sync()

    def _rename(self, path: str, other: str, number: int, data: bytes) -> None:
        (folder, name), (target, new) = self._find(path), self._find(other)
        target[new] = folder.pop(name)

    def _exchange(self, path: str, other: str, number: int, data: bytes) -> None:
        (folder, name), (target, new) = self._find(path), self._find(other)
        folder[name], target[new] = target[new], folder[name]

    def _link(self, path: str, other: str, number: int, data: bytes) -> None:
        target, new = self._find(other)
        target[new] = self._at(path)

    def _mkdir(self, path: str, other: str, number: int, data: bytes) -> None:
        folder, name = self._find(path)
        folder[name] = Folder()

    def _remove(self, path: str, other: str, number: int, data: bytes) -> None:
        folder, name = self._find(path)
        del folder[name]

    def _find(self, path: str) -> tuple[Folder, str]:
        node = self.tree
        *way, name = Path(path).relative_to(self.root).parts or ("",)
        for part in way:
            node = node[part]  # type: ignore[assignment]
        return node, name

    def _at(self, path: str) -> File | Folder:
        folder, name = self._find(path)
        return folder[name] if name else folder


def _overwrite(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def _cut(content: bytearray, length: int) -> None:
    content.extend(bytes(max(0, length - len(content))))
    del content[length:]


def _scan(root: Path) -> Folder:
    folder = Folder()
    for entry in root.iterdir():
        folder[entry.name] = _scan(entry) if entry.is_dir() else File(entry.read_bytes())
    folder.sync()
    return folder


def _survivors(folder: Folder, survival: str, way: str, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    names: dict[str, File | Folder] = folder
    if survival == "synced":
        names = folder.synced
    if survival == "removals":
        present = {id(node) for node in folder.values()}
        names = {name: node for name, node in folder.synced.items() if name in folder or id(node) in present}
    for name, node in names.items():
        if isinstance(node, Folder):
            yield from _survivors(node, survival, f"{way}{name}/", draw)
        else:
            yield f"{way}{name}", node.some(draw) if survival == "some" else node.synced


def put(files: dict[str, bytes], root: Path) -> None:
    """Write files under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def assert_tidy(root: Path) -> None:
    """Only checkpoints are left under `root`, in a moment: what was dropped is removed behind the save."""
    for _ in range(500):
        left = [path.name for path in root.glob(".*")]
        if not left:
            return
        time.sleep(0.01)
    raise AssertionError(f"{left} are left in {root}")
