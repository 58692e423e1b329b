"""Promises of the Checkpointer in one process: all or nothing, bit for bit, damage named."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from stillroom.checkpoint import CheckpointConfig, Checkpointer
from stillroom.checkpoint.reading import Snapshot
from stillroom.errors import CheckpointCorrupt, CheckpointError
from tests.checkpoint.states import assert_same, tiny_state


@pytest.fixture
def opened(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        yield checkpointer


def loaded(checkpointer, step=None):
    into: dict = {}
    return checkpointer.load(into=into, step=step), into


def test_what_is_loaded_is_what_was_saved(opened):
    save = opened.save(400, tiny_state(1), metrics={"loss": 0.5})
    save.staged()
    info = save.result()
    assert (info.step, info.metrics, save.done()) == (400, {"loss": 0.5}, True)
    assert info.size_bytes == sum(file.stat().st_size for file in info.path.iterdir())
    into = tiny_state(2)
    kept = into["weights"]["a"]
    assert opened.load(into=into).absent == ()
    assert_same(into, tiny_state(1))
    assert into["weights"]["a"] is kept  # copied into, so optimizers go on pointing at it
    assert_same(loaded(opened)[1], tiny_state(1))


@pytest.mark.promise(10)
def test_the_state_may_change_as_soon_as_save_returns(opened):
    state = {"w": torch.zeros(100_000), "step": 1}
    saves = []
    for step in range(1, 6):
        state["w"].fill_(step)
        saves.append(opened.save(step, state))
        state["w"].fill_(-1)
        saves[-1].result()
        assert loaded(opened)[1]["w"].unique().tolist() == [step]


def test_a_part_can_be_loaded(opened):
    opened.save(1, tiny_state(1)).result()
    into = {"weights": {}, "extra": torch.ones(2)}
    info = opened.load(into=into, keys=["weights.b", "run.step", "extra"])
    assert_same(into["weights"], {"b": tiny_state(1)["weights"]["b"]})
    assert into["run"] == {"step": 1}
    assert info.absent == ("extra",)
    assert into["extra"].tolist() == [1, 1]


@pytest.mark.promise(12)
def test_steps_are_kept_by_policy_and_nothing_is_none(tmp_path):
    policy = CheckpointConfig(keep_latest=2, keep_every_steps=4, keep_best=1)
    with Checkpointer(tmp_path / "fresh", config=policy) as checkpointer:
        assert checkpointer.steps() == []
        assert checkpointer.load(into={}) is None
        losses = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.6, 5: float("nan"), 6: 0.3, 7: 0.4}
        for step, loss in losses.items():
            checkpointer.save(step, {"a": step}, metrics={"loss": loss}).result()
        assert checkpointer.steps() == [2, 4, 6, 7]
        (tmp_path / "fresh" / ".step=d00000009.deadbeef-0.tmp").mkdir()
        assert checkpointer.steps() == [2, 4, 6, 7]
        assert loaded(checkpointer, 4)[1] == {"a": 4}
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 .*\[2, 4, 6, 7\]"):
            checkpointer.load(into={}, step=1)
        with pytest.raises(CheckpointError, match="negative"):
            checkpointer.save(-1, {})
    with pytest.raises(CheckpointError, match="closed"):
        checkpointer.save(10, {})


@pytest.mark.promise(12)
def test_what_crashes_left_is_swept_and_what_is_being_written_is_not(tmp_path):
    import fcntl

    stale, busy = tmp_path / ".step=d00000001.deadbeef-0.tmp", tmp_path / ".step=d00000002.01234567-0.tmp"
    for folder in (stale, busy):
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(b"x")
    holder = os.open(busy, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_SH)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"a": 1}).result()
    assert not stale.exists()
    assert (busy / "__0_0.distcp").exists()
    os.close(holder)


@pytest.mark.promise(7)
def test_a_step_is_replaced_as_a_whole(opened):
    opened.save(5, tiny_state(1)).result()
    opened.save(5, {"only": torch.ones(3)}).result()
    assert_same(loaded(opened)[1], {"only": torch.ones(3)})
    assert [path.name for path in opened.root.iterdir()] == ["step-00000005"]


def damaged(data: bytes) -> dict[str, bytes | None]:
    """A file's content with a bit flipped here or there, with its end cut off, and without anything."""
    flips = {"flip first": 0, "flip middle": len(data) // 2, "flip last": len(data) - 1}
    found = {how: data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :] for how, at in flips.items()}
    return {**found, "cut": data[:-3], "remove": None}


