"""Ridge regression over tokens that come in batches: memory does not depend on how many there are."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """The matrix that maps inputs to targets best, pulled towards a prior one.

    Minimises ``|A X - Y|^2 + r |X - prior|^2`` with ``r`` relative to the mean square of the columns of A. All sums are
    kept in float64.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Takes rows ``[tokens, inputs]`` and what is wanted of them, ``[tokens, outputs]``."""
        rows, wanted = inputs.double(), targets.double()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)  # the last row of the result is the constant
        self.gram += rows.T @ rows
        self.cross += rows.T @ wanted
        self.count += len(rows)

    def solve(self, prior: Tensor, ridge: float) -> Tensor:
        """The matrix ``[inputs + 1, outputs]``; its last row is the constant.

        Raises:
            ValueError: the sums are not finite, or without a ridge the tokens do not settle it.
        """
        if not bool(torch.isfinite(self.gram).all()) or not bool(torch.isfinite(self.cross).all()):
            raise ValueError("not all values are finite")
        prior = prior.double()
        system = self.gram.clone()
        system.diagonal().add_(ridge * self.gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            raise ValueError(f"{self.count} tokens do not settle {len(self.gram)} unknowns")
        return prior + torch.cholesky_solve(self.cross - self.gram @ prior, factor)


class Line:
    """The best ``gain * x + shift`` for each feature by itself, or one gain for all of them."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.sums = torch.zeros(5, features, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Takes rows ``[tokens, features]`` of both."""
        x, y = inputs.double(), targets.double()
        self.sums += torch.stack([x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0), (y * y).sum(0)])
        self.count += len(x)

    def solve(self, common: bool = False) -> tuple[Tensor, Tensor]:
        """Gain and shift, ``[features]``; with ``common`` the gain is the same for all features.

        Raises ValueError where the inputs do not vary.
        """
        x, y, xx, xy, _ = self.sums / self.count
        variance, covariance = xx - x * x, xy - x * y
        if common:
            variance, covariance = variance.mean().expand_as(x), covariance.mean().expand_as(x)
        if not bool((variance > 0).all()):
            raise ValueError("the stream does not vary from token to token")
        gain = covariance / variance
        return gain, y - gain * x
