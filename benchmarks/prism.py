"""PRISM adapters beside dense layers: what fits reach, what they cost and what products cost; as table, JSON and plot.

python benchmarks/prism.py --device cpu --out results/
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from telling import Row, forget_highest, machine, milliseconds, resident, shown, side_by_side, table, wait
from torch import Tensor, nn

from modernizer.components.prism import (
    Gram,
    HierarchicalPrism,
    LowRankAdapter,
    MicroMoE,
    PrismAdapter,
    PrismPipes,
    StoredPrism,
    TilePlan,
    TileStore,
    fit_prism,
    refit_prism,
    row_block_errors,
)

WIDE, NARROW, SAMPLES, HELD_OUT = 1024, 768, 8192, 2048
RIDGE = 1e-6
ACTIVE = 154  # of 512 tiles

Pairs = tuple[Tensor, Tensor]


class Bench:
    """The device, the seed and the rows that have been measured."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = torch.device(device), quick
        self.rows: dict[str, list[Row]] = {}

    def add(self, name: str, **row: Any) -> None:
        self.rows.setdefault(name, []).append(row)
        print(f"  {name}: " + ", ".join(f"{k} {shown(v)}" for k, v in row.items()), flush=True)

    def randn(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    @cached_property
    def problems(self) -> dict[str, Problem]:
        return {name: Problem(*make(self)) for name, make in ACTIVATIONS.items()}


class Problem:
    """Pairs to fit and pairs to judge by, all in float64, and the moments of the former."""

    def __init__(self, x: Tensor, z: Tensor) -> None:
        self.x, self.z = x[:SAMPLES].double(), z[:SAMPLES].double()
        self.held_x, self.held_z = x[SAMPLES:].double(), z[SAMPLES:].double()
        self.gram = Gram(x.shape[1], z.shape[1], device=x.device)
        self.gram.update(self.x, self.z)

    def error(self, made: Tensor) -> float:
        """The relative error of predictions on the held-out pairs."""
        total = (self.held_z - self.held_z.mean(0)).square().sum()
        return float(((self.held_z - made).square().sum() / total).sqrt())

    def error_of(self, weight: Tensor) -> float:
        """The same for a weight ``[in, out]`` with the best intercept."""
        intercept = self.gram.intercept(weight)
        assert intercept is not None
        return self.error(self.held_x @ weight + intercept)


# -- activations of three kinds


def white(bench: Bench) -> Pairs:
    x = bench.randn(SAMPLES + HELD_OUT, WIDE, seed=0)
    return x, linear_with_noise(bench, x)


def power_law(bench: Bench) -> Pairs:
    """Variances that fall as 1 / k, as those of hidden states do, along random directions, and a mean."""
    turned = torch.linalg.qr(bench.randn(WIDE, WIDE, seed=1))[0]
    fall = torch.arange(1, WIDE + 1, device=bench.device).rsqrt()
    x = (bench.randn(SAMPLES + HELD_OUT, WIDE, seed=0) * fall) @ turned + 0.1 * bench.randn(WIDE, seed=2)
    return x, linear_with_noise(bench, x)


def linear_with_noise(bench: Bench, x: Tensor) -> Tensor:
    """Outputs that are linear in x up to noise of a tenth of their spread: with endless samples a fit errs by 0.1."""
    z = x @ bench.randn(WIDE, NARROW, seed=3)
    return z + 0.1 * (z - z.mean(0)).std() * bench.randn(*z.shape, seed=4)


@torch.no_grad()
def two_models(bench: Bench) -> Pairs:
    """The last hidden states of two untrained transformers of different widths and depths that read the same tokens."""
    tokens = torch.randint(512, (SAMPLES + HELD_OUT,), generator=torch.Generator().manual_seed(5)).reshape(-1, 64)
    states = []
    for seed, (width, heads, layers) in enumerate(((WIDE, 16, 1), (NARROW, 12, 2))):
        torch.manual_seed(seed)
        embed = nn.Embedding(512, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True, norm_first=True)
        model = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False).eval()
        model, embed = model.to(bench.device), embed.to(bench.device)
        read = [model(embed(part.to(bench.device))) for part in tokens.split(16)]
        states.append(torch.cat(read).flatten(0, 1))
    return states[0], states[1]


ACTIVATIONS: dict[str, Callable[[Bench], Pairs]] = {
    "white": white,
    "power law": power_law,
    "two models": two_models,
}


# -- what a fit reaches


