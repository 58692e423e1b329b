"""Checkpoints on an S3-compatible server: the promises of a directory, where nothing can be renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("boto3")
pytest.importorskip("nanio")

import torch
import torch.distributed.checkpoint as stock
from typer.testing import CliRunner

from stillroom.checkpoint import CheckpointConfig, Checkpointer, dcp
from stillroom.checkpoint.reading import Snapshot
from stillroom.cli import app
from stillroom.errors import CheckpointCorrupt, CheckpointError
from stillroom.storage import ObjectStore, located
from stillroom.storage.objects import PART_BYTES
from tests.checkpoint.states import assert_same, tiny_state
from tests.conftest import configure_s3
from tests.s3_server import Server, free_port

# stock DCP says so on every call
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LARGE = PART_BYTES // 4 * 2 + 1000
"""Floats that make a file of three parts."""

REQUESTS = 20
"""More than a save of one rank that replaces a step makes."""


@pytest.fixture
def root(bucket) -> str:
    return f"s3://{bucket.name}/run/checkpoints"


@pytest.fixture
def opened(root):
    with Checkpointer(root, config=CheckpointConfig(keep_latest=3)) as checkpointer:
        yield checkpointer


def loaded(where, **options):
    into: dict = {}
    info = where.load(into, **options)
    return info, into


def test_a_state_comes_back_bit_for_bit(opened, bucket):
    assert opened.steps() == []
    assert opened.load(into={}) is None
    for step in (5, 10):
        info = opened.save(step, tiny_state(step), metrics={"loss": 1 / step}).result()
    assert opened.steps() == [5, 10]
    assert info.metrics == {"loss": 0.1}
    assert info.path == opened.path_of()
    assert info.size_bytes == sum(path.stat().st_size for path in (bucket / info.path.key).iterdir())
    assert_same(loaded(opened)[1], tiny_state(10))
    assert_same(loaded(opened, step=5)[1], tiny_state(5))
    assert opened.verify(10) == []


def test_a_copied_generation_is_a_checkpoint_for_stock_dcp_and_for_us(opened, bucket, tmp_path):
    state = {"w": torch.randn(30, 40), "step": 3}
    folder = opened.save(1, state).result().path
    shutil.copytree(bucket / folder.key, tmp_path / "step-00000001")  # what `aws s3 cp --recursive` would do
    into = {"w": torch.zeros(30, 40), "step": 0}
    stock.load(into, checkpoint_id=tmp_path / "step-00000001")
    assert_same(into, state)
    assert_same(loaded(Checkpointer(tmp_path))[1], state)


def test_a_directory_copied_to_the_store_is_read_there(bucket, tmp_path):
    state = {"w": torch.randn(30, 40)}
    for save, name in ((stock.save, "stock"), (dcp.save, "ours")):
        save(state, checkpoint_id=tmp_path / name)
        shutil.copytree(tmp_path / name, bucket / "copied" / name)
        into = {"w": torch.zeros(30, 40)}
        dcp.load(into, checkpoint_id=f"s3://{bucket.name}/copied/{name}")
        assert_same(into, state)


def test_the_drop_in_takes_urls(bucket):
    state = {"w": torch.randn(30, 40), "step": 3}
    url = f"s3://{bucket.name}/runs/a/step-100"
    dcp.async_save(state, checkpoint_id=url).result()
    state["w"] += 1
    dcp.save(state, checkpoint_id=url)
    into = {"w": torch.zeros(30, 40), "step": 0}
    dcp.load(into, checkpoint_id=url)
    assert_same(into, state)
    assert len(list((bucket / "runs/a").glob("step-100.*/"))) == 1


def test_retention_leaves_nothing_of_what_goes(root, bucket):
    policy = CheckpointConfig(keep_latest=1, keep_best=1, best_metric="loss")
    with Checkpointer(root, config=policy) as checkpointer:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
            checkpointer.save(step, {"a": torch.ones(3)}, metrics={"loss": loss}).result()
        assert checkpointer.steps() == [2, 4]
    generations = {path.name.split(".")[0] for path in (bucket / "run/checkpoints").iterdir() if path.is_dir()}
    assert generations == {"step-00000002", "step-00000004"}


def test_large_files_go_up_in_parts_and_come_down_by_range(network, root):
    whole = torch.randn(LARGE // 1000, 1000)
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, {"other": torch.randn(1_000_000), "w": whole}).result()
        assert sum("partNumber" in path for _, path in network.requests) == 3
        assert_same(loaded(checkpointer)[1]["w"], whole)
        snapshot = Snapshot(f"{root}/step-00000001")
        [piece] = snapshot.tensors["w"].pieces
        network.sent_bytes, needed = 0, 1000 * 1000 * 4
        assert torch.equal(snapshot.piece("w", piece, (3000, 4000)), whole[3000:4000])
        assert needed < network.sent_bytes < 1.1 * needed


def test_many_small_tensors_come_in_few_requests(network, root):
    state = {"layers": [torch.randn(100) for _ in range(500)], "unwanted": torch.randn(2_000_000)}
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, state).result()
        network.requests.clear()
        network.sent_bytes = 0
        assert_same(loaded(checkpointer, keys=["layers"])[1]["layers"], state["layers"])
        assert len(network.requests) < 12
        assert network.sent_bytes < 1_000_000


def test_what_stays_the_same_is_copied_within_the_store(network, root):
    state = {"base": torch.randn(500_000), "w": torch.randn(10)}
    for step in (1, 2):  # each time as after a resume
        with Checkpointer(root, like=state, frozen=["base"], config=CheckpointConfig(keep_latest=1)) as checkpointer:
            before = network.received_bytes
            checkpointer.save(step, state).result()
            assert (network.received_bytes - before > 2_000_000) == (step == 1)
            assert checkpointer.steps() == [step]
            assert checkpointer.verify(step) == []
            assert_same(loaded(checkpointer)[1], state)


def test_several_ranks(bucket, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CHECKPOINTS": f"s3://{bucket.name}/ranks"}
    command = [
        sys.executable, "-W", "ignore", "-m", "tests.checkpoint.ranks", str(tmp_path), "2", "ranks", "object_store",
    ]  # fmt: skip
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], timeout=100, check=True)
    failures = [path.read_text() for path in sorted(tmp_path.glob("*.failed"))]
    assert not failures, "\n".join(failures)
    assert len(list(tmp_path.glob("*.passed"))) == 2


@pytest.fixture(scope="module")
def saved(s3_server):
    """The objects of steps 10 and 20, to be copied and damaged."""
    folder = s3_server.make_bucket("saved")
    with pytest.MonkeyPatch.context() as patch:
        configure_s3(patch, s3_server.url)
        with Checkpointer("s3://saved/run") as checkpointer:
            checkpointer.save(10, tiny_state(1)).result()
            checkpointer.save(20, tiny_state(2)).result()
    return folder / "run"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=() if damage == "flip" or "distcp" in name else pytest.mark.slow)
        for name in ("__0_0.distcp", "__0_0.checksums", ".metadata", "checkpoint.json", "commit")
        for damage in ("flip", "cut", "remove")
    ],
)
def test_damage_is_found_and_named_before_anything_is_copied(saved, bucket, name, damage):
    shutil.copytree(saved, bucket / "run")
    opened = Checkpointer(f"s3://{bucket.name}/run")
    path = bucket / opened.path_of(20).key / name if name != "commit" else bucket / "run" / "step-00000020.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data[: -3 if damage == "cut" else None])
    if damage == "remove":
        path.unlink()
    if (name, damage) == ("commit", "remove"):
        assert opened.steps() == [10]
        return
    into = tiny_state(3)
    with pytest.raises(CheckpointCorrupt, match=r"step 20 in s3://.*damaged.*\n.*verify s3://"):
        opened.load(into=into)
    assert_same(into, tiny_state(3))
    assert opened.verify(20)
    assert str(opened.set_aside(20)).startswith("s3://")
    assert opened.load(into=into).step == 10
    assert_same(into, tiny_state(1))


def test_the_damaged_item_is_named(opened, bucket):
    folder = opened.save(1, {"good": torch.randn(100), "bad": torch.randn(200_000)}).result().path
    piece = Snapshot(folder).tensors["bad"].pieces[0]
    with (bucket / folder.key / piece.file).open("r+b") as file:
        file.seek(piece.offset + 400_000)
        file.write(b"\xff\xff\xff")
    assert opened.verify(1) == [line for line in opened.verify(1) if "'bad'" in line] != []
    with pytest.raises(CheckpointCorrupt, match=r"'bad' in __0_0\.distcp"):
        opened.load(into={})
    assert opened.load(into={}, keys=["good"]).step == 1


def test_a_step_that_is_replaced_while_it_is_read_is_said_to_be(opened):
    opened.save(1, tiny_state(1)).result()
    reader = Snapshot(f"{opened.root}/step-00000001")
    opened.save(1, tiny_state(2)).result()
    with pytest.raises(CheckpointError, match="replaced or removed while it was read") as caught:
        reader.piece("blocks", reader.tensors["blocks"].pieces[0])
    assert not isinstance(caught.value, CheckpointCorrupt)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_connection_that_ends_at_any_request_leaves_the_old_or_the_new(network, root, monkeypatch, stride):
    """Promise 7: never a mixture of what the step was and what it was to be."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    outcomes = []
    with Checkpointer(root) as checkpointer:
        for survived in range(0, REQUESTS + 1, stride):
            old, new = (
                {"a": torch.full((50,), n), "b": torch.full((9,), n)} for n in (2.0 * survived, 2.0 * survived + 1)
            )
            checkpointer.save(1, old).result()
            last = len(network.requests) + survived
            network.fault = lambda method, path, last=last: "refuse" if len(network.requests) > last else None
            save = checkpointer.save(1, new)
            try:
                save.result()
                outcomes.append("committed")
            except CheckpointError:
                outcomes.append("failed")
            network.fault = lambda method, path: None
            found = loaded(checkpointer)[1]
            assert_same(found, new if found["a"][0] == new["a"][0] else old)
            assert outcomes[-1] == "failed" or found["a"][0] == new["a"][0]
            assert checkpointer.verify(1) == []
    assert outcomes[0] == "failed"
    assert outcomes[-1] == "committed"


