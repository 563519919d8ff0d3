"""Measures of the shape of a set of points: how even its simplices are, how many dimensions it fills."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_dimension", "simplex_volume_variation"]


def simplex_volume_variation(points: Tensor, samples: int = 1000, generator: torch.Generator | None = None) -> float:
    """The coefficient of variation (standard deviation over mean) of the volumes of random 4-simplices.

    Five distinct points each, volumes by the Cayley-Menger determinant, in float64. On high-dimensional data it
    measures the dimension more than the layer: it tells noise from nothing else.

    Args:
        points: ``[..., features]``; leading axes are flattened to at least five points.
        samples: how many simplices.
        generator: of the choice, on the CPU.

    Raises:
        ValueError: fewer than five points, or no samples.
    """
    flat = points.detach().double().flatten(0, -2)
    if flat.shape[0] < 5 or samples < 2:
        raise ValueError(f"{flat.shape[0]} points, {samples} samples: five points and two samples are the least")
    if flat.shape[0] <= 4096:
        chosen = torch.rand(samples, flat.shape[0], generator=generator).topk(5, dim=1).indices
    else:
        chosen = torch.stack([torch.randperm(flat.shape[0], generator=generator)[:5] for _ in range(samples)])
    corners = flat[chosen.to(flat.device)]
    squares = (corners[:, :, None] - corners[:, None]).square().sum(-1)
    bordered = torch.ones(samples, 6, 6, dtype=torch.float64, device=flat.device)
    bordered[:, 0, 0] = 0
    bordered[:, 1:, 1:] = squares
    volumes = (-torch.linalg.det(bordered) / 9216).clamp(min=0).sqrt()  # 2^4 (4!)^2
    mean = volumes.mean()
    return float(volumes.std() / mean) if mean > 0 else float("nan")


def effective_dimension(points: Tensor) -> float:
    """How many dimensions a set of points fills: ``(sum s^2)^2 / sum s^4`` over the singular values s, centred.

    The participation ratio of the covariance's eigenvalues: d for d equal ones, 1 where one outweighs all others.

    Args:
        points: ``[..., features]``; leading axes are flattened.
    """
    flat = points.detach().double().flatten(0, -2)
    power = torch.linalg.svdvals(flat - flat.mean(0)).square()
    total = power.square().sum()
    return float(power.sum().square() / total) if total > 0 else 0.0
