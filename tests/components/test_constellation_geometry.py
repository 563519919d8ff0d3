import math

import pytest
import torch

from modernizer.components.constellation import effective_dimension, simplex_volume_variation


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_regular_simplices_do_not_vary() -> None:
    assert simplex_volume_variation(torch.eye(5), 20, seeded()) < 1e-12
    assert simplex_volume_variation(torch.eye(9) * 3, 20, seeded()) < 1e-12  # any five of nine corners


def test_volume_is_that_of_the_determinant() -> None:
    points = torch.randn(5, 4, dtype=torch.float64, generator=seeded())
    other = torch.cat([points, points[:1] + 1])
    expected = []
    for left_out in range(6):
        corners = other[[i for i in range(6) if i != left_out]]
        expected.append(abs(float(torch.linalg.det(corners[1:] - corners[0]))) / math.factorial(4))
    exact = torch.tensor(expected).std(correction=0) / torch.tensor(expected).mean()
    assert simplex_volume_variation(other, 6000, seeded()) == pytest.approx(float(exact), rel=0.05)


def test_many_points_and_leading_axes() -> None:
    noise = torch.randn(3, 2000, 64, generator=seeded())
    assert 0.0 < simplex_volume_variation(noise, 100, seeded()) < 0.3


def test_flat_points_have_no_volume() -> None:
    assert math.isnan(simplex_volume_variation(torch.zeros(8, 3), 10, seeded()))


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="five points"):
        simplex_volume_variation(torch.zeros(4, 3))


def test_dimension_of_equal_directions_and_of_one() -> None:
    corners = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_dimension(corners) == pytest.approx(6)
    assert effective_dimension(torch.arange(7.0)[:, None] * torch.ones(3) + 5) == pytest.approx(1)
    assert effective_dimension(torch.ones(4, 3)) == 0.0
