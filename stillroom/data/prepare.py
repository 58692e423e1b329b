"""From sources to splits: read, drop repeats, hold out, remove near-duplicates, choose golden answers.

Promise: no prompt, and with `group_by: tools` no tool name, is in two splits; no training prompt is
like a held-out one by the configured similarity; the outcome depends on the records and the seed, not
on the order of files. The report counts every record that came in and where it went.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillroom.config import resolve_path
from stillroom.data.config import DataConfig, SourceConfig
from stillroom.data.near_duplicates import alike, user_text
from stillroom.data.reader import read
from stillroom.data.reasons import DataWarning, Reason, Rejection, excerpt
from stillroom.data.split import Group, Item, choose_training, group, hold_out, order
from stillroom.errors import NotEnoughData
from stillroom.schema import Example, Message, Split, ToolSpec, prompt_digest

CountTokens = Callable[[Sequence[Message], Sequence[ToolSpec]], int]
SAMPLES = 10
ROLES_SEEN = {"train": (True, False), "evaluate": (False, True), "any": (True, True)}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The splits, each example with its `split` set, and the report of how they came to be (JSON values).

    Training examples that show a golden answer carry `metadata["repeats"]`: how often to count them.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    report: dict[str, Any]


def prepare(config: DataConfig, seed: int, count_tokens: CountTokens | None = None) -> Prepared:
    """Read all sources of `config` and split them.

    Args:
        seed: other seeds give other splits of the same records.
        count_tokens: tokens of a prompt, in the student's tokens; needed for `max_prompt_tokens`.

    Raises:
        NotEnoughData: fewer records than `minimum`, or than the splits need.
        ConfigError, DataError: a source does not exist, or `max_prompt_tokens` has nothing to count with.
    """
    intake = _Intake(config, count_tokens)
    for source in config.sources:
        intake.take(source)
    items = intake.items()
    if len(items) < config.minimum:
        raise NotEnoughData(_too_few(config, len(items), intake.reasons))
    groups = group(items, seed, by_tools=config.group_by == "tools")
    test, groups = hold_out(groups, "test", config.test, balance=config.balance)
    validation, groups = hold_out(groups, "validation", config.validation, balance=config.balance)
    held_out = [item.example for item in (*test, *validation)]
    pool = [item for each in groups for item in each.members if item.may_train]
    pool, removed = _without_near_duplicates(pool, held_out, config.near_duplicates)
    train = choose_training(pool, config.train, seed, balance=config.balance)
    shown = _golden_keys(train, config.golden.fraction, seed)
    splits = {
        "train": tuple(_for_training(item, item.key in shown, config.golden.upsample) for item in train),
        "validation": tuple(replace(item.example, split="validation") for item in validation),
        "test": tuple(replace(item.example, split="test") for item in test),
    }
    report = _report(intake, splits, removed, groups, len(items))
    return Prepared(splits["train"], splits["validation"], splits["test"], report)
