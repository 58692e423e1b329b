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

    openai, bedrock, logged, question, answer = blocks("jsonl")
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "possible_answer" / "bfcl.jsonl").write_text(answer, encoding="utf-8")
    found = {}
    for name, block in (("openai", openai), ("bedrock", bedrock), ("logged", logged), ("bfcl", question)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(block, encoding="utf-8")
        found[name] = list(read(path))
        assert all(isinstance(each, Example) for each in found[name]), found[name]
    for unlabelled, golden in (found["openai"], found["bedrock"]):
        assert not unlabelled.targets
        assert [tool.name for tool in unlabelled.tools] == ["get_weather"]
        assert golden.expected == [{"get_weather": {"city": ["Rome"]}}]
    assert [(target.origin, target.message.content) for target in found["logged"][0].targets] == [
        ("teacher", "Cold, 3 degrees.")
    ]
    assert found["bfcl"][0].expected == [{"get_weather": {"city": ["Oslo"]}}]


def test_the_list_of_settings_is_what_the_command_prints():
    from stillroom.pipeline.settings import page

    # To write it again: stillroom settings | sed '$d' > docs/settings.md
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page() + "\n"


def test_every_setting_is_listed_with_what_it_does():
    """Independent of the list: the classes' own fields, counted by walking their JSON schema."""
    from stillroom.pipeline import Recipe
    from stillroom.pipeline.settings import settings

    schema = Recipe.model_json_schema()
    groups = {name: set(found["properties"]) for name, found in schema["$defs"].items()} | {
        "Recipe": set(schema["properties"])
    }
    listed = settings()
    parts = {part for each in listed for part in each.name.replace("[]", "").split(".")}
    assert set().union(*groups.values()) == parts
    assert len({each.name for each in listed}) == len(listed)
    assert all(each.text and each.kind for each in listed)


def test_the_settings_of_one_section_are_its_own():
    from stillroom.errors import ConfigError
    from stillroom.pipeline.settings import settings

    assert {each.name.partition(".")[0] for each in settings("training")} == {"training"}
    assert all(each.name.startswith("data.sources[].") for each in settings("data.sources"))
    with pytest.raises(ConfigError, match="sections are name, seed, data, teacher"):
        settings("trainings")


def test_every_setting_named_in_the_sources_exists():
    from stillroom.pipeline import Recipe

    for line in (ROOT / "docs" / "sources.md").read_text().splitlines():
        for name in re.findall(r"`((?:training|evaluation|data|teacher)\.\w+)", line):
            room, setting = name.split(".")
            fields = Recipe.model_fields[room].annotation.model_fields
            assert setting in fields, name
