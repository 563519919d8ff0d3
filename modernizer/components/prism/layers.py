"""Adapters made of several: pipes that are summed, a coarse map with fine tiles on top, and low rank at equal cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components.prism.adapter import PrismAdapter
from modernizer.components.prism.gram import Gram, ridge_solve
from modernizer.components.prism.tile_plan import TilePlan

__all__ = ["HierarchicalPrism", "LowRankAdapter", "PrismPipes"]


class PrismPipes(nn.Module):
    """Several adapters side by side, their outputs summed.

    Each is fitted to what those before it left over. (Fitted to the same targets they come out equal, and their sum
    is off by their number.) A linear pipe after an exact one has nothing left to learn, so pipes are worth their cost
    only where each is restricted: give them ridges that fall, or ranges of inputs of their own.
    """

    def __init__(self, pipes: Sequence[PrismAdapter]) -> None:
        super().__init__()
        if not pipes:
            raise ValueError("at least one pipe is needed")
        if len({(pipe.in_features, pipe.out_features) for pipe in pipes}) > 1:
            raise ValueError("all pipes must have the same widths")
        self.pipes = nn.ModuleList(pipes)

    @classmethod
    def fit(
        cls,
        gram: Gram,
        plans: Sequence[TilePlan],
        *,
        ridges: Sequence[float] | float = 1e-6,
        dtype: torch.dtype = torch.float32,
    ) -> PrismPipes:
        """Pipes for pairs whose moments were gathered, one for each plan, each fitted to the rest of those before.

        Raises:
            ValueError: no plans, one for other sizes, another number of ridges, or too few samples.
        """
        ridges = [ridges] * len(plans) if isinstance(ridges, float | int) else list(ridges)
        if len(ridges) != len(plans):
            raise ValueError(f"{len(plans)} plans and {len(ridges)} ridges")
        for plan in plans:
            if (plan.in_features, plan.out_features) != (gram.in_features, gram.out_features):
                raise ValueError(f"{plan} is not for pairs {gram.in_features} -> {gram.out_features}")
        xx, xz, _ = gram.moments()
        pipes: list[PrismAdapter] = []
        sums = torch.zeros_like(xz)
        for plan, ridge in zip(plans, ridges, strict=True):
            weight = gram.solve(ridge, xz - xx @ sums)
            sums = sums + weight
            pipes.append(_frozen(weight, plan, gram.bias and not pipes, dtype))
        if pipes and pipes[0].bias is not None and (intercept := gram.intercept(sums)) is not None:
            pipes[0].bias.copy_(intercept)
        return cls(pipes)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        out: Tensor = self.pipes[0](x)
        for pipe in self.pipes[1:]:
            out = out + pipe(x)
        return out


class HierarchicalPrism(nn.Module):
    """A coarse map of the averages of neighbouring features, and fine tiles for what it leaves over.

    Both together are the exact fit; the coarse map alone is a preview at ``1 / pool`` of its cost.
    """

    def __init__(self, coarse: PrismAdapter, fine: PrismAdapter, pool: int) -> None:
        super().__init__()
        if coarse.in_features != -(-fine.in_features // pool) or coarse.out_features != fine.out_features:
            raise ValueError(f"coarse {coarse} does not go with fine {fine} and pool {pool}")
        self.coarse, self.fine, self.pool = coarse, fine, pool

    @classmethod
    def fit(
        cls,
        gram: Gram,
        *,
        pool: int = 8,
        tiles: int = 512,
        coarse_tiles: int = 8,
        padding: str = "edge",
        ridge: float = 1e-6,
        dtype: torch.dtype = torch.float32,
    ) -> HierarchicalPrism:
        """Coarse first, then fine tiles on the residual, of pairs whose moments were gathered.

        Raises:
            ValueError: ``pool`` is not positive or exceeds the inputs, or too few samples.
        """
        if not 1 <= pool <= gram.in_features:
            raise ValueError(f"pool is from 1 to {gram.in_features}, not {pool}")
        xx, xz, _ = gram.moments()
        mean = _pooled(torch.eye(gram.in_features, dtype=xx.dtype, device=xx.device), pool)  # [in, coarse]
        coarse = ridge_solve(mean.T @ xx @ mean, mean.T @ xz, ridge, gram.samples - gram.bias)
        spread = mean @ coarse
        fine = gram.solve(ridge, xz - xx @ spread)
        size = coarse.shape[0]
        made = cls(
            _frozen(coarse, TilePlan.for_sizes(size, gram.out_features, coarse_tiles, padding), gram.bias, dtype),
            _frozen(fine, TilePlan.for_sizes(gram.in_features, gram.out_features, tiles, padding), gram.bias, dtype),
            pool,
        )
        if (left := gram.intercept(spread)) is not None and (both := gram.intercept(spread + fine)) is not None:
            made.coarse.bias.copy_(left)
            made.fine.bias.copy_(both - left)
        return made

    def forward(self, x: Tensor, *, fine: bool = True) -> Tensor:
        """``[..., in_features] -> [..., out_features]``; without ``fine`` the coarse map alone.

        Raises:
            ValueError: ``x`` has another width.
        """
        if x.shape[-1] != self.fine.in_features:
            raise ValueError(f"this adapter takes {self.fine.in_features} features, not {x.shape[-1]}")
        out: Tensor = self.coarse(_pooled(x, self.pool))
        return out + self.fine(x) if fine else out


class LowRankAdapter(nn.Module):
    """``x -> (x A) B + b`` of a given rank: what the same number of products buys without tiles.

    The honest rival of an adapter with few active tiles: ``tiles_rank`` says at which rank it costs as much.
    """

    def __init__(self, into: Tensor, out: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.into = nn.Parameter(into, requires_grad=False)
        self.out = nn.Parameter(out, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @staticmethod
    def tiles_rank(plan: TilePlan, active: int) -> int:
        """The rank at which a low-rank map costs what ``active`` tiles of a plan do, at least 1."""
        share = active / plan.tiles * plan.in_features * plan.out_features
        return max(1, int(share / (plan.in_features + plan.out_features)))

    @classmethod
    def fit(cls, gram: Gram, rank: int, *, ridge: float = 1e-6, dtype: torch.dtype = torch.float32) -> LowRankAdapter:
        """Reduced-rank regression (Izenman 1975) with a ridge, of pairs whose moments were gathered.

        Raises:
            ValueError: the rank is not from 1 to the smaller width, or too few samples.
        """
        if not 1 <= rank <= min(gram.in_features, gram.out_features):
            raise ValueError(f"rank {rank} of a map {gram.in_features} -> {gram.out_features}")
        xx, _, _ = gram.moments()
        weight = gram.solve(ridge)
        # Optimal for the penalised problem: the directions of the fit in the penalised metric.
        penalised = weight.T @ xx @ weight + ridge * xx.diagonal().mean() * (weight.T @ weight)
        main = torch.linalg.eigh(penalised).eigenvectors[:, -rank:]
        into, out = weight @ main, main.T
        bias = gram.intercept(into @ out)
        return cls(into.to(dtype), out.to(dtype).contiguous(), None if bias is None else bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        out = (x @ self.into) @ self.out
        return out if self.bias is None else out + self.bias


def _pooled(x: Tensor, pool: int) -> Tensor:
    """Means of ``pool`` neighbouring features, the last group filled up with zeros: ``[..., ceil(in / pool)]``."""
    padded = F.pad(x, (0, -x.shape[-1] % pool))
    return padded.reshape(*x.shape[:-1], -1, pool).mean(-1)


@torch.no_grad()
def _frozen(weight: Tensor, plan: TilePlan, bias: bool, dtype: torch.dtype) -> PrismAdapter:
    made = PrismAdapter(
        plan.in_features, plan.out_features, bias, plan=plan, device=weight.device, dtype=dtype
    ).requires_grad_(False)
    made.weight.copy_(weight.T)
    if made.bias is not None:
        made.bias.zero_()
    return made
