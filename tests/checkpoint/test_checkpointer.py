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


def test_steps_are_kept_by_policy_and_nothing_is_none(tmp_path):
    policy = CheckpointConfig(keep_latest=2, keep_every_steps=4, keep_best=1)
    with Checkpointer(tmp_path / "fresh", config=policy) as checkpointer:
        assert checkpointer.steps() == []
        assert checkpointer.load(into={}) is None
        losses = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.6, 5: float("nan"), 6: 0.3, 7: 0.4}
        for step, loss in losses.items():
            checkpointer.save(step, {"a": step}, metrics={"loss": loss}).result()
        assert checkpointer.steps() == [2, 4, 6, 7]
        (tmp_path / "fresh" / ".step-00000009.dead-0.tmp").mkdir()
        assert checkpointer.steps() == [2, 4, 6, 7]
        assert loaded(checkpointer, 4)[1] == {"a": 4}
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 .*\[2, 4, 6, 7\]"):
            checkpointer.load(into={}, step=1)
        with pytest.raises(CheckpointError, match="negative"):
            checkpointer.save(-1, {})
    with pytest.raises(CheckpointError, match="closed"):
        checkpointer.save(10, {})


def test_what_crashes_left_is_swept_and_what_is_being_written_is_not(tmp_path):
    import fcntl

    stale, busy = tmp_path / ".step-00000001.dead-0.tmp", tmp_path / ".step-00000002.live-0.tmp"
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


def test_a_step_is_replaced_as_a_whole(opened):
    opened.save(5, tiny_state(1)).result()
    opened.save(5, {"only": torch.ones(3)}).result()
    assert_same(loaded(opened)[1], {"only": torch.ones(3)})
    assert [path.name for path in opened.root.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_0.checksums", ".metadata", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip first", "flip middle", "flip last", "cut", "remove"])
def test_damage_is_found_and_named_before_anything_is_copied(opened, name, damage):
    opened.save(10, tiny_state(1)).result()
    path = opened.save(20, tiny_state(2)).result().path / name
    data = bytearray(path.read_bytes())
    place = {"flip first": 0, "flip middle": len(data) // 2, "flip last": len(data) - 1}.get(damage)
    if place is not None:
        data[place] ^= 0x40
    path.write_bytes(data[:-3] if damage == "cut" else data)
    if damage == "remove":
        path.unlink()

    into = tiny_state(3)
    with pytest.raises(CheckpointCorrupt, match=r"step 20 in .*damaged.*\n.*verify"):
        opened.load(into=into)
    assert_same(into, tiny_state(3))
    assert opened.verify(20)
    opened.set_aside(20)
    assert opened.load(into=into).step == 10
    assert_same(into, tiny_state(1))


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
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


def test_every_change_of_the_state_is_seen(opened):
    """Promise 9: dtype, shape, nesting, keys, values that outgrow their room, and back again."""
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
def test_overlapping_saves_are_committed_in_order(tmp_path, buffers):
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_latest=30, buffers=buffers)) as checkpointer:
        saves = [checkpointer.save(step, {"w": torch.full((300_000,), float(step))}) for step in range(8)]
        assert [save.result().step for save in saves] == list(range(8))
        for step in range(8):
            assert loaded(checkpointer, step)[1]["w"].unique().tolist() == [step]


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


def test_a_failure_that_nobody_asked_about_surfaces_at_close(tmp_path, capsys):
    checkpointer = Checkpointer(tmp_path / "root")
    (tmp_path / "root").write_text("a file where the directory should be")
    save = checkpointer.save(1, {"a": torch.ones(3)})
    while not save.done():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        checkpointer.close()
    assert "step 1 was not saved" in capsys.readouterr().err


def test_descriptors_and_memory_stay_flat(tmp_path):
    """Promise 13: more than a hundred saves."""
    with Checkpointer(tmp_path) as checkpointer:
        counts = []
        for step in range(110):
            state = {"w": torch.ones(1000 + step // 50), "step": step}
            checkpointer.save(step, state).result()
            counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{checkpointer._daemon.pid}/fd"))))
        assert max(counts[5:]) <= (counts[4][0] + 1, counts[4][1] + 1)
        assert len(checkpointer._saves) <= 1
        maps = Path(f"/proc/{checkpointer._daemon.pid}/maps").read_text()
        assert maps.count("stillroom-checkpoint") <= 1
    assert not Path("/proc/self/maps").read_text().count("stillroom-checkpoint")


def test_the_record_is_readable(opened):
    path = opened.save(3, {"a": 1}, metrics={"loss": 1.5}).result().path
    record = json.loads((path / "checkpoint.json").read_text())["record"]
    assert (record["step"], record["metrics"], record["world"]) == (3, {"loss": 1.5}, 1)
