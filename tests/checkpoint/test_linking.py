"""Tensors that stay the same are written once and linked; a plan is found again in the newest checkpoint."""

from __future__ import annotations

import os
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as stock

from stillroom.checkpoint import CheckpointConfig, Checkpointer, planning
from stillroom.checkpoint.reading import Snapshot
from stillroom.errors import CheckpointCorrupt
from tests.checkpoint.states import assert_same

ALL = CheckpointConfig(keep_latest=100)
SETTLED = "__0_1.distcp"


def lora_state(step: int) -> dict:
    """A large base that stays, small adapters that change."""
    torch.manual_seed(0)
    return {"base": {"w": torch.randn(400_000)}, "lora": torch.full((1000,), float(step)), "run": {"step": step}}


def inodes(checkpointer, name: str) -> list[int]:
    paths = [checkpointer.path_of(step) / name for step in checkpointer.steps()]
    return [path.stat().st_ino for path in paths if path.exists()]


def test_unchanged_tensors_are_found_and_linked_and_every_step_stays_whole(tmp_path):
    with Checkpointer(tmp_path / "root", config=ALL) as checkpointer:
        for step in range(1, 7):
            checkpointer.save(step, lora_state(step)).result()
        assert len(inodes(checkpointer, SETTLED)) == 4  # two saves to find them, one to write them
        assert len(set(inodes(checkpointer, SETTLED))) == 1
        assert len(set(inodes(checkpointer, ".metadata"))) == 2  # one for each plan
        assert checkpointer.path_of(6).joinpath("__0_0.distcp").stat().st_size < 10_000
        for step in (1, 2, 3, 4):
            shutil.rmtree(checkpointer.path_of(step))  # as retention would
        shutil.copytree(checkpointer.path_of(5), tmp_path / "copy")
        for step in (5, 6):
            assert checkpointer.verify(step) == []
            into: dict = {}
            checkpointer.load(into, step=step)
            assert_same(into, lora_state(step))
    into = lora_state(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.load(into, checkpoint_id=tmp_path / "copy")
    assert_same(into, lora_state(5))


def test_a_settled_tensor_that_changes_is_saved_as_it_is_and_not_linked_again(tmp_path):
    state = {"settled": torch.zeros(300_000), "restless": torch.zeros(400_000), "step": torch.zeros(())}
    with Checkpointer(tmp_path, config=ALL) as checkpointer:
        for step in range(1, 12):
            state["step"].fill_(step)
            if step >= 6:
                state["restless"].fill_(step // 2)  # the same in every second save
            checkpointer.save(step, state).result()
            into: dict = {}
            checkpointer.load(into)
            assert_same(into, state)
        stored = Snapshot(checkpointer.path_of(11)).tensors
        assert {name: spec.pieces[0].file for name, spec in stored.items()} == {
            "settled": SETTLED, "restless": "__0_0.distcp", "step": "__0_0.distcp",
        }  # fmt: skip
        assert [checkpointer.verify(step) for step in checkpointer.steps()] == [[]] * 11


def test_damage_in_a_linked_file_is_found_in_every_step_that_has_it(tmp_path):
    with Checkpointer(tmp_path, config=ALL) as checkpointer:
        for step in range(1, 7):
            checkpointer.save(step, lora_state(step)).result()
        with (checkpointer.path_of(6) / SETTLED).open("r+b") as file:
            file.seek(100_000)
            file.write(b"!")
        assert ["'base.w'" in " ".join(checkpointer.verify(step)) for step in range(1, 7)] == [False] * 2 + [True] * 4
        with pytest.raises(CheckpointCorrupt, match=r"base\.w"):
            checkpointer.load({})
        checkpointer.set_aside(6)  # what is set aside is not linked from
        checkpointer.save(7, lora_state(7)).result()
        assert checkpointer.verify(7) == []


def test_nothing_is_linked_when_that_is_turned_off(tmp_path):
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_latest=9, link_unchanged=False)) as checkpointer:
        for step in range(1, 6):
            checkpointer.save(step, lora_state(step)).result()
        files = [file for step in checkpointer.steps() for file in checkpointer.path_of(step).iterdir()]
        assert {file.stat().st_nlink for file in files} == {1}


