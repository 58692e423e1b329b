"""Storage: the old content or the new one, never a part."""

from __future__ import annotations

import os

import pytest

from stillroom.storage import atomic_directory, write_atomic


def test_write_replaces_whole_files(tmp_path):
    write_atomic(tmp_path / "deep" / "a", "old")
    write_atomic(tmp_path / "deep" / "a", b"new")
    assert (tmp_path / "deep" / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path / "deep") == ["a"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), atomic_directory(tmp_path / "d") as folder:
        (folder / "half").write_text("x")
        raise KeyError
    assert os.listdir(tmp_path) == []
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "d").exists()
    assert os.listdir(tmp_path / "d") == ["whole"]


def test_a_directory_replaces_an_earlier_one(tmp_path):
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "d") as folder:
            (folder / text).write_text(text)
    assert os.listdir(tmp_path / "d") == ["new"]
    assert os.listdir(tmp_path) == ["d"]
