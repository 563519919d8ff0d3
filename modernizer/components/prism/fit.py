"""Fits adapters by exact ridge regression in one pass, judges every row block, repairs those that drifted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from modernizer.components.prism.adapter import PrismAdapter
from modernizer.components.prism.gram import Gram
from modernizer.components.prism.tile_plan import TilePlan

__all__ = ["FitReport", "fit_prism", "gather", "refit_prism", "row_block_errors"]

Pairs = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FitReport:
    """How well an adapter does: relative errors, ``sqrt(|Z - prediction|^2 / |Z - mean|^2)`` (``|Z|^2`` without bias).

    ``row_errors [rows of tiles]`` are those of each row block, all its tiles together: a tile alone has no error that
    means anything. ``heldout_*`` are None where no such set was given. Where outputs do not vary an error is NaN.
    """

    samples: int
    ridge: float
    error: float
    row_errors: Tensor
    heldout_error: float | None = None
    heldout_row_errors: Tensor | None = None
    refitted: tuple[int, ...] = ()  # row blocks that `refit_prism` replaced


def fit_prism(
    x: Tensor | Pairs,
    z: Tensor | None = None,
    *,
    ridge: float = 1e-6,
    bias: bool = True,
    tiles: int = 512,
    padding: str = "edge",
    plan: TilePlan | None = None,
    heldout: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    distributed: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    accumulate: torch.dtype = torch.float64,
    progress: Callable[[int], None] | bool | None = None,
) -> tuple[PrismAdapter, FitReport]:
    """The adapter ``Z = X W' + b`` with the least squared error, by exact ridge regression in one pass.

    Every row block is fitted jointly over all its tiles and then cut, so the result is the dense one. (Tiles fitted
    alone are not: their sum errs by more than the outputs themselves on correlated inputs.)

    Args:
        x: activations ``[..., in]`` with ``z [..., out]``; or an iterable of such pairs, which is read once.
        ridge: weight of the penalty, relative to the mean of the diagonal of X'X.
        bias: fit an intercept.
        tiles, padding, plan: as in `PrismAdapter`.
        heldout: pairs that are not fitted, to be judged.
        group: processes that each see a part of the pairs; all get the result of one process that saw all.
        distributed: the same, over the default group.
        device: where to compute; None for the first batch's.
        dtype: of the adapter.
        accumulate: of the sums and the solution.
        progress: called with the number of samples after each batch; True prints; None prints on a terminal where a
            fit lasts longer than a few seconds.

    Raises:
        ValueError: shapes do not fit, NaN or infinite values, no pairs, or too few for the ridge.
    """
    shared = distributed or group is not None
    gram = gather(x, z, bias=bias, device=device, dtype=accumulate, progress=progress, group=group, shared=shared)
    weight = gram.solve(ridge)
    made = adapter_from(gram, weight, plan, tiles, padding, dtype)
    report = _report(gram, made, weight, ridge, heldout)
    return made, report


def adapter_from(
    gram: Gram, weight: Tensor, plan: TilePlan | None, tiles: int, padding: str, dtype: torch.dtype
) -> PrismAdapter:
    """A frozen adapter of a solution ``weight [in, out]``."""
    made = PrismAdapter(
        gram.in_features, gram.out_features, gram.bias,
        tiles=tiles, padding=padding, plan=plan, device=gram.device, dtype=dtype,
    )  # fmt: skip
    made.requires_grad_(False)
    made.weight.copy_(weight.T)
    intercept = gram.intercept(weight)
    if intercept is not None:
        made.bias.copy_(intercept)
    return made


def gather(
    x: Tensor | Pairs,
    z: Tensor | None,
    *,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
    progress: Callable[[int], None] | bool | None = None,
    group: dist.ProcessGroup | None = None,
    shared: bool = False,
) -> Gram:
    """The moments of pairs given whole or in batches, summed over processes if they are shared.

    Raises:
        ValueError: as `fit_prism`; where pairs are shared, in all processes when it is raised in one.
    """
    gram: Gram | None = None
    problem: Exception | None = None
    told = _Progress(progress)
    try:
        for a, b in _batches(x, z):
            if gram is None:
                gram = Gram(a.shape[-1], b.shape[-1], bias=bias, device=device or a.device, dtype=dtype)
            gram.update(a, b)
            told(gram.samples)
        if gram is None:
            raise ValueError("no pairs were given: there is nothing to fit")
    except Exception as error:
        if not shared:
            raise
        problem = error  # the others wait for this process: they have to hear of it first
    told.done()
    if not shared:
        assert gram is not None
        return gram
    try:
        _agree(gram, problem, group)
    finally:
        del problem  # its traceback holds this frame, which would keep the group alive until the program ends
    assert gram is not None
    gram.all_reduce(group)
    return gram


def _agree(gram: Gram | None, problem: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise in every process what went wrong in one, or where widths differ."""
    sizes = (gram.in_features, gram.out_features) if gram is not None and problem is None else None
    said: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, (sizes, None if problem is None else str(problem)), group=group)
    if problem is not None:
        try:
            raise problem
        finally:
            del problem
    for rank, answer in enumerate(said):
        other, trouble = answer if isinstance(answer, tuple) else (None, "no answer")
        if trouble is not None:
            raise ValueError(f"process {rank} could not take part: {trouble}")
        if other != sizes:
            raise ValueError(f"process {rank} has pairs of widths {other}, this one {sizes}")


