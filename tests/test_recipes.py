"""Every recipe that we ship loads, and refuses a mistyped setting with the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillroom.config import load_config
from stillroom.errors import ConfigError
from stillroom.pipeline import Recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads(path):
    assert load_config(Recipe, path).name == path.stem


def test_a_mistyped_setting_fails_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown setting 'training.epoch'; did you mean 'epochs'"):
        load_config(Recipe, RECIPES[0], ["training.epoch=3"])


def test_a_wrong_value_names_its_key_and_what_was_given():
    with pytest.raises(ConfigError, match=r"'training.epochs'.*given: 'many'"):
        load_config(Recipe, RECIPES[0], ["training.epochs=many"])


def test_a_misspelt_recipe_is_answered_with_the_near_one():
    with pytest.raises(ConfigError, match=r"Did you mean .*quickstart\.yaml"):
        load_config(Recipe, RECIPES[0].parent / "quikstart.yaml")


@pytest.mark.parametrize("override", ["training.epochs", "=3", "training.epochs=[", "seed.deep=1"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(ConfigError):
        load_config(Recipe, RECIPES[0], [override])
