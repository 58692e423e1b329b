"""Every interval and test against an independent computation, and the gap's interval against the truth."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.evaluation import statistics

scipy_stats = pytest.importorskip("scipy.stats")
np = pytest.importorskip("numpy")


@given(st.integers(1, 2000), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_wilson_agrees_with_scipy(n, data, confidence):
    k = data.draw(st.integers(0, n))
    ours = statistics.wilson(k, n, confidence=confidence)
    theirs = scipy_stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert ours.value == k / n
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


def test_wilson_of_nothing_knows_nothing_and_refuses_impossible_counts():
    nothing = statistics.wilson(0, 0)
    assert (nothing.low, nothing.high, nothing.n) == (0, 1, 0)
    with pytest.raises(ValueError, match="5 successes of 4"):
        statistics.wilson(5, 4)


@given(st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_two_sided_binomial_test(b, c):
    theirs = scipy_stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert statistics.mcnemar_exact(b, c) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 50), (0, 5, 40), (1, 1, 200), (90, 60, 240), (7, 0, 9), (0, 0, 30)])
def test_tango_limits_are_where_a_numeric_score_test_just_rejects(b, c, n):
    """Independent: the nuisance parameter is found by numeric maximum likelihood, not by Tango's closed form."""
    from scipy.optimize import minimize_scalar

    interval = statistics.paired_difference(b, c, n)
    for delta in (interval.low, interval.high):

        def minus_log_likelihood(p21: float, delta: float = delta) -> float:
            cells = ((b, p21 + delta), (c, p21), (n - b - c, 1 - 2 * p21 - delta))
            return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

        bounds = (max(0.0, -delta), (1 - delta) / 2)
        p21 = minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        z = (b - c - n * delta) / math.sqrt(n * (2 * p21 + delta * (1 - delta)))
        assert abs(z) == pytest.approx(1.959964, abs=2e-3)
    assert interval.low <= interval.value <= interval.high


@pytest.mark.parametrize(("b", "c", "n"), [(30, 0, 30), (0, 30, 30), (0, 0, 1)])
def test_difference_interval_stays_within_minus_one_and_one(b, c, n):
    interval = statistics.paired_difference(b, c, n)
    assert -1 <= interval.low <= interval.value <= interval.high <= 1


def scores(rng: random.Random, n: int, *shares: float) -> list[list[float]]:
    """Right and wrong answers of several models, correlated over items as real ones are."""
    hard = [rng.random() for _ in range(n)]
    return [[float(0.5 * h + 0.5 * rng.random() < _cut(share)) for h in hard] for share in shares]


def _cut(share: float) -> float:
    """Where 0.5 U + 0.5 V, triangular on 0..1, has this mass below."""
    return math.sqrt(share / 2) if share <= 0.5 else 1 - math.sqrt((1 - share) / 2)


def test_gap_interval_agrees_with_scipys_paired_bootstrap():
    base, teacher, student = scores(random.Random(1), 240, 0.02, 0.5, 0.36)
    ours = statistics.gap_closed(base, teacher, student, samples=8000)

    def closed(b, t, s, axis=-1):
        return (s.mean(axis) - b.mean(axis)) / (t.mean(axis) - b.mean(axis))

    theirs = scipy_stats.bootstrap(
        (np.array(base), np.array(teacher), np.array(student)), closed, paired=True, vectorized=True, n_resamples=8000,
        method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert ours.value == pytest.approx(closed(*map(np.array, (base, teacher, student))))
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.02), pytest.approx(theirs.high, abs=0.02))
    assert ours.low < ours.value < ours.high


def test_gap_interval_agrees_with_enumerating_every_resample():
    """Brute force: four items have 256 ordered resamples, all equally likely."""
    base, teacher, student = [0, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1]
    ours = statistics.gap_closed(base, teacher, student, samples=60_000)
    undefined = 0
    for draw in itertools.product(range(4), repeat=4):
        b, t = sum(base[i] for i in draw), sum(teacher[i] for i in draw)
        undefined += t <= b
    assert ours.value == pytest.approx(0.5)
    assert ours.undefined_share == pytest.approx(undefined / 256, abs=0.006)
    assert ours.low is None
    assert ours.high is None
    assert "resamples" in ours.reason


