"""Fréchet distance against its closed forms: one dimension, commuting covariances, and sets that are shifted copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spm_hub.evaluation.metrics.distances import frechet_distance, kernel_distance


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 999))
def test_in_one_dimension_it_is_that_of_means_and_deviations(n: int, m: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    one, two = torch.randn(n, 1, generator=random) * 3 + 1, torch.randn(m, 1, generator=random)
    expected = (one.double().mean() - two.double().mean()) ** 2 + (one.double().std() - two.double().std()) ** 2
    assert frechet_distance(one, two) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 999))
def test_a_moved_turned_and_stretched_set(width: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    # Whitened, so that stretching along the axes makes covariances that commute.
    points = torch.randn(50, width, generator=random, dtype=torch.float64)
    points = torch.linalg.qr(points - points.mean(0))[0] * 7
    factors = torch.rand(width, generator=random, dtype=torch.float64) * 3
    shift = torch.randn(width, generator=random, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))[0]
    # 7 orthonormal columns of 50 centred points: a standard deviation of 1 in every direction.
    expected = shift.pow(2).sum() + (1 - factors).pow(2).sum()
    assert frechet_distance(points @ turn, (points * factors + shift) @ turn) == pytest.approx(
        float(expected), abs=1e-9
    )


def test_of_a_set_and_itself_it_is_zero_even_with_fewer_points_than_dimensions() -> None:
    points = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(points, points.flip(0)) == pytest.approx(0.0, abs=1e-9)


def test_sets_that_have_no_covariance_are_refused() -> None:
    with pytest.raises(ValueError, match="two or more rows"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="one width"):
        frechet_distance(torch.zeros(5, 2), torch.zeros(5, 3))


def test_the_kernel_distance_is_its_double_sum() -> None:
    """Gretton et al. 2012, Lemma 6: the mean over pairs of different places, worked out pair by pair."""
    random = torch.Generator().manual_seed(4)
    one, two = (torch.randn(6, 3, generator=random, dtype=torch.float64) for _ in range(2))

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    pairs = [
        kernel(one[i], one[j]) + kernel(two[i], two[j]) - kernel(one[i], two[j]) - kernel(one[j], two[i])
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    assert kernel_distance(one, two) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert kernel_distance(one, one) == pytest.approx(0.0, abs=1e-12), "pictures that nothing changed"
    for wrong in (one[:1], one[:, :2], one[:4]):
        with pytest.raises(ValueError, match="same two or more rows"):
            kernel_distance(one[:1] if len(wrong) == 1 else one, wrong)


def test_the_kernel_distance_of_one_distribution_is_zero_on_average_and_grows_with_a_shift() -> None:
    random = torch.Generator().manual_seed(5)
    draws = [torch.randn(30, 4, generator=random) for _ in range(200)]
    same = torch.tensor([kernel_distance(one, two) for one, two in zip(draws[::2], draws[1::2], strict=True)])
    assert float(same.mean().abs()) < 3 * float(same.std()) / 10
    assert kernel_distance(draws[0], draws[1] + 1) > float(same.max())
