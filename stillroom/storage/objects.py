"""Objects of an S3-compatible store.

Promise: an object appears whole or not at all. Every request is repeated while the store cannot be reached, fails or
throttles, and what still goes wrong is a `StorageError` that says what to do.

They go through boto3 (the extra `s3`), which is imported when the first one is asked for. Endpoint, region,
credentials, certificates and addressing are what boto3 is configured with (`AWS_ENDPOINT_URL`, `~/.aws/config`,
instance roles, ...): nothing is sent anywhere else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from stillroom.errors import StorageError

PART_BYTES = 16 << 20
"""Bytes of an object that are sent or fetched by one request; the service wants 5 MiB at least but for the last."""

MAX_PARTS = 10_000
DELETED_AT_ONCE = 1000
TRIES = 10
"""How often a request is made while the store cannot be reached, fails or throttles, with growing pauses: about a
minute in all. `AWS_MAX_ATTEMPTS` and boto3's configuration file have precedence."""

NEEDED = "s3:ListBucket, GetObject, PutObject, DeleteObject, AbortMultipartUpload and ListBucketMultipartUploads"
REFUSED = {
    "401", "403", "AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class ObjectPath:
    """The name of an object, or of what stands before a `/` in the names of several; parts as `pathlib` calls them."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.bucket, self.prefix + name)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    @property
    def prefix(self) -> str:
        """What the keys under it begin with."""
        return f"{self.key}/" if self.key else ""

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name


def located(where: str | Path | ObjectPath) -> Path | ObjectPath:
    """A local path as `Path`, `s3://bucket/key` as `ObjectPath`.

    Raises:
        StorageError: it is a URL of another kind, or names no bucket.
    """
    if isinstance(where, ObjectPath) or "://" not in str(where):
        return where if isinstance(where, ObjectPath) else Path(where)
    url = urlsplit(str(where))
    if url.scheme != "s3" or not url.netloc or url.query or url.fragment:
        raise StorageError(
            f"{where} is not a place that can be written to.\nhelp: give a local path, or s3://BUCKET/PREFIX."
        )
    return ObjectPath(url.netloc, url.path.strip("/"))


class Entry(NamedTuple):
    """An object as a listing shows it; its age is by the store's own clock."""

    path: ObjectPath
    size_bytes: int
    age_s: float


class Unfinished(NamedTuple):
    """A multipart upload that was begun and neither completed nor aborted."""

    path: ObjectPath
    upload_id: str
    age_s: float


class ObjectStore:
    """The objects that boto3's configuration leads to; may be used by many threads.

    Every request is repeated while the store cannot be reached or throttles, see `TRIES`.

    Args:
        parallel: requests at a time for one large object; each holds `PART_BYTES` in memory.

    Raises:
        StorageError: (every method) the store refuses, does not answer, or lacks the bucket; it says what to do.
    """

    def __init__(self, parallel: int = 8) -> None:
        self.parallel = parallel

    def read(self, path: ObjectPath) -> bytes | None:
        """A small object; None where there is none."""
        for attempt in range(TRIES):
            try:
                with self._explained(path):
                    response = self._client.get_object(Bucket=path.bucket, Key=path.key)
                    return bytes(response["Body"].read())
            except _Missing:
                return None
            except _CutShort:
                if attempt == TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def read_into(self, path: ObjectPath, begin: int, view: memoryview) -> None:
        """Fill `view` from the object's bytes at `begin`; a connection that is lost goes on where it broke."""
        done = attempt = 0
        while done < len(view):
            try:
                with self._explained(path):
                    wanted = f"bytes={begin + done}-{begin + len(view) - 1}"
                    body = self._client.get_object(Bucket=path.bucket, Key=path.key, Range=wanted)["Body"]
                    while got := body.readinto(view[done:]):
                        done, attempt = done + got, 0
            except _Missing as error:
                raise StorageError(f"{path} does not exist.") from error
            except _CutShort:
                attempt += 1
                if attempt == TRIES:
                    raise
                continue
            if done < len(view):
                raise StorageError(f"{path} ends at byte {begin + done:,}; {begin + len(view):,} were expected.")

    def put(self, path: ObjectPath, data: bytes) -> None:
        """Write a small object."""
        with self._explained(path):
            self._client.put_object(Bucket=path.bucket, Key=path.key, Body=data)

    @contextlib.contextmanager
    def upload(self, path: ObjectPath, memory: memoryview, size_bytes: int) -> Iterator[Upload]:
        """An object to be filled from the first `size_bytes` of `memory`: complete at the end, aborted by an error."""
        upload = Upload(self, path, memory, size_bytes)
        try:
            yield upload
            upload.complete()
        except BaseException:
            with contextlib.suppress(StorageError):  # parts that stay are aborted by whoever sweeps
                upload.abort()
            raise

    def copy(self, source: ObjectPath, target: ObjectPath) -> None:
        """Copy an object of any size within the store, without its bytes passing through here."""
        with self._explained(source):
            self._client.copy({"Bucket": source.bucket, "Key": source.key}, target.bucket, target.key)

    def under(self, folder: ObjectPath) -> list[Entry]:
        """All objects whose names begin with `folder/`."""
        return self._list(folder)[0]

    def children(self, folder: ObjectPath) -> tuple[list[Entry], list[ObjectPath]]:
        """The objects right under `folder/`, and the folders there."""
        return self._list(folder, Delimiter="/")

    def delete(self, paths: Iterable[ObjectPath]) -> None:
        """Delete objects of one bucket; those that do not exist count as deleted."""
        names = list(paths)
        for first in range(0, len(names), DELETED_AT_ONCE):
            some = names[first : first + DELETED_AT_ONCE]
            with self._explained(some[0]):
                request = {"Objects": [{"Key": path.key} for path in some], "Quiet": True}
                response = self._client.delete_objects(Bucket=some[0].bucket, Delete=request)
            for failed in response.get("Errors", []):
                raise StorageError(
                    f"s3://{some[0].bucket}/{failed.get('Key')} could not be deleted: "
                    f"{failed.get('Code')} {failed.get('Message')}.\nhelp: the credentials need {NEEDED}."
                )

    def unfinished(self, folder: ObjectPath) -> list[Unfinished]:
        """Multipart uploads under way, or left by a crash, of objects whose names begin with `folder/`."""
        found = []
        with self._explained(folder):
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=folder.bucket, Prefix=folder.prefix):
                for upload in page.get("Uploads", []):
                    if upload["Key"].startswith(folder.prefix):  # some servers do not filter
                        path = ObjectPath(folder.bucket, upload["Key"])
                        found.append(Unfinished(path, upload["UploadId"], _age_s(page, upload["Initiated"])))
        return found

    def abort(self, path: ObjectPath, upload_id: str) -> None:
        """Give up a multipart upload and its parts; one that is gone already counts as given up."""
        with contextlib.suppress(_Missing), self._explained(path):
            self._client.abort_multipart_upload(Bucket=path.bucket, Key=path.key, UploadId=upload_id)

    def _list(self, folder: ObjectPath, **options: str) -> tuple[list[Entry], list[ObjectPath]]:
        entries, folders = [], []
        with self._explained(folder):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=folder.bucket, Prefix=folder.prefix, **options):
                for found in page.get("Contents", []):
                    path = ObjectPath(folder.bucket, found["Key"])
                    entries.append(Entry(path, found["Size"], _age_s(page, found["LastModified"])))
                for found in page.get("CommonPrefixes", []):
                    folders.append(ObjectPath(folder.bucket, found["Prefix"].rstrip("/")))
        return entries, folders

    @property
    def _client(self) -> Any:
        configured = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        return _client(self.parallel, configured)

    @contextlib.contextmanager
    def _explained(self, path: ObjectPath) -> Iterator[None]:
        """Turn what boto3 raises into `StorageError` with advice, `_Missing` or `_CutShort`."""
        endpoint = self._client.meta.endpoint_url
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            raise _refusal(path, endpoint, error) from error
        except BotoCoreError as error:
            raise _failure(path, endpoint, error) from error


