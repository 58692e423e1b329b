"""Prompt insights: how many records can be used, and for each that cannot, where, why and what to change.

Promise: memory does not grow with the files, save for eight bytes a record to find repeats (4 MiB for
150,000). Every rejection and warning goes to a file as it is found; only the first of each reason are
kept for the page.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from stillroom.data.answers import prompt_key
from stillroom.data.config import DataConfig, ReadLimits
from stillroom.data.digests import DigestSet
from stillroom.data.reader import read
from stillroom.data.reasons import DataWarning, Reason, Rejection
from stillroom.schema import Example
from stillroom.storage import write_atomic
from stillroom.telemetry import progress

MINIMUM: int = DataConfig.model_fields["minimum"].default
KEPT_PER_REASON = 20
MOST_FILES = 1000


@dataclass(slots=True)
class Insights:
    """What `check` found.

    Attributes:
        paths: what was checked. minimum: accepted records that are asked for.
        accepted, rejected, warned: records; a warned one is accepted too.
        labelled: accepted records that carry an answer.
        by_reason: how often each reason was found, rejections and warnings.
        by_category: accepted records by category.
        by_file: accepted and rejected records of the first 1,000 files.
        samples: the first rejections and warnings of each reason.
        listed_in: the file that lists all of them, or None.
    """

    paths: tuple[str, ...]
    minimum: int = MINIMUM
    accepted: int = 0
    rejected: int = 0
    warned: int = 0
    labelled: int = 0
    by_reason: Counter[Reason] = field(default_factory=Counter)
    by_category: Counter[str] = field(default_factory=Counter)
    by_file: dict[str, list[int]] = field(default_factory=dict)
    samples: dict[Reason, list[Rejection | DataWarning]] = field(default_factory=dict)
    listed_in: str | None = None

    @property
    def enough(self) -> bool:
        """Whether as many records were accepted as are asked for."""
        return self.accepted >= self.minimum

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "paths": list(self.paths),
            "accepted": self.accepted,
            "rejected": self.rejected,
            "warned": self.warned,
            "labelled": self.labelled,
            "minimum": self.minimum,
            "enough": self.enough,
            "by_reason": {reason.value: count for reason, count in self.by_reason.most_common()},
            "by_category": dict(self.by_category.most_common()),
            "by_file": {file: {"accepted": good, "rejected": bad} for file, (good, bad) in self.by_file.items()},
            "help": {reason.value: reason.help for reason in self.by_reason},
            "samples": {reason.value: [found.to_dict() for found in kept] for reason, kept in self.samples.items()},
            "listed_in": self.listed_in,
        }

    def to_text(self) -> str:
        """All of it for a terminal: the verdict, then a line for each reason with its first place."""
        total = self.accepted + self.rejected
        verdict = "enough" if self.enough else f"not enough: {self.minimum:,} are asked for"
        lines = [f"{self.accepted:,} of {total:,} records accepted ({verdict}), {self.warned:,} with a warning"]
        for reason, count in sorted(self.by_reason.items(), key=lambda pair: (pair[0].is_warning, -pair[1])):
            first = self.samples[reason][0]
            place = f"{first.file}:{first.line}" if first.line else first.file
            lines += [f"{count:>9,}  {reason}{' (warning)' * reason.is_warning}, first in {place}: {first.message}"]
            lines += [f"{'':9}  {reason.help}"]
        return "\n".join(lines).encode("utf-8", "replace").decode()

    def to_html(self, path: str | Path) -> Path:
        """Write the page: one file, readable offline."""
        from stillroom.data.page import render

        write_atomic(path, render(self).encode("utf-8", "replace"))
        return Path(path)


def check(
    *paths: str | Path,
    format: str = "auto",
    where: Mapping[str, Any] | None = None,
    limits: ReadLimits | None = None,
    model: str | None = None,
    minimum: int = MINIMUM,
    out: str | Path | None = None,
) -> Insights:
    """Read every record of `paths` as a distillation would, and say what became of it.

    Args:
        format, where, limits, model: as `read` takes them.
        minimum: accepted records that are enough; by default what a recipe's `data.minimum` is by default.
        out: a folder for `rejected.jsonl`, which lists every rejection and warning as they are found, and
            `report.html`, the page.

    Raises:
        DataError: a path does not exist. ConfigError: `where` or `format` is wrong.
    """
    insights = Insights(tuple(str(path) for path in paths), minimum)
    insights.listed_in = str(Path(out, "rejected.jsonl")) if out is not None else None
    taking = _Taking(insights)
    with _listing(insights.listed_in) as listing, progress("checking", unit="records") as bar:
        for path in paths:
            for finding in read(path, format, where=where, limits=limits, model=model):
                if isinstance(finding, Example):
                    finding = taking.example(finding) or finding
                if not isinstance(finding, Example):
                    taking.fault(finding, listing)
                if (insights.accepted + insights.rejected) % 500 == 0:
                    bar.advance(insights.accepted + insights.rejected - bar.done)
        bar.advance(insights.accepted + insights.rejected - bar.done, rejected=insights.rejected)
    if out is not None:
        insights.to_html(Path(out, "report.html"))
    return insights


class _Taking:
    """Counts findings as they come; knows which prompts came before, and what the last example was."""

    def __init__(self, insights: Insights) -> None:
        self._insights = insights
        self._prompts = DigestSet()
        self._repeated = ""  # where the last repeat stands: warnings about it are left out
        self._unwarned = ""  # the accepted record that the next warnings are about, until it is counted

    def example(self, example: Example) -> Rejection | None:
        """Accept an example, or say that it repeats an earlier one."""
        file, _, line = example.source.rpartition(":")
        if not self._prompts.add(prompt_key(example)):
            self._repeated = example.source
            message = "the same prompt with the same tools came before"
            return Rejection(file, int(line), Reason.DUPLICATE_PROMPT, message)
        insights = self._insights
        insights.accepted += 1
        insights.labelled += bool(example.targets)
        insights.by_category[example.category] += 1
        _count_file(insights, file, 0)
        self._unwarned = example.source
        return None

    def fault(self, finding: Rejection | DataWarning, listing: IO[str] | None) -> None:
        """Count, keep and list a rejection or warning."""
        insights = self._insights
        if isinstance(finding, Rejection):
            insights.rejected += 1
            _count_file(insights, finding.file, 1)
        else:
            place = f"{finding.file}:{finding.line}"
            if place == self._repeated:
                return
            if place == self._unwarned:
                insights.warned, self._unwarned = insights.warned + 1, ""
        insights.by_reason[finding.reason] += 1
        kept = insights.samples.setdefault(finding.reason, [])
        if len(kept) < KEPT_PER_REASON:
            kept.append(finding)
        if listing is not None:
            listing.write(json.dumps(finding.to_dict()) + "\n")


def _count_file(insights: Insights, file: str, side: int) -> None:
    counts = insights.by_file.get(file)
    if counts is None:
        if len(insights.by_file) >= MOST_FILES:
            return
        counts = insights.by_file[file] = [0, 0]
    counts[side] += 1


@contextlib.contextmanager
def _listing(path: str | None) -> Iterator[IO[str] | None]:
    if path is None:
        yield None
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as file:
        yield file