@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_0.checksums", ".metadata", "checkpoint.json"])
@pytest.mark.promise(8)
def test_damage_is_found_and_named_before_anything_is_copied(opened, name):
    opened.save(10, tiny_state(1)).result()
    path = opened.save(20, tiny_state(2)).result().path / name
    for how, content in damaged(path.read_bytes()).items():
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        into = tiny_state(3)
        with pytest.raises(CheckpointCorrupt, match=r"step 20 in .*damaged.*\n.*verify"):
            opened.load(into=into)
        assert_same(into, tiny_state(3))
        assert opened.verify(20), how
        path.write_bytes(content or b"")
    opened.set_aside(20)
    assert opened.load(into=into).step == 10
    assert_same(into, tiny_state(1))


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.promise(8)
def test_every_byte_of_every_file_is_covered(opened, stride):
    state = {"a": torch.arange(6), "b": torch.ones(3), "empty": torch.empty(0), "value": {"x": 1}}
    folder = opened.save(1, state).result().path
    holes = between_items(Snapshot(folder))
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for place in range(0, len(data), stride):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            if path.suffix == ".distcp" and place in holes:
                continue
            assert opened.verify(1), f"byte {place} of {path.name}"
        path.write_bytes(data)
    assert opened.verify(1) == []


def between_items(snapshot):
    """Zeros that align the next item; they belong to none."""
    pieces = [piece for spec in snapshot.tensors.values() for piece in spec.pieces] + list(snapshot.values.values())
    covered = {at for piece in pieces for at in range(piece.offset, piece.offset + piece.size_bytes)}
    return set(range(max(covered) + 1)) - covered


@pytest.mark.promise(8)
def test_the_damaged_item_is_named(opened):
    folder = opened.save(1, {"good": torch.randn(100), "bad": torch.randn(200_000)}).result().path
    piece = Snapshot(folder).tensors["bad"].pieces[0]
    with (folder / piece.file).open("r+b") as file:
        file.seek(piece.offset + 400_000)
        file.write(b"\xff\xff\xff")
    assert opened.verify(1) == [line for line in opened.verify(1) if "'bad'" in line]
    with pytest.raises(CheckpointCorrupt, match=r"'bad' in __0_0\.distcp"):
        opened.load(into={})
    assert opened.load(into={}, keys=["good"]).step == 1


@pytest.mark.promise(9)
def test_another_shape_or_dtype_is_refused(opened):
    opened.save(1, {"a": torch.zeros(2, 3)}).result()
    for other in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(CheckpointError, match="tensor 'a'"):
            opened.load(into={"a": other})


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"deep": {"leaf": threading.Lock()}}, "deep.leaf"),
        ({"a.b": 1, "a": {"b": 2}}, "a.b"),
        ({"a": {1.5: 1}}, "1.5"),
        ({"s": torch.eye(2).to_sparse()}, "'s'"),
        ({"m": torch.empty(2, device="meta")}, "'m'"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_committed(opened, state, named):
    with pytest.raises(CheckpointError, match=named):
        opened.save(1, state)
    assert opened.steps() == []
    opened.save(2, {"a": 1}).result()


class Gadget:
    def __reduce__(self):
        return os.mkdir, ("/tmp/stillroom-was-fooled",)


def test_classes_are_unpickled_only_on_trust(opened):
    opened.save(1, {"path": Path("x"), "step": 4}).result()
    with pytest.raises(CheckpointError, match=r"'path'.*\n.*trust=True"):
        opened.load(into={})
    assert opened.load(into=(into := {}), trust=True)
    assert into == {"path": Path("x"), "step": 4}


def test_metadata_of_a_stranger_runs_nothing(tmp_path):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Gadget()))
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="mkdir"):
        checkpointer.load(into={})
    assert not Path("/tmp/stillroom-was-fooled").exists()


