"""Which records test, validate and train: by content, never by position.

    1. Records that must stay together form groups: with `tools`, the connected components of shared
       tool names; otherwise each record is one.
    2. Groups are ordered by a hash of their content and the seed. Test, then validation, take whole
       groups in that order while these fit. Groups too large to hold out go to training.
    3. Where that does not fill a split, groups are cut: the split takes what it needs, and the rest of
       the group is left out of everything.
    4. Training takes what remains, in hash order.

Promise: the same records and seed give the same splits in whatever order the files are read, adding a
record moves few others, and no group has members in two splits.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from stillroom.errors import NotEnoughData
from stillroom.schema import Example, Split

GIANT_SHARE = 0.1
"""A group of more than this share of a held-out split is left to training while others can fill the split."""


@dataclass(frozen=True, slots=True)
class Item:
    """A record as the split sees it: its content's digest, and which sides it may go to."""

    example: Example
    key: str
    may_train: bool = True
    may_evaluate: bool = True


@dataclass(slots=True)
class Group:
    """Records that share a tool, directly or through others."""

    members: list[Item]
    rank: str
    must_evaluate: bool = field(init=False)
    wasteful: bool = field(init=False)

    def __post_init__(self) -> None:
        self.must_evaluate = any(not item.may_train for item in self.members)
        self.wasteful = any(not item.may_evaluate for item in self.members)

    def by_category(self) -> Counter[str]:
        """How many of its members may be held out."""
        return Counter(item.example.category for item in self.members if item.may_evaluate)


def group(items: Iterable[Item], seed: int, *, by_tools: bool) -> list[Group]:
    """Groups in the order in which splits take them."""
    members: dict[str, list[Item]] = defaultdict(list)
    joined = _Union()
    for item in items:
        names = [f"tool {tool.name}" for tool in item.example.tools] if by_tools else []
        names = names or [f"record {item.key}"]
        for name in names:
            joined.join(names[0], name)
        members[names[0]].append(item)
    together: dict[str, list[Item]] = defaultdict(list)
    for name, found in members.items():
        together[joined.root(name)].extend(found)
    groups = []
    for found in together.values():
        found.sort(key=lambda item: order(seed, item.key))
        groups.append(Group(found, order(seed, found[0].key)))
    return sorted(groups, key=lambda each: (not each.must_evaluate, each.rank))


def hold_out(groups: list[Group], name: Split, count: int, *, balance: bool) -> tuple[list[Item], list[Group]]:
    """Choose `count` records for a held-out split; returns them and the groups that remain untouched.

    Raises:
        NotEnoughData: there are not that many, in total or of a category; says how many there are.
    """
    wanted = _quota(groups, count, balance=balance)
    chosen: list[Item] = []
    remaining: list[Group] = []
    for each in groups:
        size = each.by_category()
        giant = len(each.members) > max(2, GIANT_SHARE * count)
        if giant or each.wasteful or not size or not wanted.fits(size):
            remaining.append(each)
        else:
            chosen += [item for item in each.members if item.may_evaluate]
            wanted.take(size)
    # Not filled: cut groups, those first that lose least.
    for each in sorted(remaining, key=lambda each: (wanted.lost(each.by_category()), each.rank)):
        if wanted.filled():
            break
        taken = [item for item in each.members if item.may_evaluate and wanted.takes(item.example.category)]
        if taken:
            chosen += taken
            remaining.remove(each)
    if not wanted.filled():
        raise NotEnoughData(
            f"{name}: {count} records are wanted, {len(chosen)} can be held out; still missing: {wanted.missing()}.\n"
            f"help: lower data.{name}, raise data.max_prompt_tokens, add sources, or turn data.balance or group_by off."
        )
    return sorted(chosen, key=lambda item: item.key), remaining


def choose_training(pool: Sequence[Item], count: int | None, seed: int, *, balance: bool) -> list[Item]:
    """The training records, in a fixed random order; all of the pool if `count` is None.

    With `balance`, equal shares per category as far as the records go; the rest is filled from the others.

    Raises:
        NotEnoughData: the pool is smaller than `count`.
    """
    pool = sorted(pool, key=lambda item: order(seed, item.key))
    if count is None:
        return pool
    if len(pool) < count:
        raise NotEnoughData(
            f"train: {count} records are wanted, {len(pool)} remain after holding out and removing near-duplicates.\n"
            "help: lower data.train (or set it to null for all), or add sources."
        )
    if not balance:
        return pool[:count]
    shares = _even_shares(Counter(item.example.category for item in pool), count)
    chosen = []
    for item in pool:
        if shares[item.example.category] > 0:
            shares[item.example.category] -= 1
            chosen.append(item)
    return chosen


def order(seed: int, key: str) -> str:
    """A place in a fixed random order."""
    return hashlib.blake2b(f"{seed} {key}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class _Quota:
    """How many records a split still wants, in total or of each category."""

    def __init__(self, left: Counter[str], of: Callable[[str], str]) -> None:
        self._left, self._of = left, of

    def fits(self, size: Counter[str]) -> bool:
        needed = self._needed(size)
        return all(self._left[name] >= number for name, number in needed.items())

    def take(self, size: Counter[str]) -> None:
        self._left.subtract(self._needed(size))

    def takes(self, category: str) -> bool:
        if self._left[self._of(category)] <= 0:
            return False
        self._left[self._of(category)] -= 1
        return True

    def lost(self, size: Counter[str]) -> int:
        return sum(max(0, number - self._left[name]) for name, number in self._needed(size).items())

    def filled(self) -> bool:
        return all(number <= 0 for number in self._left.values())

    def missing(self) -> str:
        return ", ".join(f"{number} {name}".strip() for name, number in sorted(self._left.items()) if number > 0)

    def _needed(self, size: Counter[str]) -> Counter[str]:
        needed: Counter[str] = Counter()
        for category, number in size.items():
            needed[self._of(category)] += number
        return needed


def _quota(groups: Sequence[Group], count: int, *, balance: bool) -> _Quota:
    if not balance:
        return _Quota(Counter({"": count}), lambda category: "")
    categories = sorted({item.example.category for each in groups for item in each.members if item.may_evaluate})
    if not categories:
        return _Quota(Counter({"": count}), lambda category: "")
    share, more = divmod(count, len(categories))
    return _Quota(Counter({name: share + (i < more) for i, name in enumerate(categories)}), lambda category: category)


def _even_shares(available: Counter[str], count: int) -> Counter[str]:
    """Split `count` evenly over categories, giving what a small one cannot use to the others."""
    shares: Counter[str] = Counter()
    left = count
    names = sorted(available, key=lambda name: (available[name], name))
    for position, name in enumerate(names):
        shares[name] = min(available[name], left // (len(names) - position))
        left -= shares[name]
    return shares


class _Union:
    """Disjoint sets of names."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        parent = self._parent
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    def join(self, one: str, other: str) -> None:
        one, other = self.root(one), self.root(other)
        # The smaller name wins, so that the outcome does not depend on the order of joining.
        self._parent[max(one, other)] = min(one, other)