TRAINER = """
import json, os, sys, torch
from stillroom.checkpoint import Checkpointer

for line in sys.stdin:  # torch is imported once, each trainer is a fork
    environment, root, floats = json.loads(line)
    if (child := os.fork()) == 0:
        os.environ.update(environment)
        checkpointer = Checkpointer(root)
        save = checkpointer.save(2, {"w": torch.ones(floats)})
        print(os.getpid(), checkpointer._daemon.pid, flush=True)
        save.result()
        checkpointer.close()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def trainers():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TRAINER]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def stalled(network, root, trainers, request):
    """Process ids of a trainer and its writer in the middle of an upload: one part is there, the second hangs."""
    stalling = getattr(request, "param", "partNumber=2")
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, {"w": torch.zeros(10)}).result()
    begun = len(network.requests)
    network.fault = lambda method, path: "hang" if method == "PUT" and stalling in path else None
    configured = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    trainers.stdin.write(json.dumps([configured, root, LARGE]) + "\n")
    trainers.stdin.flush()
    trainer, writer = map(int, trainers.stdout.readline().split())
    wait_for(lambda: any(stalling in path for method, path in network.requests[begun:] if method == "PUT"))
    network.fault = lambda method, path: None
    yield trainer, writer
    for process in (trainer, writer):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def has_ended(process: int) -> bool:
    return not Path(f"/proc/{process}").exists() or " Z " in Path(f"/proc/{process}/stat").read_text()


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.slow
def test_a_writer_killed_during_an_upload_is_replaced_and_the_save_succeeds(stalled, root, s3):
    trainer, writer = stalled
    os.kill(writer, signal.SIGKILL)
    wait_for(lambda: has_ended(trainer))
    checkpointer = Checkpointer(root)
    assert checkpointer.steps() == [1, 2]
    assert loaded(checkpointer)[1]["w"].unique().tolist() == [1]
    assert_swept(checkpointer, s3)


@pytest.mark.slow
def test_a_trainer_killed_during_an_upload_leaves_the_old_and_its_writer_goes(stalled, root, s3):
    trainer, writer = stalled
    os.kill(trainer, signal.SIGKILL)
    wait_for(lambda: has_ended(writer))
    checkpointer = Checkpointer(root)
    assert checkpointer.steps() == [1]
    assert loaded(checkpointer)[1]["w"].unique().tolist() == [0]
    assert_swept(checkpointer, s3)


@pytest.mark.parametrize(
    "stalled", [pytest.param(".metadata", marks=pytest.mark.slow), "step-00000002.json"], indirect=True
)
def test_a_trainer_killed_during_the_commit_leaves_the_old_or_the_new(stalled, root, network):
    trainer, writer = stalled
    os.kill(trainer, signal.SIGKILL)
    wait_for(lambda: has_ended(writer))
    network.released.set()  # a request that was on its way arrives after all
    checkpointer = Checkpointer(root)
    for _ in range(5):
        newest = checkpointer.steps()[-1]
        assert loaded(checkpointer)[1]["w"].unique().tolist() == [newest - 1]
        assert checkpointer.verify(newest) == []


def test_both_killed_during_an_upload_leave_what_the_next_sweeps(stalled, root, s3):
    trainer, writer = stalled
    os.kill(trainer, signal.SIGSTOP)  # so that it starts no other writer
    os.kill(writer, signal.SIGKILL)
    os.kill(trainer, signal.SIGKILL)
    store, where = ObjectStore(), located(root)
    assert store.unfinished(where)
    store.put(where / "step-00000002.0123abcd-0" / "__1_0.distcp", b"of another rank")
    checkpointer = Checkpointer(root)
    assert checkpointer.steps() == [1]
    checkpointer.save(3, {"w": torch.zeros(10)}).result()
    checkpointer.close()
    assert store.unfinished(where), "it may still be under way on another machine"
    assert_swept(checkpointer, s3)


def assert_swept(checkpointer, s3):
    """Once all of it is old, the next Checkpointer that saves removes what no commit names, and nothing else."""
    store, where = ObjectStore(), checkpointer.root
    s3.age(86_400)
    committed = {str(checkpointer.path_of(step)) for step in checkpointer.steps()}
    with Checkpointer(where, config=CheckpointConfig(keep_latest=9)) as sweeper:
        sweeper.save(9, {"w": torch.ones(3)}).result()
        assert {str(folder) for folder in store.children(where)[1]} == {*committed, str(sweeper.path_of(9))}
        assert all(sweeper.verify(step) == [] for step in sweeper.steps())
    assert store.unfinished(where) == []


def test_what_was_set_aside_is_not_swept(opened, s3):
    opened.save(1, {"w": torch.ones(3)}).result()
    aside = opened.set_aside(1)
    s3.age(86_400)
    with Checkpointer(opened.root) as other:
        other.save(2, {"w": torch.ones(3)}).result()
        assert other.steps() == [2]
    assert_same(Snapshot(aside).piece("w", Snapshot(aside).tensors["w"].pieces[0]), torch.ones(3))


def test_a_server_that_dies_during_a_save_and_comes_back_is_waited_for(tmp_path, monkeypatch):
    server = Server(tmp_path / "data")
    configure_s3(monkeypatch, server.url)
    server.make_bucket("bucket")
    state = {"w": torch.randn(LARGE)}
    try:
        with Checkpointer("s3://bucket/run", like=state) as checkpointer:
            save = checkpointer.save(1, state)
            server.kill()
            back = threading.Timer(0.5, server.start)
            back.start()
            save.result()
            back.join()
            assert_same(loaded(checkpointer)[1], state)
    finally:
        server.kill()


def test_a_store_that_is_gone_fails_the_save_and_not_the_one_after(network, root, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, {"a": 1}).result()
        network.fault = lambda method, path: "refuse"
        save = checkpointer.save(2, {"a": 2})
        with pytest.raises(CheckpointError, match=r"step 2 .*cannot be reached.*\n.*AWS_ENDPOINT_URL"):
            save.result()
        with pytest.raises(CheckpointError, match="cannot be reached"):
            checkpointer.steps()
        network.fault = lambda method, path: None
        checkpointer.save(3, {"a": 3}).result()
        assert checkpointer.steps() == [1, 3]


def test_mistakes_show_when_the_checkpointer_is_made(s3, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no bucket 'no-such-bucket'.*\n.*create it"):
        Checkpointer("s3://no-such-bucket/run")
    with pytest.raises(CheckpointError, match=r"gs://bucket/run.*\n.*s3://BUCKET/PREFIX"):
        Checkpointer("gs://bucket/run")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(CheckpointError, match=r"refuses the credentials.*\n.*AWS_SECRET_ACCESS_KEY"):
        Checkpointer("s3://no-such-bucket/run")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(CheckpointError, match=r"cannot be reached.*\n.*AWS_ENDPOINT_URL"):
        Checkpointer("s3://bucket/run")


def test_the_command_line_takes_urls(opened, bucket, tmp_path):
    opened.save(1, {"weights": {"w": torch.randn(4, 5)}}, metrics={"loss": 0.5}).result()
    damaged = bucket / opened.save(2, {"weights": {"w": torch.zeros(4, 5)}}).result().path.key / "__0_0.distcp"
    data = damaged.read_bytes()
    damaged.write_bytes(data.replace(bytes(80), bytes(79) + b"1"))

    listed = command("ls", opened.root)
    assert [entry["step"] for entry in listed["checkpoints"]] == [1, 2]
    assert listed["checkpoints"][0]["metrics"] == {"loss": 0.5}
    assert list(command("verify", opened.root, status=1)["damaged"]) == ["2"]
    command("export", opened.root, tmp_path / "out", "--step", "1", "--prefix", "weights")
    assert (tmp_path / "out" / "model.safetensors").exists()


def command(*arguments, status=0):
    shown = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])  # torch is there already, unlike in a process
    assert shown.exit_code == status, shown.output
    return json.loads(shown.stdout.splitlines()[-1])
