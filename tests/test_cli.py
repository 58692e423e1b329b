"""The command line as a person meets it: help that teaches, results on stdout, one clear line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys

from stillroom.artifacts import Store
from stillroom.data import DataConfig
from tests.conftest import weather_record, write_jsonl


def stillroom(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "stillroom", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_help_names_every_command_and_where_to_start():
    shown = stillroom("--help").stdout
    for command in ("plan", "distill", "record", "evaluate", "data", "lineage"):
        assert command in shown
    assert "stillroom plan RECIPE" in shown


def test_data_check_counts_on_stdout_and_ends_in_json(tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [weather_record(index, answer=True) for index in range(3)])
    with path.open("a") as file:
        file.write("{not json\n")
    done = stillroom("data", "check", path, "--out", tmp_path / "insights", "--minimum", 3)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["accepted"] == 3
    assert found["rejected"] == 1
    assert list((tmp_path / "insights").glob("*.html"))


def test_data_check_fails_below_the_minimum(tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [weather_record(index, answer=True) for index in range(99)])
    for minimum, status in ((), 1), (("--minimum", 99), 0), (("--minimum", 120), 1):
        done = stillroom("data", "check", path, *minimum)
        found = json.loads(done.stdout.splitlines()[-1])
        assert done.returncode == status
        assert found["enough"] == (status == 0)
        assert found["minimum"] == (minimum[1] if minimum else 100)
        assert (f"{found['minimum']} are asked for" in done.stdout) == (status == 1)


def test_data_check_says_its_exit_status_and_its_minimum():
    shown = " ".join(stillroom("data", "check", "--help").stdout.split())
    assert "Exit status: 0 when at least --minimum records are accepted" in shown
    assert f"`data.minimum`. [default: {DataConfig.model_fields['minimum'].default}]" in shown


def test_a_mistake_is_one_clear_message_without_a_traceback(tmp_path):
    done = stillroom("distill", tmp_path / "missing.yaml")
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_lineage_draws_and_ends_in_json(tmp_path):
    made = Store(tmp_path).step("a", inputs={"file": "f" * 64}, config={}, rooms=[], build=lambda folder, work: None)
    done = stillroom("lineage", made.path)
    assert json.loads(done.stdout.splitlines()[-1])["key"] == made.key
    assert done.stdout.startswith(f"a {made.key}")


def test_evaluate_measures_a_model_alone(tmp_path, tiny_student):
    path = write_jsonl(tmp_path / "held_out.jsonl", [weather_record(index, answer=True) for index in range(3)])
    done = stillroom(
        "evaluate",
        tiny_student,
        path,
        "--chat-template",
        "chatml-tools",
        "--max-tokens",
        16,
        "--out",
        tmp_path / "v.json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["items"] == 3
    assert found["accuracy"]["pooled"] == 0.0
    assert found["latency_s"]["calls"] == 30
    assert len(json.loads((tmp_path / "v.json").read_text())["items"]) == 3
