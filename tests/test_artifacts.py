"""Artifacts: found when nothing changed, redone exactly where something did, whole or absent after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stillroom.artifacts import Store, lineage, read_artifact, verify_artifact
from stillroom.errors import ArtifactError


def chain(root, *, first=1, second=1):
    """Two steps, the second made from the first; returns both and what was built."""
    store, built = Store(root), []

    def build(name, text):
        def work_on(folder, work):
            built.append(name)
            (folder / "out.txt").write_text(text)

        return work_on

    a = store.step("a", inputs={"file": "f" * 64}, config={"x": first}, rooms=["errors"], build=build("a", f"a{first}"))
    b = store.step("b", inputs={"a": a}, config={"y": second}, rooms=["errors"], build=build("b", f"b{second}"))
    return a, b, built


def test_nothing_is_built_twice(tmp_path):
    assert chain(tmp_path)[2] == ["a", "b"]
    a, b, built = chain(tmp_path)
    assert built == []
    assert a.reused
    assert b.reused


def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_else(tmp_path):
    chain(tmp_path)
    assert chain(tmp_path, second=2)[2] == ["b"]
    assert chain(tmp_path, first=2)[2] == ["a", "b"]


def test_the_key_covers_the_code(tmp_path):
    store = Store(tmp_path)
    one = store.step("a", inputs={}, config={}, rooms=["errors"], build=lambda folder, work: None)
    other = store.step("a", inputs={}, config={}, rooms=["errors", "schema"], build=lambda folder, work: None)
    assert one.key != other.key


def test_a_failed_build_leaves_nothing_but_its_work(tmp_path):
    def fail(folder, work):
        (folder / "half").write_text("half")
        (work / "kept").write_text("kept")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Store(tmp_path).step("a", inputs={}, config={}, rooms=[], build=fail)
    assert list((tmp_path / "artifacts").iterdir()) == []
    assert [path.name for path in (tmp_path / "work").rglob("kept")] == ["kept"]


def test_a_killed_build_is_resumed_from_its_work(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from stillroom.artifacts import Store
        def build(folder, work):
            resumed = (work / "mark").exists()
            (work / "mark").write_text("x")
            (folder / "resumed").write_text(str(resumed))
            if not resumed:
                os.kill(os.getpid(), signal.SIGKILL)
        store = Store(sys.argv[1])
        with store.lock():
            print(store.step("a", inputs={}, config={}, rooms=[], build=build).path)
    """)
    run = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(run, capture_output=True).returncode == -signal.SIGKILL
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert (path / "resumed").read_text() == "True"
    assert list((tmp_path / "artifacts").iterdir()) == [path]
    assert not list((tmp_path / "work").iterdir())


def test_lineage_goes_back_to_the_sources_from_any_file_inside(tmp_path):
    a, b, _ = chain(tmp_path)
    (tmp_path / "link").symlink_to(b.path / "out.txt")
    tree = lineage(tmp_path / "link")
    assert (tree["step"], tree["parents"]["a"]["key"]) == ("b", a.key)
    assert tree["parents"]["a"]["parents"] == {"file": "f" * 64}
    with pytest.raises(ArtifactError, match="lies in no artifact"):
        lineage(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        lineage(tmp_path / "nothing")


def test_a_changed_file_is_named(tmp_path):
    a, _, _ = chain(tmp_path)
    verify_artifact(a.path)
    (a.path / "out.txt").write_text("tampered")
    with pytest.raises(ArtifactError, match=r"out\.txt was changed"):
        verify_artifact(a.path)


def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path):
    a, _, _ = chain(tmp_path)
    (a.path / "artifact.json").write_text("{")
    with pytest.raises(ArtifactError, match="delete it and run again"):
        read_artifact(a.path)


def test_one_process_at_a_time(tmp_path):
    with (
        Store(tmp_path).lock(),
        pytest.raises(ArtifactError, match="another process is working"),
        Store(tmp_path).lock(),
    ):
        pass