class Upload:
    """One object on its way: parts go up in parallel while later ones are not yet final. Nobody sees it before the end.

    Args:
        memory: what the object is filled from; must not change before `ready`, see `write_until`.
        size_bytes: of the object, which is the beginning of `memory`.
    """

    def __init__(self, store: ObjectStore, path: ObjectPath, memory: memoryview, size_bytes: int) -> None:
        self._store, self._path, self._memory, self._size = store, path, memory, size_bytes
        self._part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))
        self._handed, self._given_up = 0, False
        self._parts: list[Future[dict[str, Any]]] = []
        self._id: str | None = None
        if size_bytes > self._part_bytes:
            with store._explained(path):
                self._id = store._client.create_multipart_upload(**self._name)["UploadId"]
            self._pool = ThreadPoolExecutor(store.parallel, thread_name_prefix="upload")

    def write_until(self, ready: int, last: bool = False) -> None:
        """Send whole parts that lie before `ready`, all of it if it is the `last`; raises what went wrong before."""
        for part in self._parts:
            if part.done():
                part.result()
        while self._id and ready - self._handed >= self._part_bytes:
            self._hand_over(self._handed + self._part_bytes)
        if self._id and last and self._handed < ready:
            self._hand_over(ready)

    def complete(self) -> None:
        """Send what is left, wait for all of it, make the object appear."""
        if self._id is None:
            self._store.put(self._path, bytes(self._memory[: self._size]))
            return
        if self._handed < self._size:
            self._hand_over(self._size)
        parts = [part.result() for part in self._parts]
        self._pool.shutdown()
        try:
            with self._store._explained(self._path):
                self._store._client.complete_multipart_upload(
                    **self._name, UploadId=self._id, MultipartUpload={"Parts": parts}
                )
        except _Missing:
            # The answer to an earlier try may have been lost: then the upload is gone, and the object is there.
            sizes = {entry.path: entry.size_bytes for entry in self._store.under(self._path.parent)}
            if sizes.get(self._path) != self._size:
                raise

    def abort(self) -> None:
        """Give it up, from any thread; parts under way end first, so that none is left behind."""
        self._given_up = True
        if self._id is not None:
            self._pool.shutdown(cancel_futures=True)
            self._store.abort(self._path, self._id)

    @property
    def _name(self) -> dict[str, str]:
        return {"Bucket": self._path.bucket, "Key": self._path.key}

    def _hand_over(self, end: int) -> None:
        self._parts.append(self._pool.submit(self._send, len(self._parts) + 1, self._handed, end))
        self._handed = end

    def _send(self, number: int, begin: int, end: int) -> dict[str, Any]:
        if self._given_up:
            raise StorageError(f"the upload of {self._path} was given up.")
        with self._store._explained(self._path):
            # boto3 takes no memoryview. This copy of a part is the only one, and as many exist as parts are sent.
            body = bytes(self._memory[begin:end])
            sent = self._store._client.upload_part(**self._name, UploadId=self._id, PartNumber=number, Body=body)
        return {"PartNumber": number, "ETag": sent["ETag"]}


