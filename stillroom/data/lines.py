"""Lines of a file, plain or gzip, in memory bounded by the longest line allowed.

Promise: whatever the file holds, at most one line of `line_bytes` and two blocks are held at a time.
A longer line is skipped and reported with its length, and the lines after it are read. Damaged,
cut or explosive compressed data ends the file with a reason, after the lines of the blocks before it.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stillroom.data.contents import refuse_other_than_text
from stillroom.data.reasons import Reason, Reject

BLOCK_BYTES = 1 << 18
EXPANSION_GRACE_BYTES = 16 << 20  # a small file of repeated text may compress beyond any ratio
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK = b" \t\r"
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class TooLong:
    """Stands for a line that was skipped, of this many bytes."""

    size: int

    def __len__(self) -> int:
        return self.size


def lines(path: Path, *, line_bytes: int, expansion_ratio: int) -> Iterator[tuple[int, bytes | TooLong]]:
    """Each line with its number from 1, without its ending (LF or CRLF) and without a leading byte order mark.

    Blank lines are passed over. A line longer than `line_bytes` comes as `TooLong`.

    Raises:
        Reject: the file cannot be opened, is no regular file, its compressed data is unusable, or it is no text.
    """
    number, rest, skipped = 0, b"", 0
    for position, block in enumerate(blocks(path, expansion_ratio=expansion_ratio)):
        if position == 0:
            refuse_other_than_text(block)
            block = block.removeprefix(BYTE_ORDER_MARK)
        *complete, tail = block.split(b"\n")
        if complete:
            complete[0] = rest + complete[0]
            rest = b""
            for line in complete:
                number += 1
                length = skipped + len(line)
                skipped = 0
                if length > line_bytes:
                    yield number, TooLong(length)
                elif line := line.strip(BLANK):
                    yield number, line
        if skipped or len(rest) + len(tail) > line_bytes:
            skipped += len(rest) + len(tail)
            rest = b""
        else:
            rest += tail
    if skipped:
        yield number + 1, TooLong(skipped)
    elif line := rest.strip(BLANK):
        yield number + 1, line


def blocks(path: Path, *, expansion_ratio: int) -> Iterator[bytes]:
    """The file's bytes, expanded where it is gzip (told by its first bytes, not by its name).

    Raises:
        Reject: as `lines`, save that no content is refused.
    """
    with open_regular(path) as file:
        try:
            first = file.read(BLOCK_BYTES)
            if first.startswith(GZIP_MAGIC):
                yield from _expanded(first, file, expansion_ratio)
                return
            while first:
                yield first
                first = file.read(BLOCK_BYTES)
        except OSError as error:
            raise Reject(Reason.UNREADABLE, f"reading failed: {error.strerror}") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; never blocks on a pipe or device.

    Raises:
        Reject: it is not one, or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        reason = Reason.UNREADABLE if isinstance(error, PermissionError) else Reason.NOT_A_FILE
        raise Reject(reason, f"cannot be opened: {error.strerror}") from None
    except ValueError as error:
        raise Reject(Reason.NOT_A_FILE, f"cannot be opened: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Reject(Reason.NOT_A_FILE, "is not a regular file")
    return os.fdopen(descriptor, "rb")


def _expanded(data: bytes, file: BinaryIO, expansion_ratio: int) -> Iterator[bytes]:
    """Expand gzip members one after the other, a block at a time."""
    expander = zlib.decompressobj(wbits=31)
    taken, given = len(data), 0
    while data or not expander.eof:
        if not data and not (data := file.read(BLOCK_BYTES)):
            raise Reject(Reason.TRUNCATED_GZIP, f"the compressed data ends in the middle, after {given} expanded bytes")
        try:
            out = expander.decompress(data, BLOCK_BYTES)
        except zlib.error as error:
            raise Reject(Reason.CORRUPT_GZIP, f"after {given} expanded bytes: {error}") from None
        given += len(out)
        if given > EXPANSION_GRACE_BYTES and given > expansion_ratio * taken:
            message = f"{taken} bytes expand to more than {given}, over {expansion_ratio} times their size"
            raise Reject(Reason.GZIP_BOMB, message)
        if out:
            yield out
        data = expander.unconsumed_tail
        if expander.eof:
            # Zero bytes between or after members are padding (RFC 1952 readers skip them).
            data = expander.unused_data.lstrip(b"\0")
            expander = zlib.decompressobj(wbits=31) if data else expander
        if not data and (data := file.read(BLOCK_BYTES)):
            taken += len(data)
            if expander.eof and (data := data.lstrip(b"\0")):
                expander = zlib.decompressobj(wbits=31)
