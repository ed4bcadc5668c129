from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm
from scipy.stats import bootstrap as scipy_bootstrap

from offramp.analyse import intervals
from offramp.analyse.intervals import bootstrap, paired_difference, wilson
from offramp.errors import DataError

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys(count, level):
    expected = binomtest(*count).proportion_ci(level, method="wilson")
    assert wilson(*count, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_refuses_counts_that_do_not_fit(successes, trials):
    with pytest.raises(DataError, match=f"got {successes} of {trials}"):
        wilson(successes, trials)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_is_a_share(level):
    with pytest.raises(DataError, match="strictly between 0 and 1"):
        wilson(1, 2, level)


def constrained_statistic(gained: int, lost: int, trials: int, delta: float) -> float:
    """Tango's statistic, its nuisance share found by maximising the likelihood numerically."""

    def loss(share):  # of `lost`; that of `gained` is share + delta
        other, rest = share + delta, 1 - 2 * share - delta
        terms = ((gained, other), (lost, share), (trials - gained - lost, rest))
        return -sum(n * math.log(max(p, 1e-300)) for n, p in terms if n)

    low, high = max(0.0, -delta), (1 - delta) / 2
    share = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    variance = trials * (2 * share + delta - delta**2)
    return (gained - lost - trials * delta) / math.sqrt(variance)


@pytest.mark.parametrize(
    ("gained", "lost", "trials"), [(12, 5, 100), (0, 7, 60), (3, 0, 497), (40, 38, 90)]
)
def test_paired_difference_ends_where_the_score_test_does(gained, lost, trials):
    z = norm.ppf(0.975)
    lower, upper = paired_difference(gained, lost, trials)
    assert lower < (gained - lost) / trials < upper
    assert constrained_statistic(gained, lost, trials, lower) == pytest.approx(z, abs=1e-3)
    assert constrained_statistic(gained, lost, trials, upper) == pytest.approx(-z, abs=1e-3)


@given(st.integers(1, 300), st.data())
def test_paired_difference_mirrors_and_stays_inside(trials, data):
    gained = data.draw(st.integers(0, trials))
    lost = data.draw(st.integers(0, trials - gained))
    lower, upper = paired_difference(gained, lost, trials)
    assert -1 <= lower <= (gained - lost) / trials <= upper <= 1
    assert lower < upper
    mirrored = paired_difference(lost, gained, trials)
    assert mirrored == pytest.approx((-upper, -lower), abs=1e-9)


def test_no_disagreement_is_no_proof():
    z = norm.ppf(0.975)
    half = z**2 / (100 + z**2)  # in closed form where nothing tells the two apart
    assert paired_difference(0, 0, 100) == pytest.approx((-half, half), abs=1e-6)


def test_paired_difference_covers_as_promised():
    rng = np.random.default_rng(0)
    true = 0.04 - 0.06
    draws = rng.multinomial(200, [0.04, 0.06, 0.90], size=2000)
    hits = [
        low <= true <= high for low, high in (paired_difference(g, b, 200) for g, b, _ in draws)
    ]
    assert 0.93 <= np.mean(hits) <= 0.97


def test_paired_difference_refuses_counts_that_do_not_fit():
    with pytest.raises(DataError, match="gained=3, lost=8, trials=10"):
        paired_difference(3, 8, 10)


def test_bootstrap_is_scipys():
    values = np.random.default_rng(3).choice([0.3, 0.6, 1.1], size=200, p=[0.5, 0.3, 0.2])
    expected = scipy_bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, random_state=0
    ).confidence_interval
    assert bootstrap(values) == pytest.approx((expected.low, expected.high), abs=3e-3)


def test_bootstrap_of_a_function_of_means_keeps_rows_together():
    first = np.random.default_rng(1).normal(2, 1, 100)
    rows = np.stack([first, 2 * first], axis=1)
    assert bootstrap(rows, lambda means: means[:, 1] / means[:, 0]) == pytest.approx((2, 2))


def test_bootstrap_of_one_value_is_that_value():
    for samples, value in ((10_000, 124_567 / 1_111_110), (7, 0.1)):
        assert bootstrap(np.full(samples, value)) == (value, value)
        assert bootstrap(np.full((samples, 2), value), lambda means: means[:, 1]) == (value, value)


def test_bootstrap_holds_what_the_samples_give():
    values = np.random.default_rng(0).normal(size=40)
    for seed in range(20):
        low, high = bootstrap(values, resamples=1, seed=seed)
        assert low <= values.mean() + 1e-15
        assert values.mean() - 1e-15 <= high


def test_bootstrap_repeats_by_seed():
    values = np.arange(30.0)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_bootstrap_needs_samples():
    with pytest.raises(DataError, match="at least one sample"):
        bootstrap([])


def test_a_paired_difference_of_many_samples_ends_where_differences_do():
    for lost in (53_282_342, 999_999_999):  # what is left below is less than its own rounding
        trials = lost + 1
        lower, upper = paired_difference(0, lost, trials)
        assert lower == -1.0 < -lost / trials < upper
        mirrored = paired_difference(lost, 0, trials)
        assert mirrored == pytest.approx((-upper, -lower), abs=1e-8)


def test_bootstrap_draws_in_parts_what_it_draws_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=(50, 2))
    whole = bootstrap(values, lambda means: means[:, 1] - means[:, 0], resamples=1003)
    monkeypatch.setattr(intervals, "DRAWN", 500)  # 10 resamples of 50 values
    parts = bootstrap(values, lambda means: means[:, 1] - means[:, 0], resamples=1003)
    assert parts == pytest.approx(whole, abs=1e-12)


def test_bootstrap_keeps_no_count_of_every_sample_in_every_resample():
    values = np.random.default_rng(0).normal(size=5_000)
    tracemalloc.start()
    bootstrap(values, resamples=8_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000 * 5_000 * 8


def test_bootstrap_needs_resamples():
    with pytest.raises(DataError, match="one resample or more, got resamples=0"):
        bootstrap([1.0, 2.0], resamples=0)