@lru_cache(maxsize=8)
def _client(parallel: int, configured: tuple[tuple[str, str], ...]) -> Any:
    """A client for the environment `configured`, made once: that takes a fifth of a second."""
    try:
        import boto3
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise StorageError("s3:// needs boto3.\nhelp: pip install 'stillroom[s3]'") from error
    try:
        session = botocore.session.get_session()
        options = Config(
            max_pool_connections=4 * parallel,
            connect_timeout=10,
            read_timeout=60,
            retries=None
            if session.get_config_variable("max_attempts")
            else {"mode": "standard", "total_max_attempts": TRIES},
        )
        client = boto3.Session(botocore_session=session).client("s3", config=options)
    except (BotoCoreError, ValueError) as error:
        raise StorageError(f"boto3 cannot make a client: {error}.\nhelp: check its configuration.") from error
    client.meta.events.register("before-send.s3", _expect_nothing)
    return client


def _expect_nothing(request: Any, **_: Any) -> None:
    """Send bodies at once: where a store refuses a request whose body waits for its consent, and keeps the connection,
    botocore takes what follows for something else (https://github.com/boto/botocore/issues/3755).
    """
    request.headers.pop("Expect", None)


class _Missing(StorageError):
    """There is no such object or upload."""


class _CutShort(StorageError):
    """A response ended early; the request can be made again."""


def _refusal(path: ObjectPath, endpoint: str, error: Any) -> StorageError:
    """What the store's answer means, from a `ClientError`."""
    answer = error.response.get("Error", {})
    code, said = str(answer.get("Code", "")), answer.get("Message") or "no message"
    if code in ("NoSuchKey", "NoSuchUpload", "404"):
        return _Missing(f"{path} does not exist.")
    if code == "NoSuchBucket":
        return StorageError(
            f"there is no bucket {path.bucket!r} at {endpoint}.\n"
            "help: create it, or correct the URL; AWS_ENDPOINT_URL says which store is meant."
        )
    if code in REFUSED:
        return StorageError(
            f"{endpoint} refuses the credentials for {path}: {code}: {said}.\n"
            f"help: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; they need {NEEDED}."
        )
    return StorageError(f"{endpoint} refuses {error.operation_name} of {path}: {code}: {said}.")


def _failure(path: ObjectPath, endpoint: str, error: Any) -> StorageError:
    """Why there is no answer, from a `BotoCoreError`."""
    from botocore import exceptions as boto

    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)):
        return StorageError(
            f"{path} cannot be used without credentials: {error}.\n"
            "help: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or whatever else boto3 reads."
        )
    unreachable = (
        f"{endpoint} cannot be reached for {path}: {error}\n"
        "help: check the network and AWS_ENDPOINT_URL, which says which store is meant."
    )
    if isinstance(error, (boto.ResponseStreamingError, boto.IncompleteReadError, boto.ReadTimeoutError)):
        return _CutShort(unreachable)
    if isinstance(error, (boto.ConnectionError, boto.HTTPClientError)):
        return StorageError(unreachable)
    return StorageError(f"{path} cannot be used: {error}\nhelp: check the URL and boto3's configuration.")


def _age_s(response: dict[str, Any], when: datetime) -> float:
    """Seconds since `when` by the clock of the server that said so: ours may differ."""
    now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
    return (now - when).total_seconds()
