"""The trainer's end of the writer: started early, watched, and started again when it dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from stillroom.checkpoint.arena import Arena
from stillroom.checkpoint.disk import crc32
from stillroom.errors import CheckpointError
from stillroom.telemetry import note

PACKAGES = str(Path(__file__).parents[2])
TRIES = 3
"""How often a request is made before a writer that keeps dying is an error."""


class WriterDied(Exception):
    """The connection ended before the reply came."""


class Daemon:
    """A writer process for one `Checkpointer`. Requests may be repeated safely: each has the same effect twice.

    Args:
        program: what Python runs, see `roots.py`.
        timeout_s: how long a request may take.
    """

    def __init__(self, program: Sequence[str], timeout_s: float) -> None:
        self._program, self._timeout_s = program, timeout_s
        self._lock = threading.Lock()
        self._arenas: dict[int, Arena] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._closed = False
        _announce_slow_checksums()
        self._start()

    @property
    def pid(self) -> int | None:
        """Of the writer that is running; None where none is."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def share(self, arena: Arena) -> None:
        """Let the writer map an arena, now and whenever it is started again.

        Raises:
            CheckpointError: it could not, or did not reply in time.
        """
        with self._lock:
            self._arenas[arena.id] = arena
            with contextlib.suppress(WriterDied):
                self._send_arena(arena)

    def forget(self, arena: Arena) -> None:
        """Let go of an arena, so that its memory can be freed."""
        with self._lock:
            del self._arenas[arena.id]
            with contextlib.suppress(WriterDied, CheckpointError):
                self._exchange({"op": "arena", "id": arena.id, "bytes": 0}, arena.descriptor)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make a request; what the writer replied.

        Raises:
            CheckpointError: it replied with an error, kept dying, or did not reply in time.
        """
        with self._lock:
            for attempt in range(TRIES):
                try:
                    if self._process is None or self._process.poll() is not None or attempt:
                        self._restart()
                    reply = self._exchange(request)
                    break
                except WriterDied:
                    continue
            else:
                raise CheckpointError(
                    f"the checkpoint writer ended {TRIES} times during `{request['op']}` of "
                    f"{request.get('final') or request.get('folder') or ''}.\nhelp: look for the kernel's reasons "
                    "(`dmesg`, memory limits of the container); the checkpoints before are intact."
                )
        return _checked(reply)

    def close(self) -> None:
        """End the writer."""
        with self._lock:
            self._closed = True
            self._stop()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            found = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                [sys.executable, "-P", *self._program, str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": found},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the trainer, which then ends the writer in order
            )
        self._connection, self._unread = ours, b""

    def _restart(self) -> None:
        if self._closed:
            raise CheckpointError("this Checkpointer is closed.\nhelp: open another for the same root.")
        self._stop()
        self._start()
        for arena in self._arenas.values():
            self._send_arena(arena)

    def _stop(self, at_once: bool = False) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            if at_once:
                self._process.kill()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._connection = self._process = None

    def _send_arena(self, arena: Arena) -> None:
        request = {"op": "arena", "id": arena.id, "bytes": arena.size_bytes}
        _checked(self._exchange(request, arena.descriptor))

    def _exchange(self, request: dict[str, Any], descriptor: int | None = None) -> dict[str, Any]:
        connection = self._connection
        if connection is None:
            raise WriterDied
        try:
            connection.settimeout(self._timeout_s)
            message = json.dumps(request).encode() + b"\n"
            if descriptor is not None:
                socket.send_fds(connection, [message], [descriptor])
            else:
                connection.sendall(message)
            while b"\n" not in self._unread:
                data = connection.recv(1 << 16)
                if not data:
                    raise WriterDied
                self._unread += data
        except TimeoutError:
            self._stop(at_once=True)
            raise CheckpointError(
                f"the checkpoint writer did not finish `{request['op']}` within {self._timeout_s:g} s.\n"
                "help: the disk or the network may hang; raise `timeout_s` of CheckpointConfig if it is only slow."
            ) from None
        except OSError as error:
            raise WriterDied from error
        line, self._unread = self._unread.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply


@lru_cache(maxsize=1)
def _announce_slow_checksums() -> None:
    if crc32 is zlib.crc32:
        note("checksums of checkpoints are made by zlib, which takes several times the CPU of ISA-L: pip install isal")


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
    if "error" in reply:
        said = reply["error"]
        raise CheckpointError(said if "\nhelp: " in said else f"{said}\nhelp: {_advice(reply.get('errno'))}")
    return reply


def _advice(number: int | None) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free disk space or choose another directory; the checkpoints before are intact."
    if number is not None:
        return f"({os.strerror(number)}) check the disk and the directory; the checkpoints before are intact."
    return "the checkpoints before are intact."