def test_gap_without_a_leading_teacher_is_undefined_and_says_why():
    found = statistics.gap_closed([1, 1, 0], [1, 0, 0], [1, 1, 1], samples=200)
    assert found.value is None
    assert found.low is None
    assert "does not lead" in found.reason
    assert statistics.gap_closed([], [], []).reason == "no items"
    with pytest.raises(ValueError, match=r"shorter|longer"):
        statistics.gap_closed([1], [1, 0], [1])


def test_gap_may_pass_one_and_fall_below_zero():
    base, teacher = [0.0] * 60 + [1.0] * 20, [0.0] * 30 + [1.0] * 50
    assert statistics.gap_closed(base, teacher, [1.0] * 80, samples=200).value > 1
    assert statistics.gap_closed(base, teacher, [0.0] * 80, samples=200).value < 0


def coverage(trials: int, samples: int, n: int, shares: tuple[float, float, float]) -> float:
    """How often the interval holds the true value, over data sets of one stream for each case."""
    true = (shares[2] - shares[0]) / (shares[1] - shares[0])
    rng, hits = random.Random(f"data {shares}"), 0
    for trial in range(trials):
        found = statistics.gap_closed(*scores(rng, n, *shares), samples=samples, seed=trial)
        hits += (found.low is None or found.low <= true) and (found.high is None or true <= found.high)
    return hits / trials


def coverage_due(trials: int, samples: int) -> tuple[float, float]:
    """What so many trials of a right 95% interval may show: three binomial standard errors about its level, and 0.01.

    An interval between order statistics of few resamples is narrower than its nominal level, by an exact amount: the
    k-th of B has k / (B + 1) below it, and the percentile lies at k = 0.025 (B - 1) + 1. The 0.01 is for the
    percentile method at a few hundred items; a computation apart from ours (numpy's multinomial, 6,000 trials of each
    case below with 600 resamples) found it 0.001 to 0.006 under its level.
    """
    level = 1 - 2 * (0.025 * (samples - 1) + 1) / (samples + 1)
    margin = 3 * math.sqrt(level * (1 - level) / trials) + 0.01
    return level - margin, level + margin


def test_gap_interval_covers_the_truth_as_often_as_it_says_small():
    low, high = coverage_due(120, 200)
    assert low <= coverage(120, 200, 120, (0.02, 0.5, 0.36)) <= high


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(0.0, 0.49, 0.36), (0.1, 0.5, 0.45), (0.05, 0.4, 0.1)])
def test_gap_interval_covers_the_truth_as_often_as_it_says(shares):
    low, high = coverage_due(1500, 200)
    assert low <= coverage(1500, 200, 240, shares) <= high


def test_mean_interval_agrees_with_scipys_bootstrap():
    rng = random.Random(4)
    values = [rng.random() ** 2 for _ in range(150)]
    ours = statistics.mean_interval(values, samples=6000)
    theirs = scipy_stats.bootstrap(
        (np.array(values),), np.mean, n_resamples=6000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.004)
    assert ours.high == pytest.approx(theirs.high, abs=0.004)


def test_sign_flip_p_value_agrees_with_enumerating_every_flip():
    first, second = [0.9, 0.7, 0.8, 0.6, 0.9, 0.5, 0.7], [0.4, 0.6, 0.7, 0.7, 0.3, 0.4, 0.2]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    totals = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=7)
    ]
    exact = sum(total >= abs(sum(differences)) - 1e-12 for total in totals) / len(totals)
    _, p_value = statistics.paired_mean_difference(first, second, samples=20_000)
    assert p_value == pytest.approx(exact, abs=0.01)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_percentile_agrees_with_numpy(values, share):
    assert statistics.percentile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [5, 6, 30, 31, 200])
def test_median_interval_takes_the_tightest_ranks_that_hold_the_level(n):
    interval = statistics.median_interval([float(i) for i in range(1, n + 1)])
    rank = int(interval.low)
    covered = 1 - 2 * scipy_stats.binom.cdf(rank - 1, n, 0.5)
    assert interval.high == n + 1 - rank
    if n >= 6:
        assert covered >= 0.95
        assert 1 - 2 * scipy_stats.binom.cdf(rank, n, 0.5) < 0.95
    else:
        assert (interval.low, interval.high) == (1, n)  # too few for the level: the whole range


def test_the_same_seed_gives_the_same_interval():
    columns = scores(random.Random(3), 50, 0.1, 0.6, 0.4)
    assert statistics.gap_closed(*columns, samples=300, seed=7) == statistics.gap_closed(*columns, samples=300, seed=7)
