"""Intervals against their definitions, other formulas for the same thing, and distributions that are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spm_hub.evaluation import statistics
from spm_hub.evaluation.metrics.distances import frechet_distance


def test_a_difference_of_shares_has_the_interval_of_agresti_and_min() -> None:
    """Their Table I: 9 gained, 16 lost would be 0.5 more each; worked out by hand for 25 changed of 100 pairs."""
    before = [True] * 16 + [False] * 9 + [True] * 75
    after = [False] * 16 + [True] * 9 + [True] * 75
    low, high = statistics.paired_share_difference(before, after)
    gained, lost, pairs = 9.5, 16.5, 102
    error = math.sqrt((gained + lost) - (gained - lost) ** 2 / pairs) / pairs
    assert (low, high) == pytest.approx((-7 / 102 - 1.959964 * error, -7 / 102 + 1.959964 * error), abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_interval_of_a_difference_turns_with_its_sides(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [list(side) for side in zip(*pairs, strict=True)]
    low, high = statistics.paired_share_difference(before, after)
    assert -1 <= low <= (sum(after) - sum(before)) / len(pairs) <= high <= 1
    assert statistics.paired_share_difference(after, before) == pytest.approx((-high, -low))


def test_a_bootstrap_of_many_normal_numbers_is_students_interval() -> None:
    data = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 10
    low, high = statistics.bootstrap_mean(data.tolist(), resamples=20_000)
    reach = 1.97196 * float(data.std()) / math.sqrt(200)
    assert (low, high) == pytest.approx((float(data.mean()) - reach, float(data.mean()) + reach), abs=0.02)
    assert statistics.bootstrap_mean(data.tolist()) == statistics.bootstrap_mean(data.tolist())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(-50, 50), st.floats(0.1, 5))
def test_a_bootstrap_moves_and_stretches_with_its_values(values: list[float], shift: float, factor: float) -> None:
    low, high = statistics.bootstrap_mean(values, resamples=200)
    moved = statistics.bootstrap_mean([factor * value + shift for value in values], resamples=200)
    assert moved == pytest.approx((factor * low + shift, factor * high + shift), abs=1e-6)


def test_what_has_no_interval() -> None:
    assert statistics.bootstrap_mean([3.0]) == (-math.inf, math.inf)
    assert statistics.bootstrap_mean([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert statistics.jackknife(lambda places: 0.0, 3) == (-math.inf, math.inf)


def test_a_jackknife_of_the_mean_is_students_interval_of_the_group_means() -> None:
    data = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = torch.stack([data[place::10].mean() for place in range(10)])
    reach = 2.262157 * float(groups.std()) / math.sqrt(10)
    found = statistics.jackknife(lambda places: float(data[places].mean()), 40)
    assert found == pytest.approx((float(data.mean()) - reach, float(data.mean()) + reach), abs=1e-4)


def test_a_jackknife_of_a_frechet_distance_holds_what_the_distributions_give() -> None:
    """Of N(0, 1) and N(1, 4) in each of three dimensions it is 3 (1 + (2 - 1)^2) = 6."""
    random = torch.Generator().manual_seed(2)
    one = torch.randn(2000, 3, generator=random, dtype=torch.float64)
    two = 1 + 2 * torch.randn(2000, 3, generator=random, dtype=torch.float64)
    low, high = statistics.jackknife(lambda places: frechet_distance(one[places], two[places]), 2000)
    assert low < 6.0 < high
    assert high - low < 1.0


def test_what_n_detects() -> None:
    """One standard deviation of 0.5 and 100 pairs: 2.8016 x 0.05."""
    assert statistics.detectable_difference([0.5, -0.5] * 50) == pytest.approx(2.801585 * 0.05, abs=1e-5)
    assert statistics.detectable_difference([0.0] * 100) == pytest.approx(2.801585 / 100, abs=1e-6)
    assert statistics.detectable_difference([0.0] * 25) > statistics.detectable_difference([0.0] * 100)
