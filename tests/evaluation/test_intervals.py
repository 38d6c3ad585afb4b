"""Against scipy, the bootstrap, and simulation: none of it knows our formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from agentforge.evaluation import intervals
from agentforge.evaluation.measurement import Measurement


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def clusters(seed: int, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sizes of uneven clusters whose observations resemble each other."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 20, count).astype(float)
    return sizes * generator.normal(3, 1, count) + generator.normal(0, 1, count), sizes


def bootstrap(*columns: np.ndarray) -> float:
    """The standard error of sum / sum when whole clusters are drawn anew."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(columns[0]), (4000, len(columns[0])))
    return float((columns[0][drawn].sum(1) / columns[1][drawn].sum(1)).std())


@pytest.mark.parametrize("n", [2, 3, 12, 450])
def test_a_mean_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(2, 3, n)
    found = intervals.mean(torch.from_numpy(values))
    assert found["stderr"] == pytest.approx(scipy.stats.sem(values))
    assert found["interval"] == pytest.approx(scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values)))


def test_the_error_of_a_ratio_is_the_bootstraps_of_clusters() -> None:
    sums, sizes = clusters(0)
    found = intervals.mean(torch.from_numpy(sums), torch.from_numpy(sizes), "400 clusters")
    assert found["value"] == pytest.approx(sums.sum() / sizes.sum())
    assert found["stderr"] == pytest.approx(bootstrap(sums, sizes), rel=0.05)
    assert (found["n"], found["error"]) == (int(sizes.sum()), "400 clusters")


def test_on_the_log_scale_the_interval_is_exp_of_the_interval() -> None:
    sums, sizes = (torch.from_numpy(x) for x in clusters(1, 9))
    plain, log = intervals.mean(sums, sizes), intervals.mean(sums, sizes, log=True)
    assert log["interval"] == pytest.approx(tuple(math.exp(x) for x in plain["interval"]))
    assert log["stderr"] == pytest.approx(log["value"] * plain["stderr"])
    assert math.isfinite(intervals.mean(of(1e6, 2e6), log=True)["interval"][1])


@pytest.mark.parametrize(("hits", "n"), [(0, 450), (450, 450), (1, 450), (441, 450), (1, 2), (9, 20)])
def test_a_share_of_independent_items_is_exactly_binomial(hits: int, n: int) -> None:
    found = intervals.share(of(*[1.0] * hits, *[0.0] * (n - hits)))
    exact = scipy.stats.binomtest(hits, n).proportion_ci(0.95, "exact")
    assert found["interval"] == pytest.approx((exact.low, exact.high))
    assert found["error"] == "binomial"
    low, high = Measurement(unit="share", protocol={}, **found).bounds
    assert high > low


def test_items_that_come_in_clusters_tell_less() -> None:
    """Each item twice: as much as one of each, not as two."""
    hits = of(*[1.0] * 30, *[0.0] * 10)
    once, twice = intervals.share(hits), intervals.share(2 * hits, torch.full_like(hits, 2))
    as_two = intervals.share(torch.cat([hits, hits]))
    assert twice["n"] == 80 and twice["stderr"] == pytest.approx(once["stderr"], rel=0.02)
    assert twice["interval"] == pytest.approx(once["interval"], abs=0.01)
    assert as_two["interval"][0] > twice["interval"][0] + 0.03
    assert all(0 <= end <= 1 for end in intervals.share(of(19, 20, 18), of(20, 20, 20))["interval"])


def test_what_is_kept_has_the_error_of_pairs() -> None:
    generator = np.random.default_rng(0)
    before = (generator.random(400) < 0.6).astype(float)
    now = np.where(generator.random(400) < 0.9, before, 1 - before)
    found = intervals.pairs(torch.from_numpy(now), torch.from_numpy(before))
    assert found["value"] == pytest.approx(now.mean() / before.mean())
    assert found["stderr"] == pytest.approx(bootstrap(now, before), rel=0.05)
    alone = found["value"] * math.hypot(*(math.sqrt((1 - x.mean()) / x.mean() / 400) for x in (now, before)))
    assert found["stderr"] < 0.7 * alone  # pairs tell more than two samples


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_pairs_that_do_not_differ_could_have_differed(kept: float) -> None:
    """Of 100 questions that all went the same way, up to 3.6% may go another: the exact bound of none out of 100."""
    before = of(*[1.0] * 50, *[0.0] * 50)
    low, high = intervals.pairs(kept * before, before)["interval"]
    bound = 1 - 0.025 ** (1 / 100)
    assert (low, high) == pytest.approx((kept - 2 * bound, kept + 2 * bound))
    change = intervals.pairs(before - before, torch.ones_like(before))
    assert change["interval"] == pytest.approx((-bound, bound))


def test_nothing_right_before_keeps_nothing_that_has_a_share() -> None:
    # Clusters that do not differ but in the rounding of sums are clusters that do not differ.
    found = intervals.pairs(torch.full((5,), 1.0).double(), torch.full((5,), 49.0).double())
    assert found["error"] == "binomial" and found["interval"][1] - found["interval"][0] > 1e-3
    found = intervals.pairs(torch.ones(5).double(), torch.zeros(5).double())
    assert math.isnan(found["value"]) and found["error"] == "unknown"


def test_one_cluster_has_no_error() -> None:
    found = Measurement(unit="x", protocol={}, **intervals.mean(of(3.0)))
    assert found.value == 3.0 and found.stderr is None and found.error == "unknown"


@pytest.mark.parametrize("n", [6, 9, 20, 41])
def test_the_interval_of_a_median_holds_it(n: int) -> None:
    """At least 95 times in 100, of a skewed distribution, and with the nearest order statistics that do."""
    times = np.random.default_rng(n).lognormal(0, 1, (2000, n))
    ends = [intervals.median(list(row))["interval"] for row in times]
    held = np.mean([low <= 1 <= high for low, high in ends])
    assert held >= 0.94
    inner = np.sort(times)[:, [k := list(np.sort(times[0])).index(ends[0][0]) + 1, n - 1 - k]]
    assert np.mean((inner[:, 0] <= 1) & (inner[:, 1] >= 1)) < 0.955


def test_the_standard_error_of_a_median_is_the_bootstraps() -> None:
    values = np.random.default_rng(3).lognormal(0, 0.3, 21)
    drawn = np.median(np.random.default_rng(4).choice(values, (20000, 21)), axis=1)
    found = intervals.median(list(values))
    assert found["value"] == np.median(values)
    assert found["stderr"] == pytest.approx(drawn.std(), rel=0.1)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_median_of_a_few_runs_has_no_interval(n: int) -> None:
    found = intervals.median([1.0, 2.0, 4.0, 8.0, 9.0][:n])
    assert (found["stderr"], found["error"]) == (None, "unknown")
