"""The documentation says what is true: files and commands that it names exist, the layer table is the tested one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layers import LAYERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_resolves(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_in_code_marks_exists(page):
    for name in re.findall(
        r"`((?:stillroom|recipes|tests|docs|benchmarks)/[\w./-]+)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_command_in_the_readme_is_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^stillroom (data \w+|\w+)", readme, flags=re.MULTILINE))
    assert {"distill", "plan", "evaluate", "lineage", "data check"} <= commands
    for command in commands:
        shown = subprocess.run(
            [sys.executable, "-m", "stillroom", *command.split(), "--help"], capture_output=True, text=True, check=True
        )
        assert "Usage:" in shown.stdout


def test_every_make_target_in_the_readme_is_one():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make ([\w-]+)", readme, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_the_layer_table_is_the_tested_one():
    table = re.findall(r"^\| (`[^|]+`) \| (\d+) \|", (ROOT / "docs" / "index.md").read_text(), flags=re.MULTILINE)
    documented = {name: int(layer) for names, layer in table for name in re.findall(r"`(\w+)`", names)}
    assert documented == LAYERS


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_every_recipe_in_the_docs_loads(tmp_path):
    from stillroom.config import load_config
    from stillroom.pipeline import Recipe

    assert len(blocks("yaml")) == 2
    for block in blocks("yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(block, encoding="utf-8")
        load_config(Recipe, path)


def test_every_record_in_the_docs_is_accepted(tmp_path):
    from stillroom.data import read
    from stillroom.schema import Example

    (block,) = blocks("jsonl")
    path = tmp_path / "records.jsonl"
    path.write_text(block, encoding="utf-8")
    unlabelled, golden = read(path)
    assert isinstance(unlabelled, Example)
    assert isinstance(golden, Example)
    assert not unlabelled.targets
    assert golden.expected == [{"get_weather": {"city": ["Rome"]}}]


def test_every_setting_named_in_the_sources_exists():
    from stillroom.pipeline import Recipe

    for line in (ROOT / "docs" / "sources.md").read_text().splitlines():
        for name in re.findall(r"`((?:training|evaluation|data|teacher)\.\w+)", line):
            room, setting = name.split(".")
            fields = Recipe.model_fields[room].annotation.model_fields
            assert setting in fields, name