def test_what_is_declared_frozen_is_linked_from_the_second_save_on(tmp_path):
    state = {"base": {"small": torch.ones(3)}, "head": torch.ones(3), "step": 0}
    with Checkpointer(tmp_path, config=ALL, frozen=["base"]) as checkpointer:
        for step in (1, 2, 3):
            state["head"].fill_(step)
            checkpointer.save(step, state | {"step": step}).result()
        assert len(inodes(checkpointer, SETTLED)) == 3
        assert len(set(inodes(checkpointer, SETTLED))) == 1
        state["base"]["small"].zero_()
        checkpointer.load(state, step=1)  # copies into what is frozen, which may have been anything before
        state["base"]["small"].fill_(7)
        checkpointer.save(4, state).result()
        into: dict = {}
        checkpointer.load(into)
        assert into["base"]["small"].tolist() == [7, 7, 7]
        assert [checkpointer.verify(step) for step in checkpointer.steps()] == [[]] * 4


@pytest.mark.slow
def test_where_links_are_refused_everything_is_written(tmp_path):
    """A file that has as many links as it may have, as ext4 has after 65,000."""
    with Checkpointer(tmp_path, config=ALL) as checkpointer:
        for step in range(1, 4):
            checkpointer.save(step, lora_state(step)).result()
        settled = checkpointer.path_of(3) / SETTLED
        many = tmp_path / "many"
        many.mkdir()
        with pytest.raises(OSError, match="links"):
            for number in range(70_000):
                os.link(settled, many / str(number))
        save = checkpointer.save(4, lora_state(4)).result()
        assert (save.path / SETTLED).stat().st_nlink == 1
        assert checkpointer.verify(4) == []


@pytest.fixture
def no_planning(monkeypatch):
    def refuse(everybody):
        raise AssertionError("a plan was made")

    return lambda: monkeypatch.setattr(planning, "plan_for_all", refuse)


@pytest.mark.parametrize("prepared", [True, False])
def test_the_first_save_after_a_resume_needs_no_plan(tmp_path, no_planning, prepared):
    with Checkpointer(tmp_path, config=ALL) as checkpointer:
        for step in range(1, 5):
            checkpointer.save(step, lora_state(step)).result()
    no_planning()
    with Checkpointer(tmp_path, config=ALL, like=lora_state(0) if prepared else None) as checkpointer:
        checkpointer.save(5, lora_state(5)).result()
        assert len(set(inodes(checkpointer, SETTLED))) == 1
        assert checkpointer.verify(5) == []
        into: dict = {}
        checkpointer.load(into)
        assert_same(into, lora_state(5))


@pytest.mark.parametrize("damage", ["sidecar", "second sidecar", "metadata", "missing"])
def test_a_damaged_plan_is_passed_over(tmp_path, damage):
    with Checkpointer(tmp_path, config=ALL) as checkpointer:
        for step in range(1, 5):
            checkpointer.save(step, lora_state(step)).result()
        folder = checkpointer.path_of(4)
    names = {"sidecar": "__0_0.checksums", "second sidecar": "__0_1.checksums", "metadata": ".metadata"}
    path = folder / names.get(damage, "__0_0.checksums")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(data)
    with Checkpointer(tmp_path, config=ALL) as checkpointer:
        checkpointer.save(5, lora_state(5)).result()
        assert checkpointer.verify(5) == []


def test_a_plan_of_another_state_is_passed_over(tmp_path):
    states = [{"w": torch.ones(3), "v": "x"}, {"w": torch.ones(4), "v": "x"}, {"w": torch.ones(4), "v": "x" * 5000}]
    for step, state in enumerate(states):
        with Checkpointer(tmp_path, config=ALL) as checkpointer:
            checkpointer.save(step, state).result()
            into: dict = {}
            checkpointer.load(into)
            assert_same(into, state)
