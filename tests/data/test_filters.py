"""Metadata filters select what `requestMetadataFilters` of the hosted service would."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom.config import build_config
from stillroom.data import DataConfig, read
from stillroom.data.filters import check_filter, matches
from stillroom.errors import ConfigError
from stillroom.schema import Example
from tests.data.conftest import Write
from tests.data.records import log

MINE = {"equals": {"project": "Mine"}}
NOT_MINE = {"notEquals": {"project": "Mine"}}
HIGH = {"equals": {"priority": "High"}}


@pytest.mark.parametrize(
    ("where", "metadata", "selected"),
    [
        (None, {}, True),
        (MINE, {"project": "Mine"}, True),
        (MINE, {"project": "mine"}, False),
        (MINE, {}, False),
        (NOT_MINE, {"project": "Mine"}, False),
        (NOT_MINE, {"project": "Other"}, True),
        (NOT_MINE, {}, True),
        ({"andAll": [MINE, HIGH]}, {"project": "Mine", "priority": "High"}, True),
        ({"andAll": [MINE, HIGH]}, {"project": "Mine"}, False),
        ({"orAll": [MINE, HIGH]}, {"priority": "High"}, True),
        ({"orAll": [MINE, HIGH]}, {"priority": "Low"}, False),
        ({"orAll": [{**MINE, **{"notEquals": {"priority": "Low"}}}]}, {"project": "Mine", "priority": "Low"}, False),
        ({"orAll": [{**MINE, **{"notEquals": {"priority": "Low"}}}]}, {"project": "Mine"}, True),
    ],
)
def test_a_filter_selects(where: Any, metadata: dict[str, str], selected: bool) -> None:
    if where is not None:
        check_filter(where)

    assert matches(where, metadata) is selected


@pytest.mark.parametrize(
    "where",
    [
        {},
        [],
        "project=Mine",
        {"equals": {}},
        {"equals": {"a": "1", "b": "2"}},
        {"equals": {"a": 1}},
        {"equals": "a"},
        {**MINE, **NOT_MINE},
        {**MINE, "andAll": [HIGH]},
        {"andAll": []},
        {"andAll": [MINE] * 17},
        {"andAll": MINE},
        {"andAll": [{"orAll": [MINE]}]},
        {"andAll": [{}]},
        {"not": MINE},
    ],
)
def test_a_malformed_filter_is_refused_wherever_it_is_given(write: Write, where: Any) -> None:
    path = write("a.jsonl", [log()])

    with pytest.raises(ConfigError):
        read(path, where=where)
    with pytest.raises(ConfigError):
        build_config(DataConfig, {"sources": [{"path": str(path), "where": where}]}, "recipe")


def test_a_filter_applies_to_the_records_of_a_log(write: Write) -> None:
    records = [log(requestMetadata={"project": name}, requestId=name) for name in ("Mine", "Other", "Mine")]

    found = list(read(write("a.jsonl", [*records, log(requestId="none")]), where=NOT_MINE))

    assert [each.id for each in found if isinstance(each, Example)] == ["Other", "none"]
