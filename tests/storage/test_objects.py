"""Objects of a real S3-compatible server: whole or not at all, and clear words where it is neither."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("boto3")
pytest.importorskip("nanio")

from stillroom.errors import StorageError
from stillroom.storage import ObjectPath, ObjectStore, located
from stillroom.storage.objects import PART_BYTES
from tests.s3_server import free_port

PARTS = 3
BIG = os.urandom(1 << 20) * (PART_BYTES // (1 << 20) * (PARTS - 1)) + b"the rest"


@pytest.fixture
def store() -> ObjectStore:
    return ObjectStore()


@pytest.fixture
def folder(bucket) -> ObjectPath:
    return ObjectPath(bucket.name, "some/run")


def upload(store: ObjectStore, path: ObjectPath, data: bytes = BIG) -> None:
    with store.upload(path, memoryview(data), len(data)) as filling:
        for ready in range(0, len(data), 5_000_000):
            filling.write_until(ready)


@pytest.mark.parametrize("data", [b"", b"little", BIG], ids=["empty", "little", "big"])
def test_what_was_put_is_read_whole_and_by_range(store, folder, data):
    upload(store, folder / "a", data)
    assert store.read(folder / "a") == data
    middle = bytearray(len(data) // 2)
    store.read_into(folder / "a", len(data) // 3, memoryview(middle))
    assert middle == data[len(data) // 3 : len(data) // 3 + len(middle)]
    assert store.unfinished(folder) == []


def test_listing_sees_one_level_or_everything(store, folder):
    for name in ("a", "deep/b", "deep/er/c"):
        store.put(folder / name, name.encode())
    store.put(folder.with_name("run2") / "other", b"")
    assert [entry.path for entry in store.under(folder)] == [folder / "a", folder / "deep/b", folder / "deep/er/c"]
    objects, folders = store.children(folder)
    assert [(entry.path, entry.size_bytes) for entry in objects] == [(folder / "a", 1)]
    assert folders == [folder / "deep"]
    assert all(-2 < entry.age_s < 60 for entry in store.under(folder))


def test_deleting_and_copying(store, folder):
    store.put(folder / "a", b"content")
    store.copy(folder / "a", folder / "b")
    store.delete([folder / "a", folder / "never was"])
    assert (store.read(folder / "a"), store.read(folder / "b")) == (None, b"content")
    store.delete([])


def test_more_objects_than_one_request_lists_or_deletes(s3, bucket, store, folder):
    for number in range(1203):
        path = bucket / "many" / f"{number:04d}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    many = ObjectPath(bucket.name, "many")
    found = store.under(many)
    assert len(found) == 1203
    store.delete(entry.path for entry in found)
    assert store.under(many) == []


def test_throttled_requests_are_made_again(network, store, folder):
    faults = iter(["slow down", None] * 3)
    network.fault = lambda method, path: next(faults, None)
    upload(store, folder / "a")
    assert store.read(folder / "a") == BIG
    assert len(network.requests) == PARTS + 3 + 3


def test_a_failed_upload_leaves_nothing(network, store, folder, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    network.fault = lambda method, path: "refuse" if "partNumber=2" in path else None
    with pytest.raises(StorageError, match="cannot be reached"):
        upload(store, folder / "a")
    assert store.under(folder) == []
    assert store.unfinished(folder) == []


def test_an_upload_that_its_user_gives_up_leaves_nothing(store, folder):
    with pytest.raises(KeyError), store.upload(folder / "a", memoryview(BIG), len(BIG)) as filling:
        filling.write_until(PART_BYTES)
        raise KeyError
    assert store.under(folder) == []
    assert store.unfinished(folder) == []


def test_a_lost_answer_to_the_last_request_is_no_failure(network, store, folder):
    lost = []

    def lose_first(method, path):
        if method == "POST" and "uploadId" in path and not lost:
            lost.append(path)
            return "lose"
        return None

    network.fault = lose_first
    upload(store, folder / "a")
    assert lost
    assert store.read(folder / "a") == BIG


def test_an_answer_that_is_cut_short_goes_on_where_it_broke(network, store, folder):
    store.put(folder / "a", BIG)
    cuts = iter(["cut"] * 3)
    network.fault = lambda method, path: next(cuts, None) if method == "GET" else None
    found = bytearray(len(BIG))
    store.read_into(folder / "a", 0, memoryview(found))
    assert found == BIG
    assert network.sent_bytes < 3 * len(BIG)


def test_an_object_shorter_than_thought_is_said_to_be(store, folder):
    store.put(folder / "a", b"12345")
    with pytest.raises(StorageError, match=r"some/run/a"):
        store.read_into(folder / "a", 3, memoryview(bytearray(10)))
    with pytest.raises(StorageError, match="does not exist"):
        store.read_into(folder / "b", 0, memoryview(bytearray(1)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "stranger"}, r"refuses the credentials.*InvalidAccessKeyId.*\n.*AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, r"refuses the credentials.*SignatureDoesNotMatch.*\n.*AWS_SECRET"),
        ({"AWS_ACCESS_KEY_ID": None}, r"without credentials.*\n.*AWS_PROFILE"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:{free}"}, r"127.0.0.1:\d+/? cannot be reached.*\n.*AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, r"boto3 cannot make a client.*nonsense"),
        ({"AWS_PROFILE": "nobody"}, r"boto3 cannot make a client.*nobody"),
    ],
    ids=["access key", "secret key", "no credentials", "refused connection", "endpoint", "profile"],
)
def test_what_is_configured_wrongly_is_named(store, folder, monkeypatch, change, said):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    for name, value in change.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value.format(free=free_port()))
    for ask in (store.under, store.read, lambda path: store.put(path, b"x")):
        with pytest.raises(StorageError, match=f"(?s){said}"):
            ask(folder)


def test_a_bucket_that_is_missing_is_named(s3, store):
    with pytest.raises(StorageError, match=r"no bucket 'no-such-bucket' at http.*\n.*create it"):
        store.under(ObjectPath("no-such-bucket", "run"))


def test_a_refused_body_does_not_spoil_the_next_request(store, folder):
    with pytest.raises(StorageError, match="no bucket"):
        store.put(ObjectPath("no-such-bucket", "a"), b"content")
    store.put(folder / "a", b"content")
    assert store.read(folder / "a") == b"content"


def test_a_store_that_keeps_throttling_is_named(network, store, folder, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    network.fault = lambda method, path: "slow down"
    with pytest.raises(StorageError, match="SlowDown"):
        store.under(folder)


def test_places():
    assert located("runs/a") == Path("runs/a")
    assert located("s3://bucket/a/b/") == ObjectPath("bucket", "a/b")
    assert located("s3://bucket") == ObjectPath("bucket", "")
    path = ObjectPath("bucket", "")
    assert (str(path), str(path / "a" / "b"), (path / "a/b").parent, (path / "a/b").name) == (
        "s3://bucket", "s3://bucket/a/b", path / "a", "b",
    )  # fmt: skip
    for other in ("gs://bucket/a", "https://host/a", "s3:///a", "s3://bucket/a?b"):
        with pytest.raises(StorageError, match=r"s3://BUCKET/PREFIX"):
            located(other)
