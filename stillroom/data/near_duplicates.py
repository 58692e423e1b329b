"""Training prompts that are too like a held-out one.

Similarity is the Jaccard index of character 5-grams of what the user says (tools and system text
left out), after lower-casing and joining words by single spaces: it needs no word boundaries, so it
holds for every script, and one changed word in a sentence of fifteen still counts as alike. The
search is exact: an inverted index over the rarest shingles (prefix filtering), then the index itself.

Source: Bayardo et al. 2007, Scaling up all pairs similarity search, section 4.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from stillroom.schema import Example

SHINGLE_CHARS = 5
_WORD = re.compile(r"\w+")


def user_text(example: Example) -> str:
    """What the user says, normalised."""
    said = " ".join(message.content for message in example.messages if message.role == "user")
    return " ".join(_WORD.findall(said.lower()))


def shingles(text: str) -> frozenset[str]:
    """All substrings of five characters; of a shorter text, the text itself."""
    return frozenset(text[i : i + SHINGLE_CHARS] for i in range(max(1, len(text) - SHINGLE_CHARS + 1)))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard index, from 0 to 1."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def alike(
    candidates: Iterable[Example], held_out: Sequence[Example], threshold: float
) -> Iterator[tuple[Example, Example, float]]:
    """Each candidate that is like a held-out example, with the most similar of these and the similarity.

    Args:
        threshold: in (0, 1]; pairs at or above it count as alike.
    """
    texts = [shingles(user_text(example)) for example in held_out]
    frequency = Counter(shingle for text in texts for shingle in text)
    index: dict[str, list[int]] = defaultdict(list)
    for position, text in enumerate(texts):
        for shingle in _prefix(text, frequency, threshold):
            index[shingle].append(position)
    for example in candidates:
        text = shingles(user_text(example))
        near = {position for shingle in _prefix(text, frequency, threshold) for position in index.get(shingle, ())}
        best = max(((similarity(text, texts[p]), -p) for p in near), default=(0.0, 0))
        if best[0] >= threshold:
            yield example, held_out[-best[1]], best[0]


def _prefix(text: frozenset[str], frequency: Counter[str], threshold: float) -> list[str]:
    """The rarest shingles: two texts at or above the threshold share at least one of theirs.

    Those that no held-out text has are the rarest of all; they take up places and need not be returned.
    """
    known = [shingle for shingle in text if shingle in frequency]
    # The small term keeps 0.8 * 5 = 4.000000000000001 from costing a shingle.
    places = len(text) - math.ceil(threshold * len(text) - 1e-9) + 1 - (len(text) - len(known))
    return sorted(known, key=lambda shingle: (frequency[shingle], shingle))[:places] if places > 0 else []
