"""Intervals and tests for shares measured on the same items.

Each function names its source and is checked in the tests against an independent computation.
Standard library only: a remote model is evaluated without numpy. Everything is deterministic by `seed`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean

from pydantic import BaseModel

BOOTSTRAP_SAMPLES = 10_000


class Interval(BaseModel, frozen=True, extra="forbid"):
    """A measured value with its interval, the number of items behind it, and how it was computed."""

    value: float
    low: float
    high: float
    n: int
    method: str


class GapClosed(BaseModel, frozen=True, extra="forbid"):
    """The share of the gap from base to teacher that the student closed.

    Attributes:
        value: (student - base) / (teacher - base), or None where the teacher does not lead.
        low, high: its interval; None means unbounded on that side: the gap itself is not certain enough.
        reason: why a figure is missing; empty when none is.
        base, teacher, student: the means. n: items. samples: resamples.
        undefined_share: share of resamples in which the teacher did not lead.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str
    base: float
    teacher: float
    student: float
    n: int
    samples: int
    undefined_share: float = 0.0


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share, without continuity correction.

    No items give the value 0 with the interval 0 to 1: nothing is known.

    Raises:
        ValueError: successes do not lie in 0..n.

    Source: Wilson 1927, JASA 22:209; recommended by Brown, Cai and DasGupta 2001, Statistical Science 16:101.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} items")
    if n == 0:
        return Interval(value=0.0, low=0.0, high=1.0, n=0, method="wilson")
    z = _z(confidence)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(value=share, low=low, high=high, n=n, method="wilson")


