"""Scoring of labels: which one an answer names, and how well labels are told apart.

A label is read from text without case, punctuation and markup. An answer that is just a label gives it; otherwise
the one label that it mentions; an answer that mentions none (`no_label`) or several (`ambiguous`) is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from stillroom.errors import DataError
from stillroom.evaluation.results import ItemResult
from stillroom.evaluation.scoring import CUT_OFF, Verdict
from stillroom.schema import Completion, Example

NO_LABEL, AMBIGUOUS, WRONG_LABEL = "no_label", "ambiguous", "wrong_label"
_MARKUP = re.compile(r"[^\w]+")
_PREFIX = re.compile(r"^(?:the )?(?:label|class|category|answer|sentiment|intent)(?: is)? ")


class Classification:
    """Accuracy with precision, recall and F1, macro and micro.

    Args:
        labels: those that exist; empty takes those of the examples.
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = tuple(labels)

    def check(self, examples: Sequence[Example]) -> None:
        """Every example has a label, and one that exists; no two labels read the same."""
        for example in examples:
            if not isinstance(example.expected, str) or not _plain(example.expected):
                raise DataError(
                    f"held-out example {example.id!r} ({example.source or 'unknown source'}) has no label to expect.\n"
                    "help: give every held-out record its label as text."
                )
        self.labels = self.labels or tuple(sorted({example.expected for example in examples}))
        plain = [_plain(label) for label in self.labels]
        if len(set(plain)) < len(plain):
            raise DataError(f"labels {', '.join(self.labels)} differ only in case or punctuation; rename them.")
        strange = sorted({example.expected for example in examples} - set(self.labels))
        if strange:
            raise DataError(
                f"labels {', '.join(strange)} occur in the data, but not in evaluation.labels.\nhelp: add them there."
            )

    def score(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per answer, in order."""
        return [self._verdict(example, answer) for example, answer in zip(examples, completions, strict=True)]

    def extra(self, items: Sequence[ItemResult]) -> dict[str, Any]:
        """Precision, recall and F1: macro, micro, and by label."""
        return classification_figures([(item.expected, item.label) for item in items], self.labels)

    def _verdict(self, example: Example, completion: Completion) -> Verdict:
        found = read_label(completion.message.content, self.labels)
        if len(found) == 1:
            label = found[0]
            if label == example.expected:
                return Verdict(True, 1.0, valid=True, label=label)
            return Verdict(False, 0.0, WRONG_LABEL, f"wanted {example.expected}, got {label}", valid=True, label=label)
        if found:
            return Verdict(False, 0.0, AMBIGUOUS, f"the answer names {', '.join(found)}", valid=False)
        kind = CUT_OFF if completion.finish_reason == "length" else NO_LABEL
        return Verdict(False, 0.0, kind, f"wanted {example.expected}, but the answer names no label", valid=False)


def read_label(text: str, labels: Sequence[str]) -> list[str]:
    """The labels that a text names: the one that it is, or all that it mentions as whole words.

    Where one label contains another (`not spam`, `spam`), the longer one is read first and not read again.
    """
    plain = _plain(text)
    bare = _PREFIX.sub("", plain)
    for label in labels:
        if _plain(label) in (plain, bare):
            return [label]
    rest, found = f" {plain} ", []
    for label in sorted(labels, key=lambda label: -len(_plain(label))):
        word = f" {_plain(label)} "
        if word in rest:
            found.append(label)
            rest = rest.replace(word, " | ")
    return found


def classification_figures(pairs: Sequence[tuple[str, str | None]], labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of (expected, read) pairs; an unread label counts against recall only.

    A label that is never read has precision 0, as in scikit-learn with `zero_division=0`. Macro figures average over
    the labels, micro figures over all decisions. Source: Sokolova and Lapalme 2009, Inf. Process. Manag. 45:427.
    """
    table: dict[str, Any] = {}
    for label in labels:
        hits = sum(expected == read == label for expected, read in pairs)
        read, wanted = sum(r == label for _, r in pairs), sum(e == label for e, _ in pairs)
        table[label] = {**_rates(hits, read, wanted), "n": wanted}
    hits = sum(expected == read for expected, read in pairs)
    micro = _rates(hits, sum(read is not None for _, read in pairs), len(pairs))
    macro = {name: sum(row[name] for row in table.values()) / max(1, len(table)) for name in micro}
    out: dict[str, Any] = {f"macro_{name}": value for name, value in macro.items()}
    out |= {f"micro_{name}": value for name, value in micro.items()}
    return {**out, "labels": table}


def _rates(hits: int, read: int, wanted: int) -> dict[str, float]:
    precision, recall = (hits / read if read else 0.0), (hits / wanted if wanted else 0.0)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def _plain(text: str) -> str:
    return _MARKUP.sub(" ", text.replace("_", " ").casefold()).strip()