def fits(bench: Bench) -> None:
    """Exact fits, the literal form (every tile alone), and what else has been tried, on pairs that were not fitted."""
    for kind, problem in bench.problems.items():
        report = fit_prism(
            problem.x, problem.z, ridge=RIDGE, heldout=(problem.held_x, problem.held_z), dtype=torch.float64
        )[1]
        single = fit_prism(problem.x.float(), problem.z.float(), ridge=RIDGE)[0]
        assert report.heldout_error is not None
        dense = dense_ridge(problem)
        plan = TilePlan.for_sizes(WIDE, NARROW)
        alone = tiles_alone(problem.gram, plan)
        last = torch.zeros_like(alone)
        start, stop = plan.col_spans[-1]
        last[start:stop] = alone[start:stop]
        found = {
            "dense ridge, by QR": dense,
            "PrismAdapter": report.heldout_error,
            "PrismAdapter, float32 in and out": problem.error(single.double()(problem.held_x)),
            "literal: tiles fitted alone, summed": problem.error_of(alone),
            "literal: tiles fitted alone, the last one counts": problem.error_of(last),
            "tiles as preconditioner of 50 steps of CG": problem.error_of(preconditioned(problem.gram, plan, 50)),
        }
        for form, error in found.items():
            bench.add(
                "1 held-out error", activations=kind, form=form, error=error, off_dense=f"{abs(error - dense):.1e}"
            )


def dense_ridge(problem: Problem) -> float:
    """Ridge regression by the QR decomposition of the samples, with no Gram matrix anywhere."""
    x, z = problem.x - problem.x.mean(0), problem.z - problem.z.mean(0)
    size = x.shape[1]
    strength = (RIDGE * x.square().sum() / size).sqrt()
    q, r = torch.linalg.qr(torch.cat([x, strength * torch.eye(size, dtype=x.dtype, device=x.device)]))
    weight = torch.linalg.solve_triangular(r, q[: len(z)].T @ z, upper=True)
    return problem.error((problem.held_x - problem.x.mean(0)) @ weight + problem.z.mean(0))


def tiles_alone(gram: Gram, plan: TilePlan) -> Tensor:
    """What least squares gives each tile by itself: column chunk c of the input alone against the outputs."""
    xx, xz, _ = gram.moments()
    weight = torch.empty_like(xz)
    for start, stop in plan.col_spans:
        block = xx[start:stop, start:stop]
        ridge = RIDGE * block.diagonal().mean() * torch.eye(stop - start, dtype=xx.dtype, device=xx.device)
        weight[start:stop] = torch.linalg.solve(block + ridge, xz[start:stop])
    return weight


def preconditioned(gram: Gram, plan: TilePlan, steps: int) -> Tensor:
    """Conjugate gradients for all outputs at once, preconditioned by the diagonal blocks of the columns of tiles."""
    xx, xz, _ = gram.moments()
    blocks = [torch.linalg.inv(xx[a:b, a:b]) for a, b in plan.col_spans]

    def solved(rest: Tensor) -> Tensor:
        return torch.cat([block @ rest[a:b] for block, (a, b) in zip(blocks, plan.col_spans, strict=True)])

    weight, rest = torch.zeros_like(xz), xz.clone()
    way = near = solved(rest)
    power = (rest * near).sum(0)
    for _ in range(steps):
        ahead = xx @ way
        length = power / (way * ahead).sum(0)
        weight, rest = weight + length * way, rest - length * ahead
        near = solved(rest)
        before, power = power, (rest * near).sum(0)
        way = near + power / before * way
    return weight


def several(bench: Bench) -> None:
    """Pipes, coarse and fine tiles: what each reaches."""
    for kind, problem in bench.problems.items():
        one = fit_prism(problem.x, problem.z, ridge=RIDGE, dtype=torch.float64)[0]
        plans = [TilePlan.for_sizes(WIDE, NARROW, tiles) for tiles in (4, 4, 512)]
        pipes = PrismPipes.fit(problem.gram, plans, ridges=[1e-1, 1e-3, RIDGE], dtype=torch.float64)
        both = HierarchicalPrism.fit(problem.gram, ridge=RIDGE, dtype=torch.float64)
        found = {
            "one adapter": problem.error(one(problem.held_x)),
            "literal: three pipes fitted to the same targets, summed": problem.error(3 * one(problem.held_x)),
            "three pipes, each fitted to what is left": problem.error(pipes(problem.held_x)),
            "coarse tiles alone": problem.error(both(problem.held_x, fine=False)),
            "coarse tiles and fine ones": problem.error(both(problem.held_x)),
        }
        for form, error in found.items():
            bench.add("2 several adapters", activations=kind, form=form, error=error)


