"""What a file is by its first bytes, where it is no UTF-8 text: named once, instead of once for each of its lines."""

from __future__ import annotations

import re

from stillroom.data.reasons import Reason, Reject

SAMPLE_BYTES = 8192
MOST_CONTROL_CHARACTERS = 0.05
"""Share from which a file is no text. A text has none, or a few that were copied in; random bytes have 0.11."""

_CONTROL = bytes(sorted({*range(32), 127} - set(b"\t\n\r\f")))

# How a JSON document begins in these encodings, with a byte order mark and without. Source: RFC 4627, section 3.
_ENCODINGS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"{\0\0\0", "UTF-32LE"),
    (b"\0\0\0{", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"{\0", "UTF-16LE"),
    (b"\0{", "UTF-16BE"),
)
_COMPRESSED = {
    "a zip archive (as spreadsheets and documents are, too)": rb"PK\x03\x04",
    "compressed by bzip2": rb"BZh[1-9]1AY&SY",
    "compressed by xz": rb"\xfd7zXZ\0",
    "compressed by zstd": rb"\x28\xb5\x2f\xfd",
    "compressed by lz4": rb"\x04\x22\x4d\x18",
    "compressed by compress": rb"\x1f\x9d",
    "compressed by gzip twice": rb"\x1f\x8b\x08",
    "framed by snappy": rb"\xff\x06\0\0sNaPpY",
    "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
    "a rar archive": rb"Rar!\x1a\x07",
    "a tar archive": rb".{257}ustar",
}
_BINARY = {"a Parquet file": rb"PAR1", "a PDF document": rb"%PDF-", "a GGUF model": rb"GGUF"}


def refuse_other_than_text(beginning: bytes) -> None:
    """Return where `beginning`, a file's first bytes after gzip, may be lines of UTF-8 text.

    Raises:
        Reject: they are another encoding of text, a compressed file, or no text at all.
    """
    for start, encoding in _ENCODINGS:
        if beginning.startswith(start):
            raise Reject(Reason.OTHER_ENCODING, f"is text in {encoding}")
    for table, reason in ((_COMPRESSED, Reason.OTHER_COMPRESSION), (_BINARY, Reason.NOT_TEXT)):
        for what, pattern in table.items():
            if re.match(pattern, beginning, re.DOTALL):
                raise Reject(reason, f"is {what}")
    sample = beginning[:SAMPLE_BYTES]
    if sample.lstrip().startswith((b"{", b"[")):
        return  # it begins as records do: what a crash left in between costs those lines only
    control = len(sample) - len(sample.translate(None, _CONTROL))
    if control > MOST_CONTROL_CHARACTERS * len(sample):
        raise Reject(Reason.NOT_TEXT, f"has {control} control characters in its first {len(sample)} bytes")