def mean_interval(
    scores: Sequence[float], *, confidence: float = 0.95, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> Interval:
    """The mean of graded scores with a percentile bootstrap interval over items.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    if not scores:
        return Interval(value=0.0, low=0.0, high=1.0, n=0, method="bootstrap")
    means = _resample([(score,) for score in scores], lambda means: means[0], samples, seed)
    low, high = _percentiles(means, confidence)
    return Interval(value=fmean(scores), low=low, high=high, n=len(scores), method="bootstrap")


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two models are right equally often on the same items.

    Args:
        only_first, only_second: items that just one of the two got right. Items on which they agree do not matter.

    Source: McNemar 1947, Psychometrika 12:153, with the exact binomial distribution in place of chi-squared.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**n))


def paired_difference(only_first: int, only_second: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Difference of two shares measured on the same n items (first minus second), with Tango's score interval.

    Holds its level also where the models agree on almost every item, where the Wald interval collapses.

    Source: Tango 1998, Statistics in Medicine 17:891, equations 6 and 9.
    """
    if n == 0:
        return Interval(value=0.0, low=-1.0, high=1.0, n=0, method="tango")
    value, z = (only_first - only_second) / n, _z(confidence)

    def excess(delta: float) -> float:
        return _tango_z(only_first, only_second, n, delta)

    # The statistic falls as delta grows: +z at the lower limit, -z at the upper.
    low = -1.0 if only_second == n else _root(lambda d: excess(d) - z, -1.0, value)
    high = 1.0 if only_first == n else _root(lambda d: excess(d) + z, value, 1.0)
    return Interval(value=value, low=low, high=high, n=n, method="tango")


def paired_mean_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> tuple[Interval, float]:
    """Difference of two mean scores on the same items: percentile bootstrap interval, and sign-flip p-value.

    Source: Efron and Tibshirani 1993, chapters 13 and 15; the p-value counts the observed assignment too
    (Phipson and Smyth 2010, arXiv:1603.05766).
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences, confidence=confidence, samples=samples, seed=seed)
    if not differences:
        return interval.model_copy(update={"low": -1.0, "high": 1.0}), 1.0
    rng, observed = random.Random(seed), abs(sum(differences)) - 1e-12
    hits = 0
    for _ in range(samples):
        signs = rng.getrandbits(len(differences))
        total = sum(d if signs >> i & 1 else -d for i, d in enumerate(differences))
        hits += abs(total) >= observed
    return interval, (hits + 1) / (samples + 1)


def gap_closed(
    base: Sequence[float],
    teacher: Sequence[float],
    student: Sequence[float],
    *,
    confidence: float = 0.95,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> GapClosed:
    """(student - base) / (teacher - base) over the means, with a paired percentile bootstrap interval over items.

    A resample in which the teacher does not lead has no ratio; it counts as the worst case at both ends, so the
    interval is conservative, and a bound that falls on such resamples is None (unbounded). The value may exceed 1
    (the student beats its teacher) or be negative (training hurt).

    Args:
        base, teacher, student: score per item, in the same order of items.

    Raises:
        ValueError: different lengths.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile interval, cases resampled whole).
    """
    rows = list(zip(base, teacher, student, strict=True))
    if not rows:
        return GapClosed(
            value=None, low=None, high=None, reason="no items", base=0, teacher=0, student=0, n=0, samples=0
        )
    means = [fmean(column) for column in zip(*rows, strict=True)]
    known = GapClosed(
        value=None,
        low=None,
        high=None,
        reason="",
        base=means[0],
        teacher=means[1],
        student=means[2],
        n=len(rows),
        samples=samples,
    )
    value = _closed(means)
    if math.isnan(value):
        reason = f"the teacher ({means[1]:.3f}) does not lead the base ({means[0]:.3f}), so there is no gap to close"
        return known.model_copy(update={"reason": reason, "undefined_share": 1.0})
    drawn = _resample(rows, _closed, samples, seed)
    undefined = sum(map(math.isnan, drawn)) / samples
    low = _percentiles([-math.inf if math.isnan(x) else x for x in drawn], confidence)[0]
    high = _percentiles([math.inf if math.isnan(x) else x for x in drawn], confidence)[1]
    unbounded = math.isinf(low) or math.isinf(high)
    reason = f"the teacher fails to lead the base in {undefined:.0%} of the resamples" if unbounded else ""
    return known.model_copy(
        update={
            "value": value,
            "low": None if math.isinf(low) else low,
            "high": None if math.isinf(high) else high,
            "reason": reason,
            "undefined_share": undefined,
        }
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Value below which `share` of the values lie, linear between order statistics (Hyndman and Fan 1996, type 7).

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    if ordered[below] == ordered[above]:
        return ordered[below]  # also keeps two infinities from giving nan
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The median with the interval between two order statistics, whatever the distribution.

    Source: David and Nagaraja 2003, Order Statistics, section 7.1.
    """
    ordered, n = sorted(values), len(values)
    rank, covered = 0, 1.0
    # The k-th smallest and k-th largest value cover the median unless fewer than k values lie on one side of it.
    below, term = 0, 1  # sum of binomial coefficients under k, and the next one
    for k in range(1, n // 2 + 1):
        below += term
        term = term * (n - k + 1) // k
        covered_k = 1 - 2 * below / 2**n
        if covered_k < confidence:
            break
        rank, covered = k - 1, covered_k
    method = f"order statistics ({covered:.3f})" if covered < 1 else "range"
    return Interval(value=percentile(ordered, 0.5), low=ordered[rank], high=ordered[n - 1 - rank], n=n, method=method)


def _closed(means: Sequence[float]) -> float:
    base, teacher, student = means
    return (student - base) / (teacher - base) if teacher - base > 1e-12 else math.nan


def _resample(
    rows: Sequence[tuple[float, ...]], statistic: Callable[[list[float]], float], samples: int, seed: int
) -> list[float]:
    """`statistic` of the column means of `samples` resamples of the rows.

    Equal rows are counted together: right-or-wrong items make at most eight different ones.
    """
    rng, n = random.Random(seed), len(rows)
    distinct = list(dict.fromkeys(rows))
    number = {row: i for i, row in enumerate(distinct)}
    cells = [number[row] for row in rows]  # small integers count several times faster than tuples
    out = []
    for _ in range(samples):
        counts = Counter(rng.choices(cells, k=n))
        columns = zip(*([value * times for value in distinct[cell]] for cell, times in counts.items()), strict=True)
        out.append(statistic([sum(column) / n for column in columns]))
    return out


def _percentiles(values: Sequence[float], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    return percentile(values, tail), percentile(values, 1 - tail)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _tango_z(b: int, c: int, n: int, delta: float) -> float:
    """Score statistic of the hypothesis that the true difference is `delta`."""
    linear = -b - c + (2 * n - b + c) * delta
    root = math.sqrt(max(0.0, linear * linear - 8 * n * (-c * delta * (1 - delta))))
    p21 = (root - linear) / (4 * n)  # the share of `c` that is most likely under the hypothesis
    variance = n * (2 * p21 + delta * (1 - delta))
    gap = b - c - n * delta
    if variance <= 1e-15:
        return 0.0 if abs(gap) < 1e-12 else math.copysign(math.inf, gap)
    return gap / math.sqrt(variance)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between `low` and `high`, by bisection."""
    for _ in range(80):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