@pytest.mark.promise(9)
def test_every_change_of_the_state_is_seen(opened):
    """dtype, shape, nesting, keys, values that outgrow their room, and back again."""
    states = [
        {"a": torch.ones(4), "v": 1},
        {"a": torch.ones(4, dtype=torch.float64), "v": 1},
        {"a": torch.ones(2, 2, dtype=torch.float64), "v": 1},
        {"a": {"b": torch.ones(2, 2, dtype=torch.float64)}, "v": 1},
        {"a.b": torch.ones(2, 2, dtype=torch.float64), "v": 1},
        {"a.b": torch.ones(2, 2, dtype=torch.float64), "v": "long" * 10_000},
        {"a": torch.ones(4), "v": 1},
        {},
        {"v": [torch.zeros(1), {"w": torch.ones(())}]},
        {"v": [torch.zeros(1), {"w": 5}]},
    ]
    for step, state in enumerate(states):
        opened.save(step, state).result()
        assert_same(loaded(opened)[1], state)


@pytest.mark.promise(9)
def test_a_value_that_grows_a_little_keeps_the_layout(opened):
    opened.save(1, {"a": torch.ones(4), "v": "x"}).result()
    before = opened._plan
    opened.save(2, {"a": torch.ones(4), "v": "xyz"}).result()
    assert opened._plan is before


def test_memory_made_ready_before_the_first_save_is_used(tmp_path):
    state = tiny_state(1)
    with Checkpointer(tmp_path, like=state) as checkpointer:
        checkpointer._ready()
        plan = checkpointer._plan
        checkpointer.save(1, state).result()
        assert checkpointer._plan is plan
        assert_same(loaded(checkpointer)[1], state)


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.promise(11)
def test_overlapping_saves_are_committed_in_order(tmp_path, buffers):
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_latest=30, buffers=buffers)) as checkpointer:
        saves = [checkpointer.save(step, {"w": torch.full((300_000,), float(step))}) for step in range(8)]
        assert [save.result().step for save in saves] == list(range(8))
        for step in range(8):
            assert loaded(checkpointer, step)[1]["w"].unique().tolist() == [step]


@pytest.mark.promise(10)
def test_staging_behind_is_guarded_and_a_mutation_is_detected(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2_000_000))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with Checkpointer(tmp_path, config=CheckpointConfig(stage="behind", keep_latest=50)) as checkpointer:
        guard = checkpointer.guard(optimizer)
        for step in range(5):
            save = checkpointer.save(step, {"w": parameter})
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            save.result()
            assert loaded(checkpointer, step)[1]["w"].unique().tolist() == [1 - step]
        guard.remove()
        torn = 0
        for step in range(5, 25):
            before = parameter.detach()[0].item()
            save = checkpointer.save(step, {"w": parameter})
            with torch.no_grad():
                parameter.add_(1)
            try:
                save.result()
            except CheckpointError:
                torn += 1
            else:
                assert loaded(checkpointer, step)[1]["w"].unique().tolist() == [before]
    assert torn


@pytest.mark.parametrize("when", ["idle", "writing", "often"])
@pytest.mark.promise(1)
def test_a_killed_writer_is_started_again_and_the_save_succeeds(tmp_path, when):
    state = {"w": torch.randn(4_000_000), "step": 1}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state).result()
        stop = threading.Event()

        def kill():
            pid = checkpointer._daemon.pid
            if pid:
                os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=lambda: [kill() for _ in range(2) if not stop.wait(0.004)])
        if when == "idle":
            kill()
        else:
            killer.start()
        for step in range(2, 8):
            state["step"] = step
            checkpointer.save(step, state).result()
            assert_same(loaded(checkpointer)[1], state)
        stop.set()
        if when != "idle":
            killer.join()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.promise(1)