@torch.no_grad()
def active_tiles(bench: Bench) -> None:
    """154 of 512 tiles: the published gate, ours, the best choice there is, and a map of low rank at the same cost."""
    for kind, problem in bench.problems.items():
        adapter = fit_prism(problem.x, problem.z, ridge=RIDGE, dtype=torch.float64)[0]
        plan, x = adapter.plan, problem.held_x[:512]
        truth, total = problem.held_z[:512], (problem.held_z[:512] - problem.held_z.mean(0)).square().sum()
        parts = contributions(adapter, x)  # [tokens, rows, cols, outputs of a tile]
        own = parts.flatten(1, 2).norm(dim=-1).topk(ACTIVE).indices
        sparse = MicroMoE(adapter, ACTIVE)
        softened = torch.softmax(sparse.scores(x), -1)
        kept = torch.zeros_like(softened).scatter(1, (top := softened.topk(ACTIVE)).indices, top.values)
        kept = (kept / kept.sum(-1, keepdim=True)).reshape(len(x), plan.rows, plan.cols)
        rank = LowRankAdapter.tiles_rank(plan, ACTIVE)
        found = {
            "all tiles": adapter(x),
            "literal: 154 tiles weighted by a softmax": joined(plan, (parts * kept[..., None]).sum(2)) + adapter.bias,
            "154 tiles by their norms (MicroMoE)": sparse(x),
            "the same, the mean known": MicroMoE(adapter, ACTIVE, mean=problem.gram.mean)(x),
            "154 tiles by what they contribute (no gate can know)": sparse(x, own),
            f"low rank at the same cost (rank {rank})": LowRankAdapter.fit(
                problem.gram, rank, ridge=RIDGE, dtype=torch.float64
            )(x),
        }
        for form, made in found.items():
            error = float(((truth - made).square().sum() / total).sqrt())
            bench.add("3 154 of 512 tiles", activations=kind, form=form, error=error)


def contributions(adapter: PrismAdapter, x: Tensor) -> Tensor:
    """What each tile adds to each output, padded to equal tiles: ``[tokens, rows, cols, height]``."""
    plan = adapter.plan
    width = plan.tile_shape[1]
    tiles = adapter.tiles.unflatten(0, (plan.rows, plan.cols))
    cut = x.new_zeros(len(x), plan.cols, width)
    for column, (start, stop) in enumerate(plan.col_spans):
        cut[:, column, : stop - start] = x[:, start:stop]
    return torch.einsum("rcow,ncw->nrco", tiles, cut)


def joined(plan: TilePlan, outputs: Tensor) -> Tensor:
    """``[tokens, rows, height] -> [tokens, out]``, what tiles are padded with left out."""
    return torch.cat([outputs[:, row, : stop - start] for row, (start, stop) in enumerate(plan.row_spans)], 1)


