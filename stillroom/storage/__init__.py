"""Bytes with an atomic commit: files on a local or shared file system, objects of an S3-compatible store."""

from stillroom.storage.local import atomic_directory, sync_directory, write_atomic
from stillroom.storage.objects import Entry, ObjectPath, ObjectStore, Unfinished, Upload, located

__all__ = [
    "Entry",
    "ObjectPath",
    "ObjectStore",
    "Unfinished",
    "Upload",
    "atomic_directory",
    "located",
    "sync_directory",
    "write_atomic",
]
