"""The sums a linear fit needs, gathered batch by batch, in float64, over as many processes as there are."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Gram"]


class Gram:
    """Second moments of pairs ``X [N, in]``, ``Z [N, out]``; memory does not depend on N.

    Args:
        in_features, out_features: widths of the two.
        bias: fit an intercept (moments are then taken about the means).
        device: where the sums are kept and made.
        dtype: of the sums; float64 unless speed matters more than the last digits.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if min(in_features, out_features) < 1:
            raise ValueError(f"sizes must be positive: {in_features} -> {out_features}")
        self.bias, self.device, self.dtype = bias, torch.device(device), dtype
        self.samples = 0
        self.batches = 0
        self._xx = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self._xz = torch.zeros(in_features, out_features, dtype=dtype, device=device)
        self._zz = torch.zeros(out_features, dtype=dtype, device=device)
        self._x = torch.zeros(in_features, dtype=dtype, device=device)
        self._z = torch.zeros(out_features, dtype=dtype, device=device)

    @property
    def in_features(self) -> int:
        return self._xz.shape[0]

    @property
    def out_features(self) -> int:
        return self._xz.shape[1]

    @property
    def mean(self) -> Tensor:
        """The mean of the inputs ``[in_features]``; NaN before there are any."""
        return self._x / self.samples if self.samples else self._x + torch.nan

    @torch.no_grad()
    def update(self, x: Tensor, z: Tensor) -> None:
        """Add the pairs of a batch: ``x [..., in]`` and ``z [..., out]`` with equal leading axes.

        Raises:
            ValueError: shapes do not fit, or a value is NaN or infinite. The sums are then as before.
        """
        if x.shape[:-1] != z.shape[:-1] or x.shape[-1] != self.in_features or z.shape[-1] != self.out_features:
            raise ValueError(
                f"batch {self.batches}: pairs are [..., {self.in_features}] and [..., {self.out_features}] with equal"
                f" leading axes, not {tuple(x.shape)} and {tuple(z.shape)}"
            )
        if x.is_complex() or z.is_complex():
            raise ValueError(f"batch {self.batches}: complex pairs cannot be fitted; give real and imaginary parts")
        x = x.reshape(-1, self.in_features).to(self.device, self.dtype)
        z = z.reshape(-1, self.out_features).to(self.device, self.dtype)
        zz, sum_x, sum_z = z.square().sum(0), x.sum(0), z.sum(0)
        # Sums of finite values in float64 are finite, and cost less to look at than the values.
        if not torch.cat([sum_x, sum_z]).isfinite().all():
            bad = (~x.isfinite().all(1) | ~z.isfinite().all(1)).sum().item()
            raise ValueError(
                f"batch {self.batches}: {bad} of {len(x)} pairs hold NaN or infinite values; the {self.samples} pairs"
                " before it are kept"
            )
        self._xx.addmm_(x.T, x)
        self._xz.addmm_(x.T, z)
        self._zz += zz
        self._x += sum_x
        self._z += sum_z
        self.samples += len(x)
        self.batches += 1

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum over the processes of a group: each holds what one process would after seeing all batches."""
        count = torch.tensor([self.samples, self.batches], dtype=torch.float64, device=self.device)
        for part in (count, self._xx, self._xz, self._zz, self._x, self._z):
            dist.all_reduce(part, group=group)
        self.samples, self.batches = (int(n) for n in count.tolist())

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``X'X [in, in]``, ``X'Z [in, out]`` and the diagonal of ``Z'Z [out]``, about the means with a bias.

        Raises:
            ValueError: no pairs were seen.
        """
        if not self.samples:
            raise ValueError("no pairs were seen: there is nothing to fit")
        if not self.bias:
            return self._xx, self._xz, self._zz
        x, z = self._x / self.samples, self._z
        return self._xx - torch.outer(x, self._x), self._xz - torch.outer(x, z), self._zz - z.square() / self.samples

    def solve(self, ridge: float, target: Tensor | None = None) -> Tensor:
        """The weight ``[in, outputs]`` that minimises ``|target - X W|^2 + ridge * mean(diag(X'X)) * |W|^2``.

        ``target`` is ``X'T [in, outputs]``; None for ``X'Z``. Exact, by one Cholesky factorisation.

        Raises:
            ValueError: too few samples for the ridge: the solution is not determined.
        """
        xx, xz, _ = self.moments()
        return ridge_solve(xx, xz if target is None else target, ridge, self.samples - self.bias)

    def residual(self, weight: Tensor) -> Tensor:
        """The squared error of ``weight [in, out]`` on all pairs, per output, the best intercept taken: ``[out]``."""
        xx, xz, zz = self.moments()
        weight = weight.to(xx)
        return (zz - 2 * (weight * xz).sum(0) + (weight * (xx @ weight)).sum(0)).clamp(min=0)

    def intercept(self, weight: Tensor) -> Tensor | None:
        """The bias that goes with ``weight [in, outputs]`` of all outputs, None without one."""
        if not self.bias:
            return None
        return (self._z - self._x @ weight.to(self._x)) / self.samples


def ridge_solve(xx: Tensor, target: Tensor, ridge: float, rank: int) -> Tensor:
    """Solve ``(xx + ridge * mean(diag) * I) W = target``; ``rank`` is how many independent samples there were.

    Raises:
        ValueError: the solution is not determined, or ``ridge`` is negative.
    """
    if not ridge >= 0:
        raise ValueError(f"ridge must not be negative: {ridge}")
    size = xx.shape[0]
    said = f"too few samples for this ridge: {rank} independent ones for {size} inputs, ridge {ridge}"
    advice = "; give more samples or a larger ridge"
    floor = size * torch.finfo(xx.dtype).eps
    if rank < size and ridge < floor:
        raise ValueError(said + advice)
    scale = xx.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(xx + torch.eye(size, dtype=xx.dtype, device=xx.device) * (ridge * scale))
    if failed.item():
        raise ValueError(f"{said}: inputs that depend on each other leave it open{advice}")
    return torch.cholesky_solve(target, factor)