def repair(bench: Bench) -> None:
    """One tile shrinks to half: what tells it, and what mends it."""
    problem = bench.problems["power law"]
    adapter = fit_prism(problem.x, problem.z, ridge=RIDGE, dtype=torch.float64)[0]
    plan, bad = adapter.plan, 137
    alone = tile_errors(problem, adapter)
    bench.add("4 repair", what="tile errors of a faultless adapter, least and most", value=spread(alone))
    fine = row_block_errors(adapter, problem.x, problem.z)
    adapter.set_tile(bad, adapter.tiles[bad] / 2)
    found = tile_errors(problem, adapter)
    bench.add(
        "4 repair", what="tiles of 512 with a larger error than the spoilt one", value=int((found > found[bad]).sum())
    )
    errors = row_block_errors(adapter, problem.x, problem.z)
    bench.add("4 repair", what="row block errors, faultless", value=spread(fine))
    bench.add("4 repair", what="row block error of the spoilt tile", value=float(errors[bad // plan.cols]))
    report = refit_prism(adapter, problem.x, problem.z, ridge=RIDGE)
    bench.add("4 repair", what=f"row blocks refitted (the spoilt one is {bad // plan.cols})", value=report.refitted)
    off = (row_block_errors(adapter, problem.x, problem.z) - fine).abs().max()
    bench.add("4 repair", what="row block errors afterwards against before", value=float(off))


def spread(values: Tensor) -> str:
    return f"{float(values.min()):.4f} to {float(values.max()):.4f}"


def tile_errors(problem: Problem, adapter: PrismAdapter) -> Tensor:
    """The relative error of the outputs of each tile alone."""
    xx, xz, zz = problem.gram.moments()
    found = []
    for tile in range(adapter.plan.tiles):
        rows, cols, _, _ = adapter.plan.place(tile)
        weight = adapter.weight[rows, cols].T
        off = zz[rows].sum() - 2 * (weight * xz[cols, rows]).sum() + (weight * (xx[cols, cols] @ weight)).sum()
        found.append((off / zz[rows].sum()).sqrt())
    return torch.stack(found)


# -- what it costs


def fitting_time(bench: Bench) -> None:
    """Exact fits against their floor (two products, a factorisation, a solve in float32) and against Adam."""
    sizes = [(WIDE, NARROW)] if bench.quick else [(WIDE, NARROW), (4096, 4096)]
    for into, out in sizes:
        x, z = bench.randn(SAMPLES, into, seed=0), bench.randn(SAMPLES, out, seed=1)
        runs: dict[str, Callable[[], object]] = {
            "floor": lambda x=x, z=z: floor(x, z),
            "float32 sums": lambda x=x, z=z: fit_prism(x, z, ridge=1e-3, accumulate=torch.float32),
            "float64 sums (default)": lambda x=x, z=z: fit_prism(x, z, ridge=1e-3),
        }
        found = side_by_side(bench.device, runs, 5)
        for form, took in found.items():
            bench.add(
                "5 time of a fit", size=f"{into} -> {out}", samples=SAMPLES, form=form, ms=took,
                of_floor=took / found["floor"],
            )  # fmt: skip
    problem = bench.problems["white"]
    x, z = problem.x.float(), problem.z.float()
    exact = milliseconds(bench.device, lambda: fit_prism(x, z, ridge=RIDGE), 5)
    took, steps, error = adam(bench, problem)
    row = {
        "size": f"{WIDE} -> {NARROW}",
        "samples": SAMPLES,
        "form": f"Adam, {steps} steps, to an error of {error:.4f}",
    }
    bench.add("5 time of a fit", **row, ms=took, of_exact=took / exact)


def floor(x: Tensor, z: Tensor) -> Tensor:
    xx = x.T @ x
    xx.diagonal().mul_(1.001)
    return torch.cholesky_solve(x.T @ z, torch.linalg.cholesky_ex(xx)[0])


def adam(bench: Bench, problem: Problem, rate: float = 0.1, decay: float = 0.99) -> tuple[float, int, float]:
    """Milliseconds and steps until a linear layer's held-out error is within 2 % of the exact fit's, and that error."""
    goal = 1.02 * problem.error_of(problem.gram.solve(RIDGE))
    x, z = problem.x.float(), problem.z.float()
    torch.manual_seed(0)
    layer = nn.Linear(WIDE, NARROW).to(bench.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate, fused=bench.device.type == "cuda")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    wait(bench.device)
    took, step, error = 0.0, 0, math.inf
    start = time.perf_counter()
    for step in range(1, 401 if bench.quick else 2001):
        chosen = torch.randint(SAMPLES, (1024,), device=bench.device)
        F.mse_loss(layer(x[chosen]), z[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0:
            wait(bench.device)
            took += time.perf_counter() - start  # looking at the error is not training
            with torch.no_grad():
                error = problem.error(layer.double()(problem.held_x))
                layer.float()
            if error <= goal:
                break
            start = time.perf_counter()
    return 1e3 * took, step, error


@torch.no_grad()
def inference(bench: Bench) -> None:
    """4096 -> 4096: the dense product, the adapter, tiles evaluated as tiles, and only some of them."""
    size = 4096
    torch.manual_seed(0)
    dense = nn.Linear(size, size).to(bench.device)
    adapter = PrismAdapter(size, size).to(bench.device)
    adapter.load_state_dict(dense.state_dict())
    sparse, own = MicroMoE(adapter, ACTIVE, scope="batch"), MicroMoE(adapter, ACTIVE)
    tiles = adapter.tiles
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        store = TileStore(folder, max_bytes=8 << 20, device=bench.device)
        for batch in (1, 32, 1024):
            x = bench.randn(batch, size, seed=batch)
            runs: dict[str, Callable[[], object]] = {
                "nn.Linear": lambda x=x: dense(x),
                "PrismAdapter": lambda x=x: adapter(x),
            }
            calls = 200 if bench.device.type == "cuda" else (20 if batch < 1024 else 1)
            near = side_by_side(bench.device, runs, 30 if batch < 1024 or bench.device.type == "cuda" else 10, calls)
            runs = {
                "literal: a loop over 512 tiles": lambda x=x: by_loop(adapter, x),
                "literal: tiles by einsum": lambda x=x: by_einsum(adapter.plan, tiles, x),
                "154 tiles, one choice for the batch": lambda x=x: sparse(x),
                "154 tiles, each token its own": lambda x=x: own(x),
                "154 tiles from disk, 8 MiB held": lambda x=x: StoredPrism(store)(x, range(ACTIVE)),
            }
            near |= side_by_side(bench.device, runs, 3)
            for form, took in near.items():
                bench.add(
                    "6 inference 4096 -> 4096", batch=batch, form=form, ms=took, of_dense=took / near["nn.Linear"]
                )
        bench.add("6 inference 4096 -> 4096", batch="", form="tiles held in memory, MiB", ms=store.held_bytes / 2**20)


def by_loop(adapter: PrismAdapter, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), adapter.out_features)
    for tile in range(adapter.plan.tiles):
        rows, cols, _, _ = adapter.plan.place(tile)
        out[:, rows] += F.linear(x[:, cols], adapter.weight[rows, cols])
    return out + adapter.bias


def by_einsum(plan: TilePlan, tiles: Tensor, x: Tensor) -> Tensor:
    cut = x.unflatten(-1, (plan.cols, -1))
    return torch.einsum("rcow,ncw->nro", tiles.unflatten(0, (plan.rows, plan.cols)), cut).flatten(1)


def memory(bench: Bench) -> None:
    """The most that a streamed fit holds beyond what was there, however many samples pass."""
    for samples in (8192, 32768, 131072):
        whole = 4 * samples * (WIDE + NARROW) / 1e6
        bench.add("7 memory of a streamed fit", samples=samples, mb=peak(bench, samples), mb_of_the_samples=whole)


def peak(bench: Bench, samples: int) -> float:
    """The allocator's on a GPU, that of a process of its own on the CPU."""
    if bench.device.type == "cpu":
        job = [sys.executable, __file__, "--peak", str(samples)]
        at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back at once
        done = subprocess.run(job, capture_output=True, text=True, env=at_once)
        return float(done.stdout) if done.returncode == 0 else math.nan
    fit_prism(stream(bench, 1024), ridge=1e-3)
    wait(bench.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fit_prism(stream(bench, samples), ridge=1e-3)
    wait(bench.device)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def stream(bench: Bench, samples: int) -> Iterator[Pairs]:
    for number in range(samples // 1024):
        yield bench.randn(1024, WIDE, seed=2 * number), bench.randn(1024, NARROW, seed=2 * number + 1)


def peak_of_this_process(samples: int) -> float:
    bench = Bench("cpu", True)
    fit_prism(stream(bench, 1024), ridge=1e-3)  # what libraries allocate once does not count
    forget_highest()
    before = resident("VmRSS")
    fit_prism(stream(bench, samples), ridge=1e-3)
    return (resident("VmHWM") - before) * 1024 / 1e6


def plot(bench: Bench, out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in ("1 held-out error", "3 154 of 512 tiles") if name in bench.rows]
    if not names:
        return
    figure, axes = pyplot.subplots(len(names), 1, figsize=(9, 3.5 * len(names)), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        rows = bench.rows[name]
        kinds = list(dict.fromkeys(row["activations"] for row in rows))
        for place, kind in enumerate(kinds):
            mine = [row for row in rows if row["activations"] == kind]
            axis.barh([n + 0.25 * place for n in range(len(mine))], [row["error"] for row in mine], 0.25, label=kind)
        axis.set_yticks([n + 0.25 for n in range(len(mine))], [row["form"] for row in mine], fontsize=8)
        axis.set(xscale="log", xlabel="relative error on held-out pairs", title=name)
        axis.invert_yaxis()
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "prism.png", dpi=120)
    pyplot.close(figure)


TESTS: dict[str, Callable[[Bench], None]] = {
    "fits": fits, "several": several, "active": active_tiles, "repair": repair, "time": fitting_time,
    "inference": inference, "memory": memory,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for prism.json, .md and .png")
    parser.add_argument("--full", action="store_true", help="the fit of 4096 -> 4096 on a CPU too")
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), metavar="TEST", help=", ".join(TESTS))
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(peak_of_this_process(given.peak))
        return 0
    bench = Bench(given.device, given.device == "cpu" and not given.full)
    start = time.perf_counter()
    for name in given.only:
        print(name, flush=True)
        TESTS[name](bench)
    seconds = time.perf_counter() - start
    text = f"# PRISM\n\n{machine(bench.device)}; {WIDE} -> {NARROW}, {SAMPLES} samples; {seconds:.0f} s\n"
    text += "".join(f"\n## {name}\n\n{table(rows)}\n" for name, rows in bench.rows.items())
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(bench.device), "seconds": seconds, "tables": bench.rows}
        (given.out / "prism.json").write_text(json.dumps(found, indent=1))
        (given.out / "prism.md").write_text(text)
        plot(bench, given.out)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