def test_a_writer_that_cannot_live_is_an_error_and_the_next_save_works(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": 1}).result()
        ask, daemon = checkpointer._daemon.ask, checkpointer._daemon
        daemon._start_really = daemon._start

        def stillborn():
            daemon._start_really()
            daemon._process.kill()
            daemon._process.wait()

        monkeypatch.setattr(daemon, "_start", stillborn)
        daemon._process.kill()
        daemon._process.wait()
        with pytest.raises(CheckpointError, match="ended 3 times"):
            checkpointer.save(2, {"a": 2}).result()
        monkeypatch.undo()
        checkpointer.save(3, {"a": 3}).result()
        assert checkpointer.steps() == [1, 3]
        assert ask


@pytest.mark.promise(5)
def test_a_failure_that_nobody_asked_about_surfaces_at_close(tmp_path, capsys):
    checkpointer = Checkpointer(tmp_path / "root")
    (tmp_path / "root").write_text("a file where the directory should be")
    save = checkpointer.save(1, {"a": torch.ones(3)})
    while not save.done():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        checkpointer.close()
    assert "step 1 was not saved" in capsys.readouterr().err


class Interrupted(torch.Tensor):
    """Ctrl-C comes while it is being copied."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "copy" in function.__name__:
            raise KeyboardInterrupt
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("size", [10, 20_000_000], ids=["small", "large"])
def test_a_copy_that_is_interrupted_leaves_nothing_and_the_next_save_works(tmp_path, size):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"first": torch.ones(size), "w": torch.ones(3)}).result()
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(2, {"first": torch.ones(size), "w": torch.ones(3).as_subclass(Interrupted)})
        checkpointer.save(3, {"first": torch.ones(size), "w": torch.ones(3)}).result()
        assert checkpointer.steps() == [1, 3]
        with pytest.raises(CheckpointError, match="interrupted"):
            checkpointer.close()


@pytest.mark.promise(13)
@pytest.mark.parametrize("saves", [110, pytest.param(1000, marks=pytest.mark.slow)])
def test_descriptors_threads_and_memory_stay_flat(tmp_path, saves):
    with Checkpointer(tmp_path) as checkpointer:
        counts = []
        for step in range(saves):
            checkpointer.save(step, {"w": torch.ones(100_000 + step // 50), "step": step}).result()
            counts.append([*held(os.getpid()), *held(checkpointer._daemon.pid)])
        for number, of_one in enumerate(zip(*counts, strict=True)):
            assert max(of_one[10:]) <= of_one[9] + 1, f"measure {number}: {of_one}"
        assert resident_mb(checkpointer._daemon.pid) < 60
        assert len(checkpointer._saves) <= 1
    assert held(os.getpid())[2] == 0


def held(process):
    """Descriptors, threads, and megabytes of shared memory that a process maps for staging."""
    folder = Path(f"/proc/{process}")
    maps = [line for line in (folder / "maps").read_text().splitlines() if "stillroom-checkpoint" in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return [len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")), sum(b - a for a, b in spans) >> 20]


def resident_mb(process):
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) >> 10


@pytest.mark.promise(11)
def test_a_load_during_a_save_has_the_whole_of_one_of_them(tmp_path):
    """Of the same Checkpointer, what was saved last; of another process, old or new, or it is told to load again."""
    told = []
    config = CheckpointConfig(keep_latest=1)
    with Checkpointer(tmp_path, config=config) as trainer, Checkpointer(tmp_path) as evaluator:
        trainer.save(0, {"w": torch.zeros(300_000), "step": 0}).result()
        for step in range(1, 40):
            trainer.save(step // 2, {"w": torch.full((300_000,), float(step)), "step": step})
            for reader in (evaluator, evaluator, trainer):
                into: dict = {}
                try:
                    reader.load(into)
                    assert into["w"].unique().tolist() == [into["step"]]
                    assert reader is evaluator or into["step"] == step
                except CheckpointError as error:
                    told.append(str(error))
    assert all("load again" in reason or "no checkpoint" in reason for reason in told)


@pytest.mark.promise(12)
def test_the_writer_opens_no_port(opened):
    """So none can be in use, and none is open to others."""
    opened.save(1, {"a": 1}).result()
    sockets = {
        os.readlink(f"/proc/{opened._daemon.pid}/fd/{number}")
        for number in os.listdir(f"/proc/{opened._daemon.pid}/fd")
    }
    inodes = {name.removeprefix("socket:[").removesuffix("]") for name in sockets if name.startswith("socket:")}
    tables = "".join(Path(f"/proc/net/{kind}").read_text() for kind in ("tcp", "tcp6", "udp", "udp6"))
    assert inodes
    assert not inodes & set(tables.split())


def test_the_record_is_readable(opened):
    path = opened.save(3, {"a": 1}, metrics={"loss": 1.5}).result().path
    record = json.loads((path / "checkpoint.json").read_text())["record"]
    assert (record["step"], record["metrics"], record["world"]) == (3, {"loss": 1.5}, 1)
