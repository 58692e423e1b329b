"""From sources to splits: read, drop repeats, hold out, remove near-duplicates, choose golden answers.

Promise: no prompt, and with `group_by: tools` no tool name, is in two splits; no training prompt is
like a held-out one by the configured similarity; the outcome depends on the records and the seed, not
on the order of files. The report counts every record that came in and where it went.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stillroom.config import resolve_path
from stillroom.data.config import DataConfig, SourceConfig
from stillroom.data.near_duplicates import alike, user_text
from stillroom.data.reader import read
from stillroom.data.reasons import DataWarning, Reason, Rejection, excerpt
from stillroom.data.split import Group, Item, choose_training, group, hold_out, order
from stillroom.errors import ConfigError, NotEnoughData
from stillroom.schema import Example, Message, ToolSpec, digest, prompt_digest, to_dict
from stillroom.telemetry import Progress, progress

CountTokens = Callable[[Sequence[Message], Sequence[ToolSpec]], int]
SAMPLES = 10


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
    with progress("reading", unit="records") as bar:
        for source in config.sources:
            intake.take(source, bar)
    items = intake.items()
    if len(items) < config.minimum:
        raise NotEnoughData(_too_few(config, len(items), intake.reasons + intake.duplicates))
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


@dataclass(slots=True)
class _SourceCount:
    source: SourceConfig
    accepted: int = 0
    repeats: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        named = self.source.model_dump(include={"path", "format", "license", "role"})
        counts = {"accepted": self.accepted, "repeats": self.repeats}
        return {**named, **counts, "rejected": dict(self.rejected), "warnings": dict(self.warnings)}


class _Intake:
    """All records that were accepted, one per prompt, and what became of the others."""

    def __init__(self, config: DataConfig, count_tokens: CountTokens | None) -> None:
        if config.max_prompt_tokens is not None and count_tokens is None:
            raise ConfigError("data.max_prompt_tokens needs a student to count tokens with, and none was given.")
        self._most, self._count = config.max_prompt_tokens, count_tokens
        self._limits = config.limits
        self._found: dict[str, list[tuple[Example, SourceConfig]]] = defaultdict(list)
        self.sources: list[_SourceCount] = []
        self.rejections: list[Rejection] = []

    @property
    def reasons(self) -> Counter[str]:
        return sum((each.rejected for each in self.sources), Counter())

    @property
    def duplicates(self) -> Counter[str]:
        return Counter({Reason.DUPLICATE_PROMPT: sum(each.repeats for each in self.sources)})

    def take(self, source: SourceConfig, bar: Progress) -> None:
        """Read one source."""
        count = _SourceCount(source)
        self.sources.append(count)
        for finding in read(
            resolve_path(source.path),
            source.format,
            where=source.where,
            limits=self._limits,
            category=source.category,
            answers=resolve_path(source.answers) if source.answers else None,
            model=source.model,
        ):
            if isinstance(finding, Example):
                bar.advance()
                self._take_example(finding, count)
            elif isinstance(finding, DataWarning):
                count.warnings[finding.reason] += 1
            else:
                self._reject(finding, count)

    def items(self) -> list[Item]:
        """One item per prompt: repeats joined, whatever order they came in.

        Where some records say what is right, only those may be held out; where none does, scoring is left to a judge.
        """
        items = [_join(key, found) for key, found in sorted(self._found.items())]
        if all(item.example.expected is None for item in items):
            return items
        return [replace(item, may_evaluate=item.may_evaluate and item.example.expected is not None) for item in items]

    def _take_example(self, example: Example, count: _SourceCount) -> None:
        if self._most is not None and self._count is not None:
            tokens = self._count(example.messages, example.tools)
            if tokens > self._most:
                message = f"has {tokens} tokens with its tools; {self._most} are allowed"
                file, _, line = example.source.rpartition(":")
                self._reject(Rejection(file, int(line), Reason.TOO_MANY_TOKENS, message), count)
                return
        if not count.source.use_answers:
            example = replace(example, targets=())
        found = self._found[prompt_digest(example.messages, example.tools)]
        if found:
            count.repeats += 1
        else:
            count.accepted += 1
        found.append((example, count.source))

    def _reject(self, rejection: Rejection, count: _SourceCount) -> None:
        count.rejected[rejection.reason] += 1
        if count.rejected[rejection.reason] <= SAMPLES:
            self.rejections.append(rejection)


def _join(key: str, found: list[tuple[Example, SourceConfig]]) -> Item:
    """One item of all records with the same prompt: every answer is kept, the strictest role holds."""
    found = sorted(found, key=lambda pair: (pair[0].id, pair[0].source))
    examples = [example for example, _ in found]
    targets = {digest(to_dict(target)): target for example in examples for target in example.targets}
    expected = next((example.expected for example in examples if example.expected is not None), None)
    joined = replace(examples[0], targets=tuple(targets.values()), expected=expected)
    roles = {source.role for _, source in found}
    held_out_only = "evaluate" in roles
    return Item(joined, key, may_train=not held_out_only, may_evaluate=held_out_only or "train" not in roles)


def _without_near_duplicates(
    pool: list[Item], held_out: list[Example], threshold: float | None
) -> tuple[list[Item], list[tuple[Example, Example, float]]]:
    if threshold is None or not held_out:
        return pool, []
    with progress("near-duplicates", len(pool), "records") as bar:
        removed = list(alike(_watched(pool, bar), held_out, threshold))
    gone = {id(example) for example, _, _ in removed}
    return [item for item in pool if id(item.example) not in gone], removed


def _watched(pool: list[Item], bar: Progress) -> Iterator[Example]:
    for item in pool:
        bar.advance()
        yield item.example


def _golden_keys(train: Sequence[Item], fraction: float, seed: int) -> set[str]:
    """The records that show their golden answer: this share of those of each category that have one."""
    known: dict[str, list[str]] = defaultdict(list)
    for item in train:
        if any(target.origin == "golden" for target in item.example.targets):
            known[item.example.category].append(item.key)
    shown: set[str] = set()
    for keys in known.values():
        keys.sort(key=lambda key: order(seed, f"golden {key}"))
        shown.update(keys[: round(fraction * len(keys))])
    return shown


def _for_training(item: Item, shows_golden: bool, repeats: int) -> Example:
    example = replace(item.example, split="train")
    if shows_golden:
        return replace(example, metadata={**example.metadata, "repeats": repeats}) if repeats > 1 else example
    return replace(example, targets=tuple(target for target in example.targets if target.origin != "golden"))


def _report(
    intake: _Intake,
    splits: Mapping[str, tuple[Example, ...]],
    removed: list[tuple[Example, Example, float]],
    untouched: list[Group],
    accepted: int,
) -> dict[str, Any]:
    used = sum(len(split) for split in splits.values())
    remaining = sum(len(each.members) for each in untouched)
    in_held_out = len(splits["test"]) + len(splits["validation"])
    tools = {name: {tool.name for example in split for tool in example.tools} for name, split in splits.items()}
    held_out_tools = tools["test"] | tools["validation"]
    samples = [
        {"removed": excerpt(user_text(a)), "like": excerpt(user_text(b)), "similarity": round(s, 3)}
        for a, b, s in removed[:SAMPLES]
    ]
    golden = [e for e in splits["train"] if any(target.origin == "golden" for target in e.targets)]
    return {
        "sources": [each.to_json() for each in intake.sources],
        "accepted": accepted,
        "rejected": dict(intake.reasons),
        "rejections": [rejection.to_dict() for rejection in intake.rejections],
        "warnings": dict(sum((each.warnings for each in intake.sources), Counter())),
        "repeats_dropped": sum(each.repeats for each in intake.sources),
        "splits": {name: _by_category(split) for name, split in splits.items()},
        "near_duplicates": {"removed": len(removed), "samples": samples},
        "held_out_tools": {"count": len(held_out_tools), "in_training": len(held_out_tools & tools["train"])},
        "left_out": {
            "shared_tools_with_held_out": accepted - in_held_out - remaining,
            "not_needed": remaining - len(removed) - len(splits["train"]),
        },
        "golden": {"records": len(golden), "repeats": sum(e.metadata.get("repeats", 1) for e in golden)},
        "used": used,
    }


def _by_category(examples: Iterable[Example]) -> dict[str, int]:
    counts = Counter(example.category for example in examples)
    return {"total": sum(counts.values()), **dict(sorted(counts.items()))}


def _too_few(config: DataConfig, accepted: int, reasons: Counter[str]) -> str:
    why = ", ".join(f"{name} {number}" for name, number in reasons.most_common(3)) or "none"
    return (
        f"{accepted} records were accepted, and data.minimum is {config.minimum}. Rejected: {why}.\n"
        f"help: run `stillroom data check PATH` on the sources ({', '.join(s.path for s in config.sources):.200}), "
        "add records, or lower data.minimum."
    )