def _batches(x: Tensor | Pairs, z: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    if not isinstance(x, Tensor):
        if z is not None:
            raise ValueError("give two tensors, or one iterable of pairs")
        for number, pair in enumerate(x):
            if not (isinstance(pair, tuple | list) and _are_tensors(pair)):
                raise ValueError(f"batch {number} is not a pair of tensors [..., in] and [..., out]")
            yield pair[0], pair[1]
        return
    if z is None:
        raise ValueError("x is a tensor: z is needed too")
    if not _are_tensors((x, z)) or x.shape[:-1] != z.shape[:-1]:
        raise ValueError(f"x {tuple(x.shape)} and z {tuple(z.shape)} are not pairs")
    flat_x, flat_z = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
    yield from zip(torch.split(flat_x, 8192), torch.split(flat_z, 8192), strict=True)


def _are_tensors(pair: Sequence[object]) -> bool:
    return len(pair) == 2 and all(isinstance(part, Tensor) and part.dim() > 0 for part in pair)


class _Progress:
    """Tells how far a fit is: to a function, or on standard error."""

    def __init__(self, wanted: Callable[[int], None] | bool | None) -> None:
        self.call = wanted if callable(wanted) else None
        self.prints = wanted is True or (wanted is None and sys.stderr.isatty())
        self.quiet = 0.0 if wanted is True else 3.0
        self.start = self.last = time.monotonic()
        self.printed = False

    def __call__(self, samples: int) -> None:
        if self.call is not None:
            self.call(samples)
        now = time.monotonic()
        if self.prints and now - self.start >= self.quiet and (not self.printed or now - self.last >= 0.5):
            print(f"\rfitting: {samples:,} samples, {now - self.start:.0f} s", end="", file=sys.stderr, flush=True)
            self.last, self.printed = now, True

    def done(self) -> None:
        if self.printed:
            print(file=sys.stderr)


def _report(
    gram: Gram, made: PrismAdapter, weight: Tensor, ridge: float, heldout: tuple[Tensor, Tensor] | None
) -> FitReport:
    total = gram.moments()[2]
    residual = gram.residual(weight)
    blocks = (made.plan.block_sums(residual) / made.plan.block_sums(total)).sqrt()
    error = float((residual.sum() / total.sum()).sqrt())
    if heldout is None:
        return FitReport(gram.samples, ridge, error, blocks)
    off, all_ = _heldout(weight, gram.intercept(weight), heldout, gram.bias)
    out_blocks = (made.plan.block_sums(off) / made.plan.block_sums(all_)).sqrt()
    return FitReport(gram.samples, ridge, error, blocks, float((off.sum() / all_.sum()).sqrt()), out_blocks)


def _heldout(
    weight: Tensor, intercept: Tensor | None, pairs: tuple[Tensor, Tensor], centred: bool
) -> tuple[Tensor, Tensor]:
    """Squared error and total of each output on pairs."""
    if not (isinstance(pairs, tuple | list) and _are_tensors(pairs)):
        raise ValueError("held-out pairs are two tensors, x [..., in] and z [..., out]")
    x = pairs[0].reshape(-1, pairs[0].shape[-1]).to(weight)
    z = pairs[1].reshape(-1, pairs[1].shape[-1]).to(weight)
    if len(x) != len(z) or x.shape[1] != weight.shape[0] or z.shape[1] != weight.shape[1]:
        raise ValueError(f"held-out pairs {tuple(pairs[0].shape)}, {tuple(pairs[1].shape)} do not fit the others")
    if not len(x):
        raise ValueError("there are no held-out pairs: leave heldout out")
    off = z - x @ weight - (0 if intercept is None else intercept)
    return off.square().sum(0), (z - z.mean(0) if centred else z).square().sum(0)


@torch.no_grad()
def row_block_errors(adapter: PrismAdapter, x: Tensor | Pairs, z: Tensor | None = None) -> Tensor:
    """The relative error of each row block of an adapter on pairs, as in `FitReport`: ``[rows of tiles]``, float64.

    Raises:
        ValueError: no pairs, or shapes do not fit.
    """
    off = torch.zeros(adapter.out_features, dtype=torch.float64, device=adapter.weight.device)
    total, first, count = off.clone(), off.clone(), 0
    for a, b in _batches(x, z):
        if a.shape[-1] != adapter.in_features or b.shape[-1] != adapter.out_features or a.shape[:-1] != b.shape[:-1]:
            raise ValueError(f"pairs {tuple(a.shape)} and {tuple(b.shape)} do not fit {adapter}")
        made = adapter(a.reshape(-1, a.shape[-1]).to(adapter.weight)).double()
        truth = b.reshape(-1, b.shape[-1]).to(off)
        off += (truth - made).square().sum(0)
        total += truth.square().sum(0)
        first += truth.sum(0)
        count += len(truth)
    if not count:
        raise ValueError("no pairs were given: there is nothing to measure")
    total -= first.square() / count if adapter.bias is not None else 0
    return (adapter.plan.block_sums(off) / adapter.plan.block_sums(total)).sqrt()


@torch.no_grad()
def refit_prism(
    adapter: PrismAdapter,
    x: Tensor | Pairs,
    z: Tensor | None = None,
    *,
    blocks: Sequence[int] | None = None,
    tolerance: float = 1.5,
    ridge: float = 1e-6,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | bool | None = None,
) -> FitReport:
    """Refit, in place, only the row blocks that drifted; all others stay as they are, bit by bit.

    A block has drifted where its error on these pairs is more than ``tolerance`` times that of a fresh fit to them.
    (The test is on the residual of the whole block; every tile alone is far off in a perfect adapter too.)

    Args:
        adapter: changed in place.
        x, z: pairs, as in `fit_prism`; read once.
        blocks: the row blocks to refit, instead of those that drifted.
        tolerance, ridge, device, progress: see above and `fit_prism`.

    Raises:
        ValueError: as `fit_prism`; or no such block. The adapter is then unchanged.
    """
    plan = adapter.plan
    gram = gather(x, z, bias=adapter.bias is not None, device=device or adapter.weight.device, progress=progress)
    if (gram.in_features, gram.out_features) != (plan.in_features, plan.out_features):
        raise ValueError(f"pairs of widths {gram.in_features} and {gram.out_features} do not fit {adapter}")
    if blocks is not None and not all(0 <= block < plan.rows for block in blocks):
        raise ValueError(f"row blocks are 0 to {plan.rows - 1}, not {list(blocks)}")
    fresh = gram.solve(ridge)
    old = adapter.weight.detach().T.to(fresh)
    total = plan.block_sums(gram.moments()[2])
    now, best = (plan.block_sums(gram.residual(w)) for w in (old, fresh))
    if adapter.bias is not None and (intercept := gram.intercept(old)) is not None:  # an intercept may drift as well
        now = now + gram.samples * plan.block_sums((adapter.bias.to(fresh) - intercept).square())
    if blocks is None:
        # Rounding of the adapter's own dtype is no drift.
        grain = total * torch.finfo(adapter.weight.dtype).eps ** 2 * plan.in_features
        blocks = torch.nonzero(now > tolerance**2 * best + 100 * grain).flatten().tolist()
    right = gram.intercept(fresh)
    for block in blocks:
        start, stop = plan.row_spans[block]
        adapter.weight[start:stop] = fresh.T[start:stop].to(adapter.weight)
        if adapter.bias is not None and right is not None:
            adapter.bias[start:stop] = right[start:stop].to(adapter.bias)
        now[block] = best[block]
    return FitReport(
        gram.samples,
        ridge,
        float((now.sum() / total.sum()).sqrt()),
        (now / total).sqrt(),
        refitted=tuple(sorted(blocks)),
    )
