"""Promises of the Checkpointer: all or nothing, bit for bit, damage named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillroom.checkpoint import CheckpointConfig, Checkpointer
from stillroom.errors import CheckpointCorrupt, CheckpointError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)


def tiny_state(seed: int) -> dict:
    torch.manual_seed(seed)
    return {
        "weights": {"a": torch.randn(5, 7), "b": {"c": torch.randn(3).bfloat16(), "scalar": torch.randn(())}},
        "many": {str(dtype): torch.randint(0, 2, (2, 3)).to(dtype) for dtype in DTYPES},
        "odd": {"empty": torch.empty(0, 4), "strided": torch.randn(4, 6).T},
        "run": {"step": seed, "losses": [1.5, float(seed)], "note": None, "by_number": {3: "three"}, "done": False},
    }


def assert_same(found: object, wanted: object) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert isinstance(found, dict)
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same(found[key], wanted[key])
    else:
        assert found == wanted


def test_what_is_loaded_is_what_was_saved(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        save = checkpointer.save(400, tiny_state(1))
        save.staged()
        assert save.result().step == 400
        into = tiny_state(2)
        kept = into["weights"]["a"]
        assert checkpointer.load(into=into).step == 400
    assert_same(into, tiny_state(1))
    assert into["weights"]["a"] is kept  # copied into, so optimizers go on pointing at it
    empty: dict = {}
    Checkpointer(tmp_path).load(into=empty)
    assert_same(empty, tiny_state(1))


def test_the_tensor_file_is_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    info = Checkpointer(tmp_path).save(1, tiny_state(1)).result()
    assert_same(load_file(info.path / "tensors.safetensors")["weights/a"], tiny_state(1)["weights"]["a"])


def test_steps_are_kept_newest_first_and_nothing_is_none(tmp_path):
    checkpointer = Checkpointer(tmp_path / "fresh", config=CheckpointConfig(keep_latest=2))
    assert checkpointer.steps() == []
    assert checkpointer.load(into={}) is None
    for step in (1, 5, 9):
        checkpointer.save(step, tiny_state(step))
    assert checkpointer.steps() == [5, 9]
    into: dict = {}
    checkpointer.load(into=into, step=5)
    assert into["run"]["step"] == 5
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 .*\[5, 9\]"):
        checkpointer.load(into={}, step=1)
    checkpointer.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpointer.save(10, tiny_state(1))


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["flip first", "flip middle", "flip last", "cut", "remove"])
def test_damage_is_found_and_named_before_anything_is_copied(tmp_path, name, damage):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(10, tiny_state(1))
    path = checkpointer.save(20, tiny_state(2)).result().path / name
    data = bytearray(path.read_bytes())
    place = {"flip first": 0, "flip middle": len(data) // 2, "flip last": len(data) - 1}.get(damage)
    if place is not None:
        data[place] ^= 0x40
    path.write_bytes(data[:-3] if damage == "cut" else data)
    if damage == "remove":
        path.unlink()

    into = tiny_state(3)
    with pytest.raises(CheckpointCorrupt, match=r"step 20.*\n.*resume from step 10"):
        checkpointer.load(into=into)
    assert_same(into, tiny_state(3))
    checkpointer.set_aside(20)
    assert checkpointer.load(into=into).step == 10
    assert_same(into, tiny_state(1))


def test_every_byte_of_the_tensor_file_is_covered(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, {"a": torch.arange(6), "b": torch.ones(3)}).result().path / "tensors.safetensors"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointCorrupt):
            checkpointer.load(into={})


def test_another_shape_or_dtype_is_refused(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"a": torch.zeros(2, 3)})
    for other in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(CheckpointError, match="tensor 'a'"):
            checkpointer.load(into={"a": other})


@pytest.mark.parametrize("leaf", [object(), b"bytes", {1, 2}])
def test_what_is_not_tensor_or_json_is_refused_and_nothing_is_committed(tmp_path, leaf):
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="deep/leaf"):
        checkpointer.save(1, {"deep": {"leaf": leaf}})
    assert checkpointer.steps() == []


CRASHER = """
import os, sys, torch
from stillroom.checkpoint import Checkpointer

real = {name: getattr(os, name) for name in ("fsync", "replace", "open", "mkdir", "rename", "unlink", "rmdir")}

def crash_after(calls):
    left = [calls]
    def dying(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)  # at once, as a kill is: no handler, no flush
            left[0] -= 1
            return function(*args, **kwargs)
        return call
    for name, function in real.items():
        setattr(os, name, dying(function))

for calls in range(60):
    root = os.path.join(sys.argv[1], str(calls))
    Checkpointer(root).save(100, {"a": torch.full((3,), 1.0)})
    child = os.fork()
    if child == 0:
        crash_after(calls)
        Checkpointer(root).save(200, {"a": torch.full((3,), 2.0)})
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_crash_at_any_system_call_leaves_the_old_or_the_new_checkpoint(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CRASHER, str(tmp_path)], env=environment, check=True)
    outcomes = []
    for root in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        into: dict = {}
        info = Checkpointer(root).load(into=into)
        assert into["a"].tolist() == {100: [1.0] * 3, 200: [2.0] * 3}[info.step]
        Checkpointer(root).save(300, {"a": torch.zeros(3)})  # what the crash left is no obstacle, and is cleared
        assert not list(root.glob(".*"))
        outcomes.append(info.step)
    assert outcomes == sorted(outcomes)  # old up to the rename, new from there on
    assert set(outcomes) == {100, 200}
    assert len(outcomes) > 10


def test_checksums_are_readable(tmp_path):
    path = Checkpointer(tmp_path).save(3, tiny_state(1)).result().path
    record = json.loads((path / "checksums.json").read_text())
    assert record["step"] == 3
    assert "weights/a" in record["tensors"]
